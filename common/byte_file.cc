#include "common/byte_file.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <memory>

#include "common/errors.h"
#include "common/temporary_file.h"
#include "xxhash.h"

namespace routecast {
namespace {

constexpr size_t kBufferBytes = size_t{1} << 20;

}  // namespace

ByteFile::ByteFile(const fs::path& path) : path_(path) {
  // Without O_NONBLOCK, opening a named pipe would wait for somebody to write.
  fd_ = ::open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK);
  if (fd_ < 0) ThrowErrno(errno, "open", path);
  struct stat info;
  if (::fstat(fd_, &info) != 0 || !S_ISREG(info.st_mode)) {
    ::close(fd_);
    throw UsageError(
        ErrorText(path.string() + " is not a regular file", "", "check the path"));
  }
  size_ = static_cast<uint64_t>(info.st_size);
}

ByteFile::~ByteFile() { ::close(fd_); }

void ByteFile::Read(uint64_t offset, void* to, size_t count) const {
  size_t done = 0;
  while (done < count) {
    const ssize_t n = ::pread(fd_, static_cast<char*>(to) + done, count - done,
                              static_cast<off_t>(offset + done));
    if (n < 0 && errno == EINTR) continue;
    if (n < 0) ThrowErrno(errno, "read", path_);
    if (n == 0) {
      throw DataError(ErrorText(path_.string() + " ended while it was read",
                                "wanted " + std::to_string(count) + " bytes at " +
                                    std::to_string(offset) + ", got " +
                                    std::to_string(done),
                                "fetch or write the file again"));
    }
    done += static_cast<size_t>(n);
  }
}

std::string ByteFile::Read(uint64_t offset, size_t count) const {
  // Checked first: `count` may come from the file itself.
  if (offset > size_ || count > size_ - offset) {
    throw DataError(ErrorText(path_.string() + " is shorter than it says",
                              std::to_string(count) + " bytes at " +
                                  std::to_string(offset) + ", the file has " +
                                  std::to_string(size_),
                              "fetch or write the file again"));
  }
  std::string bytes(count, '\0');
  Read(offset, bytes.data(), count);
  return bytes;
}

uint64_t HashFile(const fs::path& path, uint64_t seed,
                  const std::function<void()>& on_block) {
  const ByteFile file(path);
  const std::unique_ptr<XXH3_state_t, XXH_errorcode (*)(XXH3_state_t*)> state(
      XXH3_createState(), XXH3_freeState);
  XXH3_64bits_reset_withSeed(state.get(), seed);
  std::string buffer(std::min<uint64_t>(kBufferBytes, file.size()), '\0');
  for (uint64_t at = 0; at < file.size();) {
    const size_t count = std::min<uint64_t>(buffer.size(), file.size() - at);
    file.Read(at, buffer.data(), count);
    XXH3_64bits_update(state.get(), buffer.data(), count);
    at += count;
    if (on_block) on_block();
  }
  return XXH3_64bits_digest(state.get());
}

AtomicFileWriter::AtomicFileWriter(const fs::path& path, uint64_t expected_bytes)
    : path_(path) {
  if (expected_bytes > 0) RequireFreeBytes(path, expected_bytes);
  fd_ = OpenTemporary(path, &temporary_);
}

AtomicFileWriter::~AtomicFileWriter() {
  if (fd_ < 0) return;
  ::unlink(temporary_.c_str());
  ::close(fd_);
}

void AtomicFileWriter::Append(const void* data, size_t count) {
  size_t done = 0;
  while (done < count) {
    const ssize_t n = ::write(fd_, static_cast<const char*>(data) + done, count - done);
    if (n < 0 && errno == EINTR) continue;
    if (n < 0) ThrowErrno(errno, "write", temporary_);
    done += static_cast<size_t>(n);
  }
  written_ += count;
}

void AtomicFileWriter::Commit() {
  if (::fsync(fd_) != 0) ThrowErrno(errno, "fsync", temporary_);
  if (::rename(temporary_.c_str(), path_.c_str()) != 0) {
    ThrowErrno(errno, "rename", path_);
  }
  ::close(fd_);
  fd_ = -1;
  SyncPath(path_.has_parent_path() ? path_.parent_path() : fs::path("."));
}

}  // namespace routecast
