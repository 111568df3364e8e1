// `hidden` as ONNX: see hidden_model.h and hidden_model.cc, whose names these are.
#include <ATen/ATen.h>

#include <algorithm>

#include "models/hidden_model.h"
#include "models/speculation_onnx.h"

namespace routecast {
namespace {

using Value = OnnxLayers::Value;

// Sum over layers of the embeddings of (layer, expert); the last row is "unknown".
Value Experts(OnnxLayers* o, const std::string& table, const Value& ids_BTL,
              int64_t first_layer, int64_t layers) {
  const int64_t E = o->geometry().num_experts;
  const at::Tensor rows = o->Weight(table);
  const Value known =
      o->Add(ids_BTL, at::arange(first_layer, first_layer + layers, at::kLong) * E);
  const Value unknown = o->Op("Equal", {ids_BTL, o->graph().Int(E)});
  const Value all = o->Op("Where", {unknown, o->graph().Int(rows.size(0) - 1), known});
  return o->Sum(o->Rows(rows, all), 2, /*keep=*/false);
}

// What the ids and the source layer say.
Value TokenFeatures(OnnxLayers* o) {
  const at::Tensor table = o->Weight("token.embedding");
  const Value ids = o->Window("token_ids_BT");
  Value x = o->Add(o->Linear(o->Rows(table, ids), "token.linear"),
                   o->Weight("source.embedding")[o->SourceRow()]);
  const int n = o->config().neighbours;
  for (int i = 0; i < (o->decoder() ? n : 2 * n); ++i) {
    const Value shifted = o->Shifted(ids, 2, i < n ? i - n : i - n + 1, /*fill=*/0);
    x = o->Add(x, o->Product(o->Rows(table, shifted), o->Weight("neighbours.weight")[i]));
  }
  return x;
}

Value StateFeatures(OnnxLayers* o, Value x) {
  if (o->config().hidden_width == 0) return x;
  const auto input = [&](const std::string& window, const std::string& name) {
    return o->Linear(o->Norm(o->Window(window), name + ".norm"), name + ".linear");
  };
  if (o->source_layer() < 0) {
    x = o->Add(x, o->Weight("state.absent"));
  } else {
    const int before = o->decoder() ? std::max(0, o->geometry().encoder_layers - 1) : 0;
    x = o->Add(
        x, input("hidden_BTD", "state." + std::to_string(before + o->source_layer())));
  }
  return o->decoder() ? o->Add(x, input("context_BTD", "context")) : x;
}

// A row a token's place, [T,D]; places from 255 on are alike.
Value PositionFeatures(OnnxLayers* o) {
  constexpr int64_t kPlaces = 256;
  at::Tensor rows = at::empty({kPlaces}, at::kLong);
  for (int64_t t = 0; t < kPlaces; ++t) {
    rows.data_ptr<int64_t>()[t] = HiddenNet::PositionRow(t);
  }
  const Value tokens = o->Length(o->Window("token_ids_BT"), 1);
  const Value places = o->Op("Range", {o->graph().Int(0), tokens, o->graph().Int(1)});
  return o->Rows(o->Weight("position.embedding").index_select(0, rows),
                 o->Op("Min", {places, o->graph().Int(kPlaces - 1)}));
}

Value Features(OnnxLayers* o) {
  Value x = StateFeatures(o, TokenFeatures(o));
  if (o->Has("position.embedding")) x = o->Add(x, PositionFeatures(o));
  if (o->source_layer() >= 0) {
    const int64_t known = o->source_layer() + 1;
    const Value own = o->Slice(o->Window("experts_BTL"), 2, 0, known);
    x = o->Add(x, Experts(o, "own_experts.embedding", own,
                          o->geometry().GlobalLayer(o->stack(), 0), known));
  }
  if (o->decoder()) {
    const Value before =
        o->Shifted(o->Window("experts_BTL"), 3, -1, o->geometry().num_experts);
    x = o->Add(x, Experts(o, "previous_experts.embedding", before, 0,
                          o->geometry().decoder_layers));
  }
  return x;
}

// Attention of the encoder's tokens, with a bias by distance.
Value MixTokens(OnnxLayers* o, const Value& x) {
  constexpr int64_t kReach = TokenMixer::kReach;
  const Value at =
      o->Op("Range", {o->graph().Int(0), o->Length(x, 1), o->graph().Int(1)});
  const Value distance = o->Op("Sub", {o->Unsqueeze(at, {0}), o->Unsqueeze(at, {1})});
  const Value row = o->Op(
      "Add", {o->Op("Clip", {distance, o->graph().Int(-kReach), o->graph().Int(kReach)}),
              o->graph().Int(kReach)});
  // [A,2 * kReach + 1] by [T,T]: [A,T,T].
  const Value near = o->Op("Gather", {o->Constant(o->Weight("mixer.bias")), row},
                           {{"axis", int64_t{1}}});
  const Value mask =
      o->Add(o->AdditiveMask(o->Unsqueeze(o->Window("valid_BT"), {1, 2})), near);
  const Value y = o->Norm(x, "mixer.norm");
  return o->Add(x, o->Attention({y, y, mask}, "mixer.attention", o->config().heads));
}

Value Blocks(OnnxLayers* o, Value x) {
  for (int i = 0; i < o->config().layers; ++i) {
    const std::string name = "block." + std::to_string(i);
    const Value inner = o->Gelu(o->Linear(o->Norm(x, name + ".norm"), name + ".in"));
    x = o->Add(x, o->Linear(inner, name + ".out"));
    if (i == 0 && !o->decoder() && o->config().encoder_attention) x = MixTokens(o, x);
    if (i > 0 || !o->decoder() || !o->Has("source.norm.weight")) continue;
    const Value memory =
        o->Linear(o->Norm(o->Window("source_BSD"), "source.norm"), "source.linear");
    const Value mask =
        o->AdditiveMask(o->Unsqueeze(o->Window("source_valid_BS"), {1, 2}));
    x = o->Add(x, o->Attention({o->Norm(x, "source.query_norm"), memory, mask},
                               "source.attention", o->config().heads));
  }
  return x;
}

// Each lead's row through its target's matrix.
Value Logits(OnnxLayers* o, const Value& z_BTHD) {
  const Value weight = o->Constant(o->ByLead(o->Weight("output.weight")).transpose(1, 2));
  const Value y = o->Op("MatMul", {o->Unsqueeze(z_BTHD, {3}), weight});
  return o->Add(o->Squeeze(y, 3), o->ByLead(o->Weight("output.bias")));
}

// Columns of the token table for `count` layers from `layer` on: [V,count * E].
at::Tensor TokenTable(OnnxLayers* o, int64_t layer, int64_t count) {
  const int64_t E = o->geometry().num_experts;
  return o->Weight("prior.token").narrow(1, layer * E, count * E);
}

// The own token's counts for targets of its own, else those of the source's expert.
Value PriorLogits(OnnxLayers* o) {
  const int64_t E = o->geometry().num_experts, H = o->leads(), after = o->after();
  const at::Tensor gain = o->Weight("prior.gain")[o->SourceRow()];
  std::vector<Value> parts;
  if (after > 0) {
    const auto first = o->geometry().GlobalLayer(o->stack(), o->source_layer() + 1);
    parts.push_back(o->Rows((TokenTable(o, first, after) * gain).view({-1, after, E}),
                            o->Window("token_ids_BT")));
  }
  if (H > after) {
    const at::Tensor table = o->Weight("prior.markov")
                                 .narrow(0, o->source_layer() * (E + 1), E + 1)
                                 .narrow(1, after * E, (H - after) * E);
    const Value source =
        o->Op("Gather", {o->Window("experts_BTL"), o->graph().Int(o->source_layer())},
              {{"axis", int64_t{2}}});
    parts.push_back(o->Rows((table * gain).view({E + 1, H - after, E}), source));
  }
  return parts.size() == 1 ? parts[0] : o->Op("Concat", parts, {{"axis", int64_t{2}}});
}

// Counts of the likeliest next tokens, mixed, for targets of the next token.
Value NextTokenLogits(OnnxLayers* o, const Value& y_BTD) {
  const int64_t H = o->leads(), after = o->after(), E = o->geometry().num_experts;
  const Value scores = o->Add(
      o->Product(o->Linear(y_BTD, "next_token.query"), o->Weight("token.embedding")),
      o->Weight("next_token.bias"));
  const int64_t guesses = std::min<int64_t>(HiddenNet::kGuesses, o->config().vocab_size);
  const auto best = o->graph().Ops("TopK", 2, {scores, o->graph().Ints({guesses})},
                                   {{"axis", int64_t{-1}}});
  const at::Tensor table =
      TokenTable(o, o->geometry().GlobalLayer(Stack::kDecoder, 0), H - after);
  const Value counts = o->Op("Exp", {o->Rows(table, best[1])});  // [B,T,K,leads * E]
  const Value share =
      o->Unsqueeze(o->Op("Softmax", {best[0]}, {{"axis", int64_t{-1}}}), {2});
  const Value mixed = o->Op("Log", {o->Op("MatMul", {share, counts})});
  const Value scaled =
      o->Op("Mul", {mixed, o->Constant(o->Weight("prior.next_gain")[o->SourceRow()])});
  return o->Op("Pad", {o->Reshape(scaled, {0, 0, H - after, E}),
                       o->graph().Ints({0, 0, after, 0, 0, 0, 0, 0})});
}

}  // namespace

std::string HiddenOnnx(OnnxLayers* o) {
  const Value y = o->Norm(Blocks(o, Features(o)), "norm");
  const Value z =
      o->Add(o->Unsqueeze(y, {2}), o->Weight("lead.embedding").narrow(0, 0, o->leads()));
  Value logits = Logits(o, z);
  if (o->Has("prior.token")) {
    logits = o->Add(logits, PriorLogits(o));
    if (o->Has("next_token.bias") && o->leads() > o->after()) {
      logits = o->Add(logits, NextTokenLogits(o, y));
    }
  }
  const Value confidence = o->Squeeze(o->Linear(z, "confidence"), 3);
  return o->Finish(logits, o->Op("Sigmoid", {confidence}));
}

}  // namespace routecast
