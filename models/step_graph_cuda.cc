// StepGraph in a build with CUDA.
#include <ATen/core/CachingHostAllocator.h>
#include <ATen/cuda/CUDAEvent.h>
#include <ATen/cuda/CUDAGraph.h>
#include <c10/cuda/CUDACachingAllocator.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include <map>
#include <string>

#include "models/step_graph.h"

namespace routecast {
namespace {

// One for all recordings of a thread's device: the library keeps a workspace and freed
// memory for each stream that ever multiplied.
c10::cuda::CUDAStream RecordingStream(c10::DeviceIndex device) {
  thread_local std::map<c10::DeviceIndex, c10::cuda::CUDAStream> streams;
  const auto it = streams.find(device);
  if (it != streams.end()) return it->second;
  return streams
      .emplace(device, c10::cuda::getStreamFromPool(/*isHighPriority=*/false, device))
      .first->second;
}

}  // namespace

struct StepGraph::Recording {
  explicit Recording(c10::Device on) : device(on), stream(RecordingStream(on.index())) {}

  // Recording does not run anything. False: it failed, and the stream is as it was.
  bool Record(const std::function<void()>& step) {
    auto fresh = std::make_unique<at::cuda::CUDAGraph>();
    const c10::MempoolId_t pool = at::cuda::graph_pool_handle();
    bool begun = false;
    try {
      fresh->capture_begin(pool, cudaStreamCaptureModeThreadLocal);
      begun = true;
      step();
      begun = false;
      fresh->capture_end();
      graph = std::move(fresh);
      return true;
    } catch (const std::exception& e) {
      failure = e.what();
    }
    if (begun) Quietly([&] { fresh->capture_end(); });
    // A recording that fails ends before it gives the allocators back, which would ask
    // the graph that is gone with every allocation of the next recording.
    Quietly([&] {
      c10::cuda::CUDACachingAllocator::endAllocateToPool(stream.device_index(), pool);
      c10::cuda::CUDACachingAllocator::releasePool(stream.device_index(), pool);
    });
    Quietly([&] {
      at::getHostAllocator(at::kCUDA)->end_allocate_to_pool(pool);
      at::getHostAllocator(at::kCUDA)->release_pool(pool);
    });
    cudaGetLastError();  // the failure is dealt with
    return false;
  }

  c10::Device device;
  c10::cuda::CUDAStream stream;  // recording is refused on the default stream
  std::unique_ptr<at::cuda::CUDAGraph> graph;
  int calls = 0;
  std::string failure;

 private:
  static void Quietly(const std::function<void()>& mend) {
    try {
      mend();
    } catch (const std::exception&) {  // says again what was caught, or has nothing to do
    }
  }
};

StepGraph::StepGraph(c10::Device device)
    : recording_(device.is_cuda() ? std::make_unique<Recording>(device) : nullptr) {}
StepGraph::~StepGraph() = default;

bool StepGraph::recorded() const { return recording_ && recording_->graph; }
const char* StepGraph::failure() const {
  return recording_ ? recording_->failure.c_str() : "";
}

void StepGraph::Run(const std::function<void()>& step) {
  if (!recording_) return step();
  Recording& r = *recording_;
  const c10::cuda::CUDAGuard device(r.device);
  const c10::cuda::CUDAStream caller = c10::cuda::getCurrentCUDAStream();
  at::cuda::CUDAEvent ready, done;
  ready.record(caller);
  ready.block(r.stream);
  {
    const c10::cuda::CUDAStreamGuard on_stream(r.stream);
    if (!r.graph && r.calls == kWarmUps) r.Record(step);
    ++r.calls;
    r.graph ? r.graph->replay() : step();
  }
  done.record(r.stream);
  done.block(caller);
}

}  // namespace routecast
