// Named parameters in a fixed order: what a model is made of, and what files hold.
// Thread rule: const access from any thread; mutation by one.
#pragma once

#include <ATen/core/Tensor.h>

#include <functional>
#include <map>
#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

#include "common/byte_file.h"
#include "common/tensor_entry.h"

namespace routecast {

class Parameters {
 public:
  void Add(const std::string& name, at::Tensor tensor);  // CHECKs that the name is new
  // Throws DataError naming the parameter where absent.
  const at::Tensor& Get(const std::string& name) const;
  bool Has(const std::string& name) const { return index_.count(name) > 0; }
  const std::vector<std::pair<std::string, at::Tensor>>& items() const { return items_; }
  std::vector<at::Tensor> tensors() const;
  int64_t num_elements() const;

 private:
  std::vector<std::pair<std::string, at::Tensor>> items_;
  std::unordered_map<std::string, size_t> index_;
};

// A parameter, or one member's part of one that several models share (its first
// dimension): what an optimizer and a gradient's norm work on.
struct ParameterSlice {
  std::string name;
  at::Tensor whole;
  int64_t index = -1;  // -1 = the whole tensor
  // Views. Gradient() REQUIRES that there is one.
  at::Tensor Value() const { return Part(whole); }
  at::Tensor Gradient() const;
  at::Tensor Part(const at::Tensor& of) const;  // of a tensor of the same shape
};
std::vector<ParameterSlice> SlicesOf(const Parameters& parameters);  // whole ones

// Reads one tensor, converted to `dtype` where it is of floating point (as stored where
// Undefined). Takes the tensor's own memory and a small buffer; a tensor with strides
// takes its span of the file beside it. Throws DataError (a type that no model uses).
at::Tensor ReadTensor(const ByteFile& file, const TensorEntry& entry,
                      at::ScalarType dtype);
// Reads the tensors of one safetensors file whose names pass `keep` (all where empty),
// one at a time, as ReadTensor does. Throws DataError/UsageError.
Parameters ReadParameters(const fs::path& file, at::ScalarType dtype,
                          const std::function<bool(const std::string&)>& keep = {});
// Writes float tensors as `dtype` (Undefined: as they are); atomic, and a tensor at a
// time takes memory beside the parameters.
void WriteParameters(const fs::path& file, const Parameters& parameters,
                     at::ScalarType dtype,
                     const std::map<std::string, std::string>& metadata = {});

// How a tensor is written as `dtype` (Undefined: as it is; only floats are converted):
// its type, and itself, contiguous on the CPU.
at::ScalarType StoredType(const at::Tensor& tensor, at::ScalarType dtype);
at::Tensor ToStore(const at::Tensor& tensor, at::ScalarType dtype);
// The name of a type in safetensors files ("F32"); CHECKs that it has one.
std::string DtypeName(at::ScalarType type);

at::ScalarType ParseDtype(const std::string& flag,
                          const std::string& name);  // fp32 bf16 fp16
// The device of --device: auto, cpu, cuda, cuda:N. EnvironmentError where there is none.
// Threads of every operation of this process; once, at the start.
void SetComputeThreads(int threads);
at::Device ParseDevice(const std::string& name, int local_rank);

}  // namespace routecast
