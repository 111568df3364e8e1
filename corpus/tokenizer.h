// SentencePiece tokenizer with T5's conventions: pad 0, eos 1, unk 2, and sentinels
// <extra_id_k> that live behind the model's pieces in reverse: id = vocab_size - 1 - k.
// Source: Raffel et al. 2020 (T5), transformers' T5Tokenizer; the pieces are
// libsentencepiece's. Thread rule: immutable after Load; every const method is safe from
// any number of threads.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "common/files.h"

namespace sentencepiece {
class SentencePieceProcessor;
}

namespace routecast {

struct TokenizerTrainingOptions {
  int pieces =
      480;  // of the model, specials included; a small model learns a small set well
  int extra_ids = 32;  // sentinels behind them
  int threads = 1;     // another count may move a score in its last digits
  uint64_t seed = 0;   // of the sample of texts
  // Text the trainer sees: 6 CPU seconds a megabyte. For 480 pieces 1 MB gives as many
  // bytes a token (2.20) as 4 MB; give large vocabularies more.
  uint64_t max_sample_bytes = 1'000'000;
};

class Tokenizer {
 public:
  static constexpr int32_t kPad = 0, kEos = 1, kUnk = 2;

  // Reads FOLDER/spiece.model and the `extra_ids` of FOLDER/tokenizer_config.json (100,
  // T5's default, where either is absent). Throws UsageError (no model there) or
  // DataError (corrupt, larger than 64 MiB, other special ids than T5's).
  static Tokenizer Load(const fs::path& folder);
  // The same from the bytes of a model. `what` names them in errors.
  static Tokenizer FromModel(const std::string& model_bytes, int extra_ids,
                             const std::string& what);

  // Trains a unigram model with the library's trainer (nmt_nfkc, no byte fallback, no
  // bos) on a random sample of the texts [0, num_texts) and writes spiece.model,
  // tokenizer_config.json and special_tokens_map.json into `folder`: what transformers'
  // T5Tokenizer loads. Throws UsageError where the text is too small for that many
  // pieces.
  static void Train(uint64_t num_texts, const std::function<std::string(uint64_t)>& text,
                    const TokenizerTrainingOptions& options, const fs::path& folder);
  static void Train(const std::vector<std::string>& texts,
                    const TokenizerTrainingOptions& options, const fs::path& folder);
  // Writes the three files for this tokenizer's model (to ship it with a checkpoint).
  void Save(const fs::path& folder) const;

  Tokenizer(Tokenizer&&) noexcept;
  Tokenizer& operator=(Tokenizer&&) noexcept;
  ~Tokenizer();

  // Ids without eos. The special tokens `<pad>`, `</s>`, `<unk>` and `<extra_id_k>` in
  // the text become their ids, as T5's tokenizer does: for prompts.
  std::vector<int32_t> Encode(std::string_view text) const;
  // The same, but text is only data: no special token can come from it. For corpora.
  std::vector<int32_t> EncodePlain(std::string_view text) const;
  // Text of the ids. Sentinels are written out; pad, eos and ids without a piece (a
  // model's embedding may have spare rows) are left out. REQUIRES non-negative ids.
  std::string Decode(std::span<const int32_t> ids) const;

  int vocab_size() const { return num_pieces_ + extra_ids_; }  // pieces + sentinels
  int num_pieces() const { return num_pieces_; }
  int num_sentinels() const { return extra_ids_; }
  int32_t Sentinel(int k) const;  // REQUIRES 0 <= k < num_sentinels()
  bool IsSentinel(int32_t id) const { return id >= num_pieces_ && id < vocab_size(); }
  // 16 hex digits over the model's bytes and the number of sentinels.
  const std::string& fingerprint() const { return fingerprint_; }

 private:
  Tokenizer();
  void AppendPlain(std::string_view text, std::vector<int32_t>* ids) const;
  std::unique_ptr<sentencepiece::SentencePieceProcessor> processor_;
  std::string model_bytes_;
  int num_pieces_ = 0;
  int extra_ids_ = 0;
  std::string fingerprint_;
};

}  // namespace routecast
