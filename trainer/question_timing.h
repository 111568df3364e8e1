// What a question to a speculation model costs on this machine, and beside it one token
// through the decoder of the traced model. Rounds are interleaved: a row that was timed
// while something else ran is not compared with one that was not.
// Thread rule: one thread.
#pragma once

#include <vector>

#include "trainer/trace_dataset.h"

namespace routecast {

struct QuestionTimes {
  // Medians in microseconds, a model each: a question about one decoder token (encoder,
  // where there is no decoder) with the history that the kind needs, as it is served; NaN
  // where no sequence can be asked about.
  std::vector<double> question_us;
  // FLOPs of a prediction (flop_count.h): of the trained form, over the same tokens, by
  // their number; the mean over source layers. NaN as above.
  std::vector<double> question_flops;
  // Median of a decoder step at batch 1, vocabulary head and argmax included; NaN where
  // no model was given.
  double pass_us = 0;
};

// UsageError where the checkpoint is of another geometry than the traces; before any time
// is spent.
void RequireTracedModel(const fs::path& checkpoint, const MoeGeometry& geometry);

// `models`: folders of finished runs, all in memory together. `checkpoint`: the traced
// model, every expert resident on `device`; empty = none. Throws what their loaders
// throw.
QuestionTimes TimeQuestions(const std::vector<fs::path>& models,
                            const fs::path& checkpoint, at::Device device,
                            TraceDataset* dataset);

}  // namespace routecast
