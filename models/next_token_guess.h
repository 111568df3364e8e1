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

  // Ids that a preview looks at, at most: of a vocabulary of 32,128 the 8,192 most
  // frequent ones are 95 % of held-out text, and its whole head would be 3 MB a token.
  static constexpr int64_t kShortlist = 8192;
  // head_VD: scores = head output. `shortlist`: the ids that come into question, each
  // once; empty = all. `rows`: the preview is as long as that many ids take (a replay's
  // vocabulary is larger than the recorded one); 0 = as the ids. DataError where the head
  // is not finite.
  explicit NextTokenGuess(const at::Tensor& head_VD, int64_t rows = 0,
                          std::vector<int64_t> shortlist = {});

  // output [...,D], any type and device -> int64 [...] on the CPU. Any thread.
  at::Tensor operator()(const at::Tensor& output) const;
  int64_t width() const { return head_VD_.size(1); }

 private:
  int64_t GuessRow(const float* output) const;

  std::vector<int64_t> shortlist_;  // the rows' ids; empty: row and id are one
  at::Tensor head_VD_;              // float32, of the shortlist
  at::Tensor directions_RD_;        // float32, orthonormal
  // By block of kBlock rows: [R, kBlock], and a scale a row.
  std::vector<int8_t> preview_;
  std::vector<float> scale_;
};

// The traced model's head, [V,D] float32, from a store's routers.safetensors; undefined
// where there is no such file, or none in it. DataError where it is of another shape.
at::Tensor ReadVocabularyHead(const fs::path& routers, int d_model);

}  // namespace routecast
