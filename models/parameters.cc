#include "models/parameters.h"

#include <ATen/ATen.h>
#include <ATen/Parallel.h>

#include <algorithm>

#include "common/errors.h"
#include "common/safetensors.h"
#include "models/device_choice.h"

namespace routecast {
namespace {

constexpr size_t kBufferBytes = size_t{4} << 20;

constexpr std::pair<const char*, at::ScalarType> kTypes[] = {
    {"F32", at::kFloat},  {"BF16", at::kBFloat16}, {"F16", at::kHalf},
    {"F64", at::kDouble}, {"I64", at::kLong},      {"I32", at::kInt},
    {"I16", at::kShort},  {"I8", at::kChar},       {"U8", at::kByte},
    {"BOOL", at::kBool}};

at::ScalarType TypeOf(const std::string& dtype, const std::string& what) {
  for (const auto& [name, type] : kTypes) {
    if (dtype == name) return type;
  }
  throw DataError(ErrorText(what + " has a tensor of a type that no model here uses",
                            "dtype " + dtype, "write it as F32, BF16 or F16"));
}

// Elements that lie apart: their span is read and a copy made of what belongs to it.
at::Tensor ReadStrided(const ByteFile& file, const TensorEntry& entry,
                       at::ScalarType stored) {
  std::string span = file.Read(entry.offset, entry.SpanBytes());
  const auto options = at::TensorOptions().dtype(stored);
  return at::empty(entry.shape, options)
      .copy_(at::from_blob(span.data(), entry.shape, entry.strides, options));
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

std::string DtypeName(at::ScalarType type) {
  for (const auto& [name, t] : kTypes) {
    if (t == type) return name;
  }
  throw std::logic_error("no safetensors name for this dtype");
}

at::Tensor ParameterSlice::Part(const at::Tensor& of) const {
  return index < 0 ? of : of.select(0, index);
}

at::Tensor ParameterSlice::Gradient() const { return Part(whole.grad()); }

std::vector<ParameterSlice> SlicesOf(const Parameters& parameters) {
  std::vector<ParameterSlice> slices;
  for (const auto& [name, tensor] : parameters.items()) slices.push_back({name, tensor});
  return slices;
}

at::Tensor ReadTensor(const ByteFile& file, const TensorEntry& entry,
                      at::ScalarType dtype) {
  const at::ScalarType stored = TypeOf(entry.dtype, file.path().string());
  const bool convert =
      dtype != at::ScalarType::Undefined && at::isFloatingType(stored) && dtype != stored;
  if (!entry.strides.empty()) {
    const at::Tensor read = ReadStrided(file, entry, stored);
    return convert ? read.to(dtype) : read;
  }
  at::Tensor tensor = at::empty(entry.shape, convert ? dtype : stored);
  if (!convert) {
    file.Read(entry.offset, tensor.data_ptr(), entry.size_bytes);
    return tensor;
  }
  // Piece by piece: a conversion of the whole would need the tensor twice.
  const at::Tensor flat = tensor.view(-1);
  const size_t element = DtypeBytes(entry.dtype);
  std::string buffer(std::min<uint64_t>(kBufferBytes, entry.size_bytes), '\0');
  for (uint64_t at = 0; at < entry.size_bytes; at += buffer.size()) {
    const size_t bytes = std::min<uint64_t>(buffer.size(), entry.size_bytes - at);
    const auto count = static_cast<int64_t>(bytes / element);
    file.Read(entry.offset + at, buffer.data(), bytes);
    flat.narrow(0, static_cast<int64_t>(at / element), count)
        .copy_(at::from_blob(buffer.data(), {count}, at::TensorOptions().dtype(stored)));
  }
  return tensor;
}

Parameters ReadParameters(const fs::path& path, at::ScalarType dtype,
                          const std::function<bool(const std::string&)>& keep) {
  const ByteFile file(path);
  Parameters parameters;
  for (const TensorEntry& entry : ReadSafetensorsIndex(file).tensors) {
    if (keep && !keep(entry.name)) continue;
    parameters.Add(entry.name, ReadTensor(file, entry, dtype));
  }
  return parameters;
}

at::ScalarType StoredType(const at::Tensor& tensor, at::ScalarType dtype) {
  return dtype != at::ScalarType::Undefined && tensor.is_floating_point()
             ? dtype
             : tensor.scalar_type();
}

at::Tensor ToStore(const at::Tensor& tensor, at::ScalarType dtype) {
  return tensor.detach().to(at::kCPU).to(StoredType(tensor, dtype)).contiguous();
}

void WriteParameters(const fs::path& path, const Parameters& parameters,
                     at::ScalarType dtype,
                     const std::map<std::string, std::string>& metadata) {
  std::vector<TensorHeader> headers;
  for (const auto& [name, tensor] : parameters.items()) {
    headers.push_back({name, DtypeName(StoredType(tensor, dtype)), tensor.sizes().vec()});
  }
  SafetensorsWriter writer(path, headers, metadata);
  for (const auto& [name, tensor] : parameters.items()) {
    const at::Tensor t = ToStore(tensor, dtype);
    writer.Append(t.const_data_ptr(), t.nbytes());
  }
  writer.Finish();
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
  return ChooseDevice(name, local_rank, NumCudaDevices());
}

}  // namespace routecast
