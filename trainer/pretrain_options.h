// What pre-training a small Switch Transformer takes, and the named sizes of it.
#pragma once

#include <string>
#include <vector>

#include "common/run_record.h"
#include "models/switch_config.h"

namespace routecast {

struct PretrainOptions {
  SwitchConfig model;  // geometry; vocab_size follows the tokenizer
  int pieces = 480;    // SentencePiece pieces, specials included
  int extra_ids = 32;  // sentinels
  int steps = 850;
  int warmup_steps = 100;       // linear, then linear decay to 0
  double learning_rate = 3e-3;  // 8e-3 collapses the experts
  double weight_decay = 0.01;
  double clip_norm = 1.0;
  int sequence_tokens = 128;  // raw tokens a sequence, before span corruption
  int global_batch = 16;      // sequences a step, over all ranks
  int micro_batch = 8;  // sequences a forward pass: the compute unit at any world size
  double noise_density = 0.3;
  double mean_span = 3.0;
  double mask_share = 0.15;  // of the encoder's inputs, predicted through the output head
  double mask_weight =
      0.5;  // of that loss; without it the encoder's experts learn nothing
  // Of the routers' first logits: they start decided (mean gate 0.65), so experts matter
  // from the first step. At 2 the gates sink to 0.3 and random routing costs the encoder
  // half as much after 600 steps (docs/pretraining.md).
  double router_deviation = 4.0;
  double capacity_factor =
      1.5;  // expert_capacity = ceil(factor * sequence_tokens / experts)
  uint64_t seed = 1;
  int log_every = 20;        // steps
  int validate_every = 200;  // steps, and at the end
  int validation_sequences = 64;
  int checkpoint_every = 200;  // steps

  Json ToJson() const;
  // Throws UsageError naming the flag.
  void Validate() const;
};

// demo (<= 3 min on 2 cores), small (about 10 min), small128 (128 experts, 3 + 3 MoE
// layers, <= 60 min), base128 (128 experts, 6 + 6 MoE layers, for a GPU). UsageError
// names the nearest.
PretrainOptions PretrainPreset(const std::string& name);
const std::vector<std::string>& PretrainPresetNames();

}  // namespace routecast
