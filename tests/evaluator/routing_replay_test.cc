// Misses of the cache on real router output of another system, imported, against the
// figures of a plain Python implementation stored beside that data.
#include "common/run_record.h"
#include "evaluator/expert_cache.h"
#include "gtest/gtest.h"
#include "storage/trace_reader.h"
#include "tests/storage/temp_folder.h"
#include "tests/support/published_routing.h"

namespace routecast {
namespace {

constexpr int kLayers = PublishedRouting::kLayers, kTopK = PublishedRouting::kTopK,
              kExperts = PublishedRouting::kExperts;

// uses[layer] of each sequence: expert ids, kTopK a token.
using Sequence = std::vector<std::vector<int>>;

std::vector<Sequence> ReadSequences(const fs::path& store) {
  std::vector<Sequence> sequences;
  TraceReader(store, NeedTokens::kNo)
      .Scan(
          [&](RoutingTrace&& trace) {
            Sequence& uses = sequences.emplace_back();
            const auto& ids = trace.decoder.topk_ids;
            const auto each =
                static_cast<std::ptrdiff_t>(trace.decoder.num_tokens) * kTopK;
            for (int l = 0; l < kLayers; ++l) {
              uses.emplace_back(ids.begin() + l * each, ids.begin() + (l + 1) * each);
            }
          },
          WithHidden::kNo);
  return sequences;
}

uint64_t Misses(const std::vector<Sequence>& sequences, Eviction eviction, int slots) {
  const MoeGeometry geometry{0, 1, kExperts, kTopK, 8};
  uint64_t misses = 0;
  for (const Sequence& sequence : sequences) {
    for (const std::vector<int>& uses : sequence) {
      ExpertCache cache(geometry, slots, eviction);
      if (eviction == Eviction::kBelady) {
        std::vector<ExpertKey> future;
        for (int expert : uses) future.push_back({0, expert});
        cache.SetFuture(future);
      }
      for (size_t i = 0; i < uses.size(); ++i) {
        const ExpertKey key{0, uses[i]};
        if (i % kTopK == 0) cache.BeginLayer(0);
        if (cache.state(key) != ExpertCache::State::kReady) {
          ++misses;
          if (cache.free_slots() == 0) cache.Drop(*cache.Victim());
          cache.Load(key);
          cache.Arrive(key);
        }
        cache.Use(key);
      }
    }
  }
  return misses;
}

TEST(RoutingReplayTest, MissesEqualTheReference) {
  if (!PublishedRouting::Exists()) {
    GTEST_SKIP() << "no reference data beside this checkout: "
                 << PublishedRouting::Folder();
  }
  const Json reference =
      ReadJsonFile(PublishedRouting::Folder() / "reference_stats.json");
  const TempFolder folder;
  const auto sequences =
      ReadSequences(PublishedRouting::ImportReference(folder.path() / "published"));
  ASSERT_EQ(sequences.size(), 201u);
  size_t figures = 0;
  for (const auto& [eviction, name] :
       {std::pair(Eviction::kLru, "lru_misses_per_layer_cache_reset_each_sequence"),
        {Eviction::kBelady, "belady_misses_same_semantics"}}) {
    for (const auto& [slots, misses] : reference[name].items()) {
      EXPECT_EQ(Misses(sequences, eviction, std::stoi(slots)), misses.get<uint64_t>())
          << name << ", " << slots << " slots";
      ++figures;
    }
  }
  EXPECT_EQ(figures, 8u);  // LRU of 4, 8, 12, 16 and 24 slots, Belady of 4, 8 and 16
}

}  // namespace
}  // namespace routecast
