#include "evaluator/foresight.h"

#include <ATen/ATen.h>

#include <algorithm>
#include <cmath>
#include <tuple>
#include <utility>

namespace routecast {

namespace {

// 1 - prod(1 - p) over the tokens that count, for each expert. Plain loops: between two
// layers of a step a dozen tensor calls a lead are felt.
std::vector<float> NeededByAny(const at::Tensor& probs_BTE, const at::Tensor& counts_BT) {
  const at::Tensor probs = probs_BTE.to(at::kCPU, at::kFloat).contiguous();
  const auto experts = static_cast<size_t>(probs.size(-1));
  const float* p = probs.const_data_ptr<float>();
  const bool* counts = counts_BT.const_data_ptr<bool>();
  std::vector<float> none(experts, 1.f);
  for (int64_t row = 0; row < counts_BT.numel(); ++row, p += experts) {
    if (!counts[row]) continue;
    for (size_t e = 0; e < experts; ++e) {
      // A predictor may say anything.
      none[e] *= 1 - (std::isnan(p[e]) ? 0.f : std::clamp(p[e], 0.f, 1.f));
    }
  }
  for (float& value : none) value = 1 - value;
  return none;
}

}  // namespace

PredictorForesight::PredictorForesight(ExpertPredictor* predictor,
                                       const MoeGeometry& geometry, int max_lead,
                                       std::shared_ptr<const NextTokenGuess> next_token)
    : predictor_(predictor),
      geometry_(geometry),
      max_lead_(max_lead),
      history_(std::max(1, predictor->history_tokens())),
      next_token_(std::move(next_token)) {}

std::string PredictorForesight::name() const { return predictor_->name(); }

std::vector<LayerForecast> PredictorForesight::AtPassBegin(const PassInfo& pass) {
  const at::Tensor guessed = std::exchange(guessed_B1_, at::Tensor());
  // Rows that have ended count no more.
  const bool answered = guessed.defined() && pass.stack == Stack::kDecoder &&
                        pass.first_position > 0 &&
                        guessed.sizes() == pass.token_ids_BT.sizes() &&
                        guessed.eq(pass.token_ids_BT)
                            .logical_or(pass.valid_BT.logical_not())
                            .all()
                            .item<bool>();
  SkipPass(pass);
  // What was said at the last pass' end is of this very question.
  return answered ? std::vector<LayerForecast>{} : Ask(-1);
}

void PredictorForesight::SkipPass(const PassInfo& pass) {
  guessed_B1_ = at::Tensor();  // an answer to an earlier pass
  const int64_t batch = pass.token_ids_BT.size(0), tokens = pass.token_ids_BT.size(1);
  const int64_t layers = geometry_.layers(pass.stack);
  const bool goes_on = pass.stack == Stack::kDecoder && pass.first_position > 0 &&
                       stack_ == Stack::kDecoder && tokens_BT_.defined() &&
                       tokens_BT_.size(0) == batch;
  const at::Tensor unknown =
      at::full({batch, tokens, layers}, geometry_.num_experts, at::kLong);
  if (goes_on) {
    // A decoder window keeps the newest tokens that the predictor looks at.
    const int64_t keep = std::min<int64_t>(tokens_BT_.size(1), history_ - tokens);
    const auto extend = [&](const at::Tensor& old, const at::Tensor& fresh) {
      return keep > 0 ? at::cat({old.slice(1, old.size(1) - keep), fresh}, 1) : fresh;
    };
    tokens_BT_ = extend(tokens_BT_, pass.token_ids_BT);
    valid_BT_ = extend(valid_BT_, pass.valid_BT);
    experts_BTL_ = extend(experts_BTL_, unknown);
  } else {
    tokens_BT_ = pass.token_ids_BT;
    valid_BT_ = pass.valid_BT;
    experts_BTL_ = unknown;
    hidden_BTD_.assign(static_cast<size_t>(layers), at::Tensor());
  }
  stack_ = pass.stack;
  pass_tokens_ = static_cast<int>(tokens);
  if (pass.stack == Stack::kEncoder) source_BSD_ = at::Tensor();
  if (pass.stack == Stack::kDecoder && pass.source_BSD.defined()) {
    source_BSD_ = pass.source_BSD;
    source_valid_BS_ = pass.source_valid_BS;
  }
}

void PredictorForesight::Remember(const LayerRouting& routing) {
  const int layer = geometry_.LayerInStack(routing.layer);
  const int64_t from = tokens_BT_.size(1) - pass_tokens_;
  // A copy: the window handed out before must not change under its reader.
  experts_BTL_ = experts_BTL_.clone();
  experts_BTL_.slice(1, from).select(2, layer).copy_(routing.expert_ids_BT);
  if (!predictor_->needs_hidden() || !routing.input_BTD.defined()) return;
  at::Tensor& kept = hidden_BTD_[static_cast<size_t>(layer)];
  const at::Tensor fresh = routing.input_BTD.to(at::kCPU, at::kFloat);
  if (stack_ == Stack::kEncoder && layer + 1 == geometry_.encoder_layers) {
    source_BSD_ = fresh.clone(at::MemoryFormat::Contiguous);  // outlives the pass
    source_valid_BS_ = valid_BT_.contiguous();
  }
  const int64_t keep = kept.defined() ? std::min<int64_t>(kept.size(1), from) : 0;
  kept = keep > 0 ? at::cat({kept.slice(1, kept.size(1) - keep), fresh}, 1) : fresh;
}

std::vector<LayerForecast> PredictorForesight::AtLayer(const LayerRouting& routing) {
  Remember(routing);
  const int source = geometry_.LayerInStack(routing.layer);
  return AsksAtEnd(source) ? std::vector<LayerForecast>{} : Ask(source);
}

std::vector<LayerForecast> PredictorForesight::AtPassEnd(const PassInfo& pass) {
  const int last = geometry_.layers(pass.stack) - 1;
  if (!AsksAtEnd(last)) return {};
  if (!pass.output_BTD.defined() || pass.output_BTD.size(2) != next_token_->width()) {
    return Ask(last);
  }
  const int64_t tokens = pass.token_ids_BT.size(1);
  PassInfo next;
  next.stack = pass.stack;
  next.token_ids_BT = (*next_token_)(pass.output_BTD.select(1, tokens - 1)).unsqueeze(1);
  next.valid_BT = pass.valid_BT.narrow(1, tokens - 1, 1);
  next.first_position = pass.first_position + static_cast<int>(tokens);
  // The window as it will be, for this question only.
  const auto [ids, valid, experts] = std::tuple(tokens_BT_, valid_BT_, experts_BTL_);
  const int pass_tokens = pass_tokens_;
  SkipPass(next);
  std::vector<LayerForecast> forecasts = Ask(-1);
  tokens_BT_ = ids;
  valid_BT_ = valid;
  experts_BTL_ = experts;
  pass_tokens_ = pass_tokens;
  guessed_B1_ = next.token_ids_BT;
  return forecasts;
}

void PredictorForesight::Skip(const LayerRouting& routing) { Remember(routing); }

at::Tensor PredictorForesight::Context(bool newest_known) const {
  const at::Tensor& last = hidden_BTD_.back();
  const int64_t batch = tokens_BT_.size(0), tokens = tokens_BT_.size(1);
  const int64_t before = last.defined() ? last.size(1) - newest_known : 0;
  const int64_t kept = std::min(before, tokens - 1);
  if (kept == 0) return {};  // counts as zeros
  // Only the newest row matters where the history was cut.
  return at::cat({at::zeros({batch, tokens - kept, last.size(2)}),
                  last.narrow(1, before - kept, kept)},
                 1);
}

std::vector<LayerForecast> PredictorForesight::Ask(int source_layer) {
  RoutingWindow window;
  window.stack = stack_;
  window.source_layer = source_layer;
  window.num_layers = geometry_.layers(stack_);
  window.num_experts = geometry_.num_experts;
  window.token_ids_BT = tokens_BT_;
  window.valid_BT = valid_BT_;
  window.experts_BTL = experts_BTL_;
  if (source_layer >= 0 && predictor_->needs_hidden()) {
    const at::Tensor& hidden = hidden_BTD_[static_cast<size_t>(source_layer)];
    // Where the history began without this layer, only a window of equal length serves.
    if (!hidden.defined() || hidden.size(1) != tokens_BT_.size(1)) return {};
    window.hidden_BTD = hidden;
  }
  if (stack_ == Stack::kDecoder && predictor_->needs_hidden()) {
    window.context_BTD = Context(source_layer == window.num_layers - 1);
    if (source_BSD_.defined() && source_BSD_.size(0) == tokens_BT_.size(0)) {
      window.source_BSD = source_BSD_;
      window.source_valid_BS = source_valid_BS_;
    }
  }
  std::vector<LayerForecast> forecasts;
  const bool decoder = stack_ == Stack::kDecoder;
  // Encoder: layers ahead. Decoder: up to this layer's next turn.
  const int reach = decoder ? window.num_layers : window.num_layers - 1 - source_layer;
  const int leads = std::min(max_lead_, reach);
  if (leads < 1) return {};
  const auto answers = decoder ? predictor_->PredictLast(window, leads)
                               : predictor_->PredictLeads(window, leads);
  const at::Tensor counts =
      (decoder ? valid_BT_.slice(1, valid_BT_.size(1) - 1) : valid_BT_).contiguous();
  for (int lead = 1; lead <= leads; ++lead) {
    const int target = source_layer + lead;
    const std::optional<at::Tensor>& probs = answers[static_cast<size_t>(lead - 1)];
    if (!probs) continue;
    forecasts.push_back({geometry_.GlobalLayer(stack_, target % window.num_layers), lead,
                         NeededByAny(*probs, counts)});
  }
  return forecasts;
}

OracleForesight::OracleForesight(MoeGeometry geometry, int horizon)
    : geometry_(geometry), horizon_(horizon) {}

void OracleForesight::SetFuture(std::vector<Visit> visits) {
  visits_ = std::move(visits);
  next_ = 0;
}

std::vector<LayerForecast> OracleForesight::Tell() const {
  std::vector<LayerForecast> forecasts;
  for (size_t i = next_; i < visits_.size() && i < next_ + static_cast<size_t>(horizon_);
       ++i) {
    LayerForecast forecast{
        visits_[i].layer, static_cast<int>(i - next_) + 1,
        std::vector<float>(static_cast<size_t>(geometry_.num_experts), 0.f)};
    for (int expert : visits_[i].experts) forecast.probabilities[expert] = 1;
    forecasts.push_back(std::move(forecast));
  }
  return forecasts;
}

std::vector<LayerForecast> OracleForesight::AtPassBegin(const PassInfo&) {
  return Tell();
}

std::vector<LayerForecast> OracleForesight::AtLayer(const LayerRouting&) {
  ++next_;
  return Tell();
}

}  // namespace routecast
