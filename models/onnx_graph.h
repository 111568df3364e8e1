// A writer of ONNX models (github.com/onnx/onnx, onnx.proto; operator set 17): operations
// over named tensors, in the order in which they are added. No LibTorch, no protobuf
// library: the few messages that a graph needs are written by hand.
// Thread rule: one thread at a time.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <utility>
#include <variant>
#include <vector>

namespace routecast {

// The numbers of TensorProto.DataType.
enum class OnnxType : int { kFloat = 1, kInt64 = 7, kBool = 9 };
// A length, or the name of one that is known when the model runs.
using OnnxAxis = std::variant<int64_t, std::string>;
using OnnxAttribute =
    std::pair<std::string, std::variant<int64_t, float, std::vector<int64_t>>>;

class OnnxGraph {
 public:
  using Value = std::string;  // the name of a tensor in the graph

  Value Input(const std::string& name, OnnxType type, const std::vector<OnnxAxis>& shape);
  // A constant; `bytes` are its elements, row-major, little-endian.
  Value Constant(OnnxType type, const std::vector<int64_t>& shape,
                 std::string_view bytes);
  Value Ints(const std::vector<int64_t>& values);  // [n]
  Value Int(int64_t value);                        // a scalar, as the next
  Value Float(float value);
  Value Op(const std::string& type, const std::vector<Value>& inputs,
           const std::vector<OnnxAttribute>& attributes = {});
  // Of an operation with several outputs.
  std::vector<Value> Ops(const std::string& type, int num_outputs,
                         const std::vector<Value>& inputs,
                         const std::vector<OnnxAttribute>& attributes = {});
  // Names `value` as an output of the model.
  void Output(const std::string& name, const Value& value, OnnxType type,
              const std::vector<OnnxAxis>& shape);

  // The model's bytes. Throws UsageError where they are over `most_bytes`: readers of
  // protocol buffers take no more than 2 GiB.
  std::string Model(const std::string& name, uint64_t most_bytes = INT32_MAX) const;

 private:
  Value NewName();
  int64_t names_ = 0;
  // Encoded fields of GraphProto.
  std::string nodes_, constants_, inputs_, outputs_;
};

}  // namespace routecast
