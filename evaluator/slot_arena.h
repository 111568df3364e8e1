// The experts' fast memory: one mapping of equal, page-aligned slots, locked where
// allowed. Thread rule: the memory is the user's; the object is immutable but for Discard
// and Reclaim, which any thread may call for a slot that nobody reads or writes.
#pragma once

#include <cstddef>
#include <cstdint>

namespace routecast {

// Memory of equal slots: host memory here, or a device's (expert_tiers.h).
class SlotMemory {
 public:
  virtual ~SlotMemory() = default;
  virtual std::byte* slot(int slot) const = 0;
  // Gives the slot's memory back to the system; what it held is lost. Memory that is one
  // piece keeps it.
  virtual void Discard(int) {}
  // Takes the memory again before the first byte arrives. Throws EnvironmentError when it
  // is not to be had.
  virtual void Reclaim(int) {}
};

class SlotArena : public SlotMemory {
 public:
  // Rounds slot_bytes up to 4 KiB. Throws EnvironmentError when the memory is not to be
  // had.
  SlotArena(int num_slots, uint64_t slot_bytes);
  // Over somebody's memory of SlotBytes(num_slots, slot_bytes), which outlives it.
  SlotArena(std::byte* memory, int num_slots, uint64_t slot_bytes);
  static uint64_t SlotBytes(int num_slots, uint64_t slot_bytes);
  ~SlotArena() override;
  SlotArena(const SlotArena&) = delete;
  SlotArena& operator=(const SlotArena&) = delete;
  std::byte* slot(int slot) const override {
    return base_ + static_cast<uint64_t>(slot) * stride_;
  }
  std::byte* base() const { return base_; }
  uint64_t stride_bytes() const { return stride_; }
  uint64_t size_bytes() const { return size_; }
  void Discard(int slot) override;
  void Reclaim(int slot) override;         // locked where it was
  bool locked() const { return locked_; }  // false: RLIMIT_MEMLOCK is too small

 private:
  std::byte* base_ = nullptr;
  uint64_t stride_ = 0, size_ = 0;
  bool owned_ = true, locked_ = false;
};

}  // namespace routecast
