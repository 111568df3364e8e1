// Tensors on their way to the CPU, and small ones back. From a GPU they travel into
// pinned memory on a stream of its own, so the forward thread waits only when somebody
// reads, and then for no more than what was queued before the copy.
#pragma once

#include <ATen/core/Tensor.h>

#include <memory>
#include <vector>

namespace routecast {

// Copies that are under way. Thread rule: one thread at a time. Each throws an
// EnvironmentError where the device reports that the copies failed.
class CopyFlight {
 public:
  virtual ~CopyFlight() = default;  // does not wait
  virtual bool Arrived() = 0;       // does not wait
  virtual void Wait() = 0;
  // Work queued on the current stream from now on waits for the copies; nobody else does.
  virtual void HoldStream() = 0;
};

// What copies: a GPU, or a fake in tests. Thread rule: one thread at a time.
class HostCopier {
 public:
  virtual ~HostCopier() = default;
  // False: the tensor can be read where it lies.
  virtual bool Copies(const at::Tensor& tensor) const = 0;
  // Memory to copy into, as bytes. EnvironmentError where there is none.
  virtual at::Tensor Pinned(int64_t bytes) = 0;
  // Starts copying what each of `from` (contiguous) holds after the work queued on the
  // current stream into its like in `to`, behind the copies started before. The memory
  // of `from` may be let go at once. REQUIRES one of them at least.
  virtual std::unique_ptr<CopyFlight> Start(const std::vector<at::Tensor>& from,
                                            const std::vector<at::Tensor>& to) = 0;
};

// CPU tensors stay where they are; a GPU's are copied.
HostCopier* DeviceCopier();

// One tensor. Thread rule: one thread at a time. Move-only.
class HostCopy {
 public:
  HostCopy() = default;
  // Starts copying what `tensor` holds after the work queued on the current stream. A CPU
  // tensor is not copied: later writes to it are seen.
  explicit HostCopy(const at::Tensor& tensor);
  bool defined() const { return host_.defined(); }
  // Contiguous, on the CPU; waits where it has not come. REQUIRES defined().
  const at::Tensor& Wait();

 private:
  at::Tensor host_;
  std::unique_ptr<CopyFlight> flight_;
};

// The other way, on the current stream and without a wait: `host` (on the CPU) may be
// changed or let go at once, and what is queued later finds its numbers in `to`, of the
// same shape and dtype. A CPU tensor is written at once.
void SendTo(const at::Tensor& to, const at::Tensor& host);

}  // namespace routecast
