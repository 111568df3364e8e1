// Real router output of another system (top-4 of 32 experts, 24 layers), imported and
// held against the figures of a plain Python implementation stored beside that data.
#include <gtest/gtest.h>

#include <algorithm>

#include "storage/statistics.h"
#include "storage/trace_reader.h"
#include "tests/storage/temp_folder.h"
#include "tests/support/published_routing.h"

namespace routecast {
namespace {

constexpr int kLayers = PublishedRouting::kLayers, kTopK = PublishedRouting::kTopK,
              kExperts = PublishedRouting::kExperts, kTrainSequences = 151;

class PublishedStatistics : public testing::Test {
 protected:
  void SetUp() override {
    if (!PublishedRouting::Exists()) {
      GTEST_SKIP() << "no reference data beside this checkout: "
                   << PublishedRouting::Folder();
    }
    reference_ = ReadJsonFile(PublishedRouting::Folder() / "reference_stats.json");
  }
  // The store of the reference's sequences number `first` to `last` - 1.
  fs::path Import(const std::string& name, int first, int last) {
    return PublishedRouting::ImportReference(folder_.path() / name, first, last);
  }
  static StoreStatistics Statistics(const fs::path& store) {
    return ComputeStatistics(TraceReader(store, NeedTokens::kNo));
  }
  // Share of the experts in use in `test` that are among the `hot` most used in `train`,
  // as a mean over layers.
  static double HotRecall(const StoreStatistics& train, const StoreStatistics& test,
                          int hot) {
    double sum = 0;
    for (int l = 0; l < kLayers; ++l) {
      std::vector<int> order(kExperts);
      for (int e = 0; e < kExperts; ++e) order[e] = e;
      const auto& counts = train.layers[l].slot_counts;
      std::stable_sort(order.begin(), order.end(),
                       [&](int a, int b) { return counts[a] > counts[b]; });
      uint64_t hits = 0, uses = 0;
      for (int i = 0; i < kExperts; ++i) {
        const uint64_t count = test.layers[l].slot_counts[order[i]];
        hits += i < hot ? count : 0;
        uses += count;
      }
      sum += static_cast<double>(hits) / static_cast<double>(uses);
    }
    return sum / kLayers;
  }

  TempFolder folder_;
  Json reference_;
};

TEST_F(PublishedStatistics, SizesAndPreviousTokenRecall) {
  const StoreStatistics stats = Statistics(Import("all", 0, 201));
  EXPECT_EQ(stats.sequences, 201u);
  EXPECT_EQ(stats.decoder_tokens, 61020u);
  uint64_t uses = 0;
  const Json& recall = reference_["prev_token_same_layer_recall_at_4_per_layer"];
  for (int l = 0; l < kLayers; ++l) {
    for (const uint64_t count : stats.layers[l].slot_counts) uses += count;
    EXPECT_NEAR(stats.layers[l].previous_token_recall, recall[l].get<double>(), 5.1e-7);
  }
  EXPECT_EQ(uses, reference_["accesses_total"].get<uint64_t>());
}

TEST_F(PublishedStatistics, StaticHotSets) {
  const StoreStatistics train = Statistics(Import("train", 0, kTrainSequences));
  const StoreStatistics test = Statistics(Import("test", kTrainSequences, 201));
  for (const int hot : {4, 8, 16}) {
    const std::string key =
        "static_hot_" + std::to_string(hot) + "_recall_of_top4_mean_over_layers";
    EXPECT_NEAR(HotRecall(train, test, hot), reference_[key].get<double>(), 5.1e-7)
        << hot;
  }
}

// The first choices follow each other as in the reference, sequence by sequence.
TEST_F(PublishedStatistics, TableFromLayerToLayer) {
  const TraceReader reader(Import("all", 0, 201), NeedTokens::kNo);
  const int pairs = kLayers - 1;
  std::vector<uint64_t> table(static_cast<size_t>(pairs) * kExperts * kExperts);
  std::vector<uint64_t> hits(pairs), tokens(pairs);
  reader.Scan(
      [&](RoutingTrace&& trace) {
        const RoutingSpan& s = trace.decoder;
        for (int l = 0; l < pairs; ++l) {
          for (int t = 0; t < s.num_tokens; ++t) {
            const int now = s.expert_ids[l * s.num_tokens + t];
            const int next = s.expert_ids[(l + 1) * s.num_tokens + t];
            const auto row = table.begin() + (l * kExperts + now) * kExperts;
            if (trace.sequence_id < kTrainSequences) {
              ++row[next];
            } else {
              hits[l] += std::max_element(row, row + kExperts) - row == next;
              ++tokens[l];
            }
          }
        }
      },
      WithHidden::kNo);
  const Json& expected =
      reference_["table_top1_layer_l_to_l_plus_1_accuracy_train_seq_0_150_test_151_200"];
  for (int l = 0; l < pairs; ++l) {
    EXPECT_NEAR(static_cast<double>(hits[l]) / static_cast<double>(tokens[l]),
                expected[l].get<double>(), 5.1e-7);
  }
}

// Least recently used experts of each layer, empty at each sequence's start.
TEST_F(PublishedStatistics, LruMisses) {
  const TraceReader reader(Import("all", 0, 201), NeedTokens::kNo);
  constexpr size_t kSlots = 8;
  uint64_t misses = 0;
  reader.Scan(
      [&](RoutingTrace&& trace) {
        const RoutingSpan& s = trace.decoder;
        for (int l = 0; l < kLayers; ++l) {
          std::vector<uint16_t> held;  // least recently used first
          for (int i = 0; i < s.num_tokens * kTopK; ++i) {
            const uint16_t expert = s.topk_ids[l * s.num_tokens * kTopK + i];
            const auto found = std::find(held.begin(), held.end(), expert);
            misses += found == held.end();
            if (found != held.end()) {
              held.erase(found);
            } else if (held.size() == kSlots) {
              held.erase(held.begin());
            }
            held.push_back(expert);
          }
        }
      },
      WithHidden::kNo);
  const Json& expected = reference_["lru_misses_per_layer_cache_reset_each_sequence"];
  EXPECT_EQ(misses, expected[std::to_string(kSlots)].get<uint64_t>());
}

}  // namespace
}  // namespace routecast
