#include "evaluator/recorded_visits.h"

#include <ATen/ATen.h>

#include <algorithm>

#include "common/errors.h"
#include "models/routing_window.h"

namespace routecast {

void RequireOneExpertAToken(const MoeGeometry& geometry, const std::string& what) {
  if (geometry.experts_per_token == 1) return;
  throw UsageError(
      ErrorText(what + " plays models of one expert a token",
                "the store's takes " + std::to_string(geometry.experts_per_token),
                "--mode=simulate and --mode=quality take such stores"));
}

std::vector<int> ChoicesOf(const RoutingSpan& span, const MoeGeometry& g, int layer,
                           int t) {
  const size_t at = static_cast<size_t>(layer) * static_cast<size_t>(span.num_tokens) +
                    static_cast<size_t>(t);
  if (g.experts_per_token == 1) return {span.expert_ids[at]};
  const auto row = static_cast<size_t>(span.top_k);
  if (span.top_k < g.experts_per_token ||
      span.topk_ids.size() != row * span.expert_ids.size()) {
    throw DataError(ErrorText(
        "a trace does not hold every expert of a token",
        std::to_string(span.top_k) + " of " + std::to_string(g.experts_per_token),
        "import it with all of them"));
  }
  const auto first = span.topk_ids.begin() + static_cast<ptrdiff_t>(at * row);
  std::vector<int> experts(first, first + g.experts_per_token);
  std::sort(experts.begin(), experts.end());
  experts.erase(std::unique(experts.begin(), experts.end()), experts.end());
  return experts;
}

namespace {

// What tokens [first, first + count) chose at MoE layer `layer` of their stack, as a
// foresight hears of it: the first choices, and where tokens take several the others.
LayerRouting RoutingOf(const RoutingSpan& span, const MoeGeometry& g, Stack stack,
                       int layer, int first, int count) {
  LayerRouting routing;
  routing.layer = g.GlobalLayer(stack, layer);
  const int64_t others = g.experts_per_token - 1;
  const auto at = static_cast<size_t>(layer) * static_cast<size_t>(span.num_tokens) +
                  static_cast<size_t>(first);
  routing.expert_ids_BT = at::empty({1, count}, at::kLong);
  std::copy_n(span.expert_ids.data() + at, count,
              routing.expert_ids_BT.data_ptr<int64_t>());
  if (others == 0) return routing;
  routing.other_ids_BTK = at::empty({1, count, others}, at::kLong);
  int64_t* to = routing.other_ids_BTK.data_ptr<int64_t>();
  for (size_t t = 0; t < static_cast<size_t>(count); ++t, to += others) {
    const size_t row = (at + t) * static_cast<size_t>(span.top_k);
    std::copy_n(span.topk_ids.data() + row + 1, others, to);
  }
  return routing;
}

}  // namespace

void AppendVisits(const RoutingTrace& trace, const MoeGeometry& g, int tokens,
                  const StepCosts& costs, Foresight* foresight,
                  std::vector<SimulatedVisit>* visits) {
  const RoutingSpan& span = trace.decoder;
  const bool hidden = foresight && span.hidden_width > 0 && !span.hidden.empty();
  RoutingWindow source;
  if (foresight) source = WindowOf(trace, Stack::kDecoder, -1, g.num_experts);
  std::vector<at::Tensor> states(static_cast<size_t>(g.decoder_layers));
  for (int l = 0; hidden && l < g.decoder_layers; ++l) {
    states[static_cast<size_t>(l)] =
        WindowOf(trace, Stack::kDecoder, l, g.num_experts).hidden_BTD.contiguous();
  }
  const at::Tensor output = foresight ? OutputOf(trace) : at::Tensor();
  for (int t = 0; t < std::min(span.num_tokens, tokens); ++t) {
    std::vector<LayerForecast> at_begin;
    PassInfo pass;
    if (foresight) {
      pass.stack = Stack::kDecoder;
      pass.token_ids_BT = source.token_ids_BT.narrow(1, t, 1).contiguous();
      pass.valid_BT = at::ones({1, 1}, at::kBool);
      pass.first_position = t;
      pass.source_BSD = source.source_BSD;
      pass.source_valid_BS = source.source_valid_BS;
      at_begin = foresight->AtPassBegin(pass);
    }
    for (int l = 0; l < g.decoder_layers; ++l) {
      SimulatedVisit visit;
      visit.layer = g.GlobalLayer(Stack::kDecoder, l);
      visit.experts = ChoicesOf(span, g, l, t);
      visit.seconds_before = l == 0 ? costs.head : costs.between_layers;
      visit.begins_pass = l == 0;
      visit.seconds_in_pass = l == 0 ? costs.between_layers : 0;
      visit.seconds_expert = costs.expert;
      visit.seconds_predict = foresight ? costs.question : 0;
      if (l == 0) visit.at_pass_begin = std::move(at_begin);
      if (foresight) {
        LayerRouting routing = RoutingOf(span, g, Stack::kDecoder, l, t, 1);
        if (hidden) {
          routing.input_BTD = states[static_cast<size_t>(l)].narrow(1, t, 1).contiguous();
        }
        visit.at_layer = foresight->AtLayer(routing);
        if (l + 1 == g.decoder_layers) {
          if (output.defined()) pass.output_BTD = output.narrow(1, t, 1).contiguous();
          visit.at_pass_end = foresight->AtPassEnd(pass);
        }
      }
      visits->push_back(std::move(visit));
    }
  }
}

void AppendEncoderVisits(const RoutingTrace& trace, const MoeGeometry& g, int most_tokens,
                         const StepCosts& costs, Foresight* foresight,
                         std::vector<SimulatedVisit>* visits) {
  const RoutingSpan& span = trace.encoder;
  const int tokens = std::min(span.num_tokens, most_tokens);
  const bool hidden = foresight && span.hidden_width > 0 && !span.hidden.empty();
  PassInfo pass;
  std::vector<LayerForecast> at_begin;
  if (foresight) {
    const RoutingWindow source = WindowOf(trace, Stack::kEncoder, -1, g.num_experts);
    pass.token_ids_BT = source.token_ids_BT.narrow(1, 0, tokens).contiguous();
    pass.valid_BT = at::ones({1, tokens}, at::kBool);
    at_begin = foresight->AtPassBegin(pass);
  }
  for (int l = 0; l < g.encoder_layers; ++l) {
    SimulatedVisit visit;
    visit.layer = g.GlobalLayer(Stack::kEncoder, l);
    for (int t = 0; t < tokens; ++t) {
      const std::vector<int> choices = ChoicesOf(span, g, l, t);
      visit.experts.insert(visit.experts.end(), choices.begin(), choices.end());
    }
    std::sort(visit.experts.begin(), visit.experts.end());
    visit.experts.erase(std::unique(visit.experts.begin(), visit.experts.end()),
                        visit.experts.end());
    visit.begins_pass = l == 0;
    (l == 0 ? visit.seconds_in_pass : visit.seconds_before) = costs.between_layers;
    visit.seconds_expert = costs.expert;
    visit.seconds_predict = foresight ? costs.question : 0;
    if (l == 0) visit.at_pass_begin = std::move(at_begin);
    if (foresight) {
      LayerRouting routing = RoutingOf(span, g, Stack::kEncoder, l, 0, tokens);
      if (hidden) {
        routing.input_BTD = WindowOf(trace, Stack::kEncoder, l, g.num_experts)
                                .hidden_BTD.narrow(1, 0, tokens)
                                .contiguous();
      }
      visit.at_layer = foresight->AtLayer(routing);
    }
    visits->push_back(std::move(visit));
  }
}

std::vector<SimulatedVisit> WithOracle(std::vector<SimulatedVisit> visits,
                                       int num_experts, size_t horizon) {
  for (size_t i = 0; i < visits.size(); ++i) {
    visits[i].at_pass_begin.clear();
    visits[i].at_layer.clear();
    visits[i].at_pass_end.clear();
    visits[i].seconds_predict = 0;
    for (size_t d = 1; d <= horizon && i + d < visits.size(); ++d) {
      LayerForecast forecast{visits[i + d].layer, static_cast<int>(d),
                             std::vector<float>(static_cast<size_t>(num_experts), 0.f)};
      for (const int e : visits[i + d].experts) {
        forecast.probabilities[static_cast<size_t>(e)] = 1;
      }
      visits[i].at_layer.push_back(std::move(forecast));
    }
  }
  return visits;
}

}  // namespace routecast
