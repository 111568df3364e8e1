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

}  // namespace routecast
