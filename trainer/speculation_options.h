// What training a speculation model takes.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "common/run_record.h"
#include "trainer/augmentation.h"
#include "trainer/layer_freezing.h"
#include "trainer/learning_schedule.h"

namespace routecast {

// Sizes that replace the kind's own; 0 (dropout: below 0) = the kind's.
struct ModelSizes {
  int width = 0, heads = 0, ff = 0, layers = 0, context = 0;
  double dropout = -1;
  Json ToJson() const;
};

// What one model is trained by; each member of an ensemble has its own.
struct MemberOptions {
  double learning_rate = 0;  // peak; 0 = the kind's
  double weight_decay = 0.01;
  double clip_norm = 1.0;  // of the member's gradient
  double label_smoothing = 0;
  Json ToJson() const;
};

// A member as --members writes it: kind, and what differs from the run's options.
struct MemberSpec {
  std::string kind;
  ModelSizes sizes;
  MemberOptions options;
};
// "interlayer:width=512,heads=16,lr=5e-5;interlayer*2": kinds with sizes (width heads ff
// layers context dropout) and options (lr decay clip smoothing); *N = N alike but for
// their seeds. `defaults` fill in what is not said. UsageError naming what is wrong.
std::vector<MemberSpec> ParseMembers(const std::string& text,
                                     const MemberOptions& defaults);

struct SpeculationOptions {
  std::string kind = "hidden";
  ModelSizes sizes;
  // Folder of a finished run: its sizes and weights are what training starts from
  // (pre-training on one store, fine-tuning on another); empty = seeded weights.
  std::string start_from;
  // Takes of that run what does not belong to the traced model: layers, attention,
  // patterns. Embeddings and heads are new, so the run may be of another model's traces.
  bool transfer = false;
  LayerFreezing freeze;                   // of what start_from gave
  std::string members;                    // of an ensemble; empty = the kind's own three
  std::string combine = "probabilities";  // or logits, vote, stack
  int epochs = 8;                         // at most; early stopping may end before
  int64_t steps = 0;      // > 0: exactly this many at most, instead of epochs
  int global_batch = 64;  // windows a step over all ranks
  int micro_batch = 16;   // windows a forward pass: the compute unit at any world size
  std::string dtype = "fp32";  // of a training pass' products: fp32, or bf16 (autocast);
                               // what is trained, its losses and scores are fp32 always
  MemberOptions training;
  LearningSchedule schedule;
  double beta1 = 0.9, beta2 = 0.99;  // of AdamW
  double ema = 0;  // decay of the averaged parameters that are kept; 0 = the last ones
  std::string loss = "cross_entropy";             // of the routing; or focal
  double confidence_weight = 0.1;                 // of the confidence's loss
  std::string confidence_loss = "cross_entropy";  // or squared, half (ConfidenceForm)
  double pattern_entropy = 0;    // taken off the loss; of kinds with a pattern memory
  double next_token_weight = 1;  // of the next token's, where a kind guesses it
  double set_weight = 0;         // of the encoder's set prediction
  double distill_weight = 0;  // share of the loss that is towards the router's own top-k
  double distill_temperature = 1;
  double consistency_weight = 0;   // of ConsistencyLoss and
  double diversity_weight = 0;     // DiversityLoss: the published gating loss
  double contrastive_weight = 0;   // of InfoNCE between leads and expert embeddings
  bool attention_inputs = false;   // `hidden` reads attention summaries, too
  bool later_use = false;          // `hidden`: how much each expert will be used later
  bool encoder_attention = false;  // `hidden`: the encoder's tokens see each other
  int beams = 1;                   // of `autoregressive`, 1 = greedy
  bool position_inputs = false;    // `hidden` sees a token's place in its sequence
  bool token_inputs = false;       // what kinds of expert ids see of a token beside them
  bool router_inputs = false;      // (SpeculationConfig); topk_inputs is of every kind
  bool topk_inputs = false;
  int backup_experts = 0;      // heads for the router's second, third .. choice
  double backup_weight = 0.3;  // of the mean of their cross-entropies
  AugmentOptions augment;
  int curriculum_epochs =
      0;  // until all targets count (curriculum.h); 0 = from the start
  std::string monitor = "loss";  // what validation must better: loss or top1 (of
                                 // several experts a token: recall)
  int patience = 5;              // validations without a better one; 0 = never stop
  int validate_every = 0;        // steps; 0 = an epoch, at least 8 times a run
  int log_every = 20;            // steps
  uint64_t validation_sequences = 256;  // a (stack, source layer); 0 = all
  uint64_t test_sequences = 0;          // a (stack, source layer); 0 = all
  uint64_t seed = 1;

  bool has_further_inputs() const { return token_inputs || router_inputs || topk_inputs; }
  // Records need the routers' top-k.
  bool reads_top_k() const {
    return distill_weight > 0 || backup_experts > 0 || topk_inputs;
  }
  Json ToJson() const;
  // Throws UsageError naming the flag.
  void Validate() const;
};

// Throws UsageError naming an option that is given and that the kind, or none of an
// ensemble's members, has a use for.
void RequireUse(const SpeculationOptions& options);
// Throws UsageError naming an option that is given without the one that it says more of,
// as --distill_temperature without --distill_weight. Not of a search, which may draw
// both.
void RequirePartners(const SpeculationOptions& options);
// Takes back what RequireUse refuses, where options are those of many kinds.
void DropUnused(SpeculationOptions* options);

}  // namespace routecast
