// Schedules, sizes and members: what training options mean.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "common/errors.h"
#include "trainer/member_optimizer.h"

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

TEST(Members, SizesAndCountsAreWholeNumbers) {
  for (const char* text :
       {"simple:width=16.9", "simple*1.9", "simple*0", "simple:layers=-1"}) {
    EXPECT_THROW(ParseMembers(text, {}), UsageError) << text;
  }
  const auto members = ParseMembers("simple*2:width=16,lr=1.5e-3", {});
  ASSERT_EQ(members.size(), 2u);
  EXPECT_EQ(members[1].sizes.width, 16);
  EXPECT_EQ(members[1].options.learning_rate, 1.5e-3);
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

}  // namespace
}  // namespace routecast
