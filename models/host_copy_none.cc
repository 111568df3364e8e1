// HostCopy in a build without CUDA: every tensor is there already.
#include <ATen/ATen.h>

#include "models/host_copy.h"

namespace routecast {

struct HostCopy::Flight {};

HostCopy::HostCopy(const at::Tensor& tensor) : host_(tensor.contiguous()) {}
HostCopy::HostCopy() = default;
HostCopy::HostCopy(HostCopy&&) noexcept = default;
HostCopy& HostCopy::operator=(HostCopy&&) noexcept = default;
HostCopy::~HostCopy() = default;

const at::Tensor& HostCopy::Wait() { return host_; }

}  // namespace routecast
