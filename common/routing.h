// The words all rooms share about routing. Plain data, no LibTorch.
// Shape letters: T tokens, L MoE layers of one stack, E experts, K stored top-k, D model
// width.
#pragma once

#include <compare>
#include <cstdint>
#include <functional>
#include <string>
#include <vector>

namespace routecast {

enum class Stack : uint8_t { kEncoder = 0, kDecoder = 1 };
inline const char* StackName(Stack s) {
  return s == Stack::kEncoder ? "encoder" : "decoder";
}

enum class Task : uint8_t { kEncode = 0, kDenoise = 1, kGenerate = 2 };
const char* TaskName(Task task);
Task ParseTask(const std::string& name);  // throws UsageError naming the nearest task

// The MoE geometry of a model. `layer` of an ExpertKey counts MoE layers only: encoder
// layers 0..encoder_layers-1 first, then decoder layers.
struct MoeGeometry {
  int encoder_layers = 0;     // MoE layers in the encoder
  int decoder_layers = 0;     // MoE layers in the decoder
  int num_experts = 0;        // experts a MoE layer
  int experts_per_token = 1;  // Switch: 1
  int d_model = 0;            // width of the router's input

  int num_layers() const { return encoder_layers + decoder_layers; }
  int layers(Stack s) const {
    return s == Stack::kEncoder ? encoder_layers : decoder_layers;
  }
  int GlobalLayer(Stack s, int layer_in_stack) const {
    return s == Stack::kEncoder ? layer_in_stack : encoder_layers + layer_in_stack;
  }
  Stack StackOf(int layer) const {
    return layer < encoder_layers ? Stack::kEncoder : Stack::kDecoder;
  }
  int LayerInStack(int layer) const {
    return layer < encoder_layers ? layer : layer - encoder_layers;
  }
  int num_keys() const { return num_layers() * num_experts; }
  bool operator==(const MoeGeometry&) const = default;
};

// One expert of the model: never two loose ints.
struct ExpertKey {
  int layer = 0;   // global MoE layer
  int expert = 0;  // 0..num_experts-1
  auto operator<=>(const ExpertKey&) const = default;
  int Index(const MoeGeometry& g) const { return layer * g.num_experts + expert; }
  static ExpertKey FromIndex(int i, const MoeGeometry& g) {
    return {i / g.num_experts, i % g.num_experts};
  }
};

inline constexpr int kStrongestKeys = 4;
inline constexpr uint16_t kNoKey = 0xFFFF;

// What happened to one sequence in one stack. Layer-major planes: element (l, t) at l*T +
// t. Real tokens only; padding is never recorded. Empty planes = not recorded (or stack
// not run).
struct RoutingSpan {
  int num_tokens = 0;  // T
  int num_layers = 0;  // L
  std::vector<uint32_t>
      token_ids;  // [T]; the decoder's are its inputs (start token first)
  std::vector<uint16_t> expert_ids;  // [L*T] router's choice, before capacity
  std::vector<float> gate_probs;     // [L*T] probability of that choice (stored as bf16)
  std::vector<uint8_t> dropped;      // [L*T] 1 = capacity dropped the token
  std::vector<float> margins;        // [L*T] largest minus second logit (stored as bf16)
  int top_k = 0;                     // K, 0 = not recorded
  std::vector<uint16_t> topk_ids;    // [L*T*K]
  std::vector<float> topk_probs;     // [L*T*K] (stored as bf16)
  int hidden_width = 0;              // D, 0 = router inputs not recorded
  std::vector<uint16_t> hidden;      // [L*T*D] router inputs, bf16 bits
  // [T*D] what the stack ends with, after its last norm, bf16 bits. The decoder's alone,
  // with router inputs; empty = not recorded.
  std::vector<uint16_t> output;
  // What each token looked at in the block of each MoE layer, with router inputs. Heads:
  // the encoder's self-attention; the decoder's self-attention, then its cross-attention.
  int attention_heads = 0;               // A, 0 = not recorded
  std::vector<float> attention_entropy;  // [L*T*A] of the weights, nats (stored as bf16)
  // [L*T*A*kStrongestKeys] positions of the keys with the largest weights, the largest
  // first (equal ones: the lower position); kNoKey where fewer have a weight above 0.
  std::vector<uint16_t> attention_keys;
  bool operator==(const RoutingSpan&) const = default;
};

struct RoutingTrace {
  uint64_t sequence_id = 0;  // position in the corpus' sequence order: unique in a store
  uint64_t document_id = 0;
  uint64_t group_id = 0;  // near-duplicate group; decides the split part
  Task task = Task::kDenoise;
  RoutingSpan encoder;
  RoutingSpan decoder;
  bool operator==(const RoutingTrace&) const = default;
};

enum class SplitPart : uint8_t { kTrain = 0, kValidation = 1, kTest = 2 };
const char* SplitPartName(SplitPart part);
// The one split of everything: u = hash(salt, group id) in [0,1); u < 0.30 test,
// < 0.475 validation, else train.
SplitPart SplitOf(uint64_t group_id);
// True for the documents whose router inputs are recorded at this share (0..1), by group
// hash.
bool HiddenShareOf(uint64_t group_id, double share);

uint16_t FloatToBf16(float value);  // round to nearest even; NaN stays NaN
float Bf16ToFloat(uint16_t bits);

}  // namespace routecast

template <>
struct std::hash<routecast::ExpertKey> {
  size_t operator()(const routecast::ExpertKey& k) const {
    return std::hash<uint64_t>()((static_cast<uint64_t>(k.layer) << 32) |
                                 uint32_t(k.expert));
  }
};
