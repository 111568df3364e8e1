// Checkpoints of any geometry with made-up weights, for tests of size and speed: valid,
// seeded, and written piece by piece, so that 60 GB take no more memory than 60 MB.
// Thread rule: a free function, from any thread on different folders.
#pragma once

#include "models/checkpoint_writer.h"

namespace routecast {

struct SyntheticCheckpointOptions {
  SwitchConfig config;
  at::ScalarType dtype = at::kBFloat16;  // of every tensor; kFloat, kBFloat16, kHalf
  uint64_t seed = 0;
  uint64_t max_shard_bytes = kDefaultShardBytes;
};

// Writes into an existing folder and returns the bytes of the weights. A weight is a
// function of seed, the tensor's name and its position: uniform with variance 1 / (last
// dimension), embeddings with variance 1, norms 1. No tokenizer. Throws EnvironmentError
// where the disk has no room, before anything is written, and leaves nothing behind.
uint64_t WriteSyntheticCheckpoint(const fs::path& folder,
                                  const SyntheticCheckpointOptions& options);

}  // namespace routecast
