// Misses of the cache on real router output of another system, against the figures of a
// plain Python implementation stored beside that data. Absent data: nothing to compare
// with, so the test fails only where the folder is there and disagrees.
#include <zstd.h>

#include <cstdlib>
#include <map>

#include "common/files.h"
#include "common/run_record.h"
#include "evaluator/expert_cache.h"
#include "gtest/gtest.h"

namespace routecast {
namespace {

constexpr int kLayers = 24, kTopK = 4, kExperts = 32;

fs::path DataFolder() {
  const char* root = std::getenv("ROUTECAST_SOURCE_DIR");
  return fs::path(root ? root : ".") / "../shared/data/routing-gpt-oss-20b";
}

// uses[layer] of each sequence: expert ids, kTopK a token.
using Sequence = std::vector<std::vector<int>>;

std::vector<Sequence> ReadSequences() {
  const std::string packed = ReadFile(DataFolder() / "mmlu_test.tsv.zst");
  std::string text(ZSTD_getFrameContentSize(packed.data(), packed.size()), '\0');
  EXPECT_EQ(ZSTD_decompress(text.data(), text.size(), packed.data(), packed.size()),
            text.size());
  std::vector<Sequence> sequences;
  std::string last_id;
  size_t at = text.find('\n') + 1;  // after the heading
  while (at < text.size()) {
    const size_t end = std::min(text.find('\n', at), text.size());
    std::vector<std::string> columns;
    for (size_t from = at; from <= end;) {
      const size_t tab = std::min(text.find('\t', from), end);
      columns.push_back(text.substr(from, tab - from));
      from = tab + 1;
    }
    at = end + 1;
    if (columns.size() < 3 + kLayers) continue;
    if (sequences.empty() || columns[0] != last_id) sequences.emplace_back(kLayers);
    last_id = columns[0];
    for (int layer = 0; layer < kLayers; ++layer) {
      const char* p = columns[columns.size() - kLayers + layer].c_str();
      for (int k = 0; k < kTopK; ++k) {
        char* next = nullptr;
        sequences.back()[layer].push_back(static_cast<int>(std::strtol(p, &next, 10)));
        p = next + 1;
      }
    }
  }
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
  if (!fs::exists(DataFolder() / "reference_stats.json")) {
    SUCCEED() << "no reference data beside this checkout";
    return;
  }
  const Json reference = ReadJsonFile(DataFolder() / "reference_stats.json");
  const std::vector<Sequence> sequences = ReadSequences();
  ASSERT_EQ(sequences.size(), 201u);
  const Json& lru = reference["lru_misses_per_layer_cache_reset_each_sequence"];
  EXPECT_EQ(Misses(sequences, Eviction::kLru, 8), lru["8"].get<uint64_t>());
  EXPECT_EQ(Misses(sequences, Eviction::kLru, 16), lru["16"].get<uint64_t>());
  const Json& belady = reference["belady_misses_same_semantics"];
  EXPECT_EQ(Misses(sequences, Eviction::kBelady, 8), belady["8"].get<uint64_t>());
}

}  // namespace
}  // namespace routecast
