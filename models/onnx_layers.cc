#include "models/onnx_layers.h"

#include <ATen/ATen.h>

#include <cmath>
#include <limits>
#include <stdexcept>
#include <utility>

#include "models/speculation_layers.h"

namespace routecast {
namespace {

constexpr int64_t kEnd = std::numeric_limits<int64_t>::max();

OnnxType TypeOf(const at::Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case at::kFloat:
      return OnnxType::kFloat;
    case at::kLong:
      return OnnxType::kInt64;
    case at::kBool:
      return OnnxType::kBool;
    default:
      throw std::logic_error("no ONNX constant of this type is written");
  }
}

}  // namespace

OnnxLayers::OnnxLayers(const SpeculationModel& model, Stack stack, int source_layer)
    : model_(model), stack_(stack), source_layer_(source_layer) {}

at::Tensor OnnxLayers::ByLead(const at::Tensor& by_layer) const {
  std::vector<int64_t> targets;
  for (int64_t lead = 1; lead <= leads(); ++lead) {
    const auto layer = (source_layer_ + lead) % geometry().layers(stack_);
    targets.push_back(geometry().GlobalLayer(stack_, static_cast<int>(layer)));
  }
  return by_layer.index_select(0, at::tensor(targets, at::kLong));
}

OnnxLayers::Value OnnxLayers::Window(const std::string& name) {
  if (const auto it = window_.find(name); it != window_.end()) return it->second;
  const OnnxAxis tokens = name.rfind("source", 0) == 0 ? "S" : "T";
  std::vector<OnnxAxis> shape{"B", tokens};
  if (name == "experts_BTL" || name == "others_BTLK") {
    shape.emplace_back(int64_t{geometry().layers(stack_)});
  }
  if (name.back() == 'K') shape.emplace_back(int64_t{geometry().experts_per_token - 1});
  if (name.back() == 'D') shape.emplace_back(int64_t{config().hidden_width});
  const OnnxType type = name.find("valid") != std::string::npos ? OnnxType::kBool
                        : name.back() == 'D'                    ? OnnxType::kFloat
                                                                : OnnxType::kInt64;
  return window_[name] = graph_.Input(name, type, shape);
}

bool OnnxLayers::Has(const std::string& name) const {
  return model_.parameters().Has(name) || model_.constants().Has(name);
}

at::Tensor OnnxLayers::Weight(const std::string& name) const {
  const Parameters& from =
      model_.constants().Has(name) ? model_.constants() : model_.parameters();
  return from.Get(name).detach().cpu();
}

OnnxLayers::Value OnnxLayers::Constant(const at::Tensor& tensor) {
  const at::Tensor t = tensor.contiguous();
  return graph_.Constant(
      TypeOf(t), t.sizes().vec(),
      {static_cast<const char*>(t.const_data_ptr()), static_cast<size_t>(t.nbytes())});
}

OnnxLayers::Value OnnxLayers::Slice(const Value& x, int64_t axis, int64_t first,
                                    int64_t end) {
  return Op("Slice", {x, graph_.Ints({first}), graph_.Ints({end}), graph_.Ints({axis})});
}

OnnxLayers::Value OnnxLayers::Sum(const Value& x, int64_t axis, bool keep) {
  return Op("ReduceSum", {x, graph_.Ints({axis})}, {{"keepdims", int64_t{keep}}});
}

OnnxLayers::Value OnnxLayers::Length(const Value& x, int64_t axis) {
  return Op("Gather", {Op("Shape", {x}), graph_.Int(axis)});
}

OnnxLayers::Value OnnxLayers::Rows(const at::Tensor& table, const Value& ids) {
  return Op("Gather", {Constant(table), ids});
}

OnnxLayers::Value OnnxLayers::Product(const Value& x, const at::Tensor& weight) {
  return Op("MatMul", {x, Constant(weight.t())});
}

OnnxLayers::Value OnnxLayers::Linear(const Value& x, const std::string& name) {
  return Add(Product(x, Weight(name + ".weight")), Weight(name + ".bias"));
}

OnnxLayers::Value OnnxLayers::Norm(const Value& x, const std::string& name) {
  return Op("LayerNormalization",
            {x, Constant(Weight(name + ".weight")), Constant(Weight(name + ".bias"))},
            {{"epsilon", 1e-5f}});
}

// The exact one: x / 2 (1 + erf(x / sqrt 2)). Operator set 17 has none of its own.
OnnxLayers::Value OnnxLayers::Gelu(const Value& x) {
  const Value erf =
      Op("Erf", {Op("Mul", {x, graph_.Float(static_cast<float>(std::sqrt(0.5)))})});
  return Op("Mul", {Op("Mul", {x, Add(erf, graph_.Float(1))}), graph_.Float(0.5f)});
}

OnnxLayers::Value OnnxLayers::AdditiveMask(const Value& may_attend) {
  return Op("Where",
            {may_attend, graph_.Float(0), graph_.Float(static_cast<float>(kMasked))});
}

OnnxLayers::Value OnnxLayers::Shifted(const Value& ids, int64_t rank, int64_t offset,
                                      int64_t fill) {
  std::vector<int64_t> pads(static_cast<size_t>(2 * rank), 0);
  pads[static_cast<size_t>(offset < 0 ? 1 : rank + 1)] = std::abs(offset);
  const Value padded = Op("Pad", {ids, graph_.Ints(pads), graph_.Int(fill)});
  return offset < 0 ? Slice(padded, 1, 0, offset) : Slice(padded, 1, offset, kEnd);
}

OnnxLayers::Value OnnxLayers::Attention(const Attended& of, const std::string& name,
                                        int heads) {
  const int64_t width = Weight(name + ".q.weight").size(0), each = width / heads;
  std::vector<int64_t> split(static_cast<size_t>(of.rank - 1), 0), perm, joined = split;
  split.insert(split.end(), {heads, each});
  joined.push_back(width);
  for (int64_t i = 0; i < of.rank - 2; ++i) perm.push_back(i);
  const int64_t row = of.rank - 2, head = of.rank - 1, column = of.rank;
  std::vector<int64_t> by_head = perm, for_keys = perm;
  by_head.insert(by_head.end(), {head, row, column});
  for_keys.insert(for_keys.end(), {head, column, row});
  const auto project = [&](const Value& x, const std::string& part,
                           const std::vector<int64_t>& order) {
    return Op("Transpose", {Reshape(Linear(x, name + part), split)}, {{"perm", order}});
  };
  Value scores = Op(
      "MatMul", {project(of.query, ".q", by_head), project(of.memory, ".k", for_keys)});
  scores = Op("Mul", {scores, graph_.Float(static_cast<float>(
                                  1 / std::sqrt(static_cast<double>(each))))});
  if (!of.mask.empty()) scores = Add(scores, of.mask);
  const Value mixed = Op("MatMul", {Op("Softmax", {scores}, {{"axis", int64_t{-1}}}),
                                    project(of.memory, ".v", by_head)});
  const Value rows = Op("Transpose", {mixed}, {{"perm", by_head}});
  return Linear(Reshape(rows, joined), name + ".out");
}

OnnxLayers::Value OnnxLayers::EncoderLayer(const Value& x, const Value& mask,
                                           const std::string& name, int heads) {
  const Value attended = Attention({x, x, mask}, name + ".attention", heads);
  const Value y = Norm(Add(x, attended), name + ".attention_norm");
  const Value inner = Gelu(Linear(y, name + ".in"));
  return Norm(Add(y, Linear(inner, name + ".out")), name + ".out_norm");
}

OnnxLayers::Value OnnxLayers::Known(const Value& ids) {
  return Op("Not", {Op("Equal", {ids, graph_.Int(geometry().num_experts)})});
}

// The newest `context` of the first `known` layers of [B,T,L] or [B,T,L,K-1], padded on
// the left.
OnnxLayers::Value OnnxLayers::LastLayers(const std::string& window, int64_t rank,
                                         int64_t known, int64_t context) {
  std::vector<int64_t> pads(static_cast<size_t>(2 * rank), 0);
  pads[2] = context;
  const Value padded =
      Op("Pad", {Window(window), graph_.Ints(pads), graph_.Int(geometry().num_experts)});
  return Slice(padded, 2, known, known + context);
}

OnnxLayers::Slots OnnxLayers::SlotsOf(int64_t context, bool others) {
  at::Tensor newest = at::zeros({context}, at::kBool);
  newest[context - 1] = true;
  // With the token before's rows in front of a decoder's.
  const auto rows_of = [&](const std::string& window, int64_t rank) {
    const Value own = LastLayers(window, rank, source_layer_ + 1, context);
    if (!decoder()) return std::pair{own, Value()};
    const Value all = LastLayers(window, rank, geometry().layers(stack_), context);
    return std::pair{own, Shifted(all, rank, -1, geometry().num_experts)};
  };
  auto [ids, before] = rows_of("experts_BTL", 3);
  Value valid = Op("Or", {Known(ids), Constant(newest)});
  if (decoder()) {
    ids = Op("Concat", {before, ids}, {{"axis", int64_t{2}}});
    valid = Op("Concat", {Known(before), valid}, {{"axis", int64_t{2}}});
  }
  valid = Op("And", {valid, Unsqueeze(Window("valid_BT"), {2})});
  Slots slots{ids, valid, decoder() ? 2 * context : context, {}};
  if (!others || !several()) return slots;
  const auto [own, earlier] = rows_of("others_BTLK", 4);
  slots.others = decoder() ? Op("Concat", {earlier, own}, {{"axis", int64_t{2}}}) : own;
  return slots;
}

OnnxLayers::Value OnnxLayers::SlotMask(const Slots& slots, Asks asks) {
  const Value flat = Reshape(slots.valid, {0, -1});
  Value may = Unsqueeze(flat, {1, 2});
  if (!decoder()) return AdditiveMask(may);
  const auto count = [&](const Value& end) {
    return Op("Range", {graph_.Int(0), end, graph_.Int(1)});
  };
  const Value key = Op("Div", {count(Length(flat, 1)), graph_.Int(slots.rows)});
  const Value query = asks == Asks::kRow ? key : count(Length(slots.valid, 1));
  const Value past = Op("LessOrEqual", {Unsqueeze(key, {0}), Unsqueeze(query, {1})});
  return AdditiveMask(Op("And", {may, past}));
}

OnnxLayers::Value OnnxLayers::AddSinusoid(const Value& x_BND) {
  const int64_t width = config().width;
  const auto even = at::arange(0, width, 2, at::kFloat);
  const auto rate = at::exp(even * (-std::log(10000.0) / static_cast<double>(width)));
  const auto column = at::arange(width, at::kLong);
  const Value row =
      Op("Cast", {Op("Range", {graph_.Int(0), Length(x_BND, 1), graph_.Int(1)})},
         {{"to", int64_t{static_cast<int>(OnnxType::kFloat)}}});
  const Value angle = Op("Mul", {Unsqueeze(row, {1}),
                                 Constant(rate.index_select(0, column.floor_divide(2)))});
  return Add(x_BND, Op("Where", {Constant(column.remainder(2).eq(0)), Op("Sin", {angle}),
                                 Op("Cos", {angle})}));
}

std::string OnnxLayers::Finish(const Value& logits_BTHE, const Value& confidence_BTH) {
  graph_.Output("logits_BTHE", logits_BTHE, OnnxType::kFloat,
                {"B", "T", leads(), int64_t{geometry().num_experts}});
  graph_.Output("confidence_BTH", confidence_BTH, OnnxType::kFloat, {"B", "T", leads()});
  return graph_.Model(config().kind + " " + StackName(stack_) + " " +
                      std::to_string(source_layer_));
}

}  // namespace routecast
