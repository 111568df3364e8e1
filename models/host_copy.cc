#include "models/host_copy.h"

#include <ATen/ATen.h>

namespace routecast {

HostCopy::HostCopy(const at::Tensor& tensor) : host_(tensor.contiguous()) {
  HostCopier* copier = DeviceCopier();
  if (!copier->Copies(host_)) return;
  const at::Tensor from = host_;
  host_ = copier->Pinned(static_cast<int64_t>(from.nbytes()))
              .view(from.scalar_type())
              .view(from.sizes());
  flight_ = copier->Start({from}, {host_});
}

const at::Tensor& HostCopy::Wait() {
  if (flight_) flight_->Wait();
  flight_.reset();
  return host_;
}

void SendTo(const at::Tensor& to, const at::Tensor& host) {
  at::Tensor from = host.contiguous();
  if (to.is_cuda()) {
    // Memory of its own: the allocator gives it away again once the copy is over.
    from = DeviceCopier()
               ->Pinned(static_cast<int64_t>(host.nbytes()))
               .view(host.scalar_type())
               .view(host.sizes());
    from.copy_(host);
  }
  to.copy_(from, /*non_blocking=*/true);
}

}  // namespace routecast
