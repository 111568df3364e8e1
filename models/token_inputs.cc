#include "models/token_inputs.h"

#include <ATen/ATen.h>

#include <algorithm>
#include <stdexcept>

#include "models/expert_slots.h"

namespace routecast {
namespace {

constexpr int kTokenWidth = 64;

}  // namespace

TokenInputs::TokenInputs(ParameterMaker* make, const SpeculationConfig& c, int64_t width)
    : geometry_(c.geometry) {
  if (c.token_inputs) {
    token_.emplace_back(make, "inputs.token", c.vocab_size, kTokenWidth, 0.02);
    token_in_.emplace_back(make, "inputs.token_in", kTokenWidth, width);
  }
  const int states = std::max(0, c.geometry.encoder_layers - 1) +
                     (c.geometry.decoder_layers > 0 ? c.geometry.decoder_layers + 1 : 0);
  for (int i = 0; c.router_inputs && i < states; ++i) {
    states_.emplace_back(make, "inputs.state." + std::to_string(i), c.hidden_width,
                         width);
  }
  if (c.topk_inputs) {
    gates_.emplace_back(make, "inputs.gates", c.geometry.num_experts, width);
  }
}

void TokenInputs::AddState(const RoutingWindow& window, at::Tensor* sum) const {
  if (states_.empty() || !SeesRouterInputs(window.stack, window.source_layer)) return;
  const bool before = window.source_layer < 0;  // of a decoder
  const at::Tensor& state = before ? window.context_BTD : window.hidden_BTD;
  if (!state.defined()) {
    if (before) return;  // as before the first token
    throw std::logic_error("no router inputs for a model that reads them");
  }
  const int first =
      window.stack == Stack::kEncoder ? 0 : std::max(0, geometry_.encoder_layers - 1);
  const size_t at =
      before ? states_.size() - 1 : static_cast<size_t>(first + window.source_layer);
  *sum = *sum + states_.at(at)(state);
}

at::Tensor TokenInputs::AddToNewest(const at::Tensor& x_BTRD,
                                    const RoutingWindow& window) const {
  if (token_.empty() && states_.empty() && gates_.empty()) return x_BTRD;
  const int64_t R = x_BTRD.size(2);
  auto newest = x_BTRD.select(2, R - 1);
  if (!token_.empty()) {
    // Ids that training never saw read as padding does.
    const at::Tensor& ids = window.token_ids_BT;
    const auto known = ids.masked_fill(ids.ge(token_[0].rows()), 0);
    newest = newest + token_in_[0](token_[0](known));
  }
  AddState(window, &newest);
  if (!gates_.empty() && window.source_layer >= 0) {
    RequireGates(window);
    newest = newest + gates_[0](window.gates_BTE);
  }
  return at::cat({x_BTRD.narrow(2, 0, R - 1), newest.unsqueeze(2)}, 2);
}

}  // namespace routecast
