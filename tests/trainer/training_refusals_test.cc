// What cannot be trained is said before the first step, in three lines at most and before
// anything is written.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>
#include <functional>

#include "common/errors.h"
#include "tests/storage/temp_folder.h"
#include "tests/trainer/synthetic_traces.h"
#include "tests/trainer/training_in_memory.h"
#include "trainer/leaderboard.h"

namespace routecast {
namespace {

class TrainingRefusals : public testing::Test {
 protected:
  static SyntheticTraces Traces(int top_k = 0) {
    return TraceSynthesizer(3, 8, 16, 60, 5)
        .Make(60, 6, 16, /*every_hidden=*/true, top_k);
  }
  // Without the documents of a part.
  static SyntheticTraces Without(SplitPart part) {
    SyntheticTraces traces = Traces();
    std::erase_if(traces.traces,
                  [&](const RoutingTrace& t) { return SplitOf(t.group_id) == part; });
    return traces;
  }
  SpeculationJob Job(const std::string& name = "run") const {
    SpeculationJob job;
    job.options.kind = "interlayer";
    job.options.sizes = {16, 2, 24, 1, 0, 0};
    job.options.steps = 2;
    job.options.global_batch = job.options.micro_batch = 8;
    job.options.validation_sequences = job.options.test_sequences = 8;
    job.out = folder_.path() / name;
    job.quiet = true;
    return job;
  }
  TempFolder folder_;
};

TEST_F(TrainingRefusals, APartWithoutDocumentsIsNamed) {
  EXPECT_THAT(Refusal(Job(), Without(SplitPart::kTrain)), testing::HasSubstr("train"));
  EXPECT_THAT(Refusal(Job(), Without(SplitPart::kValidation)),
              testing::HasSubstr("validation"));
  EXPECT_THAT(Refusal(Job(), Without(SplitPart::kTest)), testing::HasSubstr("test"));
}

TEST_F(TrainingRefusals, DistillationNeedsProbabilities) {
  SpeculationJob job = Job();
  job.options.distill_weight = 0.5;
  EXPECT_THAT(Refusal(job, Traces()), testing::HasSubstr("--distill_weight"));
  // As systems record that tell the experts alone.
  SyntheticTraces ids = Traces(2);
  for (RoutingTrace& trace : ids.traces) {
    trace.encoder.topk_probs.clear();
    trace.decoder.topk_probs.clear();
  }
  EXPECT_THAT(Refusal(job, ids), testing::HasSubstr("--distill_weight"));
  EXPECT_EQ(Train(job, Traces(2)).losses.size(), 2u);
}

TEST_F(TrainingRefusals, ASetOfAnEncoderNeedsOne) {
  SyntheticTraces traces = Traces();
  traces.geometry.encoder_layers = 0;
  traces.routers.clear();
  for (RoutingTrace& trace : traces.traces) trace.encoder = {};
  SpeculationJob job = Job();
  job.options.set_weight = 0.1;
  EXPECT_THAT(Refusal(job, traces), testing::HasSubstr("--set_weight"));
  job.options.set_weight = 0;
  EXPECT_EQ(Train(job, traces).losses.size(), 2u);
}

TEST_F(TrainingRefusals, HowAnEnsembleMixesIsOfEnsembles) {
  SpeculationJob job = Job();
  job.options.combine = "vote";
  EXPECT_THROW(job.options.Validate(), UsageError);
  job.options.kind = "ensemble";
  EXPECT_NO_THROW(job.options.Validate());
}

// What, which value, what to do instead.
TEST_F(TrainingRefusals, AnOptionOutOfRangeIsSaidInThreeLines) {
  const std::pair<const char*, std::function<void(SpeculationOptions*)>> wrong[] = {
      {"--global_batch=16", [](auto* o) { o->global_batch = 20; }},
      {"--micro_batch", [](auto* o) { o->micro_batch = 0; }},
      {"--learning_rate", [](auto* o) { o->training.learning_rate = -1; }},
      {"--clip_norm", [](auto* o) { o->training.clip_norm = 0; }},
      {"--dropout", [](auto* o) { o->sizes.dropout = 1; }},
      {"--ema", [](auto* o) { o->ema = 1; }},
      {"--distill_weight", [](auto* o) { o->distill_weight = 2; }},
      {"--augment_mask", [](auto* o) { o->augment.mask = 1; }},
      {"--augment_mask_mode", [](auto* o) { o->augment.mask_mode = "layer"; }},
      {"--beams", [](auto* o) { o->kind = "interlayer", o->beams = 4; }},
      {"--position_inputs",
       [](auto* o) { o->kind = "interlayer", o->position_inputs = true; }},
      {"--restart_epochs",
       [](auto* o) { o->schedule.restart_epochs = o->schedule.restart_steps = 2; }},
      {"--restart_growth", [](auto* o) { o->schedule.restart_growth = .5; }},
      {"--plateau_factor", [](auto* o) { o->schedule.plateau_factor = 1; }},
      {"--confidence_weight", [](auto* o) { o->confidence_weight = -1; }},
      {"--confidence_weight", [](auto* o) { o->confidence_weight = NAN; }},
      {"--restart_steps", [](auto* o) { o->schedule.restart_steps = 9; }},
      {"--restart_epochs", [](auto* o) { o->schedule.restart_epochs = 2; }},
      {"--restart_growth", [](auto* o) { o->schedule.restart_growth = 3; }},
      {"--plateau_factor", [](auto* o) { o->schedule.plateau_factor = .3; }},
      {"--plateau_patience", [](auto* o) { o->schedule.plateau_patience = 5; }},
      {"--warmup_steps",
       [](auto* o) { o->schedule.name = "one_cycle", o->schedule.warmup_steps = 9; }},
      {"--distill_temperature", [](auto* o) { o->distill_temperature = 2; }},
      {"--backup_weight", [](auto* o) { o->backup_weight = .5; }},
      {"--augment_unmasked", [](auto* o) { o->augment.unmasked_weight = .5; }},
      {"--freeze_epochs", [](auto* o) { o->freeze.epochs = 2; }}};
  for (const auto& [flag, spoil] : wrong) {
    SpeculationOptions options;
    options.micro_batch = 16;
    spoil(&options);
    try {
      options.Validate();
      RequirePartners(options);
      FAIL() << flag;
    } catch (const UsageError& e) {
      const std::string text = e.what();
      EXPECT_THAT(text, testing::HasSubstr(flag));
      EXPECT_EQ(std::count(text.begin(), text.end(), '\n'), 2) << text;
    }
  }
}

// What an option says more of, and the schedule that looks at it, are given with it.
TEST_F(TrainingRefusals, OptionsWithTheirPartnersAreTaken) {
  SpeculationOptions options;
  options.kind = "hidden";
  options.distill_weight = .5, options.distill_temperature = 2;
  options.augment.mask = .2, options.augment.unmasked_weight = .5;
  options.start_from = "run", options.freeze.layers = 1, options.freeze.epochs = 2;
  options.schedule.name = "restarts", options.schedule.restart_epochs = 2;
  options.schedule.restart_growth = 3, options.schedule.warmup_steps = 9;
  EXPECT_NO_THROW(RequirePartners(options));
  EXPECT_NO_THROW(options.Validate());
  options.schedule = {};
  options.schedule.name = "plateau", options.schedule.plateau_factor = .3;
  options.schedule.plateau_patience = 5;
  EXPECT_NO_THROW(options.Validate());
}

// A place in the sequence is an input only where it is asked for, and then of the run.
TEST_F(TrainingRefusals, PositionsAreAnInputOfTheirOwn) {
  const SyntheticTraces traces = Traces();
  SpeculationJob job = Job("plain");
  job.options.kind = "hidden";
  const SpeculationResult plain = Train(job, traces);
  SpeculationJob placed = job;
  placed.out = folder_.path() / "placed";
  placed.options.position_inputs = true;
  const SpeculationResult other = Train(placed, traces);
  EXPECT_EQ(other.results["parameters"].get<int64_t>() -
                plain.results["parameters"].get<int64_t>(),
            32 * 16);
  EXPECT_NE(other.losses, plain.losses);
  placed.options.sizes = {};
  placed.options.start_from = job.out.string();
  placed.out = folder_.path() / "from";
  EXPECT_THAT(Refusal(placed, traces), testing::HasSubstr("without --position_inputs"));
}

// The restarts of a run are those of its epochs.
TEST_F(TrainingRefusals, RestartsInEpochsAreTakenInSteps) {
  const SyntheticTraces traces = Traces();
  SpeculationJob job = Job("epochs");
  job.options.steps = 40;
  job.options.schedule.name = "restarts";
  job.options.schedule.restart_epochs = 1;
  const auto losses = Train(job, traces).losses;
  job.out = folder_.path() / "fifth";
  job.options.schedule.restart_epochs = 0;
  EXPECT_NE(Train(job, traces).losses, losses);
}

// --members are the ensemble's row alone; the others are what they are without.
TEST_F(TrainingRefusals, MembersChangeNoOtherRowOfALeaderboard) {
  const SyntheticTraces traces = Traces();
  const double alone = Train(Job(), traces).results["validation"]["loss"];
  LeaderboardJob job;
  job.run = Job("board");
  job.run.options.members = "interlayer*2:width=16,heads=2,layers=1,lr=1e-7";
  job.run.options.combine = "vote";
  job.entries = {"interlayer", "ensemble"};
  job.seeds = 1;
  TraceDataset dataset(traces.traces, traces.geometry);
  LocalCommunicator comm;
  const Json board = MakeLeaderboard(job, &dataset, traces.routers, &comm);
  for (const Json& row : board["rows"]) {
    if (row["kind"] != "interlayer") continue;
    EXPECT_EQ(row["validation_loss"], alone);
  }
}

}  // namespace
}  // namespace routecast
