// safetensors files: a bounded parser and a streaming writer. No LibTorch: a tensor is a
// name, a dtype, a shape and an offset. Format: u64 little-endian header length, JSON
// header, raw data; offsets contiguous, no hole, no overlap, the last one ends at the end
// of the file; header at most 100,000,000 bytes.
// Thread rule: free functions from any thread; a writer belongs to one.
#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <vector>

#include "common/byte_file.h"
#include "common/tensor_entry.h"

namespace routecast {

struct SafetensorsIndex {
  std::vector<TensorEntry> tensors;  // in file order
  std::map<std::string, std::string> metadata;
  const TensorEntry* Find(const std::string& name) const;  // nullptr where absent
};

// Parses the header of `path`. Throws DataError naming the rule that the file breaks,
// before any large allocation.
SafetensorsIndex ReadSafetensorsIndex(const fs::path& path);
SafetensorsIndex ReadSafetensorsIndex(const ByteFile& file);
// The same over bytes in memory (`file_size` = size of the whole file); for fuzzing.
SafetensorsIndex ParseSafetensorsHeader(const std::string& header_json,
                                        uint64_t file_size, const std::string& what);
// Reads one tensor's bytes.
std::string ReadTensorBytes(const fs::path& path, const TensorEntry& entry);

// A tensor to write: the header comes first, so all of them are known before the data.
struct TensorHeader {
  std::string name, dtype;
  std::vector<int64_t> shape;
  uint64_t size_bytes() const;  // REQUIRES a known dtype and no negative dimension
};

// Writes one file, atomically (common/byte_file.h), with the data in pieces: memory is
// the caller's alone. Throws EnvironmentError when the disk is full.
class SafetensorsWriter {
 public:
  SafetensorsWriter(const fs::path& path, const std::vector<TensorHeader>& tensors,
                    const std::map<std::string, std::string>& metadata = {});
  // The tensors' data in the order of `tensors`, cut anywhere.
  void Append(const void* data, size_t count);
  void Finish();  // CHECKs that all data came

 private:
  std::string header_;
  uint64_t file_bytes_;
  AtomicFileWriter file_;
};

// What to write: `data` must stay valid until WriteSafetensors returns.
struct TensorToWrite {
  std::string name, dtype;
  std::vector<int64_t> shape;
  const void* data = nullptr;
};
void WriteSafetensors(const fs::path& path, const std::vector<TensorToWrite>& tensors,
                      const std::map<std::string, std::string>& metadata = {});

}  // namespace routecast
