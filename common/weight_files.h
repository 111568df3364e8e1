// The weights of a checkpoint folder, in whichever form they lie there:
// model.safetensors, sharded safetensors, pytorch_model.bin, sharded .bin; that is also
// the order in which they are looked for, as in transformers. No LibTorch.
// docs/checkpoints.md says more. Thread rule: one thread at a time.
#pragma once

#include <memory>
#include <string>
#include <unordered_map>
#include <vector>

#include "common/byte_file.h"
#include "common/tensor_entry.h"

namespace routecast {

struct WeightEntry : TensorEntry {
  size_t file = 0;  // index into files()
};

class WeightFiles {
 public:
  static constexpr size_t kMaxIndexBytes = size_t{64} << 20;
  static constexpr size_t kMaxShards = 10'000;

  // Reads every header and no weight. Throws UsageError (no such folder, no weights in
  // it), DataError (a file or the index breaks a rule; a shard is missing; a tensor lies
  // in another shard than the index says).
  explicit WeightFiles(const fs::path& folder);

  // What lists the tensors: the index of shards, or the one weights file.
  const fs::path& source() const { return source_; }
  const std::vector<fs::path>& files() const { return files_; }         // by name
  const std::vector<WeightEntry>& tensors() const { return tensors_; }  // by file, offset
  const WeightEntry* Find(const std::string& name) const;  // null where absent
  const fs::path& FileOf(const WeightEntry& entry) const { return files_[entry.file]; }
  // The file of an entry, open; valid until the next call.
  const ByteFile& Open(const WeightEntry& entry) const;
  // True where both entries say the same values: the same place, or equal bytes. Reads
  // through a small buffer. Row-major entries only.
  bool SameBytes(const WeightEntry& a, const WeightEntry& b) const;
  // Hash64 of all weights files, one after the other in the order of their names; each
  // file's hash is the seed of the next one's.
  uint64_t Hash(uint64_t seed) const;

 private:
  void ReadSharded(const fs::path& index);
  void AddFile(const fs::path& file);

  fs::path source_;
  std::vector<fs::path> files_;
  std::vector<WeightEntry> tensors_;
  std::unordered_map<std::string, size_t> by_name_;
  mutable std::unique_ptr<ByteFile> open_;
  mutable size_t open_file_ = 0;
};

// The weight_map of an index of shards: tensor -> file name. The file names are plain: no
// folder, no "..", of the index's own kind (`suffix`: ".safetensors" or ".bin"). Throws
// DataError with `what`; for fuzzing, too.
std::unordered_map<std::string, std::string> ParseShardIndex(const std::string& text,
                                                             const std::string& suffix,
                                                             const std::string& what);

}  // namespace routecast
