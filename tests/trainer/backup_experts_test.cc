// Heads for the router's second, third .. choice: their number, their loss, what they
// learn and how they are scored; and what a run without labels for them is told.
#include <ATen/ATen.h>
#include <c10/core/GradMode.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>

#include "common/errors.h"
#include "models/speculation_onnx.h"
#include "tests/storage/temp_folder.h"
#include "tests/trainer/synthetic_traces.h"
#include "tests/trainer/training_in_memory.h"
#include "trainer/leaderboard.h"
#include "trainer/leaderboard_rows.h"
#include "trainer/speculation_loss.h"

namespace routecast {
namespace {

constexpr int kBackups = 3;

int64_t ParametersOf(const std::string& kind, int backups) {
  SpeculationConfig c =
      DefaultSpeculationConfig(kind, MoeGeometry{6, 6, 128, 1, 768}, 0, 0);
  c.backup_experts = backups;
  return MakeSpeculationModel(c, 1)->parameters().num_elements();
}

TEST(BackupExperts, AddThePublishedNumberOfParameters) {
  EXPECT_EQ(ParametersOf("interlayer", kBackups) - ParametersOf("interlayer", 0), 196992);
  EXPECT_EQ(ParametersOf("moe", kBackups) - ParametersOf("moe", 0), 196992);
}

TEST(BackupExperts, OfAConfigurationAreReadWhereTheyAreSaid) {
  SpeculationConfig c =
      DefaultSpeculationConfig("interlayer", MoeGeometry{2, 2, 8, 1, 16}, 0, 0);
  EXPECT_FALSE(c.ToJson().contains("backup_experts"));  // as files before them
  EXPECT_EQ(SpeculationConfig::FromJson(c.ToJson(), "x"), c);
  c.backup_experts = kBackups;
  EXPECT_EQ(SpeculationConfig::FromJson(c.ToJson(), "x"), c);
  c.backup_experts = 8;  // of eight experts one is the first choice
  EXPECT_THROW(SpeculationConfig::FromJson(c.ToJson(), "x"), DataError);
  c.backup_experts = kBackups;
  c.kind = "autoregressive";
  EXPECT_THROW(SpeculationConfig::FromJson(c.ToJson(), "x"), DataError);
}

// Members in one set of layers give what each gives alone.
TEST(BackupExperts, OfMembersTogetherAreThoseOfEachAlone) {
  const c10::NoGradGuard no_grad;
  SpeculationConfig c =
      DefaultSpeculationConfig("interlayer", MoeGeometry{3, 0, 8, 1, 16}, 0, 0);
  c.width = 16;
  c.heads = 2;
  c.ff = 32;
  c.layers = 1;
  c.backup_experts = kBackups;
  RoutingWindow w;
  w.source_layer = 0;
  w.num_layers = 3;
  w.num_experts = 8;
  w.token_ids_BT = at::zeros({2, 4}, at::kLong);
  w.valid_BT = at::ones({2, 4}, at::kBool);
  w.experts_BTL = at::arange(24).view({2, 4, 3}).remainder(8);
  const auto both = KindOf(c.kind).make(c, {5, 6})->Forward(w, 0).backups_BTHKE;
  ASSERT_EQ(both.sizes(), (at::IntArrayRef{4, 4, 2, kBackups, 8}));
  for (int64_t m = 0; m < 2; ++m) {
    const auto alone = MakeSpeculationModel(c, uint64_t(5 + m))->Forward(w, 0);
    EXPECT_TRUE(at::allclose(both.narrow(0, 2 * m, 2), alone.backups_BTHKE, 1e-5, 1e-6));
  }
}

// Two tokens that count, of one that does not; two backups.
SpeculationBatch SmallBatch() {
  SpeculationBatch batch;
  batch.window.stack = Stack::kDecoder;
  batch.window.source_layer = 0;
  batch.window.token_ids_BT = at::zeros({1, 3}, at::kLong);
  batch.window.valid_BT = at::ones({1, 3}, at::kBool);
  batch.labels_BTH = at::tensor({1, -100, 3}, at::kLong).view({1, 3, 1});
  batch.teacher_ids_BTHK =
      at::tensor({1, 0, 2, 0, 0, 0, 3, 4, 1}, at::kLong).view({1, 3, 1, 3});
  return batch;
}

TEST(BackupExperts, CostTheMeanOfTheirCrossEntropies) {
  at::manual_seed(3);
  SpeculationOutput output;
  output.logits_BTHE = at::randn({1, 3, 1, 5});
  const SpeculationBatch batch = SmallBatch();
  LossWeights weights;
  weights.backup = 0.4;
  const double without = SpeculationLoss(output, batch, weights).total.item<double>();
  output.backups_BTHKE = at::randn({1, 3, 1, 2, 5});
  double expected = 0;
  for (const int t : {0, 2}) {
    for (int k = 0; k < 2; ++k) {
      const auto log_probs = at::log_softmax(output.backups_BTHKE[0][t][0][k], 0);
      const auto choice = batch.teacher_ids_BTHK[0][t][0][k + 1].item<int64_t>();
      expected -= log_probs[choice].item<double>() / 2;
    }
  }
  const LossSum sum = SpeculationLoss(output, batch, weights);
  EXPECT_NEAR(sum.total.item<double>(), without + 0.4 * expected, 1e-5);
  // What is reported is the first head's.
  EXPECT_NEAR(ScoresOf(output, batch).cross_entropy, without, 1e-5);
}

TEST(BackupExperts, AnswerWithDistinctExperts) {
  SpeculationOutput output;
  // Token 0: first head 1, 0, 4; backups 1 (taken), so 2; then 0. Token 2: first head 0,
  // 3, 2; backups 4, 1.
  output.logits_BTHE =
      at::tensor({2., 9., 0., 0., 1., 0., 0., 0., 0., 0., 9., 0., 1., 2., 0.}, at::kFloat)
          .view({1, 3, 1, 5});
  output.backups_BTHKE =
      at::tensor({0., 9., 5., 0., 0., 8., 0., 7., 0., 0., 0., 0., 0., 0., 0.,
                  0., 0., 0., 0., 0., 0., 0., 0., 0., 9., 0., 9., 0., 0., 0.},
                 at::kFloat)
          .view({1, 3, 1, 2, 5});
  BackupAccumulator accumulator({0, 2, 5, 1, 4}, 2);
  accumulator.Add(output, SmallBatch());
  const auto scores = accumulator.Scores(accumulator.Sums());
  ASSERT_EQ(scores.size(), 1u);
  EXPECT_EQ(scores[0].phase, Stack::kDecoder);
  EXPECT_EQ(scores[0].lead, 1);
  EXPECT_EQ(scores[0].samples, 2);
  // Answers {1, 2, 0} and {0, 4, 1} hold all of {0, 2} and {4, 1}; the first head's
  // {1, 0, 4} holds 0 alone, its {0, 3, 2} nothing.
  EXPECT_THAT(scores[0].recall, testing::ElementsAre(1, 1));
  EXPECT_THAT(scores[0].recall_primary, testing::ElementsAre(0.5, 0));
  // The demanded 1 is in both answers to token 0, 3 in the first head's to token 2 alone.
  EXPECT_DOUBLE_EQ(scores[0].recall_first, 0.5);
  EXPECT_DOUBLE_EQ(scores[0].recall_first_primary, 1);
}

TEST(BackupExperts, LabelsMoveWithWhatAugmentationMoves) {
  AugmentOptions options;
  options.subsequence = 1;
  options.permutation = 1;
  SpeculationBatch batch;
  RoutingWindow& w = batch.window;
  w.stack = Stack::kEncoder;
  w.source_layer = 0;
  w.num_layers = 2;
  w.num_experts = 7;
  w.token_ids_BT = at::arange(48).view({2, 24});
  w.valid_BT = at::ones({2, 24}, at::kBool);
  w.experts_BTL = at::arange(96).view({2, 24, 2}).remainder(7);
  batch.documents_BT = at::ones({2, 24}, at::kLong);
  batch.labels_BTH = at::arange(48).view({2, 24, 1}).remainder(7);
  // The router's choices: the label, then the two after it.
  const auto further = at::arange(3).view({1, 1, 1, 3});
  batch.teacher_ids_BTHK = (batch.labels_BTH.unsqueeze(3) + further).remainder(7);
  batch.teacher_probs_BTHK = batch.teacher_ids_BTHK.to(at::kFloat);
  Augment(options, 5, &batch);
  const auto labels = batch.labels_BTH, choices = batch.teacher_ids_BTHK;
  const auto counts = labels.ge(0);
  EXPECT_LT(counts.sum().item<int>(), 48) << "no part was taken";
  EXPECT_TRUE(at::equal(labels.masked_select(counts),
                        choices.select(3, 0).masked_select(counts)));
  // One renaming for all choices: from what a label became follows its successor.
  for (int64_t b = 0; b < 2; ++b) {
    std::map<int64_t, int64_t> next;
    for (int64_t t = 0; t < 24; ++t) {
      if (labels[b][t][0].item<int64_t>() < 0) continue;
      const auto at = [&](int k) { return choices[b][t][0][k].item<int64_t>(); };
      for (int k = 0; k < 2; ++k) {
        const auto [place, fresh] = next.emplace(at(k), at(k + 1));
        EXPECT_EQ(place->second, at(k + 1));
      }
    }
    EXPECT_GE(next.size(), 7u);
  }
}

class BackupTraining : public testing::Test {
 protected:
  SyntheticTraces Traces(int top_k) const {
    return TraceSynthesizer(3, 8, 24, 60, 5).Make(60, 6, 24, true, top_k);
  }
  SpeculationJob Job(const std::string& name, int backups) const {
    SpeculationJob job;
    job.options.kind = "interlayer";
    job.options.sizes = {16, 2, 32, 1, 0, 0};
    job.options.backup_experts = backups;
    job.options.steps = 40;
    job.options.global_batch = 16;
    job.options.micro_batch = 8;
    job.options.validation_sequences = 8;
    job.out = folder_.path() / name;
    job.quiet = true;
    return job;
  }
  static double Mean(const Json& backups, const char* key) {
    double sum = 0;
    int count = 0;
    for (const Json& place : backups) {
      for (const Json& recall : place.at(key)) sum += recall.get<double>(), ++count;
    }
    return sum / count;
  }
  TempFolder folder_;
};

TEST_F(BackupTraining, IsScoredAndHasItsLineInTheLeaderboard) {
  const SyntheticTraces traces = Traces(4);
  SpeculationJob job = Job("run", kBackups);
  job.options.training.learning_rate = 1e-2;
  job.options.steps = 150;
  const Json results = Train(job, traces).results;
  ASSERT_EQ(results["backups"].size(), results["scores"].size());
  for (size_t i = 0; i < results["scores"].size(); ++i) {
    EXPECT_EQ(results["backups"][i]["samples"], results["scores"][i]["samples"]);
    EXPECT_EQ(results["backups"][i]["recall"].size(), size_t{kBackups});
  }
  // Four of eight experts hold the second to fourth choice in 3 of 7 cases (.43) by
  // chance.
  EXPECT_GT(Mean(results["backups"], "recall"), 0.5);
  const Json row = LeaderboardRow("interlayer (run)", {results}, NAN, 0, 1);
  EXPECT_DOUBLE_EQ(row["backup_recall"], Mean(results["backups"], "recall"));
  EXPECT_DOUBLE_EQ(row["backup_recall_primary"],
                   Mean(results["backups"], "recall_primary"));
  const Json board = {{"rows", {row}}};
  EXPECT_THAT(LeaderboardText(board), testing::HasSubstr("choices 2+"));
}

TEST_F(BackupTraining, ChangesWhatAStepLearnsByItsWeight) {
  const SyntheticTraces traces = Traces(4);
  SpeculationJob job = Job("a", kBackups);
  job.options.steps = 2;
  const auto losses = Train(job, traces).losses;
  job.out = folder_.path() / "b";
  job.options.backup_weight = 0.6;
  const auto heavier = Train(job, traces).losses;
  job.out = folder_.path() / "c";
  job.options.backup_weight = 0;
  const auto none = Train(job, traces).losses;
  // At the start each head costs about ln 8.
  EXPECT_NEAR(losses[0] - none[0], 0.3 * std::log(8), 0.1);
  EXPECT_NEAR(heavier[0] - none[0], 2 * (losses[0] - none[0]), 1e-4);
}

TEST_F(BackupTraining, IsRefusedBeforeTheFirstStepWhereThereIsNothingToLearnFrom) {
  EXPECT_THAT(Refusal(Job("few", kBackups), Traces(3)),
              testing::AllOf(testing::HasSubstr("the store holds 3 a token"),
                             testing::HasSubstr("--top_k=4")));
  EXPECT_THAT(Refusal(Job("none", 1), Traces(0)),
              testing::HasSubstr("the store holds 0 a token"));
  SpeculationJob other = Job("other", kBackups);
  other.options.kind = "hidden";
  other.options.sizes = {};
  EXPECT_THAT(Refusal(other, Traces(4)), testing::HasSubstr("--kind=interlayer"));
  SpeculationJob onnx = Job("onnx", kBackups);
  onnx.onnx = true;
  EXPECT_THAT(Refusal(onnx, Traces(4)), testing::HasSubstr("--backup_experts"));
}

TEST_F(BackupTraining, GoesOnFromARunThatHasAsMany) {
  const SyntheticTraces traces = Traces(4);
  SpeculationJob first = Job("first", kBackups);
  first.options.steps = 2;
  Train(first, traces);
  SpeculationJob next = Job("next", kBackups);
  next.options.sizes = {};
  next.options.steps = 2;
  next.options.start_from = first.out.string();
  EXPECT_EQ(Train(next, traces).losses.size(), 2u);
  next.options.backup_experts = 0;
  next.out = folder_.path() / "without";
  EXPECT_THAT(Refusal(next, traces), testing::HasSubstr("3 backup experts"));
}

}  // namespace
}  // namespace routecast
