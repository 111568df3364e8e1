// StepGraph in a build with CUDA.
#include <ATen/cuda/CUDAEvent.h>
#include <ATen/cuda/CUDAGraph.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include <string>

#include "models/step_graph.h"

namespace routecast {

struct StepGraph::Recording {
  explicit Recording(c10::Device on)
      : device(on),
        stream(c10::cuda::getStreamFromPool(/*isHighPriority=*/false, on.index())) {}

  // Recording does not run anything. False: it failed, and the stream is as it was.
  bool Record(const std::function<void()>& step) {
    auto fresh = std::make_unique<at::cuda::CUDAGraph>();
    bool begun = false;
    try {
      fresh->capture_begin({0, 0}, cudaStreamCaptureModeThreadLocal);
      begun = true;
      step();
      begun = false;
      fresh->capture_end();
      graph = std::move(fresh);
      return true;
    } catch (const std::exception& e) {
      failure = e.what();
    }
    if (begun) End(fresh.get());
    cudaGetLastError();  // the failure is dealt with
    return false;
  }

  c10::Device device;
  c10::cuda::CUDAStream stream;  // recording is refused on the default stream
  std::unique_ptr<at::cuda::CUDAGraph> graph;
  int calls = 0;
  std::string failure;

 private:
  static void End(at::cuda::CUDAGraph* broken) {
    try {
      broken->capture_end();
    } catch (const std::exception&) {  // says again what was caught before
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
