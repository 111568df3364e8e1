#include "common/tensor_entry.h"

#include <map>

namespace routecast {

uint64_t DtypeBytes(const std::string& dtype) {
  static const std::map<std::string, uint64_t> kBytes = {
      {"F64", 8},  {"I64", 8}, {"U64", 8}, {"F32", 4}, {"I32", 4}, {"U32", 4}, {"F16", 2},
      {"BF16", 2}, {"I16", 2}, {"U16", 2}, {"I8", 1},  {"U8", 1},  {"BOOL", 1}};
  const auto it = kBytes.find(dtype);
  return it == kBytes.end() ? 0 : it->second;
}

uint64_t TensorEntry::SpanBytes() const {
  if (strides.empty() || size_bytes == 0) return size_bytes;
  uint64_t last = 0;
  for (size_t i = 0; i < shape.size(); ++i) {
    last += static_cast<uint64_t>(shape[i] - 1) * static_cast<uint64_t>(strides[i]);
  }
  return (last + 1) * DtypeBytes(dtype);
}

std::string KnownImpostor(const std::string& first_bytes) {
  const auto starts = [&](const char* text) { return first_bytes.rfind(text, 0) == 0; };
  if (starts("version https://git-lfs")) return "a Git LFS pointer (git lfs pull)";
  if (starts("<!DOCTYPE") || starts("<html")) return "a web page";
  if (starts("PK\x03\x04")) return "a zip archive, like PyTorch's .bin files";
  return "";
}

std::string ShapeText(const std::vector<int64_t>& shape) {
  std::string text = "[";
  for (const int64_t dim : shape) {
    text += (text.size() > 1 ? ", " : "") + std::to_string(dim);
  }
  return text + "]";
}

}  // namespace routecast
