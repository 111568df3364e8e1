// Which token comes next, from the decoder's output, before the vocabulary head has run.
// A narrow preview of the head (its largest directions, in eight bits) names a few
// candidates and their exact scores decide: a fraction of the head's own bytes, so that
// what depends on the next token's id can be asked for while the head is at work.
// V vocabulary, D width, B sequences. CPU.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <vector>

#include "common/files.h"

namespace routecast {

class NextTokenGuess {
 public:
  static constexpr int kDirections = 96, kCandidates = 16;

  // head_VD: scores = head output. `rows` >= V charges the preview of a larger vocabulary
  // (a replay's): rows past V are computed and never chosen; 0 = V. DataError where the
  // head is not finite.
  explicit NextTokenGuess(const at::Tensor& head_VD, int64_t rows = 0);

  // output [B,D] float32 -> int64 [B]. Any thread.
  at::Tensor operator()(const at::Tensor& output_BD) const;
  int64_t width() const { return head_VD_.size(1); }

 private:
  int64_t GuessRow(const float* output) const;

  at::Tensor head_VD_;        // float32
  at::Tensor directions_RD_;  // float32, orthonormal
  // By block of kBlock rows: [R, kBlock], and a scale a row.
  std::vector<int8_t> preview_;
  std::vector<float> scale_;
};

// The traced model's head, [V,D] float32, from a store's routers.safetensors; undefined
// where there is no such file, or none in it. DataError where it is of another shape.
at::Tensor ReadVocabularyHead(const fs::path& routers, int d_model);

}  // namespace routecast
