#include "collector/dry_run.h"

#include <algorithm>
#include <cstdio>

#include "collector/span_log.h"
#include "collector/store_estimate.h"
#include "common/errors.h"
#include "common/output_folder.h"
#include "storage/store_lock.h"
#include "storage/trace_reader.h"
#include "storage/trace_store.h"

namespace routecast {
namespace {

// Of a store that a job was killed in, or writes now, what can be read. A damaged shard
// is the job's to mend; here all its store is taken to be missing.
uint64_t CompletedChunks(const fs::path& store) {
  if (!fs::exists(store / "store.json")) return 0;
  try {
    return static_cast<uint64_t>(TraceReader(store, NeedTokens::kNo).completed_chunks());
  } catch (const DataError&) {
    return 0;
  }
}

void PrintHidden(const StoreConfig& config, const TextTokens& tokens) {
  if (config.hidden_share == 0) return;
  std::printf("inputs     of %g %% of the document groups: ", 100 * config.hidden_share);
  for (const Stack stack : {Stack::kEncoder, Stack::kDecoder}) {
    const uint64_t bytes = BytesBesideIds(config, stack);
    if (bytes == 0) continue;
    std::printf("%llu bytes a token of the %s (%d layers x %d x 2%s), ",
                static_cast<unsigned long long>(bytes), StackName(stack),
                config.geometry.layers(stack), config.geometry.d_model,
                config.Records("attention") ||
                        (stack == Stack::kDecoder && config.Records("output"))
                    ? " and what is recorded beside"
                    : "");
  }
  std::printf("about %s of the store, of %.3g %% of the text\n",
              FormatBytes(EstimatedBytesBesideIds(config, tokens)).c_str(),
              100 * tokens.hidden / std::max(tokens.all, 1.0));
}

std::string MemoryText(const PlannedWeights& weights) {
  const auto now = static_cast<uint64_t>(OwnMemory().resident_bytes);
  if (weights.device.is_cpu()) return FormatBytes(now + weights.bytes) + " of memory";
  return FormatBytes(weights.bytes) + " of the device and " + FormatBytes(now) +
         " of memory";
}

void PrintPlan(const CollectOptions& options, const StoreConfig& config,
               const Corpus& corpus, const ChunkPlan& plan, const PlannedWeights& weights,
               const RankInfo& rank, const TextTokens& tokens, uint64_t completed) {
  std::printf("corpus     %s\n", corpus.Summary().c_str());
  std::printf("plan       %llu documents (%s of text) in %zu chunks, %d shards, %d ranks",
              static_cast<unsigned long long>(plan.num_documents),
              FormatBytes(plan.text_bytes).c_str(), plan.chunks.size(), config.num_shards,
              rank.world);
  if (completed > 0) {
    std::printf("; the store has %llu chunks",
                static_cast<unsigned long long>(completed));
  }
  std::printf(
      "\nmodel      %s: %d+%d MoE layers, %d experts, width %d; a rank takes %s before "
      "its first batch\n",
      options.model.c_str(), config.geometry.encoder_layers,
      config.geometry.decoder_layers, config.geometry.num_experts,
      config.geometry.d_model, MemoryText(weights).c_str());
  std::printf("store      %s: about %s; %s free\n", options.store.c_str(),
              FormatBytes(EstimatedStoreBytes(config, tokens)).c_str(),
              FormatBytes(FreeBytes(options.store)).c_str());
  PrintHidden(config, tokens);
  const std::string holder = StoreHolder(options.store);
  if (!holder.empty()) std::printf("in use     by another job: %s\n", holder.c_str());
}

}  // namespace

void DryRun(const CollectOptions& options, const StoreConfig& config,
            const CollectSources& sources, const Tokenizer& tokenizer,
            const PlannedWeights& weights, const RankInfo& rank) {
  const Corpus& corpus = sources.corpus;
  const ChunkPlan& plan = sources.plan;
  const fs::path store = options.store;
  if (fs::exists(store / "store.json")) {
    TraceStore::RequireGoesOn(store, TraceStore::Open(store), config);
  }
  if (!rank.is_root()) return;
  const uint64_t completed = CompletedChunks(store);
  const TextTokens tokens = EstimatedTokens(config, corpus, plan, tokenizer);
  PrintPlan(options, config, corpus, plan, weights, rank, tokens, completed);
  RequireWritable(store);
  const uint64_t chunks = std::max<uint64_t>(plan.chunks.size(), 1);
  RequireFreeBytes(store, EstimatedStoreBytes(config, tokens) / chunks *
                              (chunks - std::min(completed, chunks)));
}

}  // namespace routecast
