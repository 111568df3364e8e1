// A training cut at random steps and started again has the losses, weights and moments of
// one that was never cut, to the bit. Dropout, masks and augmentation draw from the
// position in the run, so equal losses are equal draws. Four cuts a kind;
// ROUTECAST_LONG_TESTS=1 makes twenty; ROUTECAST_CUT_SEED another seed.
#include <gtest/gtest.h>

#include <algorithm>
#include <cstdlib>
#include <sstream>

#include "common/errors.h"
#include "common/random.h"
#include "tests/storage/temp_folder.h"
#include "tests/trainer/synthetic_traces.h"
#include "trainer/speculation_trainer.h"

namespace routecast {
namespace {

constexpr int64_t kSteps = 40, kCompared = 36;  // steps of a run; where states are read

uint64_t CutSeed() {
  const char* text = std::getenv("ROUTECAST_CUT_SEED");
  return text == nullptr ? 1 : std::strtoull(text, nullptr, 10);
}
int Cuts() { return std::getenv("ROUTECAST_LONG_TESTS") != nullptr ? 20 : 4; }

class ResumeCuts : public testing::TestWithParam<const char*> {
 protected:
  ResumeCuts()
      : traces_(TraceSynthesizer(/*layers=*/3, /*experts=*/8, /*width=*/16,
                                 /*vocabulary=*/100, /*seed=*/5)
                    .Make(40, 6, 16, /*every_hidden=*/true)) {}

  SpeculationJob Job(const std::string& name) const {
    SpeculationJob job;
    SpeculationOptions& o = job.options;
    o.kind = GetParam();
    o.sizes = {16, 2, 32, 1, 0, 0.1};
    o.schedule.name = "one_cycle";
    o.schedule.cycle_beta1 = true;
    if (o.kind == "ensemble") {  // all that a checkpoint has to hold
      o.sizes = {};
      o.members =
          "interlayer*2:width=16,heads=2,layers=1,lr=2e-3;hidden:width=16,clip=.1";
      o.schedule = {};
      o.schedule.name = "plateau";
      o.schedule.plateau_patience = 1;
      o.ema = 0.9;
      o.augment = {0.2, 0.3, 0.1, 0.15, 0.5};
    }
    o.steps = kSteps;
    o.global_batch = 8;
    o.micro_batch = 4;
    o.validate_every = 7;
    o.log_every = 1;
    o.validation_sequences = 4;
    o.test_sequences = 4;
    job.out = folder_.path() / name;
    job.quiet = true;
    return job;
  }
  // Up to `stop`, or to the end where it is 0.
  void Train(SpeculationJob job, int64_t stop) {
    TraceDataset dataset(traces_.traces, traces_.geometry);
    LocalCommunicator comm;
    job.stop_after = stop;
    if (stop == 0) {
      TrainSpeculation(job, &dataset, traces_.routers, &comm);
    } else {
      EXPECT_THROW(TrainSpeculation(job, &dataset, traces_.routers, &comm), StoppedError);
    }
  }
  // What was logged of every step and validation, but how fast it was.
  static std::string Metrics(const SpeculationJob& job) {
    std::istringstream lines(ReadFile(job.out / "metrics.jsonl"));
    std::string all;
    for (std::string line; std::getline(lines, line);) {
      Json json = ParseJson(line, "metrics.jsonl");
      json.erase("samples_per_second");
      json.erase("waiting_for_data");
      json.erase("making_batches");
      all += json.dump() + "\n";
    }
    return all;
  }
  // Everything of the checkpoint at kCompared.
  static std::string State(const SpeculationJob& job) {
    const fs::path folder =
        job.out / "state" / ("step-000000" + std::to_string(kCompared));
    std::string bytes;
    for (const char* file :
         {"parameters.safetensors", "optimizer.safetensors", "state.json"}) {
      bytes += ReadFile(folder / file);
    }
    return bytes;
  }
  TempFolder folder_;
  SyntheticTraces traces_;
};

INSTANTIATE_TEST_SUITE_P(Kinds, ResumeCuts, testing::Values("hidden", "ensemble"),
                         [](const auto& info) { return std::string(info.param); });

TEST_P(ResumeCuts, AnyStepGoesOnWithEqualBits) {
  const SpeculationJob whole = Job("whole"), stopped = Job("stopped");
  Train(whole, 0);
  Train(stopped, kCompared);
  const std::string state = State(stopped), metrics = Metrics(whole);
  EXPECT_GE(std::count(metrics.begin(), metrics.end(), '\n'), kSteps);
  for (int i = 0; i < Cuts(); ++i) {
    const auto cut = 1 + static_cast<int64_t>(ToRange(
                             Mix(CutSeed(), static_cast<uint64_t>(i)), kCompared - 1));
    SCOPED_TRACE("cut after step " + std::to_string(cut));
    const SpeculationJob parts = Job("cut-" + std::to_string(i));
    Train(parts, cut);
    Train(parts, kCompared);
    EXPECT_TRUE(State(parts) == state) << "weights, moments or counters differ";
    Train(parts, 0);
    EXPECT_EQ(Metrics(parts), metrics);
    for (const char* file : {"model.safetensors", "results.json"}) {
      EXPECT_TRUE(ReadFile(parts.out / file) == ReadFile(whole.out / file)) << file;
    }
    fs::remove_all(parts.out);
  }
}

// A run that validation had ended, killed before its scores were written: it goes on to
// the scores, not to further steps.
TEST_P(ResumeCuts, ARunThatHadEndedEarlyTakesNoMoreSteps) {
  const auto job = [&](const std::string& name) {
    SpeculationJob one = Job(name);
    one.options.patience = 1;
    one.options.validate_every = 2;
    one.options.training.learning_rate = 0.5;  // worse soon
    return one;
  };
  const SpeculationJob whole = job("whole"), killed = job("killed");
  Train(whole, 0);
  const Json expected = ReadJsonFile(whole.out / "results.json");
  ASSERT_LT(expected["steps"], kSteps);
  // Where a folder lies no file can be written: as if the process died there.
  fs::create_directories(killed.out / "results.json" / "in-the-way");
  EXPECT_ANY_THROW(Train(killed, 0));
  fs::remove_all(killed.out / "results.json");
  Train(killed, 0);
  EXPECT_EQ(ReadJsonFile(killed.out / "results.json"), expected);
}

}  // namespace
}  // namespace routecast
