#include "models/trunk_model.h"

#include <ATen/ATen.h>
#include <c10/core/GradMode.h>

#include <algorithm>

#include "common/random.h"

namespace routecast {

TargetHead::TargetHead(ParameterMaker* make, const std::string& name,
                       const MoeGeometry& geometry, int64_t width, double gain)
    : geometry(geometry),
      weight(make->Xavier(name + ".weight",
                          {geometry.num_layers(), geometry.num_experts, width}, gain)),
      bias(make->Constant(name + ".bias", {geometry.num_layers(), geometry.num_experts},
                          0)) {}

at::Tensor TargetHead::operator()(const at::Tensor& h,
                                  const RoutingWindow& window) const {
  const int64_t layers = geometry.layers(window.stack), E = geometry.num_experts;
  const int64_t base = geometry.GlobalLayer(window.stack, 0);
  const int64_t after = layers - 1 - window.source_layer;
  const int64_t wrapped = NumLeadsOf(geometry, window.stack, window.source_layer) - after;
  const auto part = [&](int64_t first, int64_t count) {
    const int64_t axis = weight.dim() - 3;
    auto sizes = weight.sizes().vec();
    sizes.erase(sizes.end() - 3);
    sizes[sizes.size() - 2] = count * E;
    const auto y = AddRow(Product(h, weight.narrow(axis, first, count).reshape(sizes)),
                          bias.narrow(axis, first, count).flatten(axis, axis + 1));
    return y.view({h.size(0), h.size(1), count, E});
  };
  if (wrapped == 0) return part(base + layers - after, after);
  if (after == 0) return part(base, wrapped);
  return at::cat({part(base + layers - after, after), part(base, wrapped)}, 2);
}

SourceFeatures::SourceFeatures(ParameterMaker* make, const SpeculationConfig& config,
                               int64_t width)
    : geometry_(config.geometry),
      source_(make, "ours.source", config.geometry.num_layers() + 2, width, 0.02) {
  if (config.vocab_size > 0) {
    token_.emplace_back(make, "ours.token", config.vocab_size, kTokenWidth, 0.02);
    token_in_.emplace_back(make, "ours.token_in", kTokenWidth, width);
  }
  if (config.hidden_width > 0 && config.geometry.encoder_layers > 0) {
    absent_.emplace_back(make, "ours.absent", 1, config.hidden_width, 0.02);
  }
}

at::Tensor SourceFeatures::Add(const at::Tensor& x, const RoutingWindow& window) const {
  const int row = window.source_layer + 1 +
                  (window.stack == Stack::kEncoder ? 0 : geometry_.encoder_layers + 1);
  at::Tensor sum = AddRow(x, source_.Row(row));
  if (token_.empty()) return sum;
  return sum + token_in_[0](token_[0](window.token_ids_BT));
}

at::Tensor SourceFeatures::State(const RoutingWindow& window) const {
  if (window.hidden_BTD.defined()) return window.hidden_BTD;
  const int64_t B = window.token_ids_BT.size(0), T = window.token_ids_BT.size(1);
  if (window.stack == Stack::kDecoder && window.context_BTD.defined()) {
    return window.context_BTD;
  }
  const auto zeros = at::zeros({B, T, geometry_.d_model},
                               window.token_ids_BT.options().dtype(at::kFloat));
  return absent_.empty() ? zeros : AddRow(zeros, absent_[0].Row(0));
}

uint64_t MemberKey(uint64_t key, int64_t m) {
  return key == 0 ? 0 : Mix(key, static_cast<uint64_t>(m) + 1);
}

SpeculationOutput TrunkModel::Forward(const RoutingWindow& window, uint64_t dropout_key) {
  const bool nothing = window.token_ids_BT.numel() == 0 ||
                       NumLeads(window.stack, window.source_layer) == 0;
  const RoutingWindow all = ForMembers(window, members_);
  if (nothing) return NoOutput(all);
  std::vector<uint64_t> keys{dropout_key};
  if (members_ > 1) {
    keys.clear();
    for (int64_t m = 0; m < members_; ++m) keys.push_back(MemberKey(dropout_key, m));
  }
  KeyedDropout dropout(config_.dropout, std::move(keys));
  return Compute(all, &dropout, nullptr);
}

void TrunkModel::PrepareServing() {
  serving_ = true;
  served_.clear();
}

SpeculationOutput TrunkModel::ForwardLast(const RoutingWindow& window) {
  const int64_t tokens = window.token_ids_BT.size(1);
  const bool keeps = serving_ && window.stack == Stack::kDecoder &&
                     !c10::GradMode::is_enabled() && window.token_ids_BT.numel() > 0 &&
                     NumLeads(window.stack, window.source_layer) > 0;
  TokenRecord record = keeps ? RecordOf(window) : TokenRecord{};
  if (record.bytes.empty()) return SpeculationModel::ForwardLast(window);
  Served& served = served_[{window.source_layer, window.context_layers}];
  const int64_t known = std::min(CommonTokens(served.tokens, record), tokens - 1);
  served.tokens = {};  // unless this pass comes to its end
  served.memory.Begin(known, tokens - known);
  KeyedDropout none(config_.dropout, /*key=*/0);
  const SpeculationOutput fresh =
      Compute(ForMembers(WithoutTokens(window, known), members_), &none, &served.memory);
  served.tokens = std::move(record);
  const int64_t last = fresh.logits_BTHE.size(1) - 1;
  return {
      fresh.logits_BTHE.narrow(1, last, 1), fresh.confidence_BTH.narrow(1, last, 1), {}};
}

at::Tensor LargestProbability(const at::Tensor& logits_BTHE) {
  return at::softmax(logits_BTHE.detach(), -1, at::kFloat).amax(-1);
}

}  // namespace routecast
