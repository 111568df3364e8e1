#include "corpus/mapped_file.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>

#include "common/errors.h"

namespace routecast {

MappedFile::MappedFile(const fs::path& path) {
  // Without O_NONBLOCK, opening a named pipe would wait for somebody to write.
  const int fd = ::open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK);
  if (fd < 0) ThrowErrno(errno, "open", path);
  struct stat info;
  const bool regular = ::fstat(fd, &info) == 0 && S_ISREG(info.st_mode);
  void* data = nullptr;
  if (regular && info.st_size > 0) {
    size_ = static_cast<size_t>(info.st_size);
    data = ::mmap(nullptr, size_, PROT_READ, MAP_PRIVATE, fd, 0);
  }
  const int error = errno;
  ::close(fd);
  if (!regular) {
    throw UsageError(ErrorText(path.string() + " is not a regular file", "",
                               "give a file, not a folder, pipe or device"));
  }
  if (data == MAP_FAILED) ThrowErrno(error, "map", path);
  data_ = data;
}

MappedFile::~MappedFile() {
  if (data_) ::munmap(data_, size_);
}

}  // namespace routecast
