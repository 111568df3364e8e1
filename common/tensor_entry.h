// A tensor in a file, as the readers of weights files tell it: safetensors
// (common/safetensors.h) and PyTorch's .bin (common/torch_file.h). No LibTorch.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace routecast {

struct TensorEntry {
  std::string name;
  std::string dtype;  // "F32", "BF16", "F16", "I64", "I32", "U8", "BOOL", "F64", ...
  std::vector<int64_t> shape;
  uint64_t offset = 0;      // of the first element, from the start of the file
  uint64_t size_bytes = 0;  // of the elements, without the holes that strides leave
  // In elements; empty where the elements lie row by row without holes (always in
  // safetensors). No two elements share bytes.
  std::vector<int64_t> strides = {};

  // Bytes from the first element to the end of the last.
  uint64_t SpanBytes() const;
};

// Bytes an element; 0 for an unknown dtype name.
uint64_t DtypeBytes(const std::string& dtype);

// What a weights file often is instead: "a Git LFS pointer", "a web page"; empty where
// the first bytes of the file look like neither. For error messages.
std::string KnownImpostor(const std::string& first_bytes);

// "[2, 3]"
std::string ShapeText(const std::vector<int64_t>& shape);

}  // namespace routecast
