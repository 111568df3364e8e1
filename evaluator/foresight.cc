#include "evaluator/foresight.h"

#include <ATen/ATen.h>

#include <algorithm>
#include <cstring>
#include <string>
#include <utility>

#include "evaluator/question_guard.h"

namespace routecast {

namespace {

// A question stands between two layers of a pass, whose weights have driven everything
// else out of the caches: a tensor call then takes some ten microseconds, so that windows
// are put together by copying rows.

// The tensor itself where it is one of plain rows on the CPU already.
at::Tensor PlainRows(const at::Tensor& t, at::ScalarType type) {
  if (t.is_cpu() && t.scalar_type() == type && t.is_contiguous()) return t;
  return t.to(at::kCPU, type).contiguous();
}

size_t TokenBytes(const at::Tensor& rows_BT) {
  const int64_t tokens = rows_BT.size(0) * rows_BT.size(1);
  return tokens == 0 ? 0 : rows_BT.nbytes() / static_cast<size_t>(tokens);
}

at::Tensor EmptyOfTokens(const at::Tensor& like, int64_t tokens) {
  std::vector<int64_t> sizes = like.sizes().vec();
  sizes[1] = tokens;
  return at::empty(sizes, like.scalar_type());
}

// Tokens [first, first + count) of each sequence of `from` to its tokens from `at` on.
void CopyTokens(const at::Tensor& from, int64_t first, int64_t count, at::Tensor* to,
                int64_t at) {
  const size_t bytes = TokenBytes(from);
  const auto* source = static_cast<const std::byte*>(from.const_data_ptr());
  auto* target = static_cast<std::byte*>(to->mutable_data_ptr());
  for (int64_t b = 0; b < from.size(0); ++b) {
    std::memcpy(target + static_cast<size_t>(b * to->size(1) + at) * bytes,
                source + static_cast<size_t>(b * from.size(1) + first) * bytes,
                static_cast<size_t>(count) * bytes);
  }
}

// The newest `keep` tokens of `old`, then all of `fresh`; plain rows. Always a copy: a
// predictor that writes into its window must not reach the model's tensors.
at::Tensor Extended(const at::Tensor& old, int64_t keep, const at::Tensor& fresh) {
  keep = std::max<int64_t>(keep, 0);
  at::Tensor all = EmptyOfTokens(fresh, keep + fresh.size(1));
  if (keep > 0) CopyTokens(old, old.size(1) - keep, keep, &all, 0);
  CopyTokens(fresh, 0, fresh.size(1), &all, keep);
  return all;
}

// Whether the newest ids of each sequence are those of `pass`, where they count.
bool SameIds(const at::Tensor& ids_B1, const PassInfo& pass) {
  if (!ids_B1.defined() || ids_B1.sizes() != pass.token_ids_BT.sizes()) return false;
  const at::Tensor ids = PlainRows(pass.token_ids_BT, at::kLong),
                   valid = PlainRows(pass.valid_BT, at::kBool);
  for (int64_t b = 0; b < ids.size(0); ++b) {
    if (valid.const_data_ptr<bool>()[b] &&
        ids.const_data_ptr<int64_t>()[b] != ids_B1.const_data_ptr<int64_t>()[b]) {
      return false;
    }
  }
  return true;
}

// Writes the choices of a pass' tokens, one row of numbers each, as those of `layer` from
// token `from` on: into a copy, as the window handed out before must not change under its
// reader.
void PutChoices(const at::Tensor& chosen_BT, int64_t from, int64_t layer,
                at::Tensor* window_BTL) {
  const int64_t tokens = window_BTL->size(1), layers = window_BTL->size(2);
  at::Tensor all = EmptyOfTokens(*window_BTL, tokens);
  CopyTokens(*window_BTL, 0, tokens, &all, 0);
  const at::Tensor chosen = PlainRows(chosen_BT, at::kLong);
  const int64_t fresh = tokens - from,
                width = all.numel() / (all.size(0) * tokens * layers);
  for (int64_t row = 0; row * width < chosen.numel(); ++row) {
    const int64_t b = row / fresh, t = from + row % fresh;
    std::copy_n(chosen.const_data_ptr<int64_t>() + row * width, width,
                all.data_ptr<int64_t>() + ((b * tokens + t) * layers + layer) * width);
  }
  *window_BTL = std::move(all);
}

// 1 - prod(1 - p) over the tokens that count, for each expert, p = the chance that the
// token takes it; probs_BTE is an answer (RequireAnswers) of the newest tokens of
// valid_BT.
std::vector<float> NeededByAny(const at::Tensor& probs_BTE, const at::Tensor& valid_BT,
                               int experts_per_token) {
  const at::Tensor probs = PlainRows(probs_BTE, at::kFloat);
  const int64_t tokens = probs.size(1), before = valid_BT.size(1) - tokens;
  const auto experts = static_cast<size_t>(probs.size(2));
  const float* p = probs.const_data_ptr<float>();
  const bool* valid = valid_BT.const_data_ptr<bool>();
  std::vector<float> none(experts, 1.f);
  for (int64_t row = 0; row < probs.size(0) * tokens; ++row, p += experts) {
    const int64_t b = row / tokens;
    if (!valid[b * valid_BT.size(1) + before + row % tokens]) continue;
    for (size_t e = 0; e < experts; ++e) {
      none[e] *= 1 - UseProbability(p[e], experts_per_token);
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
      next_token_(std::move(next_token)) {}

std::string PredictorForesight::name() const { return predictor_->name(); }

std::vector<LayerForecast> PredictorForesight::AtPassBegin(const PassInfo& pass) {
  const at::Tensor guessed = std::exchange(guessed_B1_, at::Tensor());
  // Rows that have ended count no more.
  const bool answered =
      pass.stack == Stack::kDecoder && pass.first_position > 0 && SameIds(guessed, pass);
  if (!answered) {
    SkipPass(pass);
    return Ask(-1);
  }
  // What was said at the last pass' end is of this very question.
  StartPass(pass);
  return {};
}

void PredictorForesight::SkipPass(const PassInfo& pass) {
  guessed_B1_ = at::Tensor();  // an answer to an earlier pass
  StartPass(pass);
}

void PredictorForesight::StartPass(const PassInfo& pass) {
  const int64_t batch = pass.token_ids_BT.size(0), tokens = pass.token_ids_BT.size(1);
  const int64_t layers = geometry_.layers(pass.stack);
  const bool goes_on = pass.stack == Stack::kDecoder && pass.first_position > 0 &&
                       window_.stack == Stack::kDecoder && window_.tokens_BT.defined() &&
                       window_.tokens_BT.size(0) == batch;
  at::Tensor unknown = at::empty({batch, tokens, layers}, at::kLong);
  std::fill_n(unknown.data_ptr<int64_t>(), unknown.numel(), geometry_.num_experts);
  const int64_t keep =
      goes_on ? KeptTokens(*predictor_, window_.tokens_BT.size(1), tokens) : 0;
  window_.tokens_BT =
      Extended(window_.tokens_BT, keep, PlainRows(pass.token_ids_BT, at::kLong));
  window_.valid_BT =
      Extended(window_.valid_BT, keep, PlainRows(pass.valid_BT, at::kBool));
  window_.experts_BTL = keep > 0 ? Extended(window_.experts_BTL, keep, unknown) : unknown;
  if (const int64_t others = geometry_.experts_per_token - 1; others > 0) {
    at::Tensor rest = at::empty({batch, tokens, layers, others}, at::kLong);
    std::fill_n(rest.data_ptr<int64_t>(), rest.numel(), geometry_.num_experts);
    window_.others_BTLK = keep > 0 ? Extended(window_.others_BTLK, keep, rest) : rest;
  }
  if (!goes_on) hidden_BTD_.assign(static_cast<size_t>(layers), at::Tensor());
  window_.stack = pass.stack;
  window_.pass_tokens = static_cast<int>(tokens);
  window_.first_token = pass.first_position - keep;
  if (pass.stack == Stack::kEncoder) source_BSD_ = at::Tensor();
  if (pass.stack == Stack::kDecoder && pass.source_BSD.defined()) {
    source_BSD_ = pass.source_BSD;
    source_valid_BS_ = pass.source_valid_BS;
  }
}

void PredictorForesight::Remember(const LayerRouting& routing) {
  const int layer = geometry_.LayerInStack(routing.layer);
  const int64_t tokens = window_.tokens_BT.size(1), from = tokens - window_.pass_tokens;
  PutChoices(routing.expert_ids_BT, from, layer, &window_.experts_BTL);
  if (window_.others_BTLK.defined() && routing.other_ids_BTK.defined())
    PutChoices(routing.other_ids_BTK, from, layer, &window_.others_BTLK);
  if (!predictor_->needs_hidden() || !routing.input_BTD.defined()) return;
  at::Tensor& kept = hidden_BTD_[static_cast<size_t>(layer)];
  const at::Tensor fresh = PlainRows(routing.input_BTD, at::kFloat);
  if (window_.stack == Stack::kEncoder && layer + 1 == geometry_.encoder_layers) {
    source_BSD_ = Extended({}, 0, fresh);  // outlives the pass
    source_valid_BS_ = window_.valid_BT;
  }
  kept =
      Extended(kept, kept.defined() ? std::min<int64_t>(kept.size(1), from) : 0, fresh);
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
  const auto newest = [&](const at::Tensor& rows_BT) {
    return tokens == 1 ? rows_BT : rows_BT.narrow(1, tokens - 1, 1);
  };
  next.token_ids_BT = (*next_token_)(newest(pass.output_BTD));
  next.valid_BT = newest(pass.valid_BT);
  next.first_position = pass.first_position + static_cast<int>(tokens);
  // The window as it will be, for this question only, whether or not it is answered.
  struct Restored {
    Window* window;
    Window now;
    ~Restored() { *window = std::move(now); }
  } const restored{&window_, window_};
  StartPass(next);
  std::vector<LayerForecast> forecasts = Ask(-1);
  guessed_B1_ = next.token_ids_BT;
  return forecasts;
}

void PredictorForesight::Skip(const LayerRouting& routing) { Remember(routing); }

at::Tensor PredictorForesight::Context(bool newest_known) const {
  const at::Tensor& last = hidden_BTD_.back();
  const int64_t tokens = window_.tokens_BT.size(1);
  const int64_t before = last.defined() ? last.size(1) - newest_known : 0;
  const int64_t kept = std::min(before, tokens - 1);
  if (kept == 0) return {};  // counts as zeros
  // Only the newest row matters where the history was cut.
  at::Tensor context = EmptyOfTokens(last, tokens);
  std::memset(context.mutable_data_ptr(), 0, context.nbytes());
  CopyTokens(last, before - kept, kept, &context, tokens - kept);
  return context;
}

std::vector<LayerForecast> PredictorForesight::Ask(int source_layer) {
  RoutingWindow window;
  window.stack = window_.stack;
  window.source_layer = source_layer;
  window.num_layers = geometry_.layers(window_.stack);
  window.num_experts = geometry_.num_experts;
  window.first_token = window_.first_token;
  window.token_ids_BT = window_.tokens_BT;
  window.valid_BT = window_.valid_BT;
  window.experts_BTL = window_.experts_BTL;
  window.others_BTLK = window_.others_BTLK;
  const int64_t batch = window_.tokens_BT.size(0);
  if (source_layer >= 0 && predictor_->needs_hidden()) {
    const at::Tensor& hidden = hidden_BTD_[static_cast<size_t>(source_layer)];
    // Where the history began without this layer, only a window of equal length serves.
    if (!hidden.defined() || hidden.size(1) != window_.tokens_BT.size(1)) return {};
    window.hidden_BTD = hidden;
  }
  const bool decoder = window_.stack == Stack::kDecoder;
  if (decoder && predictor_->needs_hidden()) {
    window.context_BTD = Context(source_layer == window.num_layers - 1);
    if (source_BSD_.defined() && source_BSD_.size(0) == batch) {
      window.source_BSD = source_BSD_;
      window.source_valid_BS = source_valid_BS_;
    }
  }
  std::vector<LayerForecast> forecasts;
  // Encoder: layers ahead. Decoder: up to this layer's next turn.
  const int reach = decoder ? window.num_layers : window.num_layers - 1 - source_layer;
  const int leads = std::min(max_lead_, reach);
  if (leads < 1) return {};
  const auto answers = decoder ? predictor_->PredictLast(window, leads)
                               : predictor_->PredictLeads(window, leads);
  RequireAnswers(answers, window, decoder ? 1 : window.token_ids_BT.size(1));
  const int said = std::min(leads, static_cast<int>(answers.size()));
  for (int lead = 1; lead <= said; ++lead) {
    const int target = source_layer + lead;
    const std::optional<at::Tensor>& probs = answers[static_cast<size_t>(lead - 1)];
    if (!probs) continue;
    forecasts.push_back(
        {geometry_.GlobalLayer(window_.stack, target % window.num_layers), lead,
         NeededByAny(*probs, window_.valid_BT, geometry_.experts_per_token)});
  }
  if (decoder && source_layer == -1) AddLaterUse(window, &forecasts);
  return forecasts;
}

void PredictorForesight::AddLaterUse(const RoutingWindow& window,
                                     std::vector<LayerForecast>* forecasts) const {
  const std::optional<at::Tensor> said = predictor_->LaterUse();
  if (!said) return;
  if (!said->defined() || said->dim() != 3 || said->size(1) != window.num_layers) {
    throw std::runtime_error("what is said of later use is not [batch, layers, experts]");
  }
  std::vector<std::optional<at::Tensor>> by_layer;
  for (int l = 0; l < window.num_layers; ++l) by_layer.push_back(said->narrow(1, l, 1));
  RequireAnswers(by_layer, window, 1);
  for (int l = 0; l < window.num_layers; ++l) {
    forecasts->push_back({geometry_.GlobalLayer(window_.stack, l), LayerForecast::kLater,
                          NeededByAny(*by_layer[static_cast<size_t>(l)], window_.valid_BT,
                                      geometry_.experts_per_token)});
  }
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
