// Changes to training windows that ask a model for more than the recorded order of
// things. Each is a pure function of (key, sequence in the batch); validation and test
// never see them. Labels move with what they belong to.
#pragma once

#include <string>

#include "trainer/speculation_batch.h"

namespace routecast {

struct AugmentOptions {
  double layer_dropout = 0;  // probability of hiding a known layer of a sequence; the
                             // newest one stays
  double subsequence = 0;    // probability of a contiguous part of a sequence, 8 tokens
                             // or more
  double permutation = 0;    // probability of relabelling the experts, inputs and labels
                             // alike; destroys what an id means: for ablation
  double mask = 0;           // share of tokens whose routing and state are hidden; the
  double unmasked_weight = 1;  // others' labels then count by this much
  double mixup = 0;            // probability of mixing a sequence's embedded experts with
                               // another's, labels in proportion; share ~ Beta(.2, .2)
  double noise = 0;            // deviation of normal noise on embedded experts
  double context = 0;          // probability that a micro-batch looks at fewer layers: 1
                               // to the context, evenly
  double masked_ids = 0;       // share of known experts that are hidden and predicted
  // What `mask` hides: "tokens", each by its own draw; "block", that share of every
  // sequence in one run; "layer", of that share of the sequences one whole layer of those
  // that the model looks at (all their labels then count 1).
  std::string mask_mode = "tokens";
  bool any() const {
    return layer_dropout > 0 || subsequence > 0 || permutation > 0 || mask > 0 ||
           mixup > 0 || noise > 0 || context > 0 || masked_ids > 0;
  }

  Json ToJson() const;
  void Validate() const;  // UsageError naming the flag
};

// `key` is of the micro-batch, `context` the layers that the model looks at. Afterwards
// batch->weights_BT is defined where labels do not count alike.
void Augment(const AugmentOptions& options, uint64_t key, SpeculationBatch* batch,
             int context = 0);

}  // namespace routecast
