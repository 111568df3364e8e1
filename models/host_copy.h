// A tensor on its way to the CPU. From a GPU it travels into pinned memory on a stream of
// its own, so the forward thread waits only when somebody reads, and then for no more
// than what was queued before the copy.
#pragma once

#include <ATen/core/Tensor.h>

#include <memory>

namespace routecast {

// Thread rule: one thread at a time. Move-only.
class HostCopy {
 public:
  HostCopy();
  // Starts copying what `tensor` holds after the work queued on the current stream. A CPU
  // tensor is not copied: later writes to it are seen.
  explicit HostCopy(const at::Tensor& tensor);
  HostCopy(HostCopy&&) noexcept;
  HostCopy& operator=(HostCopy&&) noexcept;
  ~HostCopy();
  bool defined() const { return host_.defined(); }
  // Contiguous, on the CPU; waits where it has not come. REQUIRES defined().
  const at::Tensor& Wait();

 private:
  struct Flight;  // what is known of a copy under way
  at::Tensor host_;
  std::unique_ptr<Flight> flight_;
};

}  // namespace routecast
