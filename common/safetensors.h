// safetensors files: a bounded parser and a streaming writer. No LibTorch: a tensor is a
// name, a dtype, a shape and an offset. Format: u64 little-endian header length, JSON
// header, raw data; offsets contiguous, no hole, no overlap, the last one ends at the end
// of the file; header at most 100,000,000 bytes.
#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <vector>

#include "common/files.h"

namespace routecast {

struct TensorEntry {
  std::string name;
  std::string dtype;  // "F32", "BF16", "F16", "I64", "I32", "U8", "BOOL", "F64", ...
  std::vector<int64_t> shape;
  uint64_t offset = 0;  // from the start of the file
  uint64_t size_bytes = 0;
};

struct SafetensorsIndex {
  std::vector<TensorEntry> tensors;  // in file order
  std::map<std::string, std::string> metadata;
  const TensorEntry* Find(const std::string& name) const;  // nullptr where absent
};

// Bytes an element; 0 for an unknown dtype name.
uint64_t DtypeBytes(const std::string& dtype);

// Parses the header of `path`. Throws DataError naming the rule that the file breaks,
// before any large allocation.
SafetensorsIndex ReadSafetensorsIndex(const fs::path& path);
// The same over bytes in memory (`header_and_data_size` = size of the whole file); for
// fuzzing.
SafetensorsIndex ParseSafetensorsHeader(const std::string& header_json,
                                        uint64_t file_size, const std::string& what);
// Reads one tensor's bytes.
std::string ReadTensorBytes(const fs::path& path, const TensorEntry& entry);

// What to write: `data` must stay valid until WriteSafetensors returns.
struct TensorToWrite {
  std::string name, dtype;
  std::vector<int64_t> shape;
  const void* data = nullptr;
};
// Atomic write (common/files.h). Throws EnvironmentError when the disk is full.
void WriteSafetensors(const fs::path& path, const std::vector<TensorToWrite>& tensors,
                      const std::map<std::string, std::string>& metadata = {});

}  // namespace routecast
