#include "storage/shard_db.h"

#include <algorithm>
#include <array>
#include <chrono>
#include <cstdarg>
#include <cstdio>
#include <fstream>
#include <thread>

#include "common/open_files.h"
#include "rocksdb/cache.h"
#include "rocksdb/filter_policy.h"
#include "rocksdb/table.h"
#include "storage/file_checksum.h"
#include "storage/ingest_env.h"

namespace routecast {
namespace {

constexpr size_t kBlockBytes = 48 << 10;
constexpr size_t kCacheBytes = 64 << 20;
constexpr auto kLockPatience = std::chrono::seconds(15);  // mpirun reaps ranks within 2 s
constexpr std::array<const char*, 3> kFamilyNames = {"default", "hidden", "attention"};
constexpr int kFewTables = 20;  // RocksDB's least
constexpr int kReadAttempts = 100;
constexpr auto kLockRetry = std::chrono::milliseconds(100);

// RocksDB's own log says nothing that its statuses do not; and it aborts the process when
// it cannot append to it (full disk).
class NoLog : public rocksdb::Logger {
 public:
  using rocksdb::Logger::Logv;
  void Logv(const char*, va_list) override {}
};

// A database that its maker had no time to finish lacks column families.
bool IsMade(const rocksdb::Options& options, const fs::path& path,
            const std::vector<rocksdb::ColumnFamilyDescriptor>& families) {
  std::vector<std::string> names;
  const rocksdb::Status status = rocksdb::DB::ListColumnFamilies(options, path, &names);
  if (!status.ok()) return true;
  return std::all_of(families.begin(), families.end(), [&names](const auto& family) {
    return std::find(names.begin(), names.end(), family.name) != names.end();
  });
}

// Whether the shard was more than just made: it has a seal, or table files.
bool HadRecords(const fs::path& shard) {
  if (fs::exists(shard.string() + ".seal")) return true;
  std::error_code gone;
  for (const auto& entry : fs::directory_iterator(shard, gone)) {
    if (entry.path().extension() == ".sst") return true;
  }
  return false;
}

// How many of a shard's tables a reader keeps open. All, as opening one reads its index;
// only while enough are left for a look through the shards after it, which has all tables
// of a family that overlap open at once.
int TablesOfAReader(const fs::path& shard) {
  uint64_t tables = 0;
  std::error_code gone;
  for (fs::directory_iterator it(shard, gone), end; !gone && it != end;
       it.increment(gone)) {
    tables += it->path().extension() == ".sst";
  }
  return tables <= OpenFilesLeft() / 4 ? -1 : kFewTables;
}

// Changes with every step that a writer takes: which manifest is current, its size.
std::string Generation(const fs::path& shard) {
  std::error_code gone;
  std::ifstream in(shard / "CURRENT");
  std::string manifest;
  std::getline(in, manifest);
  return manifest + " " + std::to_string(fs::file_size(shard / manifest, gone));
}

// NotFound where the shard is not there or not made to its end. What fails because a
// writer beside this reader has just replaced files is tried again.
rocksdb::Status OpenToRead(const rocksdb::Options& options, const fs::path& shard,
                           const std::vector<rocksdb::ColumnFamilyDescriptor>& families,
                           std::vector<rocksdb::ColumnFamilyHandle*>* handles,
                           rocksdb::DB** db) {
  rocksdb::Status status;
  for (int attempt = 0; attempt < kReadAttempts; ++attempt) {
    const std::string before = Generation(shard);
    if (!fs::exists(shard / "CURRENT")) return rocksdb::Status::NotFound();
    status = rocksdb::DB::OpenForReadOnly(options, shard, families, handles, db);
    if (status.ok()) return status;
    if (status.IsInvalidArgument() && !IsMade(options, shard, families)) {
      return rocksdb::Status::NotFound();
    }
    if (Generation(shard) == before) break;  // nobody writes: it is what it is
  }
  return status;
}

// Somebody else has the database open, in this process or in another.
bool IsLocked(const rocksdb::Status& status) {
  const std::string text = status.ToString();
  return status.IsIOError() && (text.find("While lock file") != std::string::npos ||
                                text.find("lock hold by") != std::string::npos);
}

// The manifest names a table file that is not there.
bool LacksTable(const rocksdb::Status& status) {
  const std::string text = status.ToString();
  return !status.ok() && text.find("No such file") != std::string::npos &&
         (text.find(".ldb") != std::string::npos ||
          text.find(".sst") != std::string::npos);
}

// Beside the shard, as its seal is.
fs::path WentBackPath(const fs::path& shard) { return shard.string() + ".recovered"; }

std::shared_ptr<rocksdb::Cache> SharedCache() {
  static const std::shared_ptr<rocksdb::Cache> cache = rocksdb::NewLRUCache(kCacheBytes);
  return cache;
}

}  // namespace

std::vector<Family> FamiliesOf(const StoreConfig& config) {
  std::vector<Family> families = {Family::kRouting, Family::kHidden};
  if (config.Records("attention")) families.push_back(Family::kAttention);
  return families;
}

rocksdb::Options FamilyOptions(Family family, const StoreConfig& config) {
  rocksdb::Options options;
  rocksdb::BlockBasedTableOptions table;
  table.block_size = kBlockBytes;
  table.checksum = rocksdb::kXXH3;
  table.format_version = 5;
  table.filter_policy.reset(rocksdb::NewBloomFilterPolicy(10));
  table.whole_key_filtering = true;
  table.index_block_restart_interval = 16;  // keys differ in few bytes: share the rest
  table.block_cache = SharedCache();
  options.table_factory.reset(rocksdb::NewBlockBasedTableFactory(table));
  options.compression = family == Family::kRouting && config.ZstdBlocks()
                            ? rocksdb::kZSTD
                            : rocksdb::kNoCompression;
  options.compression_opts.level = 1;
  options.bottommost_compression = rocksdb::kDisableCompressionOption;
  // Files arrive whole; they are merged once, when the collection is complete.
  options.disable_auto_compactions = true;
  options.level0_slowdown_writes_trigger = 1 << 30;
  options.level0_stop_writes_trigger = 1 << 30;
  options.file_checksum_gen_factory = FileChecksums();
  options.info_log = std::make_shared<NoLog>();
  options.write_buffer_size = 1 << 20;  // memtables stay empty
  return options;
}

void CheckStatus(const rocksdb::Status& status, const std::string& operation,
                 const fs::path& path) {
  if (status.ok()) return;
  const std::string what = operation + " " + path.string() + " failed";
  if (LacksTable(status)) {
    throw DataError(
        ErrorText(what, status.ToString(),
                  "start the routecast-collect that wrote the store again: it "
                  "computes the lost chunks anew"));
  }
  if (status.IsCorruption() || status.IsNotFound()) {
    throw DataError(
        ErrorText(what, status.ToString(),
                  "run routecast-trace verify; collect into a new store if it fails"));
  }
  if (status.IsNoSpace()) {
    throw EnvironmentError(
        ErrorText(what, status.ToString(), "free space and start again"));
  }
  const bool files = status.ToString().find("Too many open files") != std::string::npos;
  throw EnvironmentError(
      ErrorText(what, status.ToString(),
                files ? "raise the limit of open files (ulimit -n), start again"
                      : "check the disk and who else uses the store, start again"));
}

fs::path ShardPath(const fs::path& store, int shard) {
  char name[16];
  std::snprintf(name, sizeof name, "%05d", shard);
  return store / "shards" / name;
}

ShardDb::ShardDb(const fs::path& store, int shard, const StoreConfig& config, Mode mode)
    : path_(ShardPath(store, shard)) {
  rocksdb::Options options = FamilyOptions(Family::kRouting, config);
  std::vector<rocksdb::ColumnFamilyDescriptor> families;
  for (const Family family : FamiliesOf(config)) {
    families.emplace_back(kFamilyNames[static_cast<size_t>(family)],
                          FamilyOptions(family, config));
  }
  rocksdb::DB* db = nullptr;
  // A writer adds tables, and goes through them when it is opened and at its end.
  options.max_open_files = mode == Mode::kRead ? TablesOfAReader(path_) : kFewTables;
  // Else there would be a table for each of 64 parts of RocksDB's cache of them.
  if (options.max_open_files == kFewTables) options.table_cache_numshardbits = 0;
  if (mode == Mode::kRead) {
    const rocksdb::Status status = OpenToRead(options, path_, families, &handles_, &db);
    if (status.IsNotFound()) {
      const std::string text =
          ErrorText(path_.string() + " is missing from the store",
                    "store.json names this shard", "restore it, or collect again");
      if (HadRecords(path_)) throw DataError(text);
      throw ShardMissing(text);
    }
    CheckStatus(status, "open shard", path_);
    db_.reset(db);
    return;
  }
  MakeFolder(path_);
  SyncPath(path_.parent_path());  // RocksDB would not; also after a death in between
  env_ = NewIngestEnv();
  options.env = env_.get();
  options.create_if_missing = true;
  options.create_missing_column_families = true;
  const auto start = std::chrono::steady_clock::now();
  rocksdb::Status status = rocksdb::DB::Open(options, path_, families, &handles_, &db);
  // Ranks of a killed job may live a moment longer; their kernel locks end with them.
  while (IsLocked(status) && std::chrono::steady_clock::now() - start < kLockPatience) {
    std::this_thread::sleep_for(kLockRetry);
    status = rocksdb::DB::Open(options, path_, families, &handles_, &db);
  }
  if (LacksTable(status)) {
    // When the disk fails while the manifest is synced, RocksDB removes the files that it
    // was taking in, and the manifest may name them all the same. Back to the last state
    // whose files are all there: chunks after it are not complete, and are made again.
    std::fprintf(stderr, "%s: a table file is missing; going back to before it\n",
                 path_.c_str());
    WriteFileAtomic(WentBackPath(path_), "");
    options.best_efforts_recovery = true;
    status = rocksdb::DB::Open(options, path_, families, &handles_, &db);
  }
  CheckStatus(status, "open shard", path_);
  db_.reset(db);
}

ShardDb::~ShardDb() {
  for (auto* handle : handles_) db_->DestroyColumnFamilyHandle(handle);
  if (db_) db_->Close().PermitUncheckedError();
}

bool ShardDb::WentBack() const { return fs::exists(WentBackPath(path_)); }

void ShardDb::ForgetWentBack() {
  std::error_code error;
  fs::remove(WentBackPath(path_), error);
  if (error) ThrowErrno(error.value(), "remove", WentBackPath(path_));
  SyncPath(path_.parent_path());
}

}  // namespace routecast
