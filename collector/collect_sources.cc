#include "collector/collect_sources.h"

#include <cstdio>

#include "collector/intakes.h"
#include "common/stop.h"
#include "storage/trace_store.h"

namespace routecast {
namespace {

std::vector<StoreIntake> StoredIntakes(const fs::path& store) {
  if (!fs::exists(store / "store.json")) return {};
  return TraceStore::Open(store).AllIntakes();
}

Corpus OpenCorpus(const CollectOptions& options, const RankInfo& rank, int threads,
                  const std::vector<std::vector<std::string>>& intakes) {
  const fs::path cache = options.dry_run         ? fs::path()
                         : options.cache.empty() ? fs::path(options.store + ".corpus")
                                                 : options.cache;
  return Corpus::OpenIntakes(intakes, cache, threads, options.quiet || !rank.is_root());
}

// Other names for what the store has add nothing.
bool LastIsEmpty(const Corpus& corpus) {
  const std::vector<uint64_t>& ends = corpus.intake_ends();
  return ends.size() > 1 && ends.back() == ends[ends.size() - 2];
}

// Two numbers an intake, of rank 0: documents, and segments of the last one.
std::vector<int64_t> FindLimits(const CollectSources& sources,
                                const CollectOptions& options, const Tokenizer& tokenizer,
                                int threads) {
  std::vector<int64_t> numbers;
  for (size_t i = 0; i < sources.intakes.size(); ++i) {
    const auto most = static_cast<uint64_t>(sources.intakes[i].max_sequences);
    const SequenceLimit limit = FindSequenceLimit(sources.corpus, i, tokenizer,
                                                  options.max_length - 1, most, threads);
    if (!StopRequested()) {
      RequireWholeDocuments(sources.corpus, i, limit, tokenizer, options.max_length - 1);
    }
    numbers.push_back(static_cast<int64_t>(limit.num_documents));
    numbers.push_back(static_cast<int64_t>(limit.last_segments));
  }
  return numbers;
}

}  // namespace

std::optional<CollectSources> OpenSources(
    const CollectOptions& options, const Tokenizer& tokenizer, const RankInfo& rank,
    int threads, const std::function<void(std::vector<int64_t>*)>& share) {
  const std::vector<StoreIntake> stored = StoredIntakes(options.store);
  IntakeList list = ListIntakes(stored, options.data);
  CollectSources sources{OpenCorpus(options, rank, threads, list.sources), {}, {}};
  if (list.adds && LastIsEmpty(sources.corpus)) {
    if (rank.is_root() && !options.quiet) {
      const auto& stats = sources.corpus.stats();
      std::fprintf(stderr,
                   "collect: --data adds nothing: of all sources %llu documents are in "
                   "the store already, or come twice, and %llu are no text\n",
                   static_cast<unsigned long long>(stats.exact_duplicates),
                   static_cast<unsigned long long>(stats.binary_documents));
    }
    list.sources.pop_back();
    list.named = list.sources.size() - 1;
    sources.corpus = OpenCorpus(options, rank, threads, list.sources);
  }
  for (size_t i = 0; i < list.sources.size(); ++i) {
    const int64_t most =
        i == list.named ? options.max_sequences : stored[i].max_sequences;
    sources.intakes.push_back(
        {list.sources[i], sources.corpus.FingerprintAfter(i), 0, most});
  }
  std::vector<int64_t> shared;
  if (rank.is_root()) shared = FindLimits(sources, options, tokenizer, threads);
  shared.push_back(StopRequested() ? 1 : 0);
  share(&shared);
  if (shared.back() != 0) return std::nullopt;
  std::vector<SequenceLimit> limits;
  for (size_t i = 0; i < sources.intakes.size(); ++i) {
    limits.push_back(
        {static_cast<uint64_t>(shared[2 * i]), static_cast<uint64_t>(shared[2 * i + 1])});
  }
  std::vector<uint64_t> stored_chunks;
  for (const StoreIntake& intake : stored) {
    stored_chunks.push_back(static_cast<uint64_t>(intake.num_chunks));
  }
  sources.plan = MakeChunkPlan(sources.corpus, limits, stored_chunks);
  size_t begin = 0;
  for (size_t i = 0; i < sources.intakes.size(); ++i) {
    const size_t end = sources.plan.intakes[i].chunk_end;
    sources.intakes[i].num_chunks = static_cast<int64_t>(end - begin);
    begin = end;
  }
  return sources;
}

}  // namespace routecast
