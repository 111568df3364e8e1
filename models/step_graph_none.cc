// StepGraph in a build without CUDA.
#include "models/step_graph.h"

namespace routecast {

struct StepGraph::Recording {};

StepGraph::StepGraph(c10::Device) {}
StepGraph::~StepGraph() = default;

void StepGraph::Run(const std::function<void()>& step) { step(); }
bool StepGraph::recorded() const { return false; }
const char* StepGraph::failure() const { return ""; }

}  // namespace routecast
