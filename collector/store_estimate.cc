#include "collector/store_estimate.h"

#include <algorithm>
#include <bit>
#include <set>
#include <string_view>

#include "common/open_files.h"

namespace routecast {
namespace {

constexpr uint64_t kBytesPerBf16 = 2;
constexpr double kBytesPerId = 5.2;  // id, probability, margin, drop bit
constexpr uint64_t kSampleBytes = 64 << 10;
constexpr double kTokensPerByte = 1.0 / 3;  // where there is nothing to tokenize
constexpr double kMeanSpan = 3;             // as chunk_runner.cc masks

// Tokens of a stack for each token of the text: a masked span leaves one sentinel, and
// another one stands before its tokens in the targets.
double TokensOf(const StoreConfig& config, Stack stack) {
  const double masked = config.noise_density;
  if (config.task == Task::kEncode || masked == 0) return 1;
  return stack == Stack::kEncoder ? 1 - masked + masked / kMeanSpan
                                  : masked + masked / kMeanSpan;
}

double SampledTokensPerByte(const Corpus& corpus, const ChunkPlan& plan,
                            const DocumentOrder& order, const Tokenizer& tokenizer) {
  uint64_t bytes = 0, tokens = 0;
  for (const PlannedIntake& intake : plan.intakes) {
    for (uint64_t p = intake.begin; p < intake.end && bytes < kSampleBytes; ++p) {
      const std::string_view text = corpus.Text(order(p)).substr(0, kSampleBytes);
      tokens += tokenizer.EncodePlain(text).size();
      bytes += text.size();
    }
  }
  return tokens == 0 ? kTokensPerByte
                     : static_cast<double>(tokens) / static_cast<double>(bytes);
}

}  // namespace

TextTokens EstimatedTokens(const StoreConfig& config, const Corpus& corpus,
                           const ChunkPlan& plan, const Tokenizer& tokenizer) {
  const DocumentOrder order(corpus);
  const double a_byte = SampledTokensPerByte(corpus, plan, order, tokenizer);
  const std::set<uint64_t> forced = ForcedHiddenGroups(corpus, plan, config.hidden_share);
  TextTokens tokens;
  for (const PlannedIntake& intake : plan.intakes) {
    for (uint64_t p = intake.begin; p < intake.end; ++p) {
      const Document document = corpus.document(order(p));
      double more = a_byte * static_cast<double>(document.length_bytes);
      if (p + 1 == intake.end && intake.last_segments > 0) {
        more = std::min(more, static_cast<double>(intake.last_segments) *
                                  static_cast<double>(config.max_length));
      }
      tokens.all += more;
      const bool hidden = config.hidden_share > 0 &&
                          (HiddenShareOf(document.group, config.hidden_share) ||
                           forced.contains(document.group));
      if (hidden) tokens.hidden += more;
    }
  }
  return tokens;
}

uint64_t BytesBesideIds(const StoreConfig& config, Stack stack) {
  const bool decoder = stack == Stack::kDecoder;
  if (config.hidden_share == 0 || (decoder && config.task == Task::kEncode)) return 0;
  const MoeGeometry& g = config.geometry;
  const auto layers = static_cast<uint64_t>(g.layers(stack));
  const auto width = static_cast<uint64_t>(g.d_model);
  const auto heads = static_cast<uint64_t>(config.AttentionHeads(stack));
  const uint64_t vectors = layers + (decoder && config.Records("output") ? 1 : 0);
  return kBytesPerBf16 * width * vectors + layers * heads * kAttentionBytesPerHead;
}

uint64_t EstimatedBytesBesideIds(const StoreConfig& config, const TextTokens& tokens) {
  double bytes = 0;
  for (const Stack stack : {Stack::kEncoder, Stack::kDecoder}) {
    bytes += TokensOf(config, stack) * static_cast<double>(BytesBesideIds(config, stack));
  }
  return static_cast<uint64_t>(tokens.hidden * bytes);
}

uint64_t EstimatedStoreBytes(const StoreConfig& config, const TextTokens& tokens) {
  const MoeGeometry& g = config.geometry;
  const double topk =
      config.top_k * (2 + std::bit_width(unsigned(g.num_experts - 1)) / 8.0);
  double layers = g.encoder_layers * TokensOf(config, Stack::kEncoder);
  if (config.task != Task::kEncode) {
    layers += g.decoder_layers * TokensOf(config, Stack::kDecoder);
  }
  return static_cast<uint64_t>(tokens.all * layers * (kBytesPerId + topk)) +
         EstimatedBytesBesideIds(config, tokens);
}

uint64_t EstimatedOpenFiles(const StoreConfig& config, int world) {
  // RocksDB's own six files and ten tables; a scan's tables of the first level, where
  // they are merged at 16, and one of each of six others; libraries, MPI, a merge.
  constexpr uint64_t kOfAnOwnShard = 16, kOfARead = 22, kOfAProcess = 64;
  const auto shards = static_cast<uint64_t>(config.num_shards);
  const auto ranks = static_cast<uint64_t>(world);
  return kOfAProcess + kOfAnOwnShard * ((shards + ranks - 1) / ranks) + kOfARead * shards;
}

void RequireShardFiles(const fs::path& store, const StoreConfig& config, int world) {
  RequireOpenFiles(EstimatedOpenFiles(config, world), store.string(),
                   "use fewer --num_shards in a new store");
}

}  // namespace routecast
