#include "common/files.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <unistd.h>

#include <cerrno>
#include <cmath>
#include <cstdio>

#include "common/byte_file.h"
#include "common/errors.h"
#include "xxhash.h"

namespace routecast {
namespace {

struct Descriptor {
  int fd;
  ~Descriptor() {
    if (fd >= 0) ::close(fd);
  }
};

}  // namespace

std::string ReadFile(const fs::path& path, uint64_t max_bytes) {
  // Without O_NONBLOCK, opening a named pipe would wait for somebody to write.
  Descriptor file{::open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK)};
  if (file.fd < 0) ThrowErrno(errno, "open", path);
  struct stat info;
  if (::fstat(file.fd, &info) != 0) ThrowErrno(errno, "stat", path);
  if (!S_ISREG(info.st_mode)) {
    throw UsageError(
        ErrorText(path.string() + " is not a regular file", "", "check the path"));
  }
  const auto size = static_cast<uint64_t>(info.st_size);
  if (size > max_bytes) {
    throw DataError(
        ErrorText(path.string() + " is larger than this file may be",
                  std::to_string(size) + " bytes, limit " + std::to_string(max_bytes),
                  "is it the right file?"));
  }
  std::string bytes(size, '\0');
  size_t done = 0;
  while (done < bytes.size()) {
    const ssize_t n = ::read(file.fd, bytes.data() + done, bytes.size() - done);
    if (n < 0 && errno == EINTR) continue;
    if (n < 0) ThrowErrno(errno, "read", path);
    if (n == 0) break;
    done += static_cast<size_t>(n);
  }
  bytes.resize(done);
  return bytes;
}

void SyncPath(const fs::path& path) {
  Descriptor file{::open(path.c_str(), O_RDONLY | O_CLOEXEC)};
  if (file.fd < 0) ThrowErrno(errno, "open", path);
  if (::fsync(file.fd) != 0 && errno != EINVAL) ThrowErrno(errno, "fsync", path);
}

void WriteFileAtomic(const fs::path& path, std::string_view bytes) {
  AtomicFileWriter file(path, /*expected_bytes=*/0);
  file.Append(bytes.data(), bytes.size());
  file.Commit();
}

void MakeFolder(const fs::path& path) {
  std::error_code error;
  fs::path there = fs::absolute(path).lexically_normal();
  while (!fs::exists(there, error) && there.has_relative_path()) {
    there = there.parent_path();
  }
  fs::create_directories(path, error);
  if (error || !fs::is_directory(path, error)) {
    ThrowErrno(error ? error.value() : ENOTDIR, "create folder", path);
  }
  // What is written into it must not be lost with its name. From the outermost on.
  const fs::path below = fs::absolute(path).lexically_normal().lexically_relative(there);
  if (below.empty() || below == ".") return;
  for (const fs::path& part : below) {
    if (part.empty()) break;  // of a slash at the end
    SyncPath(there);
    there /= part;
  }
}

uint64_t FreeBytes(const fs::path& path) {
  fs::path existing = fs::absolute(path);
  std::error_code ignored;  // of what cannot be looked at: its parent is on the same disk
  while (!fs::exists(existing, ignored) && existing.has_relative_path()) {
    existing = existing.parent_path();
  }
  struct statvfs info;
  if (::statvfs(existing.c_str(), &info) != 0) ThrowErrno(errno, "statvfs", existing);
  return static_cast<uint64_t>(info.f_bavail) * info.f_frsize;
}

void RequireFreeBytes(const fs::path& path, uint64_t bytes) {
  const uint64_t free_bytes = FreeBytes(path);
  if (bytes <= free_bytes) return;
  throw EnvironmentError(ErrorText(
      "no room for " + path.string(),
      FormatBytes(bytes) + " are needed, " + FormatBytes(free_bytes) + " are free",
      "free some space or choose another folder"));
}

namespace {
// Without the slash at its end, which would put the temporary folder into the final one.
fs::path Named(const fs::path& path) {
  fs::path name = path.lexically_normal();
  if (!name.has_filename()) name = name.parent_path();
  if (!name.has_filename() || name.filename() == "." || name.filename() == "..") {
    throw UsageError(ErrorText(path.string() + " cannot be made as a whole",
                               "it is written beside itself and renamed",
                               "give a folder by its name"));
  }
  return name;
}
}  // namespace

SealedFolder::SealedFolder(fs::path final_path)
    : final_(Named(final_path)), temporary_(final_.string() + ".tmp") {
  std::error_code error;
  fs::remove_all(temporary_, error);
  if (error) ThrowErrno(error.value(), "remove", temporary_);
  if (final_.has_parent_path()) MakeFolder(final_.parent_path());
  fs::create_directory(temporary_, error);
  if (error) ThrowErrno(error.value(), "create folder", temporary_);
}

SealedFolder::~SealedFolder() {
  std::error_code ignored;
  if (!committed_) fs::remove_all(temporary_, ignored);
}

namespace {
void Rename(const fs::path& from, const fs::path& to) {
  if (::rename(from.c_str(), to.c_str()) != 0) ThrowErrno(errno, "rename", to);
}

// One step: something is under both names at every moment. False where the file system
// cannot do that (NFS, some FUSE ones).
bool Exchange(const fs::path& a, const fs::path& b) {
  if (::renameat2(AT_FDCWD, a.c_str(), AT_FDCWD, b.c_str(), RENAME_EXCHANGE) == 0) {
    return true;
  }
  if (errno != EINVAL && errno != ENOSYS && errno != EOPNOTSUPP) {
    ThrowErrno(errno, "rename", b);
  }
  return false;
}

void SyncAll(const fs::path& folder) {
  std::error_code error;
  fs::recursive_directory_iterator entry(folder, error), end;
  for (; !error && entry != end; entry.increment(error)) SyncPath(entry->path());
  if (error) ThrowErrno(error.value(), "list", folder);
  SyncPath(folder);
}
}  // namespace

void SealedFolder::Commit(Durable durable) {
  if (durable == Durable::kYes) SyncAll(temporary_);
  std::error_code error;
  fs::path old = final_.string() + ".old.tmp";
  fs::remove_all(old, error);
  if (error) ThrowErrno(error.value(), "remove", old);
  if (!fs::exists(final_, error)) {
    Rename(temporary_, final_);
  } else if (Exchange(temporary_, final_)) {
    old = temporary_;
  } else {
    Rename(final_, old);
    Rename(temporary_, final_);
  }
  committed_ = true;
  if (durable == Durable::kYes) SyncPath(fs::absolute(final_).parent_path());
  fs::remove_all(old, error);
}

uint64_t Hash64(const void* data, size_t size, uint64_t seed) {
  return XXH3_64bits_withSeed(data, size, seed);
}

std::string Hex64(uint64_t value) {
  char text[17];
  std::snprintf(text, sizeof text, "%016llx", static_cast<unsigned long long>(value));
  return text;
}

uint64_t ParseBytes(const std::string& flag, const std::string& text) {
  size_t used = 0;
  double number = -1;
  try {
    number = std::stod(text, &used);
  } catch (const std::exception&) {
  }
  const std::string unit = text.substr(used);
  double scale = 0;
  if (unit.empty() || unit == "B") scale = 1;
  if (unit == "KiB") scale = 1024;
  if (unit == "MiB") scale = 1024.0 * 1024;
  if (unit == "GiB") scale = 1024.0 * 1024 * 1024;
  if (unit == "KB") scale = 1e3;
  if (unit == "MB") scale = 1e6;
  if (unit == "GB") scale = 1e9;
  if (!(number >= 0) || scale == 0 || !std::isfinite(number) || number * scale > 1e18) {
    throw UsageError(
        ErrorText(flag + "=" + text + " is not a size", "",
                  "write a number with B, KiB, MiB, GiB, KB, MB or GB: 512MiB"));
  }
  return static_cast<uint64_t>(number * scale);
}

std::string FormatBytes(uint64_t bytes) {
  const char* units[] = {"B", "KiB", "MiB", "GiB", "TiB"};
  double value = static_cast<double>(bytes);
  int unit = 0;
  while (value >= 1024 && unit < 4) {
    value /= 1024;
    ++unit;
  }
  char text[32];
  std::snprintf(text, sizeof text, unit == 0 ? "%.0f %s" : "%.2f %s", value, units[unit]);
  return text;
}

}  // namespace routecast
