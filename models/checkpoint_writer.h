// Writes a checkpoint folder piece by piece: the weights as model.safetensors or, above a
// size, as shards with an index, then config.json and generation_config.json. As
// transformers 5.23.0 writes it. Thread rule: one thread.
#pragma once

#include <ATen/core/Tensor.h>

#include <memory>
#include <vector>

#include "common/safetensors.h"
#include "models/switch_config.h"

namespace routecast {

// transformers' default: 5 GB, decimal.
inline constexpr uint64_t kDefaultShardBytes = 5'000'000'000;

// What a written checkpoint of this configuration holds, in order: the parameters, and
// where embeddings are not tied each stack's copy of shared.weight, as transformers 5
// wants it.
std::vector<TensorHeader> CheckpointTensors(const SwitchConfig& config,
                                            at::ScalarType dtype);

// Nothing is in the folder under its final name before Finish. Shards are filled in the
// tensors' order, as huggingface_hub fills them: a shard grows until the next tensor
// would take it above `max_shard_bytes`; a larger tensor has one of its own. Throws
// EnvironmentError where the disk has no room, at once where it never had.
class CheckpointWriter {
 public:
  // `folder` exists.
  CheckpointWriter(fs::path folder, std::vector<TensorHeader> tensors,
                   uint64_t max_shard_bytes = kDefaultShardBytes);
  // Data of the tensors in their order, cut at tensors or inside them.
  void Append(const void* data, size_t count);
  // Renames everything to its final name and removes weights of an earlier checkpoint
  // that would be read before these.
  void Finish(const SwitchConfig& config, at::ScalarType dtype);

 private:
  void BeginShard();
  void RemoveOthers() const;
  std::string ShardName(size_t shard) const;

  fs::path folder_;
  std::vector<TensorHeader> tensors_;
  std::vector<size_t> shard_begin_;  // index of each shard's first tensor; and the end
  std::vector<std::unique_ptr<SafetensorsWriter>> shards_;
  uint64_t left_bytes_ = 0;  // of the shard that is being filled
};

}  // namespace routecast
