#include "models/switch_model.h"

namespace routecast {

std::vector<std::pair<std::string, std::vector<int64_t>>> ParameterShapes(
    const SwitchConfig& c) {
  const int64_t d = c.d_model, inner = int64_t{c.num_heads} * c.d_kv, f = c.d_ff;
  std::vector<std::pair<std::string, std::vector<int64_t>>> shapes;
  const auto add = [&](const std::string& name, std::vector<int64_t> shape) {
    shapes.emplace_back(name, std::move(shape));
  };
  const auto feed_forward = [&](const std::string& mlp) {
    if (c.is_gated_act) {
      add(mlp + "wi_0.weight", {f, d});
      add(mlp + "wi_1.weight", {f, d});
    } else {
      add(mlp + "wi.weight", {f, d});
    }
    add(mlp + "wo.weight", {d, f});
  };
  add("shared.weight", {c.vocab_size, d});
  for (Stack stack : {Stack::kEncoder, Stack::kDecoder}) {
    for (int i = 0; i < c.blocks(stack); ++i) {
      const std::string base =
          std::string(StackName(stack)) + ".block." + std::to_string(i) + ".layer.";
      const auto attention = [&](const std::string& layer, const std::string& kind) {
        for (const char* part : {"q", "k", "v"}) {
          add(base + layer + kind + "." + part + ".weight", {inner, d});
        }
        add(base + layer + kind + ".o.weight", {d, inner});
      };
      attention("0.", "SelfAttention");
      if (i == 0) {
        add(base + "0.SelfAttention.relative_attention_bias.weight",
            {c.relative_attention_num_buckets, c.num_heads});
      }
      add(base + "0.layer_norm.weight", {d});
      if (stack == Stack::kDecoder) {
        attention("1.", "EncDecAttention");
        add(base + "1.layer_norm.weight", {d});
      }
      const std::string ff = base + (stack == Stack::kEncoder ? "1." : "2.");
      if (c.IsSparse(stack, i)) {
        add(ff + "mlp.router.classifier.weight", {c.num_experts, d});
        if (c.router_bias) add(ff + "mlp.router.classifier.bias", {c.num_experts});
        for (int e = 0; e < c.num_experts; ++e) {
          feed_forward(ff + "mlp.experts.expert_" + std::to_string(e) + ".");
        }
      } else {
        feed_forward(ff + "mlp.");
      }
      add(ff + "layer_norm.weight", {d});
    }
    add(std::string(StackName(stack)) + ".final_layer_norm.weight", {d});
  }
  if (!c.tie_word_embeddings) add("lm_head.weight", {c.vocab_size, d});
  return shapes;
}

}  // namespace routecast
