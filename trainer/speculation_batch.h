// Samples -> windows and labels -> loss. The one place where training, validation and
// test meet the featuriser.
// B windows, T tokens, H leads, E experts.
#pragma once

#include <ATen/core/Tensor.h>

#include <vector>

#include "models/speculation_model.h"
#include "trainer/trace_dataset.h"
#include "trainer/window_sampler.h"

namespace routecast {

struct SpeculationBatch {
  RoutingWindow window;     // on the CPU; To() gives the device's
  at::Tensor labels_BTH;    // int64, -100 = does not count; [.., h] is lead h + 1
  at::Tensor documents_BT;  // int64, the bits of the document's id
  at::Tensor weights_BT;    // float32, of the tokens' labels in training; undefined = 1
  // The router's own top-k at the label's place, and how probable it found each; 0 where
  // there is no label. Undefined where they are not asked for or not recorded.
  at::Tensor teacher_ids_BTHK, teacher_probs_BTHK;
  uint64_t id = 0;
  int64_t num_labels = 0;  // that count, over all leads
};

// `hidden`: router inputs are wanted (REQUIRED of all sequences where
// SeesRouterInputs).
SpeculationBatch MakeSpeculationBatch(const MicroBatch& micro, TraceDataset* dataset,
                                      WithHidden hidden);
RoutingWindow WindowTo(const RoutingWindow& window, at::Device device);
// As a kind sees it that reads none.
void ForgetRouterInputs(RoutingWindow* window);

// Groups of windows that a kind can learn from or is scored on: every (stack, source
// layer) that has a lead and a sequence. Kinds that read router inputs get sequences that
// have them where their windows do (SeesRouterInputs); every sequence serves the others.
std::vector<SampleGroup> GroupsOf(const TraceDataset& dataset, SplitPart part,
                                  WithHidden hidden);
// A part's windows in a fixed order as micro-batches of similar length, with router
// inputs in all or none of their sequences. At most `sequences` of each group (0 = all),
// chosen by `seed`.
std::vector<MicroBatch> EvaluationBatches(const TraceDataset& dataset,
                                          const std::vector<SampleGroup>& groups,
                                          int micro_batch, uint64_t sequences,
                                          uint64_t seed);

struct LossSums {
  at::Tensor total;  // summed over labels; what backward runs from
  double cross_entropy = 0, top1 = 0, top4 = 0;  // sums over labels
  int64_t labels = 0;
};
struct LossWeights {
  double confidence = 0;  // of the binary cross-entropy of "the top-1 is right"
  double next_token = 0;  // of the next token's id, where the model guesses it
  double set = 0;         // of the encoder's set prediction (speculation_sets.h)
  double distill = 0;     // share of the loss that is towards the router's own top-k
  double distill_temperature = 1;
  double label_smoothing = 0;
};
// Cross-entropy of the routing and what the weights add to it; cross_entropy and top1 are
// of the plain labels. Throws std::logic_error naming the batch where a value is not
// finite.
LossSums SpeculationLoss(const SpeculationOutput& output, const SpeculationBatch& batch,
                         const LossWeights& weights);

}  // namespace routecast
