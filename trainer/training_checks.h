// What a training needs of its traces and ranks, looked at before anything is written.
// Each throws UsageError that names what is missing.
#pragma once

#include "trainer/speculation_options.h"
#include "trainer/trace_dataset.h"

namespace routecast {

// What options learn from or read is in the traces, and the kind has a use for it.
void CheckTraces(const SpeculationOptions& options, TraceDataset* dataset);
// A part has a window that such a model can be asked about.
void RequirePart(const TraceDataset& dataset, SplitPart part, WithHidden hidden);
// A store of another domain (null = none) is of the same model, with test documents and
// what the model reads.
void RequireShift(TraceDataset* shift, const TraceDataset& dataset, WithHidden hidden,
                  bool top_k = false);
// Every rank has a micro-batch in a step.
void RequireWork(const SpeculationOptions& options, int world);

}  // namespace routecast
