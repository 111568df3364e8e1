// Layers of speculation models as ONNX operations: the counterpart of
// speculation_layers.h and expert_slots.h for one stack and source layer, with B and T
// (and S) known only when the file runs. Weights are looked up by their names in the
// model. B sequences, T tokens, S encoder tokens, L MoE layers of the stack, W context
// layers, R rows a token, E experts, K of them a token, D width, H leads.
// Thread rule: one thread at a time.
#pragma once

#include <ATen/core/Tensor.h>

#include <map>
#include <string>
#include <vector>

#include "models/onnx_graph.h"
#include "models/speculation_model.h"

namespace routecast {

class OnnxLayers {
 public:
  using Value = OnnxGraph::Value;
  // Keeps a reference to `model`, which has no members (speculation_layers.h).
  OnnxLayers(const SpeculationModel& model, Stack stack, int source_layer);

  const SpeculationConfig& config() const { return model_.config(); }
  const MoeGeometry& geometry() const { return config().geometry; }
  Stack stack() const { return stack_; }
  bool decoder() const { return stack_ == Stack::kDecoder; }
  int source_layer() const { return source_layer_; }
  int64_t leads() const { return model_.NumLeads(stack_, source_layer_); }
  // Inputs have all K experts of a token.
  bool several() const { return geometry().experts_per_token > 1; }
  // Leads whose targets are layers of the same token.
  int64_t after() const { return geometry().layers(stack_) - 1 - source_layer_; }
  // The row of this stack and source in tables of layers + 2 rows.
  int64_t SourceRow() const {
    return source_layer_ + 1 + (decoder() ? geometry().encoder_layers + 1 : 0);
  }
  // Rows of a table by target layer ([layers,..]) in the order of leads: [H,..].
  at::Tensor ByLead(const at::Tensor& by_layer) const;

  // The tensor of a RoutingWindow of this name, an input of the graph from its first use
  // on.
  Value Window(const std::string& name);

  bool Has(const std::string& name) const;
  at::Tensor Weight(const std::string& name) const;  // on the CPU, without gradient
  Value Constant(const at::Tensor& tensor);
  Value Op(const std::string& type, const std::vector<Value>& inputs,
           const std::vector<OnnxAttribute>& attributes = {}) {
    return graph_.Op(type, inputs, attributes);
  }
  OnnxGraph& graph() { return graph_; }

  Value Add(const Value& x, const Value& y) { return Op("Add", {x, y}); }
  Value Add(const Value& x, const at::Tensor& rows) { return Add(x, Constant(rows)); }
  // Lengths of 0 are kept, one of -1 is what is left.
  Value Reshape(const Value& x, const std::vector<int64_t>& shape) {
    return Op("Reshape", {x, graph_.Ints(shape)});
  }
  Value Unsqueeze(const Value& x, const std::vector<int64_t>& axes) {
    return Op("Unsqueeze", {x, graph_.Ints(axes)});
  }
  Value Squeeze(const Value& x, int64_t axis) {
    return Op("Squeeze", {x, graph_.Ints({axis})});
  }
  Value Slice(const Value& x, int64_t axis, int64_t first, int64_t end);
  Value Sum(const Value& x, int64_t axis, bool keep);
  Value Length(const Value& x, int64_t axis);               // a scalar
  Value Rows(const at::Tensor& table, const Value& ids);    // an embedding's
  Value Product(const Value& x, const at::Tensor& weight);  // weight [out,in]
  Value Linear(const Value& x, const std::string& name);
  Value Norm(const Value& x, const std::string& name);
  Value Gelu(const Value& x);
  Value AdditiveMask(const Value& may_attend);
  // Row t holds row t + offset of ids [B,T] or [B,T,..]; `fill` beyond the ends.
  Value Shifted(const Value& ids, int64_t rank, int64_t offset, int64_t fill);

  // query [..,Q,D], memory [..,K,D] of `rank` dimensions; mask is added to scores
  // [..,heads,Q,K], empty = none.
  struct Attended {
    Value query, memory, mask;
    int64_t rank = 3;
  };
  Value Attention(const Attended& of, const std::string& name, int heads);
  Value EncoderLayer(const Value& x, const Value& mask, const std::string& name,
                     int heads);

  struct Slots {
    Value ids, valid;  // [B,T,R]
    int64_t rows;      // R
    Value others;      // [B,T,R,K-1]; empty = one expert a token
  };
  // `others`: with the further choices, where there are several.
  Slots SlotsOf(int64_t context, bool others = false);
  // Who may attend to the rows of all tokens: every row, or one row a token.
  enum class Asks { kRow, kToken };
  Value SlotMask(const Slots& slots, Asks asks);
  Value AddSinusoid(const Value& x_BND);

  // Names the outputs; the file's bytes.
  std::string Finish(const Value& logits_BTHE, const Value& confidence_BTH);

 private:
  Value LastLayers(const std::string& window, int64_t rank, int64_t known,
                   int64_t context);
  Value Known(const Value& ids);

  const SpeculationModel& model_;
  const Stack stack_;
  const int source_layer_;
  OnnxGraph graph_;
  std::map<std::string, Value> window_;
};

}  // namespace routecast
