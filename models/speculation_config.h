// Which speculation model: kind, sizes, and the geometry whose routing it learns. No
// LibTorch.
#pragma once

#include <string>
#include <vector>

#include "common/routing.h"
#include "common/run_record.h"

namespace routecast {

struct SpeculationConfig {
  std::string kind;      // one of SpeculationKinds()
  MoeGeometry geometry;  // of the model whose routing is learnt
  int vocab_size = 0;    // 0 = token ids are not a feature
  int hidden_width = 0;  // D; 0 = the router's input is not a feature
  int width = 0, heads = 0, ff = 0, layers = 0;
  int context = 0;          // W: the newest layers of a token whose experts are seen
  int neighbours = 0;       // tokens on each side (decoder: left) whose ids `hidden` sees
  bool priors = false;      // starts from the counts of the train part
  bool next_token = false;  // `hidden` guesses the decoder's next token; needs priors
  bool positions = false;   // `hidden` sees a token's place in its sequence
  // Heads of the traced model's attention whose summaries are a feature of `hidden`, at
  // the source layer (a decoder has as many again over the encoder); 0 = no feature.
  int attention_heads = 0;
  // `hidden`: tokens of the encoder attend to each other, as those of the model will.
  bool encoder_attention = false;
  // `hidden`: also says how much each expert of the decoder will be used later.
  bool later_use = false;
  // What a kind sees of a token beside the experts, where it may (SpeculationKind): its
  // id, the router's input at the source layer, and there the probabilities of the
  // router's likeliest experts.
  bool token_inputs = false, router_inputs = false, topk_inputs = false;
  int beams = 1;  // of `autoregressive`: joint continuations that it follows, 1 = greedy
  int backup_experts = 0;  // heads for the router's second, third .. choice; 0 = none
  double dropout = 0;      // training only

  // `ensemble` alone: what it is made of, and the weights of its members, which sum to 1;
  // `combine` is probabilities, logits, vote or stack (a sum of the members'
  // log-probabilities whose weights, a (stack, source, lead), were learnt).
  std::vector<SpeculationConfig> members;
  std::vector<double> weights;
  std::string combine;

  Json ToJson() const;
  // Throws DataError naming `what`, the key and the value; every size is bounded.
  static SpeculationConfig FromJson(const Json& json, const std::string& what);
  bool operator==(const SpeculationConfig&) const = default;
};

// Why the configuration cannot be, as "key=value, expected ..."; empty where it can.
std::string ProblemOf(const SpeculationConfig& config);

// Whether it, or one of its members, sees the router's likeliest experts.
bool ReadsTopK(const SpeculationConfig& config);
// Whether it, or one of its members, sees token ids.
bool ReadsTokenIds(const SpeculationConfig& config);

// Number of leads of a geometry from a source.
int NumLeadsOf(const MoeGeometry& geometry, Stack stack, int source_layer);

}  // namespace routecast
