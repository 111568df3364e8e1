// Samples -> windows and labels. The one place where training, validation and test meet
// the featuriser.
// B windows, T tokens, H leads, K experts a token.
#pragma once

#include <ATen/core/Tensor.h>

#include <vector>

#include "models/speculation_model.h"
#include "trainer/trace_dataset.h"
#include "trainer/window_sampler.h"

namespace routecast {

struct SpeculationBatch {
  RoutingWindow window;   // on the CPU; To() gives the device's
  at::Tensor labels_BTH;  // int64, -100 = does not count; [.., h] is lead h + 1
  // Models of K > 1 experts a token: the further choices [B,T,H,K-1] where labels_BTH
  // counts; else undefined.
  at::Tensor others_BTHK;
  at::Tensor documents_BT;  // int64, the bits of the document's id
  at::Tensor weights_BT;    // float32, of the tokens' labels in training; undefined = 1
  // The router's own top-k at the label's place, the likeliest first, and how probable it
  // found each; 0 where there is no label. Undefined where they are not asked for or not
  // recorded.
  at::Tensor teacher_ids_BTHK, teacher_probs_BTHK;
  uint64_t id = 0;
  int64_t num_labels = 0;  // that count, over all leads
};

// `hidden`: router inputs are wanted (REQUIRED of all sequences where
// SeesRouterInputs). Thread rule: any thread; runs no operation of LibTorch in parallel.
SpeculationBatch MakeSpeculationBatch(const MicroBatch& micro, TraceDataset* dataset,
                                      WithHidden hidden);
// All experts of each label [B,T,H,K], the first choice first; -100 = does not count.
at::Tensor LabelSets(const SpeculationBatch& batch);
RoutingWindow WindowTo(const RoutingWindow& window, at::Device device);
// As a kind sees it that reads none.
void ForgetRouterInputs(RoutingWindow* window);

// Groups of windows that a kind can learn from or is scored on: every (stack, source
// layer) that has a lead and a sequence. Kinds that read router inputs get sequences that
// have them where their windows do (SeesRouterInputs); every sequence serves the others.
std::vector<SampleGroup> GroupsOf(const TraceDataset& dataset, SplitPart part,
                                  WithHidden hidden, int store = 0);
// Of several data sets, each group with its data set's number.
std::vector<SampleGroup> GroupsOfAll(const std::vector<TraceDataset*>& stores,
                                     SplitPart part, WithHidden hidden);
// A part's windows in a fixed order as micro-batches of similar length, with router
// inputs in all or none of their sequences; of more than 128 tokens fewer together. At
// most `sequences` of each group (0 = all), chosen by `seed`.
std::vector<MicroBatch> EvaluationBatches(const TraceDataset& dataset,
                                          const std::vector<SampleGroup>& groups,
                                          int micro_batch, uint64_t sequences,
                                          uint64_t seed);

}  // namespace routecast
