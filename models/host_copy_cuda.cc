// HostCopy in a build with CUDA.
#include <ATen/ATen.h>
#include <ATen/cuda/CUDAEvent.h>
#include <c10/cuda/CUDACachingAllocator.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include <map>

#include "models/host_copy.h"

namespace routecast {
namespace {

// One for all copies of a thread's device: they are small, and end in their order.
c10::cuda::CUDAStream CopyStream(c10::DeviceIndex device) {
  thread_local std::map<c10::DeviceIndex, c10::cuda::CUDAStream> streams;
  const auto it = streams.find(device);
  if (it != streams.end()) return it->second;
  return streams
      .emplace(device, c10::cuda::getStreamFromPool(/*isHighPriority=*/true, device))
      .first->second;
}

}  // namespace

struct HostCopy::Flight {
  at::cuda::CUDAEvent arrived;
};

HostCopy::HostCopy(const at::Tensor& tensor) : host_(tensor.contiguous()) {
  if (!tensor.is_cuda()) return;
  const at::Tensor source = host_;
  const c10::cuda::CUDAGuard device(source.device());
  const c10::cuda::CUDAStream stream = CopyStream(source.device().index());
  at::cuda::CUDAEvent ready;
  ready.record(c10::cuda::getCurrentCUDAStream());
  ready.block(stream);
  const c10::cuda::CUDAStreamGuard on_stream(stream);
  host_ =
      at::empty(source.sizes(), source.options().device(at::kCPU).pinned_memory(true));
  host_.copy_(source, /*non_blocking=*/true);
  // The source's memory may be given to another tensor of its stream before the copy.
  c10::cuda::CUDACachingAllocator::recordStream(source.storage().data_ptr(), stream);
  flight_ = std::make_unique<Flight>();
  flight_->arrived.record(stream);
}
HostCopy::HostCopy() = default;
HostCopy::HostCopy(HostCopy&&) noexcept = default;
HostCopy& HostCopy::operator=(HostCopy&&) noexcept = default;
HostCopy::~HostCopy() = default;

const at::Tensor& HostCopy::Wait() {
  if (flight_) flight_->arrived.synchronize();
  flight_.reset();
  return host_;
}

}  // namespace routecast
