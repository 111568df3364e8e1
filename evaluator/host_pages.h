// Page-aligned memory that is there: no page fault comes later. Torch-free. Thread rule:
// the memory is the user's.
#pragma once

#include <sys/mman.h>

#include <cstddef>
#include <cstdint>

#include "common/errors.h"
#include "common/files.h"

namespace routecast {

class HostPages {
 public:
  // EnvironmentError where the system has none.
  explicit HostPages(uint64_t bytes) : bytes_(bytes) {
    memory_ = ::mmap(nullptr, bytes, PROT_READ | PROT_WRITE,
                     MAP_PRIVATE | MAP_ANONYMOUS | MAP_POPULATE, -1, 0);
    if (memory_ == MAP_FAILED) {
      throw EnvironmentError(ErrorText("no memory for a transfer of this size",
                                       FormatBytes(bytes) + " wanted", "free some"));
    }
  }
  ~HostPages() { ::munmap(memory_, bytes_); }
  HostPages(const HostPages&) = delete;
  HostPages& operator=(const HostPages&) = delete;
  std::byte* data() const { return static_cast<std::byte*>(memory_); }
  uint64_t bytes() const { return bytes_; }

 private:
  void* memory_;
  uint64_t bytes_;
};

}  // namespace routecast
