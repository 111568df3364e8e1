// How this house opens RocksDB, and what its statuses mean to us. Internal to storage/.
// Thread rule: ShardDb may be read from any thread; ingest and compaction from one.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "common/errors.h"
#include "common/files.h"
#include "rocksdb/db.h"
#include "rocksdb/options.h"
#include "storage/store_config.h"

namespace routecast {

// Column families. The attention's is there in stores that record it (FamiliesOf).
enum class Family { kRouting = 0, kHidden = 1, kAttention = 2 };
std::vector<Family> FamiliesOf(const StoreConfig& config);

// Options of a column family: files and blocks are the same whoever writes them.
// Blocks of the routing family are compressed where the store's compression ends in
// "zstd"; the others' never are.
rocksdb::Options FamilyOptions(Family family, const StoreConfig& config);

// Throws the error that `status` is: DataError (corruption), EnvironmentError (disk,
// lock), UsageError (missing). Does nothing when ok.
void CheckStatus(const rocksdb::Status& status, const std::string& operation,
                 const fs::path& path);

fs::path ShardPath(const fs::path& store, int shard);

// Thrown where a shard to be read is not there (yet): its first owner makes it before any
// chunk gets into any shard. One that had records and is gone is a DataError.
struct ShardMissing : DataError {
  using DataError::DataError;
};

// One open shard database with the column families that its store has.
class ShardDb {
 public:
  enum class Mode { kRead, kWrite };
  // kWrite creates what is missing, and waits up to 15 s for the lock of a job that is
  // dying. Where table files are missing each family goes back to the last state that has
  // all of its files (WentBack). kRead throws ShardMissing.
  ShardDb(const fs::path& store, int shard, const StoreConfig& config, Mode mode);
  ~ShardDb();
  ShardDb(const ShardDb&) = delete;
  ShardDb& operator=(const ShardDb&) = delete;

  rocksdb::DB* db() const { return db_.get(); }
  // REQUIRES one of FamiliesOf the store.
  rocksdb::ColumnFamilyHandle* family(Family f) const {
    return handles_.at(static_cast<size_t>(f));
  }
  const fs::path& path() const { return path_; }
  // Whether it went back, now or in an earlier job, and nobody has looked yet whether the
  // families still fit together (RemoveMarksOfLostChunks). Durable.
  bool WentBack() const;
  void ForgetWentBack();

 private:
  fs::path path_;
  std::unique_ptr<rocksdb::Env> env_;  // of kWrite; outlives db_
  std::unique_ptr<rocksdb::DB> db_;
  std::vector<rocksdb::ColumnFamilyHandle*> handles_;
};

}  // namespace routecast
