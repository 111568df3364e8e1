#include "storage/ingest_env.h"

#include <map>
#include <mutex>
#include <string>
#include <utility>

#include "rocksdb/file_system.h"

namespace routecast {
namespace {

// The first failed read of each file.
class FailedReads {
 public:
  void Note(const std::string& path, const rocksdb::IOStatus& status) {
    if (status.ok()) return;
    const std::lock_guard lock(mutex_);
    statuses_.emplace(path, status);
  }
  rocksdb::IOStatus Of(const std::string& path) const {
    const std::lock_guard lock(mutex_);
    const auto found = statuses_.find(path);
    return found == statuses_.end() ? rocksdb::IOStatus::OK() : found->second;
  }

 private:
  mutable std::mutex mutex_;
  std::map<std::string, rocksdb::IOStatus> statuses_;
};

class NotedFile : public rocksdb::FSRandomAccessFileOwnerWrapper {
 public:
  NotedFile(std::unique_ptr<rocksdb::FSRandomAccessFile>&& file, std::string path,
            std::shared_ptr<FailedReads> failed)
      : FSRandomAccessFileOwnerWrapper(std::move(file)),
        path_(std::move(path)),
        failed_(std::move(failed)) {}
  rocksdb::IOStatus Read(uint64_t offset, size_t n, const rocksdb::IOOptions& options,
                         rocksdb::Slice* result, char* scratch,
                         rocksdb::IODebugContext* debug) const override {
    const rocksdb::IOStatus status =
        target()->Read(offset, n, options, result, scratch, debug);
    failed_->Note(path_, status);
    return status;
  }
  rocksdb::IOStatus MultiRead(rocksdb::FSReadRequest* requests, size_t count,
                              const rocksdb::IOOptions& options,
                              rocksdb::IODebugContext* debug) override {
    const rocksdb::IOStatus status = target()->MultiRead(requests, count, options, debug);
    failed_->Note(path_, status);
    for (size_t i = 0; i < count; ++i) failed_->Note(path_, requests[i].status);
    return status;
  }

 private:
  const std::string path_;
  const std::shared_ptr<FailedReads> failed_;
};

class IngestFileSystem : public rocksdb::FileSystemWrapper {
 public:
  IngestFileSystem() : FileSystemWrapper(rocksdb::FileSystem::Default()) {}
  const char* Name() const override { return "RoutecastIngestFileSystem"; }
  rocksdb::IOStatus NewRandomAccessFile(
      const std::string& path, const rocksdb::FileOptions& options,
      std::unique_ptr<rocksdb::FSRandomAccessFile>* file,
      rocksdb::IODebugContext* debug) override {
    const rocksdb::IOStatus status =
        target()->NewRandomAccessFile(path, options, file, debug);
    if (status.ok()) {
      *file = std::make_unique<NotedFile>(std::move(*file), path, failed_);
    }
    return status;
  }
  rocksdb::IOStatus LinkFile(const std::string& from, const std::string& to,
                             const rocksdb::IOOptions& options,
                             rocksdb::IODebugContext* debug) override {
    const rocksdb::IOStatus read = failed_->Of(from);
    return read.ok() ? target()->LinkFile(from, to, options, debug) : read;
  }

 private:
  const std::shared_ptr<FailedReads> failed_ = std::make_shared<FailedReads>();
};

}  // namespace

std::unique_ptr<rocksdb::Env> NewIngestEnv() {
  return rocksdb::NewCompositeEnv(std::make_shared<IngestFileSystem>());
}

}  // namespace routecast
