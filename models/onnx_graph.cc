#include "models/onnx_graph.h"

#include <cstring>

#include "common/errors.h"

namespace routecast {
namespace {

constexpr int kIrVersion = 8, kOperatorSet = 17;

enum Wire { kVarint = 0, kBytes = 2, kFixed32 = 5 };
// Fields of ModelProto, OperatorSetIdProto, GraphProto, NodeProto, AttributeProto,
// TensorProto, ValueInfoProto, TypeProto, TypeProto.Tensor, TensorShapeProto and its
// Dimension.
constexpr int kModelIr = 1, kModelProducer = 2, kModelGraph = 7, kModelOperators = 8;
constexpr int kOperatorsVersion = 2;
constexpr int kGraphNode = 1, kGraphName = 2, kGraphConstant = 5, kGraphInput = 11,
              kGraphOutput = 12;
constexpr int kNodeInput = 1, kNodeOutput = 2, kNodeName = 3, kNodeType = 4,
              kNodeAttribute = 5;
constexpr int kAttributeName = 1, kAttributeFloat = 2, kAttributeInt = 3,
              kAttributeInts = 8, kAttributeType = 20;
constexpr int kTypeOfFloat = 1, kTypeOfInt = 2, kTypeOfInts = 7;
constexpr int kTensorDims = 1, kTensorType = 2, kTensorName = 8, kTensorBytes = 9;
constexpr int kInfoName = 1, kInfoType = 2, kTypeTensor = 1, kElementType = 1, kShape = 2,
              kShapeAxis = 1, kAxisLength = 1, kAxisName = 2;

void AddVarint(uint64_t value, std::string* out) {
  for (; value >= 0x80; value >>= 7) out->push_back(static_cast<char>(value | 0x80));
  out->push_back(static_cast<char>(value));
}

void AddTag(int field, Wire wire, std::string* out) {
  AddVarint(static_cast<uint64_t>(field) << 3 | wire, out);
}

void AddInt(int field, int64_t value, std::string* out) {
  AddTag(field, kVarint, out);
  AddVarint(static_cast<uint64_t>(value), out);
}

void AddBytes(int field, std::string_view bytes, std::string* out) {
  AddTag(field, kBytes, out);
  AddVarint(bytes.size(), out);
  out->append(bytes);
}

std::string AttributeOf(const OnnxAttribute& attribute) {
  std::string out;
  AddBytes(kAttributeName, attribute.first, &out);
  if (const auto* i = std::get_if<int64_t>(&attribute.second)) {
    AddInt(kAttributeInt, *i, &out);
    AddInt(kAttributeType, kTypeOfInt, &out);
  } else if (const auto* f = std::get_if<float>(&attribute.second)) {
    AddTag(kAttributeFloat, kFixed32, &out);
    char bytes[sizeof *f];
    std::memcpy(bytes, f, sizeof bytes);  // little-endian machines alone
    out.append(bytes, sizeof bytes);
    AddInt(kAttributeType, kTypeOfFloat, &out);
  } else {
    for (const int64_t i : std::get<std::vector<int64_t>>(attribute.second)) {
      AddInt(kAttributeInts, i, &out);
    }
    AddInt(kAttributeType, kTypeOfInts, &out);
  }
  return out;
}

std::string InfoOf(const std::string& name, OnnxType type,
                   const std::vector<OnnxAxis>& shape) {
  std::string axes;
  for (const OnnxAxis& axis : shape) {
    std::string one;
    if (const auto* length = std::get_if<int64_t>(&axis)) {
      AddInt(kAxisLength, *length, &one);
    } else {
      AddBytes(kAxisName, std::get<std::string>(axis), &one);
    }
    AddBytes(kShapeAxis, one, &axes);
  }
  std::string tensor, whole, info;
  AddInt(kElementType, static_cast<int>(type), &tensor);
  AddBytes(kShape, axes, &tensor);
  AddBytes(kTypeTensor, tensor, &whole);
  AddBytes(kInfoName, name, &info);
  AddBytes(kInfoType, whole, &info);
  return info;
}

template <typename T>
std::string_view BytesOf(const T* first, size_t count) {
  return {reinterpret_cast<const char*>(first), count * sizeof(T)};
}

}  // namespace

OnnxGraph::Value OnnxGraph::NewName() { return "v" + std::to_string(names_++); }

OnnxGraph::Value OnnxGraph::Input(const std::string& name, OnnxType type,
                                  const std::vector<OnnxAxis>& shape) {
  AddBytes(kGraphInput, InfoOf(name, type, shape), &inputs_);
  return name;
}

OnnxGraph::Value OnnxGraph::Constant(OnnxType type, const std::vector<int64_t>& shape,
                                     std::string_view bytes) {
  const Value name = NewName();
  std::string tensor;
  for (const int64_t length : shape) AddInt(kTensorDims, length, &tensor);
  AddInt(kTensorType, static_cast<int>(type), &tensor);
  AddBytes(kTensorName, name, &tensor);
  AddBytes(kTensorBytes, bytes, &tensor);
  AddBytes(kGraphConstant, tensor, &constants_);
  return name;
}

OnnxGraph::Value OnnxGraph::Ints(const std::vector<int64_t>& values) {
  return Constant(OnnxType::kInt64, {static_cast<int64_t>(values.size())},
                  BytesOf(values.data(), values.size()));
}

OnnxGraph::Value OnnxGraph::Int(int64_t value) {
  return Constant(OnnxType::kInt64, {}, BytesOf(&value, 1));
}

OnnxGraph::Value OnnxGraph::Float(float value) {
  return Constant(OnnxType::kFloat, {}, BytesOf(&value, 1));
}

OnnxGraph::Value OnnxGraph::Op(const std::string& type, const std::vector<Value>& inputs,
                               const std::vector<OnnxAttribute>& attributes) {
  return Ops(type, 1, inputs, attributes)[0];
}

std::vector<OnnxGraph::Value> OnnxGraph::Ops(
    const std::string& type, int num_outputs, const std::vector<Value>& inputs,
    const std::vector<OnnxAttribute>& attributes) {
  std::string node;
  for (const Value& input : inputs) AddBytes(kNodeInput, input, &node);
  std::vector<Value> outputs;
  for (int i = 0; i < num_outputs; ++i) {
    outputs.push_back(NewName());
    AddBytes(kNodeOutput, outputs.back(), &node);
  }
  AddBytes(kNodeName, type + "." + outputs[0], &node);
  AddBytes(kNodeType, type, &node);
  for (const OnnxAttribute& attribute : attributes) {
    AddBytes(kNodeAttribute, AttributeOf(attribute), &node);
  }
  AddBytes(kGraphNode, node, &nodes_);
  return outputs;
}

void OnnxGraph::Output(const std::string& name, const Value& value, OnnxType type,
                       const std::vector<OnnxAxis>& shape) {
  std::string node;
  AddBytes(kNodeInput, value, &node);
  AddBytes(kNodeOutput, name, &node);
  AddBytes(kNodeType, "Identity", &node);
  AddBytes(kGraphNode, node, &nodes_);
  AddBytes(kGraphOutput, InfoOf(name, type, shape), &outputs_);
}

std::string OnnxGraph::Model(const std::string& name, uint64_t most_bytes) const {
  std::string graph = nodes_;
  AddBytes(kGraphName, name, &graph);
  graph += constants_ + inputs_ + outputs_;
  std::string operators, model;
  AddInt(kOperatorsVersion, kOperatorSet, &operators);
  AddInt(kModelIr, kIrVersion, &model);
  AddBytes(kModelProducer, "routecast", &model);
  AddBytes(kModelGraph, graph, &model);
  AddBytes(kModelOperators, operators, &model);
  if (model.size() > most_bytes) {
    throw UsageError(ErrorText("an ONNX file cannot hold this model",
                               name + " takes " + std::to_string(model.size()) +
                                   " bytes, at most " + std::to_string(most_bytes),
                               "train without --onnx, or a smaller model"));
  }
  return model;
}

}  // namespace routecast
