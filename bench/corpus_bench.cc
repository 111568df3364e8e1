// Speed of the corpus room on real text: index pass, cached open, tokenising (through
// Tokenizer and through bare libsentencepiece), span corruption, training a tokenizer.
// Usage: corpus_bench THREADS TOKENIZER_FOLDER KIND:PATH...
#include <sentencepiece_processor.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <string>
#include <vector>

#include "common/errors.h"
#include "corpus/corpus.h"
#include "corpus/parallel.h"
#include "corpus/span_corruption.h"
#include "corpus/tokenizer.h"

namespace routecast {
namespace {

double Seconds(std::chrono::steady_clock::time_point start) {
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

void Print(const char* what, double seconds, uint64_t bytes) {
  std::printf("%-34s %8.3f s %9.2f MB/s\n", what, seconds,
              static_cast<double>(bytes) / 1e6 / seconds);
}

// The first documents that make up about `bytes`.
std::vector<std::string_view> Sample(const Corpus& corpus, uint64_t bytes,
                                     uint64_t* taken) {
  std::vector<std::string_view> texts;
  for (uint64_t i = 0; i < corpus.size() && *taken < bytes; ++i) {
    texts.push_back(corpus.Text(i));
    *taken += texts.back().size();
  }
  return texts;
}

void BenchTokenizer(const Corpus& corpus, const fs::path& folder, int threads) {
  const Tokenizer tokenizer = Tokenizer::Load(folder);
  sentencepiece::SentencePieceProcessor bare;
  if (!bare.Load((folder / "spiece.model").string()).ok()) std::abort();
  uint64_t bytes = 0;
  const auto texts = Sample(corpus, 8'000'000, &bytes);
  std::atomic<uint64_t> tokens{0};
  auto start = std::chrono::steady_clock::now();
  for (const auto text : texts) {
    std::vector<int> ids;
    if (!bare.Encode(absl::string_view(text.data(), text.size()), &ids).ok())
      std::abort();
    tokens += ids.size();
  }
  Print("tokenise, bare sentencepiece", Seconds(start), bytes);
  start = std::chrono::steady_clock::now();
  for (const auto text : texts) tokenizer.EncodePlain(text);
  Print("tokenise, EncodePlain", Seconds(start), bytes);
  start = std::chrono::steady_clock::now();
  std::vector<std::vector<int32_t>> all(texts.size());
  ParallelFor(texts.size(), threads,
              [&](size_t i) { all[i] = tokenizer.EncodePlain(texts[i]); });
  Print("tokenise, EncodePlain, threads", Seconds(start), bytes);
  std::printf("%-34s %8.3f bytes\n", "a token",
              static_cast<double>(bytes) / tokens.load());
  start = std::chrono::steady_clock::now();
  const Sentinels sentinels{tokenizer.Sentinel(0), tokenizer.num_sentinels()};
  uint64_t masked = 0;
  for (size_t i = 0; i < all.size(); ++i) {
    masked += CorruptSpans(all[i], i, {}, sentinels).targets.size();
  }
  std::printf("%-34s %8.3f s %9.2f M tokens/s\n", "span corruption", Seconds(start),
              tokens.load() / 1e6 / Seconds(start));
  if (masked == 0) std::abort();
}

void BenchTraining(const Corpus& corpus, int threads, const fs::path& scratch) {
  const auto train = corpus.DocumentsOf(SplitPart::kTrain);
  const auto start = std::chrono::steady_clock::now();
  Tokenizer::Train(
      train.size(), [&](uint64_t i) { return std::string(corpus.Text(train[i])); },
      {.threads = threads}, scratch);
  std::printf("%-34s %8.3f s\n", "train a tokenizer of 480 pieces", Seconds(start));
}

int Run(int argc, char** argv) {
  if (argc < 4) {
    std::fprintf(stderr, "usage: corpus_bench THREADS TOKENIZER_FOLDER KIND:PATH...\n");
    return kExitUsage;
  }
  const int threads = std::atoi(argv[1]);
  const std::vector<std::string> specs(argv + 3, argv + argc);
  const fs::path scratch =
      fs::temp_directory_path() / ("corpus_bench." + std::to_string(::getpid()));
  const Corpus corpus = Corpus::Open(specs, scratch, threads, true);
  std::printf("%s\n", corpus.Summary().c_str());
  Print("index", corpus.stats().seconds, corpus.stats().text_bytes);
  Print("open from the cache",
        Corpus::Open(specs, scratch, threads, true).stats().seconds,
        corpus.stats().text_bytes);
  BenchTokenizer(corpus, argv[2], threads);
  BenchTraining(corpus, threads, scratch / "tokenizer");
  fs::remove_all(scratch);
  return kExitDone;
}

}  // namespace
}  // namespace routecast

int main(int argc, char** argv) { return routecast::Run(argc, argv); }
