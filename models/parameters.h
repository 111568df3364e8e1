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

#include "common/files.h"

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

// Reads the tensors of one safetensors file whose names pass `keep` (all where empty),
// one at a time, converted to `dtype` (as stored where Undefined). Throws
// DataError/UsageError.
Parameters ReadParameters(const fs::path& file, at::ScalarType dtype,
                          const std::function<bool(const std::string&)>& keep = {});
// Writes float tensors as `dtype` (Undefined: as they are); atomic.
void WriteParameters(const fs::path& file, const Parameters& parameters,
                     at::ScalarType dtype,
                     const std::map<std::string, std::string>& metadata = {});

at::ScalarType ParseDtype(const std::string& flag,
                          const std::string& name);  // fp32 bf16 fp16
// The device of --device: auto, cpu, cuda, cuda:N. EnvironmentError where there is none.
// Threads of every operation of this process; once, at the start.
void SetComputeThreads(int threads);
at::Device ParseDevice(const std::string& name, int local_rank);

}  // namespace routecast
