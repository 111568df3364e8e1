#include "trainer/augmentation.h"

#include <ATen/ATen.h>

#include <algorithm>
#include <cmath>

#include "common/errors.h"
#include "common/random.h"

namespace routecast {
namespace {

constexpr int64_t kShortest = 8;
constexpr double kMixupShape = 0.2;  // of the Beta distribution
enum Stream : uint64_t { kLayer = 1, kPart, kPermute, kMask, kMix, kContext, kHide };

// In [0, 1), by everything that tells one draw from another.
template <typename... Values>
double Draw(uint64_t key, Stream stream, Values... values) {
  return ToUnit(
      Mix(key, static_cast<uint64_t>(stream), static_cast<uint64_t>(values)...));
}

// Known layers but the newest one become unknown.
void DropLayers(double share, uint64_t key, SpeculationBatch* batch) {
  RoutingWindow& w = batch->window;
  const int64_t known = w.stack == Stack::kEncoder ? w.source_layer : w.num_layers;
  const int64_t newest = w.source_layer >= 0 ? w.source_layer : w.num_layers - 1;
  for (int64_t b = 0; b < w.experts_BTL.size(0); ++b) {
    for (int64_t l = 0; l < known; ++l) {
      if (l == newest || Draw(key, kLayer, b, l) >= share) continue;
      for (const at::Tensor& ids : {w.experts_BTL, w.others_BTLK}) {
        if (ids.defined()) ids.select(0, b).select(1, l).fill_(w.num_experts);
      }
    }
  }
}

// Row b of x becomes its columns [first, first + count), the rest `padding`.
void Shift(const at::Tensor& x, int64_t b, int64_t first, int64_t count, double padding) {
  if (!x.defined()) return;
  const auto row = x.select(0, b);
  const auto kept = row.narrow(0, first, count).clone();
  row.fill_(padding);
  row.narrow(0, 0, count).copy_(kept);
}

void TakeParts(double share, uint64_t key, SpeculationBatch* batch) {
  RoutingWindow& w = batch->window;
  for (int64_t b = 0; b < w.valid_BT.size(0); ++b) {
    const int64_t tokens = w.valid_BT.select(0, b).sum().item<int64_t>();
    if (tokens <= kShortest || Draw(key, kPart, b, 0) >= share) continue;
    const auto span = [&](int64_t values, int which) {
      return static_cast<int64_t>(Draw(key, kPart, b, which) *
                                  static_cast<double>(values));
    };
    const int64_t count = kShortest + span(tokens - kShortest + 1, 1);
    const int64_t first = span(tokens - count + 1, 2);
    Shift(w.token_ids_BT, b, first, count, 0);
    Shift(w.valid_BT, b, first, count, 0);
    Shift(w.experts_BTL, b, first, count, w.num_experts);
    Shift(w.others_BTLK, b, first, count, w.num_experts);
    Shift(w.hidden_BTD, b, first, count, 0);
    Shift(w.context_BTD, b, first, count, 0);
    Shift(w.gates_BTE, b, first, count, 0);
    Shift(w.attention_entropy_BTA, b, first, count, 0);
    Shift(w.attended_ids_BTAK, b, first, count, -1);
    Shift(batch->labels_BTH, b, first, count, -100);
    Shift(batch->others_BTHK, b, first, count, -100);
    Shift(w.training.teacher_BTH, b, first, count, -100);
    Shift(batch->teacher_ids_BTHK, b, first, count, 0);
    Shift(batch->teacher_probs_BTHK, b, first, count, 0);
    Shift(batch->documents_BT, b, first, count, 0);
    // The token after the part is not seen any more: its layers are no leads of the last.
    if (w.stack == Stack::kDecoder && first + count < tokens) {
      const int64_t own = w.num_layers - 1 - w.source_layer;
      const auto last = batch->labels_BTH.select(0, b).select(0, count - 1);
      last.narrow(0, own, last.size(0) - own).fill_(-100);
    }
  }
}

void PermuteExperts(double share, uint64_t key, SpeculationBatch* batch) {
  RoutingWindow& w = batch->window;
  const auto experts = static_cast<uint64_t>(w.num_experts);
  for (int64_t b = 0; b < w.experts_BTL.size(0); ++b) {
    if (Draw(key, kPermute, b) >= share) continue;
    const Permutation permutation(experts,
                                  Mix(key, kPermute, static_cast<uint64_t>(b), 1));
    auto names = at::empty({w.num_experts + 1}, at::kLong);
    for (uint64_t e = 0; e < experts; ++e) {
      names[static_cast<int64_t>(e)] = static_cast<int64_t>(permutation(e));
    }
    names[w.num_experts] = w.num_experts;  // unknown stays unknown
    for (const at::Tensor& x :
         {w.experts_BTL, w.others_BTLK, batch->labels_BTH, batch->others_BTHK,
          batch->teacher_ids_BTHK, w.training.teacher_BTH}) {
      if (!x.defined()) continue;
      const auto ids = x.select(0, b);
      const auto renamed =
          names.index_select(0, ids.clamp_min(0).flatten()).view(ids.sizes());
      ids.copy_(at::where(ids.ge(0), renamed, ids));  // below 0: does not count
    }
    if (!w.gates_BTE.defined()) continue;
    const auto gates = w.gates_BTE.select(0, b);
    gates.copy_(
        at::zeros_like(gates).index_copy(1, names.narrow(0, 0, w.num_experts), gates));
  }
}

// The token's routing and state, as if nothing were known of it yet.
void HideToken(int64_t b, int64_t t, RoutingWindow* w) {
  const auto token = [&](const at::Tensor& x) { return x.select(0, b).select(0, t); };
  token(w->experts_BTL).fill_(w->num_experts);
  if (w->others_BTLK.defined()) token(w->others_BTLK).fill_(w->num_experts);
  if (w->hidden_BTD.defined()) token(w->hidden_BTD).zero_();
  if (w->context_BTD.defined()) token(w->context_BTD).zero_();
  if (w->gates_BTE.defined()) token(w->gates_BTE).zero_();
  if (w->attended_ids_BTAK.defined()) {
    token(w->attention_entropy_BTA).zero_();
    token(w->attended_ids_BTAK).fill_(-1);
  }
}

// Of all tokens of the sequence; the states that would tell their choices go with them:
// the source layer's, and after the last layer that of the token before.
void HideLayer(int64_t b, int64_t layer, RoutingWindow* w) {
  for (const at::Tensor& ids : {w->experts_BTL, w->others_BTLK}) {
    if (ids.defined()) ids.select(0, b).select(1, layer).fill_(w->num_experts);
  }
  if (layer == w->num_layers - 1 && w->context_BTD.defined()) {
    w->context_BTD.select(0, b).zero_();
  }
  if (layer != w->source_layer) return;
  if (w->hidden_BTD.defined()) w->hidden_BTD.select(0, b).zero_();
  if (w->gates_BTE.defined()) w->gates_BTE.select(0, b).zero_();
  if (w->attended_ids_BTAK.defined()) {
    w->attention_entropy_BTA.select(0, b).zero_();
    w->attended_ids_BTAK.select(0, b).fill_(-1);
  }
}

void MaskTokens(double share, uint64_t key, SpeculationBatch* batch) {
  RoutingWindow& w = batch->window;
  for (int64_t b = 0; b < w.valid_BT.size(0); ++b) {
    for (int64_t t = 0; t < w.valid_BT.size(1); ++t) {
      if (Draw(key, kMask, b, t) >= share) continue;
      HideToken(b, t, &w);
      batch->weights_BT.select(0, b).select(0, t).fill_(1);
    }
  }
}

// As many tokens of each sequence, next to each other.
void MaskBlock(double share, uint64_t key, SpeculationBatch* batch) {
  RoutingWindow& w = batch->window;
  for (int64_t b = 0; b < w.valid_BT.size(0); ++b) {
    const auto tokens = w.valid_BT.select(0, b).sum().item<int64_t>();
    const int64_t count = std::llround(share * static_cast<double>(tokens));
    const auto first = static_cast<int64_t>(Draw(key, kMask, b, 0) *
                                            static_cast<double>(tokens - count + 1));
    for (int64_t t = first; t < first + count; ++t) HideToken(b, t, &w);
    batch->weights_BT.select(0, b).narrow(0, first, count).fill_(1);
  }
}

// One whole layer of those that the model looks at, of a share of the sequences.
void MaskLayer(double share, uint64_t key, int context, SpeculationBatch* batch) {
  RoutingWindow& w = batch->window;
  // A decoder's earlier tokens know the layers after the source, too.
  const int known = w.stack == Stack::kEncoder ? w.source_layer + 1 : w.num_layers;
  const int seen = context > 0 ? std::min(context, known) : known;
  for (int64_t b = 0; b < w.valid_BT.size(0); ++b) {
    if (Draw(key, kMask, b, 0) >= share) continue;
    batch->weights_BT.select(0, b).fill_(1);
    if (seen == 0) continue;
    const int back = static_cast<int>(Draw(key, kMask, b, 1) * seen);
    HideLayer(b, (w.source_layer - back + w.num_layers) % w.num_layers, &w);
  }
}

void Mask(const AugmentOptions& options, uint64_t key, int context,
          SpeculationBatch* batch) {
  batch->weights_BT =
      at::full(batch->window.valid_BT.sizes(), options.unmasked_weight, at::kFloat);
  if (options.mask_mode == "layer") return MaskLayer(options.mask, key, context, batch);
  if (options.mask_mode == "block") return MaskBlock(options.mask, key, batch);
  MaskTokens(options.mask, key, batch);
}

// Beta(a, a) by Joehnk's rejection: u^(1/a) / (u^(1/a) + v^(1/a)) where the sum is 1 at
// most. About half the tries are kept.
double DrawBeta(double a, uint64_t key, int64_t b) {
  for (uint64_t i = 0;; ++i) {
    const double x = std::pow(Draw(key, kMix, b, 2, i), 1 / a);
    const double y = std::pow(Draw(key, kMix, b, 3, i), 1 / a);
    if (x + y > 0 && x + y <= 1) return x / (x + y);
  }
}

void MixSequences(double share, uint64_t key, RoutingWindow* w) {
  const int64_t B = w->valid_BT.size(0);
  if (B < 2) return;
  w->training.order_B = at::arange(B, at::kLong);
  w->training.share_B = at::ones({B});
  for (int64_t b = 0; b < B; ++b) {
    if (Draw(key, kMix, b, 0) >= share) continue;
    const auto step = static_cast<int64_t>(Draw(key, kMix, b, 1) * double(B - 1));
    w->training.order_B[b] = (b + 1 + step) % B;  // another one
    w->training.share_B[b] = DrawBeta(kMixupShape, key, b);
  }
}

// What would tell the expert of this layer otherwise.
void HideStates(int64_t b, int64_t t, int64_t layer, RoutingWindow* w) {
  const auto hide = [&](const at::Tensor& x, int64_t token) {
    if (x.defined() && token < x.size(1)) x.select(0, b).select(0, token).zero_();
  };
  if (layer == w->source_layer) {
    hide(w->hidden_BTD, t);
    hide(w->gates_BTE, t);
  }
  if (layer == w->num_layers - 1) hide(w->context_BTD, t + 1);
}

void HideIds(double share, uint64_t key, RoutingWindow* w) {
  w->training.hidden_ids_BTL = at::full(w->experts_BTL.sizes(), -100, at::kLong);
  const int64_t T = w->experts_BTL.size(1), L = w->experts_BTL.size(2);
  auto* hidden = w->training.hidden_ids_BTL.data_ptr<int64_t>();
  w->experts_BTL = w->experts_BTL.contiguous();
  auto* ids = w->experts_BTL.data_ptr<int64_t>();
  for (int64_t b = 0; b < w->experts_BTL.size(0); ++b) {
    for (int64_t t = 0; t < T; ++t) {
      for (int64_t l = 0; l < L; ++l) {
        const int64_t at = (b * T + t) * L + l;
        if (ids[at] == w->num_experts || Draw(key, kHide, b, t, l) >= share) continue;
        hidden[at] = ids[at];
        ids[at] = w->num_experts;
        HideStates(b, t, l, w);
        if (!w->others_BTLK.defined()) continue;
        w->others_BTLK.select(0, b).select(0, t).select(0, l).fill_(w->num_experts);
      }
    }
  }
}

}  // namespace

Json AugmentOptions::ToJson() const {
  Json json{{"layer_dropout", layer_dropout},
            {"subsequence", subsequence},
            {"permutation", permutation},
            {"mixup", mixup},
            {"noise", noise},
            {"context", context},
            {"masked_ids", masked_ids},
            {"mask", mask},
            {"unmasked_weight", unmasked_weight}};
  // Runs of versions that had one mode are the same as before.
  if (mask_mode != AugmentOptions().mask_mode) json["mask_mode"] = mask_mode;
  return json;
}

void AugmentOptions::Validate() const {
  const auto share = [](const char* flag, double value, bool one) {
    if (value >= 0 && (one ? value <= 1 : value < 1)) return;
    throw UsageError(ErrorText(
        std::string(flag) + " is out of range", "it is " + std::to_string(value),
        std::string("use 0 or more and ") + (one ? "at most 1" : "below 1")));
  };
  share("--augment_layers", layer_dropout, false);
  share("--augment_parts", subsequence, true);
  share("--augment_permutation", permutation, true);
  share("--augment_mask", mask, false);
  share("--augment_unmasked", unmasked_weight, true);
  share("--augment_mixup", mixup, true);
  share("--augment_noise", noise, true);
  share("--augment_context", context, true);
  share("--masked_ids", masked_ids, false);
  ParseChoice("--augment_mask_mode", mask_mode, {"tokens", "block", "layer"});
  if (mask_mode != AugmentOptions().mask_mode && mask == 0) {
    throw UsageError(
        ErrorText("--augment_mask_mode=" + mask_mode + " needs --augment_mask",
                  "nothing is masked", "e.g. --augment_mask=0.15"));
  }
}

void Augment(const AugmentOptions& options, uint64_t key, SpeculationBatch* batch,
             int context) {
  if (!options.any()) return;
  // Windows may share memory with what the data set keeps.
  for (at::Tensor* x :
       {&batch->window.token_ids_BT, &batch->window.valid_BT, &batch->window.experts_BTL,
        &batch->window.others_BTLK, &batch->window.hidden_BTD, &batch->window.context_BTD,
        &batch->window.attention_entropy_BTA, &batch->window.attended_ids_BTAK,
        &batch->window.training.teacher_BTH}) {
    if (x->defined()) *x = x->clone();
  }
  if (options.subsequence > 0) TakeParts(options.subsequence, key, batch);
  if (options.permutation > 0) PermuteExperts(options.permutation, key, batch);
  if (options.layer_dropout > 0) DropLayers(options.layer_dropout, key, batch);
  if (options.mask > 0) Mask(options, key, context, batch);
  if (options.mixup > 0) MixSequences(options.mixup, key, &batch->window);
  batch->window.training.noise = options.noise;
  if (options.masked_ids > 0) HideIds(options.masked_ids, key, &batch->window);
  if (Draw(key, kContext, 0) < options.context) {
    batch->window.context_layers = 1 + static_cast<int>(Draw(key, kContext, 1) * context);
  }
  batch->num_labels = batch->labels_BTH.ne(-100).sum().item<int64_t>();
}

}  // namespace routecast
