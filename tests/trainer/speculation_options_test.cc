// Schedules, members, sets, search and leaderboard: what training options mean.
#include <ATen/ATen.h>
#include <c10/core/GradMode.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>

#include "common/errors.h"
#include "models/ensemble_model.h"
#include "trainer/leaderboard.h"
#include "trainer/leaderboard_rows.h"
#include "trainer/member_optimizer.h"
#include "trainer/search.h"
#include "trainer/speculation_sets.h"

namespace routecast {
namespace {

LearningSchedule Schedule(const std::string& name) {
  LearningSchedule s;
  s.name = name;
  s.warmup_steps = 10;
  return s;
}

TEST(LearningScheduleTest, CosineEndsAtItsLastShare) {
  const LearningSchedule s = Schedule("cosine");
  EXPECT_DOUBLE_EQ(s.Share(0, 1000, 0), 0.1);
  EXPECT_DOUBLE_EQ(s.Share(9, 1000, 0), 1);
  EXPECT_DOUBLE_EQ(s.Share(10, 1000, 0), 1);
  EXPECT_NEAR(s.Share(505, 1000, 0), 0.51, 1e-9);
  EXPECT_NEAR(s.Share(1000, 1000, 0), 0.02, 1e-9);
}

TEST(LearningScheduleTest, RestartsGrow) {
  LearningSchedule s = Schedule("restarts");
  s.restart_steps = 100;
  s.last_share = 0;
  EXPECT_DOUBLE_EQ(s.Share(10, 1000, 0), 1);
  EXPECT_NEAR(s.Share(60, 1000, 0), 0.5, 1e-9);
  EXPECT_DOUBLE_EQ(s.Share(110, 1000, 0), 1);  // second wave, of 200
  EXPECT_NEAR(s.Share(210, 1000, 0), 0.5, 1e-9);
  EXPECT_DOUBLE_EQ(s.Share(310, 1000, 0), 1);  // third, of 400
  LearningSchedule epochs = Schedule("restarts");
  epochs.last_share = 0;
  epochs.restart_epochs = 4;
  EXPECT_DOUBLE_EQ(epochs.InEpochsOf(25).Share(210, 1000, 0), s.Share(210, 1000, 0));
  EXPECT_NE(epochs.InEpochsOf(50).Share(210, 1000, 0), s.Share(210, 1000, 0));
}

TEST(LearningScheduleTest, PlateausLowerAndOneCycleRises) {
  const LearningSchedule plateau = Schedule("plateau");
  EXPECT_DOUBLE_EQ(plateau.Share(500, 1000, 0), 1);
  EXPECT_DOUBLE_EQ(plateau.Share(500, 1000, 2), 0.25);
  EXPECT_DOUBLE_EQ(plateau.Share(500, 1000, 20), 0.02);
  const LearningSchedule cycle = Schedule("one_cycle");
  EXPECT_NEAR(cycle.Share(0, 1000, 0), 1.0 / 25, 1e-9);
  EXPECT_NEAR(cycle.Share(100, 1000, 0), 1, 1e-9);
  EXPECT_NEAR(cycle.Share(1000, 1000, 0), 1.0 / 250000, 1e-9);
  EXPECT_DOUBLE_EQ(Schedule("constant").Share(999, 1000, 0), 1);
}

// .95 down to .85 while the rate rises, and back by half a cosine, as
// torch.optim.lr_scheduler.OneCycleLR does by default.
TEST(LearningScheduleTest, OneCycleMayMoveBeta1) {
  LearningSchedule cycle = Schedule("one_cycle");
  EXPECT_DOUBLE_EQ(cycle.Beta1(100, 1000, .9), .9);
  cycle.cycle_beta1 = true;
  const std::pair<int64_t, double> expected[] = {
      {0, .95},        {25, .9353553}, {50, .9},        {100, .85},
      {325, .8646447}, {550, .9},      {775, .9353553}, {1000, .95}};
  for (const auto& [step, beta1] : expected) {
    EXPECT_NEAR(cycle.Beta1(step, 1000, .9), beta1, 1e-7) << step;
  }
  EXPECT_NE(cycle.ToJson(), Schedule("one_cycle").ToJson());
  cycle.name = "cosine";
  EXPECT_THROW(cycle.Validate(), UsageError);
  SpeculationOptions both;
  both.schedule.name = "one_cycle";
  both.schedule.cycle_beta1 = true;
  both.Validate();
  both.beta1 = .8;
  EXPECT_THROW(both.Validate(), UsageError);
}

std::string UseRefused(const SpeculationOptions& options) {
  try {
    RequireUse(options);
  } catch (const UsageError& e) {
    return e.what();
  }
  return "";
}

TEST(UnusedOptions, AreRefusedByNameWithTheKindsThatTakeThem) {
  SpeculationOptions o;  // hidden
  o.sizes.context = 4;
  EXPECT_THAT(UseRefused(o), testing::AllOf(testing::HasSubstr("--context does nothing"),
                                            testing::HasSubstr("--kind=hidden"),
                                            testing::HasSubstr("interlayer, auto")));
  o.kind = "interlayer";
  EXPECT_EQ(UseRefused(o), "");
  o = {};
  o.kind = "simple";
  o.augment.layer_dropout = .1;
  EXPECT_THAT(UseRefused(o), testing::HasSubstr("--augment_layers"));
  o = {};
  o.kind = "simple";
  o.confidence_weight = .5;
  EXPECT_THAT(UseRefused(o), testing::HasSubstr("--confidence_weight"));
  o.kind = "hidden";
  EXPECT_EQ(UseRefused(o), "");
  o.pattern_entropy = .01;
  EXPECT_THAT(UseRefused(o), testing::AllOf(testing::HasSubstr("--pattern_entropy"),
                                            testing::HasSubstr("interlayer, moe")));
  o = {};
  o.kind = "simple";
  o.confidence_loss = "half";
  EXPECT_THAT(UseRefused(o), testing::HasSubstr("--confidence_loss"));
}

TEST(UnusedOptions, OfAnEnsembleAreItsMembers) {
  SpeculationOptions o;
  o.kind = "ensemble";
  o.sizes.layers = 3;
  EXPECT_THAT(UseRefused(o), testing::HasSubstr("say it in --members"));
  o.sizes = {};
  o.augment.layer_dropout = .1;
  EXPECT_EQ(UseRefused(o), "") << "its own three embed experts";
  o.members = "simple;lstm:layers=3";
  EXPECT_THAT(UseRefused(o), testing::HasSubstr("--augment_layers"));
  o.members = "simple;interlayer";
  EXPECT_EQ(UseRefused(o), "");
  o.pattern_entropy = .01;
  EXPECT_EQ(UseRefused(o), "");
  o.pattern_entropy = 0;
  o.members = "interlayer;simple:layers=3";
  EXPECT_THAT(UseRefused(o), testing::HasSubstr("the member simple"));
}

TEST(UnusedOptions, AreDroppedWhereManyKindsShareThem) {
  SpeculationOptions o;
  o.kind = "lstm";
  o.sizes = {16, 2, 32, 1, 4, .3};
  o.confidence_weight = .5;
  DropUnused(&o);
  EXPECT_EQ(o.sizes.ToJson(), (ModelSizes{16, 0, 0, 1, 0, .3}.ToJson()));
  EXPECT_EQ(o.confidence_weight, SpeculationOptions().confidence_weight);
  EXPECT_EQ(UseRefused(o), "");
}

TEST(MembersTest, AreParsed) {
  MemberOptions defaults;
  defaults.clip_norm = 0.7;
  const auto members = ParseMembers(
      "interlayer:width=512,heads=16,lr=5e-5,smoothing=0.1;hidden*2:dropout=0.2",
      defaults);
  ASSERT_EQ(members.size(), 3u);
  EXPECT_EQ(members[0].kind, "interlayer");
  EXPECT_EQ(members[0].sizes.width, 512);
  EXPECT_EQ(members[0].sizes.heads, 16);
  EXPECT_DOUBLE_EQ(members[0].options.learning_rate, 5e-5);
  EXPECT_DOUBLE_EQ(members[0].options.label_smoothing, 0.1);
  EXPECT_DOUBLE_EQ(members[0].options.clip_norm, 0.7);
  EXPECT_EQ(members[2].kind, "hidden");
  EXPECT_DOUBLE_EQ(members[2].sizes.dropout, 0.2);
}

TEST(MembersTest, MistakesAreNamed) {
  const std::pair<const char*, const char*> cases[] = {
      {"hiden", "hidden"},          {"hidden:widht=3", "width"},
      {"hidden:width", "no value"}, {"hidden:width=x", "not a number"},
      {"hidden*0", "1 to 64"},      {"ensemble", "ensemble"},
      {"hidden*65", "1 to 64"},     {"hidden:smoothing=1", "below 1"}};
  for (const auto& [text, expected] : cases) {
    try {
      ParseMembers(text, {});
      ADD_FAILURE() << text;
    } catch (const UsageError& e) {
      EXPECT_THAT(e.what(), testing::HasSubstr(expected)) << text;
    }
  }
}

// Against counting by hand.
TEST(SpeculationSetsTest, AreScoredLikeSets) {
  at::manual_seed(4);
  const auto probs = at::softmax(3 * at::randn({3, 7, 2, 6}), -1);
  auto labels = at::randint(0, 6, {3, 7, 2}, at::kLong);
  labels[2].narrow(0, 4, 3).fill_(-100);
  const auto frequency = at::softmax(at::randn({2, 6}), -1);
  SetAccumulator accumulator;
  accumulator.Add(-1, probs, labels.unsqueeze(3), frequency);
  const auto scores = SetAccumulator::Scores(accumulator.Sums(2), 2);
  ASSERT_EQ(scores.size(), 2u);
  for (int lead = 1; lead <= 2; ++lead) {
    double recall = 0, precision = 0, size = 0, frequent = 0, wide = 0, frequent_wide = 0;
    for (int b = 0; b < 3; ++b) {
      std::vector<std::pair<double, int>> likely, common;
      double expected = 0;
      std::vector<bool> needed(6);
      for (int e = 0; e < 6; ++e) {
        double none = 1;
        for (int t = 0; t < 7; ++t) {
          if (labels[b][t][lead - 1].item<int>() < 0) continue;
          none *= 1 - probs[b][t][lead - 1][e].item<double>();
          needed[size_t(e)] =
              needed[size_t(e)] || labels[b][t][lead - 1].item<int>() == e;
        }
        likely.emplace_back(-(1 - none), e);
        common.emplace_back(-frequency[lead - 1][e].item<double>(), e);
        expected += 1 - none;
      }
      std::sort(likely.begin(), likely.end());
      std::sort(common.begin(), common.end());
      const int held = static_cast<int>(std::ceil(expected - 1e-6));
      int hits = 0, common_hits = 0, total = 0;
      for (int i = 0; i < held; ++i) {
        hits += needed[size_t(likely[size_t(i)].second)];
        common_hits += needed[size_t(common[size_t(i)].second)];
      }
      for (const bool n : needed) total += n;
      for (int i = 0; i < std::min(6, total * 13 / 10); ++i) {
        wide += double(needed[size_t(likely[size_t(i)].second)]) / total / 3;
        frequent_wide += double(needed[size_t(common[size_t(i)].second)]) / total / 3;
      }
      recall += double(hits) / total / 3;
      precision += double(hits) / held / 3;
      size += held / 3.0;
      frequent += double(common_hits) / total / 3;
    }
    const SetScores& s = scores[size_t(lead - 1)];
    EXPECT_NEAR(s.recall, recall, 1e-6);
    EXPECT_NEAR(s.precision, precision, 1e-6);
    EXPECT_NEAR(s.size, size, 1e-6);
    EXPECT_NEAR(s.frequency_recall, frequent, 1e-6);
    EXPECT_NEAR(s.wider_recall, wide, 1e-6);
    EXPECT_NEAR(s.wider_frequency_recall, frequent_wide, 1e-6);
    EXPECT_EQ(s.sequences, 3);
    ASSERT_EQ(s.by_tokens.size(), 1u);  // all are short
    EXPECT_EQ(s.by_tokens[0].recall, s.recall);
  }
}

TEST(SpeculationSetsTest, AreScoredByLengthAsWell) {
  auto labels = at::zeros({3, 70, 1}, at::kLong);
  labels[0].narrow(0, 16, 54).fill_(-100);  // 16 tokens, 17, 70
  labels[1].narrow(0, 17, 53).fill_(-100);
  labels[1][3][0] = 1;
  const auto probs = at::one_hot(at::zeros({3, 70, 1}, at::kLong), 6).to(at::kFloat);
  SetAccumulator accumulator;
  accumulator.Add(0, probs, labels.unsqueeze(3), at::ones({1, 6}));
  const SetScores all = SetAccumulator::Scores(accumulator.Sums(2), 2).at(0);
  EXPECT_DOUBLE_EQ(all.recall, (1 + .5 + 1) / 3);
  ASSERT_EQ(all.by_tokens.size(), 3u);
  const int most[] = {16, 64, 128};
  const double recall[] = {1, .5, 1};
  for (size_t i = 0; i < 3; ++i) {
    EXPECT_EQ(all.by_tokens[i].sequences, 1);
    EXPECT_EQ(all.by_tokens[i].most_tokens, most[i]);
    EXPECT_DOUBLE_EQ(all.by_tokens[i].recall, recall[i]);
  }
  EXPECT_EQ(all.ToJson()["by_tokens"][1]["most_tokens"], 64);
  EXPECT_FALSE(all.ToJson().contains("most_tokens"));
}

TEST(SpeculationSetsTest, TheLossIsFiniteAndPrefersTheTrueSet) {
  auto labels = at::zeros({1, 3, 1}, at::kLong);
  labels[0][1][0] = 2;
  labels[0][2][0] = -100;
  const auto right = at::one_hot(labels.clamp_min(0), 4).to(at::kFloat) * 30;
  const auto wrong = at::one_hot(labels.clamp_min(0) + 1, 4).to(at::kFloat) * 30;
  auto logits = right.clone().requires_grad_();
  const auto loss = SetLoss(logits, labels.unsqueeze(3));
  loss.backward();
  EXPECT_TRUE(at::isfinite(logits.grad()).all().item<bool>());
  EXPECT_LT(loss.item<double>(), 0.1);
  EXPECT_GT(SetLoss(wrong, labels.unsqueeze(3)).item<double>(), 5);
}

SpeculationConfig TinyEnsemble() {
  const MoeGeometry g{3, 2, 5, 1, 6};
  SpeculationConfig c = DefaultSpeculationConfig("ensemble", g, 11, 0);
  for (SpeculationConfig& m : c.members) {
    m.width = 8;
    m.heads = 2;
    m.ff = 16;
    m.layers = 1;
    m.dropout = 0;
    m.priors = false;
  }
  return c;
}

RoutingWindow TinyWindow() {
  RoutingWindow w;
  w.stack = Stack::kDecoder;
  w.source_layer = 0;
  w.num_layers = 2;
  w.num_experts = 5;
  w.token_ids_BT = at::arange(8).view({2, 4});
  w.valid_BT = at::ones({2, 4}, at::kBool);
  w.experts_BTL = at::arange(16).view({2, 4, 2}).remainder(5);
  return w;
}

// Members with rates, decays and clips of their own, stepped together, end as each does
// alone: losses within 1e-5 over 20 steps.
TEST(MemberOptimizerTest, MembersStepAsTheyWouldAlone) {
  const SpeculationConfig config = TinyEnsemble();
  std::vector<MemberOptions> training = {
      {3e-3, 0.1, 0.05, 0}, {1e-2, 0, 1, 0}, {1e-3, 0.2, 0.01, 0}};
  const auto together = MakeSpeculationModel(config, 9);
  std::vector<std::unique_ptr<SpeculationModel>> alone;
  std::vector<MemberOptimizer> optimizers;
  for (int64_t m = 0; m < 3; ++m) {
    alone.push_back(MakeSpeculationModel(config.members[size_t(m)], MemberSeed(9, m)));
    optimizers.emplace_back(*alone.back(), std::vector{training[size_t(m)]}, .9, .99, 0);
  }
  MemberOptimizer optimizer(*together, training, .9, .99, 0);
  const auto labels = at::arange(16).view({2, 4, 2}).remainder(5);
  const auto loss_of = [&](const SpeculationOutput& out) {
    return at::cross_entropy_loss(out.logits_BTHE.reshape({-1, 5}), labels.flatten());
  };
  const auto clear = [](const SpeculationModel& model) {
    for (const auto& [name, tensor] : model.parameters().items()) {
      at::Tensor(tensor).mutable_grad() = at::zeros_like(tensor);
    }
  };
  for (int step = 0; step < 20; ++step) {
    clear(*together);
    const auto outputs = together->ForwardMembers(TinyWindow(), 0);
    at::Tensor total;
    std::vector<double> losses;
    for (const auto& out : outputs) {
      const auto loss = loss_of(out);
      losses.push_back(loss.item<double>());
      total = total.defined() ? total + loss : loss;
    }
    total.backward();
    optimizer.Step(1);
    for (size_t m = 0; m < 3; ++m) {
      clear(*alone[m]);
      const auto loss = loss_of(alone[m]->Forward(TinyWindow(), 0));
      EXPECT_NEAR(losses[m], loss.item<double>(), 1e-5 * loss.item<double>())
          << "member " << m << " step " << step;
      loss.backward();
      optimizers[m].Step(1);
    }
  }
}

TEST(MemberOptimizerTest, ABrokenGradientIsNamedAndChangesNothing) {
  const auto model = MakeSpeculationModel(TinyEnsemble(), 9);
  MemberOptimizer optimizer(*model, std::vector<MemberOptions>(3), .9, .99, 0);
  for (const auto& [name, tensor] : model->parameters().items()) {
    at::Tensor(tensor).mutable_grad() = at::zeros_like(tensor);
  }
  const auto& broken = model->parameters().Get("group.0.head.mid.bias");
  const auto before = broken.detach().clone();
  broken.grad().fill_(NAN);
  try {
    optimizer.Step(1);
    optimizer.RequireFinite();
    FAIL();
  } catch (const std::logic_error& e) {
    EXPECT_THAT(e.what(), testing::HasSubstr("head.mid.bias"));
  }
  EXPECT_TRUE(at::equal(broken, before));
}

TEST(MemberOptimizerTest, AveragesFollowAndSwap) {
  const c10::NoGradGuard no_grad;
  const auto model = MakeSpeculationModel(TinyEnsemble(), 9);
  MemberOptimizer optimizer(*model, std::vector<MemberOptions>(3, {0.1, 0, 1, 0}), .9,
                            .99, 0.75);
  for (const auto& [name, tensor] : model->parameters().items()) {
    at::Tensor(tensor).mutable_grad() = at::ones_like(tensor);
  }
  const auto& w = model->parameters().Get("group.0.norm.bias");
  const auto start = w.detach().clone();
  optimizer.Step(1);
  const auto one = w.detach().clone();
  optimizer.Step(1);
  const auto two = w.detach().clone();
  const auto expected = (start * .75 + one * .25) * .75 + two * .25;
  optimizer.SwapAverages();
  EXPECT_TRUE(at::allclose(w, expected, 1e-5, 1e-6));
  optimizer.SwapAverages();
  EXPECT_TRUE(at::equal(w, two));
}

Json Space() {
  return Json::parse(R"({"trials": 9, "factor": 3, "rungs": 3, "space": {
      "learning_rate": {"log": [1e-4, 1e-2]}, "layers": {"int": [1, 3]},
      "dropout": {"uniform": [0, 0.3]}, "width": [64, 128]}})");
}

TEST(SearchTest, DrawsAreAFunctionOfSeedAndTrial) {
  const SearchSpace space = SearchSpace::FromJson(Space(), "test");
  EXPECT_EQ(space.Draw(1, 3), space.Draw(1, 3));
  EXPECT_NE(space.Draw(1, 3), space.Draw(1, 4));
  EXPECT_NE(space.Draw(1, 3), space.Draw(2, 3));
  int below = 0;
  std::vector<int> layers(4);
  for (int t = 0; t < 300; ++t) {
    const auto values = space.Draw(1, t);
    EXPECT_TRUE(values.at("width") == 64 || values.at("width") == 128);
    EXPECT_GE(values.at("learning_rate"), 1e-4);
    EXPECT_LE(values.at("learning_rate"), 1e-2);
    below += values.at("learning_rate") < 1e-3;
    ++layers.at(static_cast<size_t>(values.at("layers")));
  }
  EXPECT_NEAR(below, 150, 40);  // even in the logarithm
  for (int n = 1; n <= 3; ++n) EXPECT_NEAR(layers[size_t(n)], 100, 35);
}

TEST(SearchTest, EachRungHasAFactorMoreSteps) {
  EXPECT_EQ(RungSteps(900, 0, 3, 3), 100);
  EXPECT_EQ(RungSteps(900, 1, 3, 3), 300);
  EXPECT_EQ(RungSteps(900, 2, 3, 3), 900);
  EXPECT_EQ(RungSteps(2, 0, 3, 3), 1);
}

TEST(SearchTest, EverySearchableNameSetsSomething) {
  for (const std::string& name : SearchableNames()) {
    SpeculationOptions options;
    SetOption(name, 0.0625 * 1024, &options);
    EXPECT_NE(options.ToJson(), SpeculationOptions().ToJson()) << name;
  }
}

TEST(SearchTest, MistakesInTheSpaceAreNamed) {
  const std::pair<const char*, const char*> cases[] = {
      {R"({})", "space"},
      {R"({"space": {}})", "space"},
      {R"({"space": {"learning_rat": [1]}})", "learning_rate"},
      {R"({"space": {"width": []}})", "list of numbers"},
      {R"({"space": {"width": ["x"]}})", "holds"},
      {R"({"space": {"width": {"log": [0, 1]}}})", "above 0"},
      {R"({"space": {"width": {"log": [2, 1]}}})", "lower first"},
      {R"({"space": {"width": {"lag": [1, 2]}}})", "log"},
      {R"({"trials": 0, "space": {"width": [1]}})", "trials"},
      {R"({"rungs": 99, "space": {"width": [1]}})", "rungs"}};
  for (const auto& [text, expected] : cases) {
    try {
      SearchSpace::FromJson(Json::parse(text), "space.json");
      ADD_FAILURE() << text;
    } catch (const UsageError& e) {
      EXPECT_THAT(e.what(), testing::HasSubstr(expected)) << text;
    }
  }
}

Json Results(uint64_t seed, double top1) {
  return {{"kind", "hidden"},
          {"seed", seed},
          {"parameters", 100},
          {"validation", {{"loss", 1.0}}},
          {"scores",
           {{{"phase", "decoder"},
             {"layer", 0},
             {"lead", 1},
             {"top1", top1},
             {"top4", 0.9},
             {"cross_entropy", 1.5},
             {"ece", 0.02},
             {"ci95", {top1 - 0.01, top1 + 0.02}}}}}};
}

TEST(LeaderboardTest, SeedsAreAveragedAndIntervalsCoverThem) {
  const Json row =
      LeaderboardRow("hidden", {Results(1, .5), Results(2, .6)}, 200, 20000, 4);
  EXPECT_NEAR(row["scores"][0]["top1"].get<double>(), .55, 1e-9);
  EXPECT_NEAR(row["scores"][0]["ci95"][0].get<double>(), .49, 1e-9);
  EXPECT_NEAR(row["scores"][0]["ci95"][1].get<double>(), .62, 1e-9);
  EXPECT_NEAR(row["decoder_next_top1"].get<double>(), .55, 1e-9);
  EXPECT_TRUE(row["encoder_next_top1"].is_null());
  EXPECT_FALSE(row["offline_only"].get<bool>());  // 4 x 200 us of 20 ms are 4 %
}

TEST(LeaderboardTest, SlowKindsAreOfflineOnly) {
  const auto offline = [](double us, double pass) {
    return LeaderboardRow("x", {Results(1, .5)}, us, pass, 4)["offline_only"];
  };
  EXPECT_TRUE(offline(251, 20000).get<bool>());
  EXPECT_FALSE(offline(249, 20000).get<bool>());
  EXPECT_TRUE(offline(251, 0).is_null());  // the pass is not known
}

}  // namespace
}  // namespace routecast
