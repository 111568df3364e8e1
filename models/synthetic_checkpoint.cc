#include "models/synthetic_checkpoint.h"

#include <ATen/ATen.h>

#include <cmath>

#include "common/random.h"

namespace routecast {
namespace {

constexpr int64_t kPieceElements = int64_t{1} << 20;  // a multiple of 4

bool Has(const std::string& name, const char* part) {
  return name.find(part) != std::string::npos;
}

// Half the width of the interval that a tensor's weights are drawn from.
float HalfWidth(const TensorHeader& tensor) {
  const bool embedding = Has(tensor.name, "embed") || Has(tensor.name, "shared") ||
                         Has(tensor.name, "lm_head");
  const double variance =
      embedding ? 1.0 : 1.0 / static_cast<double>(tensor.shape.back());
  return static_cast<float>(std::sqrt(3 * variance));
}

// Elements [begin, begin + count) of a tensor. One mixing gives four elements.
void Fill(uint64_t key, int64_t begin, int64_t count, float half_width, float* to) {
  for (int64_t i = 0; i < count; i += 4) {
    uint64_t bits = Mix(key, static_cast<uint64_t>(begin + i));
    for (int64_t j = i; j < std::min(i + 4, count); ++j, bits >>= 16) {
      const auto centred =
          static_cast<float>(static_cast<int32_t>(bits & 0xffff) - 32768);
      to[j] = half_width * centred / 32768.0f;
    }
  }
}

}  // namespace

uint64_t WriteSyntheticCheckpoint(const fs::path& folder,
                                  const SyntheticCheckpointOptions& options) {
  const auto tensors = CheckpointTensors(options.config, options.dtype);
  CheckpointWriter writer(folder, tensors, options.max_shard_bytes);
  const at::Tensor piece = at::empty({kPieceElements}, at::kFloat);
  uint64_t written = 0;
  for (const TensorHeader& tensor : tensors) {
    // The stacks' copies of the embedding are copies.
    const bool copy = Has(tensor.name, "embed_tokens");
    const uint64_t key =
        Mix(options.seed, Hash64(copy ? std::string("shared.weight") : tensor.name));
    const auto elements =
        static_cast<int64_t>(tensor.size_bytes() / DtypeBytes(tensor.dtype));
    const float half_width = HalfWidth(tensor);
    for (int64_t at = 0; at < elements; at += kPieceElements) {
      const int64_t count = std::min(kPieceElements, elements - at);
      const at::Tensor part = piece.narrow(0, 0, count);
      if (Has(tensor.name, "layer_norm")) {
        part.fill_(1);
      } else {
        Fill(key, at, count, half_width, part.mutable_data_ptr<float>());
      }
      const at::Tensor stored = part.to(options.dtype);
      writer.Append(stored.const_data_ptr(), stored.nbytes());
      written += stored.nbytes();
    }
  }
  writer.Finish(options.config, options.dtype);
  return written;
}

}  // namespace routecast
