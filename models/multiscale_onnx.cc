// `multiscale` as ONNX: see multiscale_model.cc, whose names these are.
#include <ATen/ATen.h>

#include "models/multiscale_shapes.h"
#include "models/speculation_onnx.h"

namespace routecast {
namespace {

using Value = OnnxLayers::Value;

// [B,T,D] of one branch.
Value View(OnnxLayers* o, const std::string& name, BranchShape shape) {
  const int D = o->config().width, heads = HeadsFor(D, shape.heads);
  const OnnxLayers::Slots slots = o->SlotsOf(shape.context);
  // The row past the experts stands for an unknown one.
  const at::Tensor table =
      at::cat({o->Weight("expert.embedding"), o->Weight("ours.unknown_expert")});
  const Value embedded = o->Rows(table, slots.ids);
  at::Tensor slot = o->Weight(name + ".slot");
  if (o->decoder()) slot = at::cat({o->Weight("ours." + name + ".slot_before"), slot});
  Value x = o->AddSinusoid(o->Reshape(o->Add(embedded, slot), {0, -1, D}));
  const Value mask = o->SlotMask(slots, OnnxLayers::Asks::kRow);
  for (int i = 0; i < shape.layers; ++i) {
    x = o->EncoderLayer(x, mask, name + ".layer." + std::to_string(i), heads);
  }
  const Value newest =
      o->Op("Gather", {embedded, o->graph().Int(slots.rows - 1)}, {{"axis", int64_t{2}}});
  const Value query = o->Add(newest, o->Weight("ours.source")[o->SourceRow()]);
  const Value read_mask = o->SlotMask(slots, OnnxLayers::Asks::kToken);
  const Value read = o->Attention({query, x, read_mask}, name + ".read", heads);
  return o->Norm(o->Add(query, read), name + ".norm");
}

}  // namespace

std::string MultiscaleOnnx(OnnxLayers* o) {
  const int64_t E = o->geometry().num_experts, H = o->leads(), D = o->config().width;
  std::vector<Value> views;
  for (int i = 0; i < kBranches; ++i) {
    const std::string number = std::to_string(i), adapter = "adapter." + number;
    const Value view = View(o, "branch." + number, kBranchShapes[i]);
    const Value inner = o->Gelu(o->Linear(view, adapter + ".in"));
    views.push_back(o->Unsqueeze(o->Linear(inner, adapter + ".out"), {2}));
  }
  const Value a = o->Op("Concat", views, {{"axis", int64_t{2}}});  // [B,T,3,D]
  const Value weights =
      o->Constant(at::softmax(o->Weight("fusion.weights"), -1).view({kBranches, 1}));
  const Value fused = o->Attention({a, a, "", 4}, "fusion.attention",
                                   HeadsFor(static_cast<int>(D), kFusionHeads));
  // Both sums have the same weights.
  const Value both = o->Op("Mul", {o->Add(fused, a), weights});
  const Value h = o->Norm(o->Sum(both, 2, /*keep=*/false), "fusion.norm");
  const Value rows =
      o->Product(h, o->ByLead(o->Weight("head.weight")).reshape({H * E, D}));
  const Value logits =
      o->Add(o->Reshape(rows, {0, 0, H, E}), o->ByLead(o->Weight("head.bias")));
  const Value by_lead =
      o->Add(o->Unsqueeze(h, {2}), o->Weight("ours.lead").narrow(0, 0, H));
  const Value confidence = o->Squeeze(o->Linear(by_lead, "confidence"), 3);
  return o->Finish(logits, o->Op("Sigmoid", {confidence}));
}

}  // namespace routecast
