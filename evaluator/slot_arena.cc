#include "evaluator/slot_arena.h"

#include <sys/mman.h>

#include <cerrno>
#include <cstring>

#include "common/errors.h"
#include "common/files.h"

namespace routecast {

uint64_t SlotArena::SlotBytes(int num_slots, uint64_t slot_bytes) {
  return (slot_bytes + 4095) / 4096 * 4096 * static_cast<uint64_t>(num_slots);
}

SlotArena::SlotArena(std::byte* memory, int num_slots, uint64_t slot_bytes)
    : base_(memory),
      stride_(SlotBytes(1, slot_bytes)),
      size_(SlotBytes(num_slots, slot_bytes)),
      owned_(false) {}

SlotArena::SlotArena(int num_slots, uint64_t slot_bytes)
    : stride_(SlotBytes(1, slot_bytes)), size_(SlotBytes(num_slots, slot_bytes)) {
  void* memory =
      ::mmap(nullptr, size_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (memory == MAP_FAILED) {
    throw EnvironmentError(ErrorText("no memory for the experts' slots",
                                     FormatBytes(size_) + ": " + std::strerror(errno),
                                     "choose a smaller --expert_budget"));
  }
  base_ = static_cast<std::byte*>(memory);
  // Large pages spare the address translation of long weight rows; refusal costs nothing.
  ::madvise(memory, size_, MADV_HUGEPAGE);
  locked_ = ::mlock(memory, size_) == 0;
  if (!locked_) std::memset(memory, 0, size_);  // at least no page faults inside a step
}

void SlotArena::Discard(int slot) {
  if (!owned_) return;
  ::munlock(this->slot(slot), stride_);
  ::madvise(this->slot(slot), stride_, MADV_DONTNEED);
}

void SlotArena::Reclaim(int slot) {
  if (!locked_ || ::mlock(this->slot(slot), stride_) == 0) return;
  throw EnvironmentError(ErrorText("a slot's memory cannot be locked again",
                                   FormatBytes(stride_) + ": " + std::strerror(errno),
                                   "free memory, or choose a smaller --expert_budget"));
}

SlotArena::~SlotArena() {
  if (owned_) ::munmap(base_, size_);
}

}  // namespace routecast
