// `interlayer` as ONNX: see interlayer_model.cc, whose names these are.
#include <ATen/ATen.h>

#include <cmath>

#include "models/speculation_onnx.h"

namespace routecast {
namespace {

using Value = OnnxLayers::Value;

Value Embed(OnnxLayers* o, const OnnxLayers::Slots& slots) {
  const int64_t W = o->config().context;
  const at::Tensor slot = o->Weight("slot.embedding");
  at::Tensor rows = slot.narrow(0, 0, W);
  if (slots.rows > W) rows = at::cat({slot.narrow(0, W, W), rows});
  rows = rows + o->Weight("stack.embedding")[static_cast<int64_t>(o->stack())] +
         o->Weight("source.embedding")[o->source_layer() + 1];
  Value x = o->Rows(o->Weight("expert.embedding"), slots.ids);
  if (!slots.others.empty()) {
    const Value others = o->Rows(o->Weight("others.embedding"), slots.others);
    x = o->Add(x, o->Sum(others, 3, /*keep=*/false));
  }
  x = o->Add(x, rows);
  return o->AddSinusoid(o->Reshape(x, {0, -1, o->config().width}));
}

// One vector a token: attention over its own rows, then over the pattern memory.
Value Pool(OnnxLayers* o, const Value& x_BND, const OnnxLayers::Slots& slots) {
  const int64_t D = o->config().width;
  const Value rows = o->Reshape(x_BND, {0, -1, slots.rows, D});
  const Value weight = o->Unsqueeze(
      o->Op("Cast", {slots.valid}, {{"to", int64_t{static_cast<int>(OnnxType::kFloat)}}}),
      {3});
  const Value count =
      o->Op("Max", {o->Sum(weight, 2, /*keep=*/true), o->graph().Float(1)});
  const Value query =
      o->Op("Div", {o->Sum(o->Op("Mul", {rows, weight}), 2, /*keep=*/true), count});
  const Value mask = o->AdditiveMask(o->Unsqueeze(slots.valid, {2, 3}));
  const Value context =
      o->Squeeze(o->Attention({query, rows, mask, 4}, "context", o->config().heads), 2);
  const Value memory = o->Constant(o->Weight("pattern.memory").unsqueeze(0));
  const Value pattern = o->Attention({context, memory, ""}, "pattern", o->config().heads);
  return o->Norm(o->Add(context, pattern), "norm");
}

// The experts at the source layer: [B,T], of several a token [B,T,K].
Value SourceExperts(OnnxLayers* o) {
  const auto at_source = [&](const std::string& window) {
    return o->Op("Gather", {o->Window(window), o->graph().Int(o->source_layer())},
                 {{"axis", int64_t{2}}});
  };
  const Value first = at_source("experts_BTL");
  if (!o->several()) return first;
  return o->Op("Concat", {o->Unsqueeze(first, {2}), at_source("others_BTLK")},
               {{"axis", int64_t{2}}});
}

// Counts of the train part from the expert at the source layer (of several the mean of
// the probabilities that each gives), times their gain.
Value PriorLogits(OnnxLayers* o) {
  const int64_t E = o->geometry().num_experts, H = o->leads();
  const int64_t layer = o->geometry().GlobalLayer(o->stack(), o->source_layer());
  const at::Tensor table = o->Weight("prior.markov")
                               .narrow(0, layer * (E + 1), E + 1)
                               .narrow(1, 0, H * E)
                               .reshape({E + 1, H, E});
  const at::Tensor gain = o->Weight("prior.gain")[layer];
  if (!o->several()) return o->Rows(table.mul(gain), SourceExperts(o));
  const Value sum = o->Op("ReduceLogSumExp", {o->Rows(table, SourceExperts(o))},
                          {{"axes", std::vector<int64_t>{2}}, {"keepdims", int64_t{0}}});
  const double K = o->geometry().experts_per_token;
  const Value mean = o->Add(sum, o->graph().Float(static_cast<float>(-std::log(K))));
  return o->Op("Mul", {mean, o->Constant(gain)});
}

}  // namespace

std::string InterlayerOnnx(OnnxLayers* o) {
  const SpeculationConfig& c = o->config();
  const OnnxLayers::Slots slots = o->SlotsOf(c.context, /*others=*/true);
  const Value mask = o->SlotMask(slots, OnnxLayers::Asks::kRow);
  Value x = Embed(o, slots);
  for (int i = 0; i < c.layers; ++i) {
    x = o->EncoderLayer(x, mask, "layer." + std::to_string(i), c.heads);
  }
  const Value h = o->Add(o->Unsqueeze(Pool(o, x, slots), {2}),
                         o->Weight("lead.embedding").narrow(0, 0, o->leads()));
  const Value inner = o->Gelu(o->Linear(h, "head.in"));
  Value logits = o->Linear(o->Gelu(o->Linear(inner, "head.mid")), "head.out");
  if (o->Has("prior.markov") && o->source_layer() >= 0) {
    logits = o->Add(logits, PriorLogits(o));
  }
  const Value confidence =
      o->Linear(o->Gelu(o->Linear(h, "confidence.in")), "confidence.out");
  return o->Finish(logits, o->Op("Sigmoid", {o->Squeeze(confidence, 3)}));
}

}  // namespace routecast
