// StepGraph in a build with CUDA.
#include <ATen/core/CachingHostAllocator.h>
#include <ATen/cuda/CUDAEvent.h>
#include <ATen/cuda/CUDAGraph.h>
#include <c10/cuda/CUDACachingAllocator.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include <map>
#include <string>
#include <vector>

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

uint64_t ReservedBytes(c10::DeviceIndex device) {
  const auto stats = c10::cuda::CUDACachingAllocator::getDeviceStats(device);
  return static_cast<uint64_t>(stats.reserved_bytes[0].current);  // [0]: of all sizes
}

}  // namespace

struct StepGraph::Recording {
  // Of the step that is on.
  enum class Phase { kWarmingUp, kRecording, kFailed, kRecorded, kAsItIs };

  Recording(c10::Device on, size_t num_parts)
      : device(on), stream(RecordingStream(on.index())), graphs(num_parts) {}
  ~Recording() { Forget(); }

  // All parts are recorded in one step or none is: what a part reads of the one before
  // lies where that one's recording put it.
  void BeginStep() {
    if (phase == Phase::kRecorded || phase == Phase::kAsItIs) return;
    if (phase != Phase::kWarmingUp) {  // failed, or ended early
      Forget();
    }
    if (phase == Phase::kFailed) {
      phase = Phase::kAsItIs;
    } else {
      phase = warm_ups < kWarmUps ? Phase::kWarmingUp : Phase::kRecording;
    }
  }
  void EndStep() {
    if (phase == Phase::kWarmingUp) ++warm_ups;
    if (phase == Phase::kRecording) phase = Phase::kRecorded;
  }

  // The allocator would keep a pool that nothing records into any more until the device
  // is full, and each recording has one of its own.
  void Forget() {
    for (auto& graph : graphs) graph.reset();
    if (pool != c10::MempoolId_t{})
      Quietly([&] { c10::cuda::CUDACachingAllocator::emptyCache(pool); });
    pool = {};
    kept_bytes = 0;
  }

  // Recording does not run anything. Where it fails the stream is as it was.
  void Record(const std::function<void()>& step, size_t part) {
    if (part == 0) pool = at::cuda::graph_pool_handle();
    auto fresh = std::make_unique<at::cuda::CUDAGraph>();
    const uint64_t before = ReservedBytes(stream.device_index());
    bool begun = false;
    try {
      fresh->capture_begin(pool, cudaStreamCaptureModeThreadLocal);
      begun = true;
      step();
      begun = false;
      fresh->capture_end();
      graphs[part] = std::move(fresh);
      const uint64_t after = ReservedBytes(stream.device_index());
      kept_bytes += after > before ? after - before : 0;
      return;
    } catch (const std::exception& e) {
      failure = e.what();
      phase = Phase::kFailed;
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
  }

  c10::Device device;
  c10::cuda::CUDAStream stream;  // recording is refused on the default stream
  // Of all parts: they are recorded and replayed in one order, one after the other.
  c10::MempoolId_t pool{};
  std::vector<std::unique_ptr<at::cuda::CUDAGraph>> graphs;  // of the parts
  Phase phase = Phase::kWarmingUp;
  int warm_ups = 0;  // whole steps
  at::cuda::CUDAEvent ready, done;
  std::string failure;
  uint64_t kept_bytes = 0;

 private:
  static void Quietly(const std::function<void()>& mend) {
    try {
      mend();
    } catch (const std::exception&) {  // says again what was caught, or has nothing to do
    }
  }
};

StepGraph::StepGraph(c10::Device device, size_t num_parts)
    : recording_(device.is_cuda() ? std::make_unique<Recording>(device, num_parts)
                                  : nullptr) {}
StepGraph::~StepGraph() = default;

bool StepGraph::recorded() const {
  return recording_ && recording_->phase == Recording::Phase::kRecorded;
}
const char* StepGraph::failure() const {
  return recording_ ? recording_->failure.c_str() : "";
}
uint64_t StepGraph::kept_bytes() const { return recording_ ? recording_->kept_bytes : 0; }

void StepGraph::Run(const std::function<void()>& step, size_t part) {
  if (!recording_) return step();
  Recording& r = *recording_;
  const c10::cuda::CUDAGuard device(r.device);
  const c10::cuda::CUDAStream caller = c10::cuda::getCurrentCUDAStream();
  if (part == 0) r.BeginStep();
  r.ready.record(caller);
  r.ready.block(r.stream);
  {
    const c10::cuda::CUDAStreamGuard on_stream(r.stream);
    if (r.phase == Recording::Phase::kRecording) r.Record(step, part);
    r.graphs[part] ? r.graphs[part]->replay() : step();
  }
  r.done.record(r.stream);
  r.done.block(caller);
  if (part + 1 == r.graphs.size()) r.EndStep();
}

}  // namespace routecast
