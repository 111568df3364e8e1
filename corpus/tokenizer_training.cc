// Training and saving: kept apart so that readers of tokenizer.cc see only what serving
// needs.
#include <sentencepiece_processor.h>
#include <sentencepiece_trainer.h>

#include <unordered_map>

#include "common/errors.h"
#include "common/random.h"
#include "common/run_record.h"
#include "corpus/tokenizer.h"

namespace routecast {
namespace {

// The trainer drops longer sentences without a word.
constexpr size_t kMaxSentenceBytes = 4000;

class VectorIterator : public sentencepiece::SentenceIterator {
 public:
  explicit VectorIterator(const std::vector<std::string>& lines) : lines_(lines) {}
  bool done() const override { return next_ >= lines_.size(); }
  void Next() override { ++next_; }
  const std::string& value() const override { return lines_[next_]; }
  sentencepiece::util::Status status() const override { return {}; }

 private:
  const std::vector<std::string>& lines_;
  size_t next_ = 0;
};

// Cuts a text into sentences of at most kMaxSentenceBytes at line ends and spaces.
void AppendSentences(std::string_view text, std::vector<std::string>* lines) {
  while (!text.empty()) {
    // No further than a sentence reaches: a line may be the whole file.
    size_t end = std::min(text.substr(0, kMaxSentenceBytes + 1).find('\n'), text.size());
    size_t skip = 1;
    if (end > kMaxSentenceBytes) {
      end = text.rfind(' ', kMaxSentenceBytes);
      if (end == text.npos || end == 0) {
        end = kMaxSentenceBytes;
        while (end > 1 && (static_cast<unsigned char>(text[end]) & 0xc0) == 0x80) --end;
        skip = 0;
      }
    }
    if (end > 0) lines->emplace_back(text.substr(0, end));
    text.remove_prefix(std::min(text.size(), end + skip));
  }
}

std::vector<std::string> SampleLines(uint64_t num_texts,
                                     const std::function<std::string(uint64_t)>& text,
                                     const TokenizerTrainingOptions& options) {
  std::vector<std::string> lines;
  if (num_texts == 0) return lines;
  const Permutation order(num_texts, Mix(options.seed, 0x746f6b656e697a65ULL));
  uint64_t bytes = 0;
  for (uint64_t i = 0; i < num_texts && bytes < options.max_sample_bytes; ++i) {
    std::string one = text(order(i));
    if (const size_t room = options.max_sample_bytes - bytes; one.size() > room) {
      const size_t blank = one.find_last_of(" \n", room - 1);
      size_t end = blank == one.npos ? room : blank + 1;
      while (end > 0 && (static_cast<unsigned char>(one[end]) & 0xc0) == 0x80) --end;
      one.resize(end);
      bytes = options.max_sample_bytes;
    }
    bytes += one.size();
    AppendSentences(one, &lines);
  }
  return lines;
}

std::unordered_map<std::string, std::string> TrainerArguments(
    const TokenizerTrainingOptions& options) {
  return {
      {"model_type", "unigram"},
      {"vocab_size", std::to_string(options.pieces)},
      {"pad_id", "0"},
      {"eos_id", "1"},
      {"unk_id", "2"},
      {"bos_id", "-1"},
      {"pad_piece", "<pad>"},
      {"byte_fallback", "false"},
      {"normalization_rule_name", "nmt_nfkc"},
      // Far below the default of a million: the pieces kept are few, every seed costs
      // time.
      {"seed_sentencepiece_size", std::to_string(std::max(20000, 10 * options.pieces))},
      {"max_sentence_length", std::to_string(2 * kMaxSentenceBytes)},
      {"shuffle_input_sentence", "false"},
      {"num_threads", std::to_string(options.threads)},
      {"minloglevel", "2"}};
}

}  // namespace

void Tokenizer::Train(uint64_t num_texts,
                      const std::function<std::string(uint64_t)>& text,
                      const TokenizerTrainingOptions& options, const fs::path& folder) {
  if (options.pieces < 8 || options.pieces > 1'000'000 || options.extra_ids < 0 ||
      options.extra_ids > 10'000 || options.threads < 1) {
    throw UsageError(ErrorText(
        "tokenizer: pieces, extra_ids or threads out of range",
        std::to_string(options.pieces) + ", " + std::to_string(options.extra_ids) + ", " +
            std::to_string(options.threads),
        "pieces 8 to 1000000, extra_ids 0 to 10000, threads 1 or more"));
  }
  const std::vector<std::string> lines = SampleLines(num_texts, text, options);
  VectorIterator iterator(lines);
  std::string model;
  const auto status =
      lines.empty() ? sentencepiece::util::Status(
                          sentencepiece::util::StatusCode::kInternal, "no text at all")
                    : sentencepiece::SentencePieceTrainer::Train(
                          TrainerArguments(options), &iterator, &model);
  if (!status.ok()) {
    throw UsageError(ErrorText("no tokenizer of " + std::to_string(options.pieces) +
                                   " pieces could be trained on this text",
                               status.ToString(), "give more text or fewer pieces"));
  }
  FromModel(model, options.extra_ids, "the trained model").Save(folder);
}

void Tokenizer::Train(const std::vector<std::string>& texts,
                      const TokenizerTrainingOptions& options, const fs::path& folder) {
  Train(
      texts.size(), [&texts](uint64_t i) { return texts[i]; }, options, folder);
}

void Tokenizer::Save(const fs::path& folder) const {
  MakeFolder(folder);
  Json specials = Json::array();
  for (int k = 0; k < extra_ids_; ++k) {
    specials.push_back("<extra_id_" + std::to_string(k) + ">");
  }
  Json map = {{"additional_special_tokens", specials},
              {"eos_token", "</s>"},
              {"pad_token", "<pad>"},
              {"unk_token", "<unk>"}};
  Json config = {{"tokenizer_class", "T5Tokenizer"}, {"extra_ids", extra_ids_}};
  for (const auto& [key, value] : map.items()) config[key] = value;
  WriteFileAtomic(folder / "special_tokens_map.json", map.dump(2) + "\n");
  WriteFileAtomic(folder / "tokenizer_config.json", config.dump(2) + "\n");
  WriteFileAtomic(folder / "spiece.model", model_bytes_);  // last: Load needs it
}

}  // namespace routecast
