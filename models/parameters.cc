#include "models/parameters.h"

#include <ATen/ATen.h>
#include <ATen/Parallel.h>

#include <cstring>

#include "common/errors.h"
#include "common/safetensors.h"

namespace routecast {
namespace {

at::ScalarType TypeOf(const std::string& dtype, const std::string& what) {
  if (dtype == "F32") return at::kFloat;
  if (dtype == "BF16") return at::kBFloat16;
  if (dtype == "F16") return at::kHalf;
  if (dtype == "F64") return at::kDouble;
  if (dtype == "I64") return at::kLong;
  if (dtype == "I32") return at::kInt;
  if (dtype == "U8") return at::kByte;
  if (dtype == "BOOL") return at::kBool;
  throw DataError(ErrorText(what + " has a tensor of a type that no model here uses",
                            "dtype " + dtype, "write it as F32, BF16 or F16"));
}

std::string NameOf(at::ScalarType type) {
  switch (type) {
    case at::kFloat:
      return "F32";
    case at::kBFloat16:
      return "BF16";
    case at::kHalf:
      return "F16";
    case at::kDouble:
      return "F64";
    case at::kLong:
      return "I64";
    case at::kInt:
      return "I32";
    case at::kByte:
      return "U8";
    case at::kBool:
      return "BOOL";
    default:
      throw std::logic_error("no safetensors name for this dtype");
  }
}

}  // namespace

void Parameters::Add(const std::string& name, at::Tensor tensor) {
  if (!index_.emplace(name, items_.size()).second) {
    throw std::logic_error("parameter named twice: " + name);
  }
  items_.emplace_back(name, std::move(tensor));
}

const at::Tensor& Parameters::Get(const std::string& name) const {
  const auto it = index_.find(name);
  if (it == index_.end()) {
    throw DataError(ErrorText("the checkpoint lacks the tensor " + name, "",
                              "does config.json belong to these weights?"));
  }
  return items_[it->second].second;
}

std::vector<at::Tensor> Parameters::tensors() const {
  std::vector<at::Tensor> all;
  for (const auto& [name, tensor] : items_) all.push_back(tensor);
  return all;
}

int64_t Parameters::num_elements() const {
  int64_t n = 0;
  for (const auto& [name, tensor] : items_) n += tensor.numel();
  return n;
}

Parameters ReadParameters(const fs::path& file, at::ScalarType dtype,
                          const std::function<bool(const std::string&)>& keep) {
  Parameters parameters;
  for (const TensorEntry& entry : ReadSafetensorsIndex(file).tensors) {
    if (keep && !keep(entry.name)) continue;
    const std::string bytes = ReadTensorBytes(file, entry);
    at::Tensor tensor = at::empty(entry.shape, TypeOf(entry.dtype, file.string()));
    std::memcpy(tensor.data_ptr(), bytes.data(), bytes.size());
    if (dtype != at::ScalarType::Undefined && tensor.is_floating_point()) {
      tensor = tensor.to(dtype);
    }
    parameters.Add(entry.name, std::move(tensor));
  }
  return parameters;
}

void WriteParameters(const fs::path& file, const Parameters& parameters,
                     at::ScalarType dtype,
                     const std::map<std::string, std::string>& metadata) {
  std::vector<at::Tensor> kept;  // alive until written
  std::vector<TensorToWrite> tensors;
  for (const auto& [name, tensor] : parameters.items()) {
    at::Tensor t = tensor.detach().to(at::kCPU);
    if (dtype != at::ScalarType::Undefined && t.is_floating_point()) t = t.to(dtype);
    kept.push_back(t.contiguous());
    tensors.push_back({name, NameOf(t.scalar_type()), kept.back().sizes().vec(),
                       kept.back().data_ptr()});
  }
  WriteSafetensors(file, tensors, metadata);
}

at::ScalarType ParseDtype(const std::string& flag, const std::string& name) {
  constexpr at::ScalarType kTypes[] = {at::kFloat, at::kBFloat16, at::kHalf};
  return kTypes[ParseChoice(flag, name, {"fp32", "bf16", "fp16"})];
}

void SetComputeThreads(int threads) {
  at::set_num_threads(threads);
  at::set_num_interop_threads(1);
}

at::Device ParseDevice(const std::string& name, int local_rank) {
  const int count =
      at::hasCUDA() ? static_cast<int>(at::detail::getCUDAHooks().deviceCount()) : 0;
  if (name == "cpu" || (name == "auto" && count == 0)) return at::kCPU;
  if (name == "auto" || name == "cuda") {
    if (count > 0) return {at::kCUDA, static_cast<c10::DeviceIndex>(local_rank % count)};
  } else if (name.rfind("cuda:", 0) == 0 && name.size() > 5 && name.size() < 9 &&
             name.find_first_not_of("0123456789", 5) == std::string::npos) {
    const int index = std::stoi(name.substr(5));
    if (index < count) return {at::kCUDA, static_cast<c10::DeviceIndex>(index)};
  } else {
    ParseChoice("--device", name, {"auto", "cpu", "cuda", "cuda:0"});
  }
  throw EnvironmentError(
      ErrorText("--device=" + name + ": no such CUDA device",
                std::to_string(count) + " CUDA devices were found",
                "use --device=cpu, or a build and a driver with CUDA"));
}

}  // namespace routecast
