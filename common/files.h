// Whole-file reads, and writes that are there completely or not at all.
// Thread rule: free functions, safe from any thread on different paths.
#pragma once

#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <string>
#include <string_view>

namespace routecast {

namespace fs = std::filesystem;

// Reads a whole regular file. Throws UsageError (missing, not a file), DataError (larger
// than max_bytes), EnvironmentError (I/O).
std::string ReadFile(const fs::path& path, uint64_t max_bytes = uint64_t{1} << 32);
// Temporary file in the same folder, write, fsync, rename, fsync of the folder. Mode
// 0644.
void WriteFileAtomic(const fs::path& path, std::string_view bytes);
// fsync of a file or folder.
void SyncPath(const fs::path& path);
// Creates the folder (and parents), durably; UsageError where a file is in the way.
void MakeFolder(const fs::path& path);
// Free bytes of the file system that holds `path` (or its nearest existing parent).
uint64_t FreeBytes(const fs::path& path);
// EnvironmentError with both numbers where fewer than `bytes` are free there.
void RequireFreeBytes(const fs::path& path, uint64_t bytes);

// A folder that appears under its final name only when Commit() ran: written beside it as
// NAME.tmp, synced, renamed. An earlier unfinished NAME.tmp is removed. An existing final
// folder is replaced. The destructor removes what was not committed.
class SealedFolder {
 public:
  // kNo: nothing is synced, for what need not outlive a power loss.
  enum class Durable { kYes, kNo };
  explicit SealedFolder(fs::path final_path);
  ~SealedFolder();
  SealedFolder(const SealedFolder&) = delete;
  SealedFolder& operator=(const SealedFolder&) = delete;
  const fs::path& path() const { return temporary_; }  // write here
  void Commit(Durable durable = Durable::kYes);

 private:
  fs::path final_, temporary_;
  bool committed_ = false;
};

// XXH3-64 of bytes; hex of 16 digits for files and fingerprints.
uint64_t Hash64(const void* data, size_t size, uint64_t seed = 0);
inline uint64_t Hash64(std::string_view s, uint64_t seed = 0) {
  return Hash64(s.data(), s.size(), seed);
}
std::string Hex64(uint64_t value);

// "6GiB", "512MiB", "1.5GB", "1000" -> bytes. UsageError otherwise.
uint64_t ParseBytes(const std::string& flag, const std::string& text);
std::string FormatBytes(uint64_t bytes);  // "1.50 GiB"

}  // namespace routecast
