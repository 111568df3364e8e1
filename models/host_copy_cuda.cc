#include <ATen/ATen.h>
#include <ATen/cuda/CUDAEvent.h>
#include <c10/cuda/CUDACachingAllocator.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include <map>
#include <utility>

#include "common/errors.h"
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

// What the device refuses, as an error of ours.
template <typename Call>
auto Named(const char* what, const char* advice, const Call& call) {
  try {
    return call();
  } catch (const c10::Error& e) {
    const std::string text = e.what_without_backtrace();
    throw EnvironmentError(ErrorText(what, text.substr(0, text.find('\n')), advice));
  }
}

template <typename Call>
auto NamedCopy(const Call& call) {
  return Named("a copy from the CUDA device to the host failed",
               "nvidia-smi says what the device is doing; start the same command again",
               call);
}

class CudaFlight final : public CopyFlight {
 public:
  explicit CudaFlight(c10::cuda::CUDAStream stream) { arrived_.record(stream); }
  bool Arrived() override {
    return NamedCopy([this] { return arrived_.query(); });
  }
  void Wait() override {
    NamedCopy([this] { arrived_.synchronize(); });
  }
  void HoldStream() override {
    NamedCopy([this] {
      arrived_.block(c10::cuda::getCurrentCUDAStream(arrived_.device_index()));
    });
  }

 private:
  at::cuda::CUDAEvent arrived_;
};

class CudaCopier final : public HostCopier {
 public:
  bool Copies(const at::Tensor& tensor) const override { return tensor.is_cuda(); }

  at::Tensor Pinned(int64_t bytes) override {
    return Named("no pinned host memory for copies from the CUDA device",
                 "use a smaller batch, or fewer ranks on this host", [&] {
                   return at::empty({bytes},
                                    at::TensorOptions(at::kByte).pinned_memory(true));
                 });
  }

  std::unique_ptr<CopyFlight> Start(const std::vector<at::Tensor>& from,
                                    const std::vector<at::Tensor>& to) override {
    return NamedCopy([&]() -> std::unique_ptr<CopyFlight> {
      const c10::cuda::CUDAGuard device(from.front().device());
      const c10::cuda::CUDAStream stream = CopyStream(from.front().device().index());
      at::cuda::CUDAEvent ready;
      ready.record(c10::cuda::getCurrentCUDAStream());
      ready.block(stream);
      const c10::cuda::CUDAStreamGuard on_stream(stream);
      for (size_t i = 0; i < from.size(); ++i) {
        at::Tensor host = to[i];
        host.copy_(from[i], /*non_blocking=*/true);
        // The source's memory may be given to another tensor of its stream before the
        // copy.
        c10::cuda::CUDACachingAllocator::recordStream(from[i].storage().data_ptr(),
                                                      stream);
      }
      return std::make_unique<CudaFlight>(stream);
    });
  }
};

}  // namespace

HostCopier* DeviceCopier() {
  static CudaCopier copier;
  return &copier;
}

}  // namespace routecast
