// Batches of span-corrupted text for pre-training: a pure function of (seed, epoch, row).
// Shape letters: B sequences, S source tokens, T target tokens.
#pragma once

#include <ATen/core/Tensor.h>

#include <vector>

#include "corpus/corpus.h"
#include "corpus/span_corruption.h"
#include "corpus/tokenizer.h"

namespace routecast {

// The documents of one split part as rows of `sequence_tokens` ids, documents joined by
// end-of-sequence, in a seeded document order; tokenised until `max_rows` are full.
class TokenRows {
 public:
  TokenRows(const Corpus& corpus, const Tokenizer& tokenizer, SplitPart part,
            int sequence_tokens, uint64_t max_rows, uint64_t seed, bool quiet);
  uint64_t size() const { return ids_.size() / static_cast<size_t>(length_); }
  std::span<const int32_t> row(uint64_t i) const {
    return {ids_.data() + i * static_cast<size_t>(length_), static_cast<size_t>(length_)};
  }

 private:
  int length_;
  std::vector<int32_t> ids_;
};

struct DenoisingBatch {
  at::Tensor ids_BS, valid_BS;   // encoder inputs: int64, bool
  at::Tensor masked_targets_BS;  // int64, -100 where the encoder sees the token itself
  at::Tensor decoder_ids_BT, targets_BT;  // int64; targets -100 where padded
  at::Tensor decoder_valid_BT;
  int64_t num_raw_tokens = 0;
};

struct DenoisingOptions {
  SpanCorruptionOptions spans;
  double mask_share = 0.15;  // 0 = no masking of encoder inputs
  uint64_t seed = 0;
};

// `rows` are corrupted with coordinates (seed, sample id), right-padded to the longest
// here.
DenoisingBatch MakeDenoisingBatch(const TokenRows& rows,
                                  std::span<const uint64_t> row_ids,
                                  std::span<const uint64_t> sample_ids,
                                  const Tokenizer& tokenizer,
                                  const DenoisingOptions& options);

}  // namespace routecast
