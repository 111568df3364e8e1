#include <cuda_runtime_api.h>

#include <chrono>
#include <map>
#include <thread>
#include <vector>

#include "common/errors.h"
#include "common/files.h"
#include "evaluator/device_copy.h"
#include "evaluator/expert_codec_cuda.h"

namespace routecast {
namespace {

constexpr uint64_t kPage = 4096;
constexpr double kPollSeconds = 5e-6, kDecodeDeadline = 30, kGraceSeconds = 1;

void Check(cudaError_t error, const char* call) {
  if (error == cudaSuccess) return;
  cudaGetLastError();  // else this thread's next launch finds it as its own
  throw EnvironmentError(
      ErrorText(std::string(call) + " failed on the CUDA device",
                std::string(cudaGetErrorName(error)) + ": " + cudaGetErrorString(error),
                "nvidia-smi says what the device is doing"));
}

// Advice and prefetches name places in two ways.
#if CUDART_VERSION >= 13000
using Place = cudaMemLocation;
const Place kHost = {cudaMemLocationTypeHost, 0};
Place DeviceOf(int index) { return {cudaMemLocationTypeDevice, index}; }
cudaError_t Prefetch(const void* memory, uint64_t bytes, Place to, cudaStream_t stream) {
  return cudaMemPrefetchAsync(memory, bytes, to, 0, stream);
}
#else
using Place = int;
const Place kHost = cudaCpuDeviceId;
Place DeviceOf(int index) { return index; }
cudaError_t Prefetch(const void* memory, uint64_t bytes, Place to, cudaStream_t stream) {
  return cudaMemPrefetchAsync(memory, bytes, to, stream);
}
#endif

class CudaCopy final : public DeviceCopy {
 public:
  explicit CudaCopy(int index) : index_(index) {
    Check(cudaSetDevice(index_), "cudaSetDevice");
    for (cudaStream_t& stream : streams_) {
      // Non-blocking: the model's stream does not wait for copies, nor they for it.
      Check(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking),
            "cudaStreamCreate");
    }
    Check(cudaEventCreateWithFlags(&fence_, cudaEventDisableTiming), "cudaEventCreate");
  }
  ~CudaCopy() override {
    // Errors here have nobody to go to, and the process is about to end.
    cudaSetDevice(index_);
    // Freeing waits for the device: behind a copy that never completes, for ever, and the
    // error that says so would not be seen.
    if (Hangs()) return;
    for (cudaStream_t stream : streams_) cudaStreamDestroy(stream);
    for (auto& [ticket, event] : events_) cudaEventDestroy(event);
    for (cudaEvent_t event : spare_) cudaEventDestroy(event);
    cudaEventDestroy(fence_);
    for (std::byte* slab : slabs_) cudaFree(slab);
    for (std::byte* host : registered_) cudaHostUnregister(host);
    cudaGetLastError();
  }

  std::byte* Allocate(uint64_t bytes) override {
    Check(cudaSetDevice(index_), "cudaSetDevice");
    void* slab = nullptr;
    if (cudaMalloc(&slab, bytes) != cudaSuccess) {
      cudaGetLastError();  // said below; later calls must not find it again
      const MemoryInfo memory = Memory();
      throw EnvironmentError(
          ErrorText("no room for the experts' slots on the CUDA device",
                    FormatBytes(bytes) + " wanted, " + FormatBytes(memory.free) + " of " +
                        FormatBytes(memory.whole) + " free",
                    "use a smaller --expert_budget or gpu tier"));
    }
    slabs_.push_back(static_cast<std::byte*>(slab));
    return slabs_.back();
  }

  void Free(std::byte* slab) override {
    Check(cudaSetDevice(index_), "cudaSetDevice");
    Check(cudaFree(slab), "cudaFree");
    std::erase(slabs_, slab);
  }

  uint64_t FreeBytes() const override { return Memory().free; }
  uint64_t MemoryBytes() const override { return Memory().whole; }

  void Register(std::byte* host, uint64_t bytes) override {
    Check(cudaSetDevice(index_), "cudaSetDevice");
    const cudaError_t error = cudaHostRegister(host, bytes, cudaHostRegisterDefault);
    if (error != cudaSuccess) {
      cudaGetLastError();  // said here; later calls must not find it again
      throw EnvironmentError(ErrorText(
          "host memory cannot be pinned for the CUDA device",
          FormatBytes(bytes) + ": " + cudaGetErrorString(error),
          "use a smaller host tier (--tier=gpu:SIZE,host:SIZE,disk), or free memory"));
    }
    registered_.push_back(host);
  }
  void Unregister(std::byte* host) override {
    Check(cudaHostUnregister(host), "cudaHostUnregister");
    std::erase(registered_, host);
  }

  void FenceAfterCompute() override {
    Check(cudaSetDevice(index_), "cudaSetDevice");  // a thread's first call
    // The model's stream is the legacy default one, as LibTorch has it.
    Check(cudaEventRecord(fence_, cudaStreamLegacy), "cudaEventRecord");
    for (cudaStream_t stream : streams_)
      Check(cudaStreamWaitEvent(stream, fence_, 0), "cudaStreamWaitEvent");
  }

  Ticket CopyAsync(std::byte* device, const std::byte* host, uint64_t bytes,
                   int stream) override {
    return Enqueue(device, host, bytes, cudaMemcpyHostToDevice, stream);
  }
  Ticket CopyBackAsync(std::byte* host, const std::byte* device, uint64_t bytes,
                       int stream) override {
    return Enqueue(host, device, bytes, cudaMemcpyDeviceToHost, stream);
  }
  Ticket CopyWithinAsync(std::byte* to, const std::byte* from, uint64_t bytes,
                         int stream) override {
    return Enqueue(to, from, bytes, cudaMemcpyDeviceToDevice, stream);
  }

  std::byte* AllocateManaged(uint64_t bytes) override {
    Check(cudaSetDevice(index_), "cudaSetDevice");
    int concurrent = 0;
    Check(cudaDeviceGetAttribute(&concurrent, cudaDevAttrConcurrentManagedAccess, index_),
          "cudaDeviceGetAttribute");
    void* slab = nullptr;
    const bool had =
        concurrent != 0 && cudaMallocManaged(&slab, bytes + kPage) == cudaSuccess;
    if (!had) {
      cudaGetLastError();  // said below; later calls must not find it again
      throw EnvironmentError(
          ErrorText("no managed memory for the experts on the CUDA device",
                    concurrent ? FormatBytes(bytes) + " are not to be had"
                               : std::string("it moves none while the host uses it"),
                    "use --tier=gpu:SIZE,host:SIZE,disk"));
    }
    slabs_.push_back(static_cast<std::byte*>(slab));
    const auto address = reinterpret_cast<uintptr_t>(slab);
    std::byte* memory = slabs_.back() + (kPage - address % kPage) % kPage;
    Check(cudaMemAdvise(memory, bytes, cudaMemAdviseSetPreferredLocation, kHost),
          "cudaMemAdvise(preferred location)");
    Check(cudaMemAdvise(memory, bytes, cudaMemAdviseSetReadMostly, DeviceOf(index_)),
          "cudaMemAdvise(read mostly)");
    return memory;
  }
  Ticket PrefetchAsync(const std::byte* managed, uint64_t bytes, int stream) override {
    Check(cudaSetDevice(index_), "cudaSetDevice");  // of the calling thread
    Check(Prefetch(managed, bytes, DeviceOf(index_), streams_[stream]),
          "cudaMemPrefetchAsync");
    return Mark(stream);
  }
  void DropPrefetched(const std::byte* managed, uint64_t bytes) override {
    // Of the copies of memory that is no longer read-mostly one stays: that at its
    // preferred location. So nothing is moved.
    Check(cudaMemAdvise(managed, bytes, cudaMemAdviseUnsetReadMostly, DeviceOf(index_)),
          "cudaMemAdvise(not read mostly)");
    Check(cudaMemAdvise(managed, bytes, cudaMemAdviseSetReadMostly, DeviceOf(index_)),
          "cudaMemAdvise(read mostly)");
  }

  void Decode(const ExpertFileSpec& spec, const std::byte* blob,
              std::byte* expert) override {
    FenceAfterCompute();
    const auto d = static_cast<uint64_t>(spec.geometry.d_model),
               f = static_cast<uint64_t>(spec.d_ff);
    cudaStream_t stream = streams_[1];
    DecodeMatrixOnDevice(spec.copies, blob, f, d, spec.dtype, expert, stream);
    DecodeMatrixOnDevice(spec.copies, blob + CodedBytes(spec.copies, f, d), d, f,
                         spec.dtype, expert + spec.expert_bytes() / 2, stream);
    // Not cudaStreamSynchronize: a device that hangs would never be named.
    const Ticket decoded = Mark(1);
    for (const double from = Now(); !IsOver(decoded); Pause(kPollSeconds)) {
      if (Now() - from <= kDecodeDeadline) continue;
      throw EnvironmentError(ErrorText("decoding on the device does not complete",
                                       description(),
                                       "nvidia-smi says what the device is doing"));
    }
  }

  bool IsOver(Ticket ticket) override {
    const auto found = events_.find(ticket);
    if (found == events_.end()) return true;
    const cudaError_t state = cudaEventQuery(found->second);
    if (state == cudaErrorNotReady) {
      cudaGetLastError();  // else this thread's next launch finds it as its own
      return false;
    }
    Check(state, "a copy to the device (cudaEventQuery)");
    spare_.push_back(found->second);
    events_.erase(found);
    return true;
  }

  double Now() const override {
    return std::chrono::duration<double>(
               std::chrono::steady_clock::now().time_since_epoch())
        .count();
  }
  void Pause(double seconds) override {
    // A copy of a chunk takes some 80 us: a sleep would be longer than the wait.
    const double until = Now() + seconds;
    do std::this_thread::yield();
    while (Now() < until);
  }
  std::string description() const override {
    cudaDeviceProp properties;
    Check(cudaGetDeviceProperties(&properties, index_), "cudaGetDeviceProperties");
    return std::string(properties.name) + " (cuda:" + std::to_string(index_) + ")";
  }

 private:
  struct MemoryInfo {
    size_t free = 0, whole = 0;
  };
  MemoryInfo Memory() const {
    Check(cudaSetDevice(index_), "cudaSetDevice");
    MemoryInfo memory;
    Check(cudaMemGetInfo(&memory.free, &memory.whole), "cudaMemGetInfo");
    return memory;
  }
  Ticket Enqueue(std::byte* to, const std::byte* from, uint64_t bytes,
                 cudaMemcpyKind kind, int stream) {
    Check(cudaSetDevice(index_), "cudaSetDevice");  // of the calling thread
    Check(cudaMemcpyAsync(to, from, bytes, kind, streams_[stream]), "cudaMemcpyAsync");
    return Mark(stream);
  }
  // Whether something is under way, and is not over a second later.
  bool Hangs() {
    const double until = Now() + kGraceSeconds;
    bool hangs = false;
    for (const auto& [ticket, event] : events_) {
      while (!hangs && cudaEventQuery(event) == cudaErrorNotReady) {
        hangs = Now() > until;
        Pause(kPollSeconds);
      }
    }
    cudaGetLastError();  // "not ready" is no error
    return hangs;
  }
  // A ticket for what is enqueued on the stream so far.
  Ticket Mark(int stream) {
    cudaEvent_t event = nullptr;
    if (spare_.empty()) {
      Check(cudaEventCreateWithFlags(&event, cudaEventDisableTiming), "cudaEventCreate");
    } else {
      event = spare_.back();
      spare_.pop_back();
    }
    events_[++last_] = event;
    Check(cudaEventRecord(event, streams_[stream]), "cudaEventRecord");
    return last_;
  }

  int index_;
  cudaStream_t streams_[2] = {};
  cudaEvent_t fence_ = nullptr;
  std::map<Ticket, cudaEvent_t> events_;  // of copies that are not known to be over
  std::vector<cudaEvent_t> spare_;
  std::vector<std::byte*> slabs_, registered_;
  Ticket last_ = 0;
};

}  // namespace

std::unique_ptr<DeviceCopy> OpenCudaDevice(int index) {
  int count = 0;
  const cudaError_t error = cudaGetDeviceCount(&count);
  if (error != cudaSuccess || index >= count) {
    cudaGetLastError();  // said here
    throw EnvironmentError(
        ErrorText("no CUDA device " + std::to_string(index),
                  error == cudaSuccess ? std::to_string(count) + " devices were found"
                                       : cudaGetErrorString(error),
                  "use --device=cpu, or a machine and a driver with CUDA"));
  }
  return std::make_unique<CudaCopy>(index);
}

}  // namespace routecast
