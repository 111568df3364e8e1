// Traces of models that route a token to several experts, as they are imported: no token
// ids, no states. Labels, losses and scores heed every expert.
#include <ATen/ATen.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <map>
#include <sstream>
#include <utility>

#include "common/errors.h"
#include "common/random.h"
#include "tests/storage/temp_folder.h"
#include "tests/support/published_routing.h"
#include "trainer/knn_estimate.h"
#include "trainer/leaderboard.h"
#include "trainer/speculation_loss.h"
#include "trainer/speculation_size.h"

namespace routecast {
namespace {

constexpr int kLayers = 3, kChosen = 4, kExperts = 16, kTokens = 12, kSequences = 60;

// A token is one of 48 kinds, which decide the experts of all its layers: the first
// choice tells 16 of them apart, the others tell the rest.
int ExpertAt(int token, int layer, int choice) {
  const auto kind = static_cast<int>(ToRange(Mix(7, uint64_t(token)), 48));
  return (5 * kind + 3 * layer + choice * (1 + 2 * (kind % 3))) % kExperts;
}

class SeveralExperts : public testing::Test {
 protected:
  // The store of packed rows that another system recorded.
  fs::path Import() {
    std::string ids, index = "row_offset,decode_tokens\n";
    for (int token = 0; token < kSequences * kTokens; ++token) {
      for (int l = 0; l < kLayers; ++l) {
        for (int k = 0; k < kChosen; ++k) ids += static_cast<char>(ExpertAt(token, l, k));
      }
    }
    for (int s = 0; s < kSequences; ++s) {
      index += std::to_string(s * kTokens) + "," + std::to_string(kTokens) + "\n";
    }
    WriteFileAtomic(At("index_x.csv"), index);
    WriteFileAtomic(At("experts_x.u8"), ids);
    ImportTraces(At("index_x.csv"), At("store"),
                 {.format = "packed",
                  .num_experts = kExperts,
                  .layers = kLayers,
                  .experts_per_token = kChosen});
    return At("store");
  }
  static TraceDataset Open(const fs::path& store) {
    return {std::make_shared<const TraceReader>(store, NeedTokens::kNo), {}};
  }
  SpeculationJob Job(const std::string& name, const std::string& kind) const {
    SpeculationJob job;
    job.options.kind = kind;
    job.options.sizes = {32, 2, 64, 1, 0, -1};
    job.options.steps = 60;
    job.options.global_batch = 16;
    job.options.micro_batch = 8;
    job.options.validation_sequences = 8;
    job.out = At(name);
    job.quiet = true;
    return job;
  }
  static Json Train(const SpeculationJob& job, const fs::path& store) {
    TraceDataset dataset = Open(store);
    LocalCommunicator comm;
    return TrainSpeculation(job, &dataset, {}, &comm).results;
  }
  // Mean recall over the places where the target is the same token's.
  static double Recall(const Json& entries) {
    double sum = 0;
    int count = 0;
    for (const Json& e : entries) {
      if (e["layer"].get<int>() < 0 || e["target"] <= e["layer"]) continue;
      sum += e["recall"].get<double>();
      ++count;
    }
    return sum / count;
  }
  fs::path At(const std::string& name) const { return folder_.path() / name; }

 private:
  TempFolder folder_;
};

TEST_F(SeveralExperts, APartIsReadAheadWhereAllOfItFits) {
  const auto reader = std::make_shared<const TraceReader>(Import(), NeedTokens::kNo);
  TraceDataset dataset(reader, {});
  const auto estimate = dataset.EstimateBytes(SplitPart::kTrain, WithHidden::kNo);
  EXPECT_TRUE(dataset.KeepAll(SplitPart::kTrain, WithHidden::kNo));
  const uint64_t kept = dataset.kept_bytes();
  EXPECT_NEAR(double(kept), double(estimate), 0.1 * double(kept));
  dataset.Read(dataset.Select(SplitPart::kTrain, Stack::kDecoder, WithHidden::kNo),
               WithHidden::kNo);
  EXPECT_EQ(dataset.kept_bytes(), kept) << "something was left to read";
  TraceDataset small(reader, {.cache_bytes = estimate / 2});
  EXPECT_FALSE(small.KeepAll(SplitPart::kTrain, WithHidden::kNo));
  EXPECT_LE(small.kept_bytes(), estimate / 2);
  // --dry_run says which of the two it will be.
  const SpeculationJob job = Job("plan", "interlayer");
  EXPECT_THAT(DescribeSpeculation(job, &dataset, 1),
              testing::HasSubstr("read into memory before the first step"));
  EXPECT_THAT(DescribeSpeculation(job, &small, 1),
              testing::HasSubstr("read when they are needed"));
}

TEST_F(SeveralExperts, ABatchHoldsAllOfAToken) {
  TraceDataset dataset = Open(Import());
  const auto sequences =
      dataset.Select(SplitPart::kTrain, Stack::kDecoder, WithHidden::kNo);
  ASSERT_GE(sequences.size(), 2u);
  const SpeculationBatch batch = MakeSpeculationBatch(
      {1, Stack::kDecoder, 1, {sequences[0], sequences[1]}}, &dataset, WithHidden::kNo);
  const auto sets = LabelSets(batch);
  ASSERT_EQ(sets.sizes(), (at::IntArrayRef{2, kTokens, kLayers, kChosen}));
  const auto first = static_cast<int>(sequences[1]) * kTokens;
  for (int t = 0; t < kTokens; ++t) {
    for (int k = 0; k < kChosen; ++k) {
      EXPECT_EQ(sets[1][t][0][k].item<int>(), ExpertAt(first + t, 2, k));
      // Lead 2 leaves the token: the next one's layer 0.
      EXPECT_EQ(sets[1][t][1][k].item<int>(),
                t + 1 < kTokens ? ExpertAt(first + t + 1, 0, k) : -100);
    }
    EXPECT_EQ(batch.window.others_BTLK[1][t][1][2].item<int>(),
              ExpertAt(first + t, 1, 3));
  }
}

// Against plain loops, over logits that rank nothing alike.
TEST(SeveralExpertsLoss, IsTheMeanOverAllAndRecallCountsAll) {
  at::manual_seed(3);
  SpeculationBatch batch;
  batch.window.token_ids_BT = at::zeros({1, 5}, at::kLong);
  batch.window.valid_BT = at::ones({1, 5}, at::kBool);
  batch.labels_BTH = at::tensor({1, 0, -100, 3, 5}, at::kLong).view({1, 5, 1});
  batch.others_BTHK = at::tensor({2, 3, 4, 1, 5, 5}, at::kLong).view({1, 3, 1, 2});
  batch.others_BTHK = at::cat({batch.others_BTHK, batch.others_BTHK.narrow(1, 0, 2)}, 1);
  const SpeculationOutput output{at::randn({1, 5, 1, 6}), at::ones({1, 5, 1})};
  double loss = 0, recall = 0, first = 0;
  for (const int t : {0, 1, 3, 4}) {
    const auto scores = output.logits_BTHE[0][t][0];
    const auto log_probs = at::log_softmax(scores, 0);
    for (int k = 0; k < 3; ++k) {
      const auto id = LabelSets(batch)[0][t][0][k].item<int64_t>();
      const int rank = scores.gt(scores[id]).sum().item<int>();
      loss -= log_probs[id].item<double>() / 3;
      recall += rank < 3 ? 1 / 3. : 0;
      first += k == 0 && rank == 0;
    }
  }
  const LossSum sum = SpeculationLoss(output, batch, {});
  EXPECT_EQ(sum.labels, 4);
  EXPECT_NEAR(sum.total.item<double>(), loss, 1e-5);
  const RoutingScores scores = ScoresOf(output, batch);
  EXPECT_EQ(scores.labels, 4);
  EXPECT_NEAR(scores.cross_entropy, loss, 1e-5);
  EXPECT_NEAR(scores.recall, recall, 1e-9);
  EXPECT_NEAR(scores.top1, first, 1e-9);
  // Smoothing is that of one-hot labels, K times.
  double smoothed = 0;
  for (int k = 0; k < 3; ++k) {
    SpeculationBatch one = batch;
    one.others_BTHK = at::Tensor();
    one.labels_BTH = LabelSets(batch).select(3, k);
    smoothed +=
        SpeculationLoss(output, one, {.label_smoothing = .2}).total.item<double>();
  }
  EXPECT_NEAR(
      SpeculationLoss(output, batch, {.label_smoothing = .2}).total.item<double>(),
      smoothed / 3, 1e-5);
}

// What hides or renames a first choice does so to the others: else they would tell it.
TEST_F(SeveralExperts, AugmentationTakesAllOfAToken) {
  TraceDataset dataset = Open(Import());
  const auto sequences =
      dataset.Select(SplitPart::kTrain, Stack::kDecoder, WithHidden::kNo);
  const auto augmented = [&](const AugmentOptions& options) {
    SpeculationBatch batch = MakeSpeculationBatch(
        {1, Stack::kDecoder, 1, {sequences[0], sequences[1]}}, &dataset, WithHidden::kNo);
    Augment(options, 5, &batch);
    return batch;
  };
  for (const AugmentOptions& options :
       {AugmentOptions{.layer_dropout = .7}, AugmentOptions{.mask = .5}}) {
    const RoutingWindow w = augmented(options).window;
    const auto hidden = w.experts_BTL.eq(kExperts);
    EXPECT_TRUE(hidden.any().item<bool>());
    EXPECT_TRUE(at::equal(w.others_BTLK.eq(kExperts).all(3), hidden));
    EXPECT_TRUE(at::equal(w.others_BTLK.eq(kExperts).any(3), hidden));
  }
  const SpeculationBatch plain = augmented({}), renamed = augmented({.permutation = 1});
  std::map<int64_t, int64_t> names;  // of the first sequence
  const auto before = LabelSets(plain)[0].flatten(),
             after = LabelSets(renamed)[0].flatten();
  for (int64_t i = 0; i < before.numel(); ++i) {
    const auto from = before[i].item<int64_t>(), to = after[i].item<int64_t>();
    EXPECT_EQ(names.emplace(from, to).first->second, to);
  }
  EXPECT_EQ(names.at(-100), -100);
  EXPECT_FALSE(at::equal(before, after));
  const SpeculationBatch part = augmented({.subsequence = 1});
  EXPECT_TRUE(at::equal(LabelSets(part).ge(0).all(3), part.labels_BTH.ge(0)));
}

TEST(SeveralExpertsSets, AnEncoderNeedsEveryExpertOfEveryToken) {
  const auto labels = at::tensor({0, 1, 1, 2, -100, -100}, at::kLong).view({1, 3, 1, 2});
  const auto logits = at::tensor({9., 9., 0., 0., 0., 9., 9., 0., 0., 0., 0., 9.})
                          .to(at::kFloat)
                          .view({1, 3, 1, 4});
  EXPECT_LT(SetLoss(logits, labels).item<double>(), 0.01);
  EXPECT_GT(SetLoss(-logits, labels).item<double>(), 1);
  SetAccumulator accumulator;
  accumulator.Add(0, at::softmax(logits, -1), labels, at::ones({1, 4}));
  const SetScores scores = SetAccumulator::Scores(accumulator.Sums(2), 2).at(0);
  EXPECT_DOUBLE_EQ(scores.true_size, 3);
  EXPECT_DOUBLE_EQ(scores.recall, 1);
}

// The kind of a token is in its set alone, so only a model that sees and learns all of it
// can name all experts of the layers ahead.
TEST_F(SeveralExperts, TheSetIsLearntFromTheSet) {
  SpeculationJob job = Job("run", "interlayer");
  job.options.steps = 300;
  job.options.training.learning_rate = 3e-3;
  const Json results = Train(job, Import());
  const double frequency = Recall(results["baselines"]["frequency"]);
  EXPECT_LT(frequency, 0.5);
  EXPECT_GT(Recall(results["baselines"]["markov"]), frequency + 0.2);
  EXPECT_GT(Recall(results["scores"]), Recall(results["baselines"]["markov"]));
  EXPECT_GT(Recall(results["scores"]), 0.98);
  EXPECT_TRUE(results["baselines"].contains("previous_token"));
  EXPECT_FALSE(results["baselines"].contains("token_table"));  // there are no ids
  for (const Json& e : results["scores"]) {
    EXPECT_EQ(e["recall_by_choice"].size(), size_t{kChosen});
    EXPECT_GE(e["recall_at_2k"], e["recall"]);
    EXPECT_LE(e["ci95"][0], e["recall"]);
  }
  EXPECT_GT(results["validation"]["recall"], results["validation"]["top1"]);
}

// A token's kind, and with it all its layers, follows from any of its sets; the next
// token's does not.
TEST_F(SeveralExperts, NeighboursAreFoundBySetsWhereThereAreNoStates) {
  TraceDataset dataset = Open(Import());
  const auto all = EstimateByNeighbours(&dataset, 1);
  ASSERT_EQ(all.size(), size_t{kLayers * kLayers});
  for (const KnnEstimate& e : all) {
    EXPECT_EQ(e.features, "experts");
    EXPECT_EQ(e.nearest_by_choice.size(), size_t{kChosen});
    if (e.layer + e.lead < kLayers) {
      EXPECT_EQ(e.recall_nearest, 1);
      EXPECT_EQ(e.bayes_bound, 1);
    } else {
      EXPECT_LT(e.recall_nearest, 0.5);  // by chance 4 of 16
      EXPECT_LT(e.bayes_bound, 0.8);
    }
  }
}

TEST_F(SeveralExperts, ALeaderboardComparesRecall) {
  LeaderboardJob job;
  job.run = Job("board", "interlayer");
  job.run.options.steps = 2;
  job.entries = {"all"};
  job.seeds = 1;
  TraceDataset dataset = Open(Import());
  LocalCommunicator comm;
  const Json board = MakeLeaderboard(job, &dataset, {}, &comm);
  EXPECT_EQ(board["experts_per_token"], kChosen);
  int estimates = 0;
  double last = 2;
  bool fewer = false;  // rows that answer fewer places come after all others
  for (const Json& row : board["rows"]) {
    EXPECT_NE(row["kind"], "hidden");  // needs ids and states
    estimates += row.contains("estimate") && row["decoder_next_recall"].is_number();
    if (row["decoder_recall"].is_null()) continue;  // a baseline that needs states
    const double recall = row["decoder_recall"];
    EXPECT_TRUE(!fewer || row["fewer_places"].get<bool>()) << row["kind"];
    if (row["fewer_places"] && !std::exchange(fewer, true)) last = 2;
    EXPECT_LE(recall, last) << row["kind"];  // best first
    last = recall;
  }
  EXPECT_EQ(estimates, 3);
  EXPECT_NE(LeaderboardText(board).find("recall at K"), std::string::npos);
}

// What needs token ids, states or one choice a token says so, and how to go on.
TEST_F(SeveralExperts, WhatTheStoreCannotTeachIsRefused) {
  const fs::path store = Import();
  const auto refusal = [&](const std::string& kind, auto&& change) -> std::string {
    SpeculationJob job = Job("run", kind);
    change(&job.options);
    try {
      Train(job, store);
    } catch (const UsageError& e) {
      EXPECT_LE(std::count(e.what(), e.what() + std::strlen(e.what()), '\n'), 2);
      return e.what();
    }
    return "";
  };
  const auto plainly = [](SpeculationOptions*) {};
  using testing::HasSubstr;
  EXPECT_THAT(refusal("hidden", plainly), HasSubstr("the store has none"));
  for (const std::string& kind : SpeculationKinds()) {
    if (KindOf(kind).router_inputs != RouterInputs::kRequired) continue;
    EXPECT_THAT(refusal(kind, plainly), HasSubstr("needs router inputs")) << kind;
  }
  EXPECT_THAT(refusal("interlayer", [](auto* o) { o->token_inputs = true; }),
              HasSubstr("--token_inputs needs token ids"));
  EXPECT_THAT(refusal("interlayer", [](auto* o) { o->router_inputs = true; }),
              HasSubstr("--router_inputs needs router inputs"));
  EXPECT_THAT(refusal("interlayer", [](auto* o) { o->topk_inputs = true; }),
              HasSubstr("--topk_inputs needs the routers' top-k"));
  EXPECT_THAT(refusal("interlayer", [](auto* o) { o->backup_experts = 1; }),
              HasSubstr("all of them are labels already"));
  EXPECT_THAT(refusal("interlayer", [](auto* o) { o->set_weight = 1; }),
              HasSubstr("a decoder alone"));
  EXPECT_THAT(refusal("ensemble", [](auto* o) { o->members = "interlayer;hidden"; }),
              HasSubstr("--kind=hidden needs"));
}

// Real routing of another system (top-4 of 32 experts, 24 layers).
TEST_F(SeveralExperts, PublishedTracesAreLearnt) {
  if (!PublishedRouting::Exists()) {
    GTEST_SKIP() << "no published traces beside this checkout: "
                 << PublishedRouting::Folder();
  }
  int sequences = 0;  // the first tokens of the first ones
  const fs::path published =
      PublishedRouting::Import(At("published"), [&](const std::string&, uint64_t) {
        return uint64_t{sequences++ < 60 ? 16u : 0u};
      });
  SpeculationJob job = Job("run", "interlayer");
  job.options.validation_sequences = job.options.test_sequences = 2;
  const Json results = Train(job, published);
  EXPECT_EQ(results["scores"].size(), size_t{25 * 24});
  EXPECT_GT(Recall(results["scores"]), Recall(results["baselines"]["frequency"]) + 0.05);
}

}  // namespace
}  // namespace routecast
