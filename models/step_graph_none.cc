// StepGraph in a build without CUDA.
#include "models/step_graph.h"

namespace routecast {

struct StepGraph::Recording {};

StepGraph::StepGraph(c10::Device, size_t) {}
StepGraph::~StepGraph() = default;

void StepGraph::Run(const std::function<void()>& step, size_t) { step(); }
bool StepGraph::recorded() const { return false; }
const char* StepGraph::failure() const { return ""; }
uint64_t StepGraph::kept_bytes() const { return 0; }

}  // namespace routecast
