#include "trainer/denoising_batch.h"

#include <ATen/ATen.h>

#include <algorithm>

#include "common/errors.h"
#include "common/progress.h"
#include "common/random.h"

namespace routecast {
namespace {
constexpr uint64_t kMaskStream = 0x6d61736bULL;  // "mask"
constexpr int64_t kIgnored = -100;
}  // namespace

TokenRows::TokenRows(const Corpus& corpus, const Tokenizer& tokenizer, SplitPart part,
                     int sequence_tokens, uint64_t max_rows, uint64_t seed, bool quiet)
    : length_(sequence_tokens) {
  const uint64_t wanted = max_rows * static_cast<uint64_t>(length_);
  const Permutation order(corpus.size(), Mix(seed, static_cast<uint64_t>(part)));
  Progress progress(std::string("tokenising the ") + SplitPartName(part) + " part",
                    "tokens", wanted, quiet);
  for (uint64_t i = 0; i < corpus.size() && ids_.size() < wanted; ++i) {
    const uint64_t d = order(i);
    if (corpus.document(d).part != part) continue;
    const std::vector<int32_t> ids = tokenizer.EncodePlain(corpus.Text(d));
    ids_.insert(ids_.end(), ids.begin(), ids.end());
    ids_.push_back(Tokenizer::kEos);
    progress.Update(ids_.size());
  }
  ids_.resize(std::min<size_t>(ids_.size() / static_cast<size_t>(length_), max_rows) *
              static_cast<size_t>(length_));
  if (ids_.empty()) {
    throw UsageError(ErrorText(std::string("the corpus is too small: its ") +
                                   SplitPartName(part) + " part fills no sequence",
                               "one sequence is " + std::to_string(length_) + " tokens",
                               "give more text with --data"));
  }
}

DenoisingBatch MakeDenoisingBatch(const TokenRows& rows,
                                  std::span<const uint64_t> row_ids,
                                  std::span<const uint64_t> sample_ids,
                                  const Tokenizer& tokenizer,
                                  const DenoisingOptions& options) {
  // The last sentinel stands for a masked input token, and for no span.
  const bool masks = options.mask_share > 0 && tokenizer.num_sentinels() > 1;
  const Sentinels sentinels{tokenizer.Sentinel(0), tokenizer.num_sentinels() - masks};
  const int64_t mask_id = tokenizer.Sentinel(tokenizer.num_sentinels() - 1);
  std::vector<CorruptedSpans> corrupted;
  size_t source = 0, target = 0;
  for (size_t b = 0; b < row_ids.size(); ++b) {
    corrupted.push_back(CorruptSpans(rows.row(row_ids[b]),
                                     Mix(options.seed, sample_ids[b]), options.spans,
                                     sentinels));
    source = std::max(source, corrupted.back().inputs.size());
    target = std::max(target, corrupted.back().targets.size());
  }
  const auto batch = static_cast<int64_t>(row_ids.size());
  const auto s = static_cast<int64_t>(source), t = static_cast<int64_t>(target);
  DenoisingBatch out;
  out.ids_BS = at::zeros({batch, s}, at::kLong);
  out.valid_BS = at::zeros({batch, s}, at::kBool);
  out.masked_targets_BS = at::full({batch, s}, kIgnored, at::kLong);
  out.decoder_ids_BT = at::zeros({batch, t}, at::kLong);
  out.decoder_valid_BT = at::zeros({batch, t}, at::kBool);
  out.targets_BT = at::full({batch, t}, kIgnored, at::kLong);
  for (int64_t b = 0; b < batch; ++b) {
    const CorruptedSpans& c = corrupted[static_cast<size_t>(b)];
    int64_t* ids = out.ids_BS.data_ptr<int64_t>() + b * s;
    bool* valid = out.valid_BS.data_ptr<bool>() + b * s;
    int64_t* masked = out.masked_targets_BS.data_ptr<int64_t>() + b * s;
    const uint64_t key =
        Mix(options.seed, sample_ids[static_cast<size_t>(b)], kMaskStream);
    for (size_t i = 0; i < c.inputs.size(); ++i) {
      ids[i] = c.inputs[i];
      valid[i] = true;
      const bool maskable =
          !tokenizer.IsSentinel(c.inputs[i]) && c.inputs[i] != Tokenizer::kEos;
      if (maskable && ToUnit(Mix(key, i)) < options.mask_share) {
        masked[i] = c.inputs[i];
        ids[i] = mask_id;
      }
    }
    int64_t* decoder = out.decoder_ids_BT.data_ptr<int64_t>() + b * t;
    bool* decoder_valid = out.decoder_valid_BT.data_ptr<bool>() + b * t;
    int64_t* targets = out.targets_BT.data_ptr<int64_t>() + b * t;
    for (size_t i = 0; i < c.targets.size(); ++i) {
      decoder[i] =
          i == 0 ? Tokenizer::kPad : c.targets[i - 1];  // start token = padding, as T5
      decoder_valid[i] = true;
      targets[i] = c.targets[i];
    }
    out.num_raw_tokens +=
        static_cast<int64_t>(rows.row(row_ids[static_cast<size_t>(b)]).size());
  }
  return out;
}

}  // namespace routecast
