// What the engine of a device tier needs of a device, and nothing else: one slab of
// memory, pinned host memory, copies on a stream of their own, events, a clock. A body
// for CUDA (device_copy_cuda.cc); in tests a fake device under a virtual clock.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>

#include "evaluator/expert_file.h"

namespace routecast {

// Thread rule: one thread at a time. What the device refuses is an EnvironmentError that
// names the call and the device's own words.
class DeviceCopy {
 public:
  using Ticket = uint64_t;
  virtual ~DeviceCopy() = default;  // frees the slabs, unpins
  // Device memory, valid as long as this object. EnvironmentError with what is free.
  virtual std::byte* Allocate(uint64_t bytes) = 0;
  // Before its end. REQUIRES memory of Allocate, and nothing under way to or from it.
  virtual void Free(std::byte* slab) = 0;
  // Pins a whole mapping, once. It must outlive this object's copies.
  virtual void Register(std::byte* host, uint64_t bytes) = 0;
  virtual uint64_t FreeBytes() const = 0;    // that Allocate could have now, about
  virtual uint64_t MemoryBytes() const = 0;  // of the device, used or not
  // Before the mapping goes. REQUIRES no copy from it under way.
  virtual void Unregister(std::byte* host) = 0;
  // Copies enqueued from now on wait for the work that the model gave the device so far:
  // a slot may still be read by a layer that runs late.
  virtual void FenceAfterCompute() = 0;
  // Enqueues behind the copies of `stream` (0 or 1) and returns at once. Pageable memory
  // is allowed, and slow.
  virtual Ticket CopyAsync(std::byte* device, const std::byte* host, uint64_t bytes,
                           int stream) = 0;
  // The same from the device to host memory.
  virtual Ticket CopyBackAsync(std::byte* host, const std::byte* device, uint64_t bytes,
                               int stream) = 0;
  // The same from one place of the device to another.
  virtual Ticket CopyWithinAsync(std::byte* to, const std::byte* from, uint64_t bytes,
                                 int stream) = 0;
  // Managed memory, aligned to 4 KiB, valid as long as this object: it lies in host
  // memory, which writes it, and may have copies on the device, which are read.
  // EnvironmentError where the device cannot.
  virtual std::byte* AllocateManaged(uint64_t bytes) = 0;
  // Enqueues as CopyAsync: a part of managed memory is on the device as well from then
  // on, under the same address. REQUIRES whole pages of 4 KiB, and nobody writes it.
  virtual Ticket PrefetchAsync(const std::byte* managed, uint64_t bytes, int stream) = 0;
  // It is not, at once; who still reads it reads host memory.
  virtual void DropPrefetched(const std::byte* managed, uint64_t bytes) = 0;
  // DecodeExpert (expert_copies.h) from one place of the device to another, after the
  // work that the model gave the device so far. Returns when it is over.
  virtual void Decode(const ExpertFileSpec& spec, const std::byte* blob,
                      std::byte* expert) = 0;
  // True once the copy is over.
  virtual bool IsOver(Ticket ticket) = 0;
  virtual double Now() const = 0;  // seconds
  // Lets others run for about `seconds`; a fake's clock moves on.
  virtual void Pause(double seconds) = 0;
  virtual std::string description() const = 0;
};

// CUDA device `index`. EnvironmentError: no such device, or a build without CUDA.
std::unique_ptr<DeviceCopy> OpenCudaDevice(int index);

}  // namespace routecast
