// A stop is heard in every phase of a training, not in its steps alone: before the first
// one and after the last, and what is saved goes on to the same bits.
#include <gtest/gtest.h>

#include "common/errors.h"
#include "common/stop.h"
#include "tests/storage/temp_folder.h"
#include "tests/trainer/synthetic_traces.h"
#include "trainer/speculation_trainer.h"

namespace routecast {
namespace {

// A world of one in which somebody asks to stop at the first collective call of a phase.
class StoppedAt final : public Communicator {
 public:
  explicit StoppedAt(std::function<bool()> phase) : phase_(std::move(phase)) {}
  RankInfo rank_info() const override {  // what each look at validation data begins with
    Look();
    return inner_.rank_info();
  }
  std::unique_ptr<PendingReduce> StartAllReduceSum(const at::Tensor& tensor) override {
    return inner_.StartAllReduceSum(tensor);
  }
  void AllReduceSum(std::span<double> values) override {
    inner_.AllReduceSum(values);
    Look();
  }
  void Broadcast(const at::Tensor& tensor, int root) override {
    inner_.Broadcast(tensor, root);
  }
  std::vector<at::Tensor> AllToAll(const std::vector<at::Tensor>& send,
                                   std::span<const int64_t> counts) override {
    return inner_.AllToAll(send, counts);
  }
  std::vector<std::string> AllGather(const std::string& bytes) override {
    ++gathered_;
    return inner_.AllGather(bytes);
  }
  void Barrier() override {
    inner_.Barrier();
    Look();
  }
  int gathered() const { return gathered_; }

 private:
  void Look() const {
    if (phase_()) RequestStop();
  }
  LocalCommunicator inner_;
  std::function<bool()> phase_;
  int gathered_ = 0;
};

class Stopping : public testing::Test {
 protected:
  Stopping()
      : traces_(TraceSynthesizer(/*layers=*/2, /*experts=*/4, /*width=*/8,
                                 /*vocabulary=*/40, /*seed=*/5)
                    .Make(24, 4, 8, /*every_hidden=*/true)) {
    job_.options.kind = "ensemble";
    job_.options.members = "interlayer*2:width=8,heads=2,ff=8,layers=1";
    job_.options.combine = "stack";
    job_.options.steps = 4;
    job_.options.validate_every = 2;
    job_.options.global_batch = job_.options.micro_batch = 4;
    job_.options.validation_sequences = job_.options.test_sequences = 4;
    job_.out = folder_.path() / "run";
    job_.quiet = true;
  }
  // The exit code that the program would end with, in a process of its own: a stop is for
  // good.
  void ExpectStop(const std::function<bool()>& phase) {
    EXPECT_EXIT(
        {
          StoppedAt comm(phase);
          try {
            Train(&comm);
          } catch (const StoppedError&) {
            // Scores are gathered rank by rank: nothing was scored.
            std::_Exit(comm.gathered() == 0 ? kExitStopped : kExitDefect);
          }
          std::_Exit(kExitDone);
        },
        testing::ExitedWithCode(kExitStopped), "");
  }
  void Train(Communicator* comm) {
    TraceDataset dataset(traces_.traces, traces_.geometry);
    TrainSpeculation(job_, &dataset, traces_.routers, comm);
  }
  std::string Undisturbed() {
    LocalCommunicator comm;
    Train(&comm);
    const std::string all =
        ReadFile(job_.out / "model.safetensors") + ReadFile(job_.out / "results.json");
    fs::remove_all(job_.out);
    return all;
  }
  fs::path state() const { return job_.out / "state"; }
  // Whether a line with this text was logged.
  bool Logged(const std::string& text) const {
    const fs::path file = job_.out / "metrics.jsonl";
    return fs::exists(file) && ReadFile(file).find(text) != std::string::npos;
  }

  SyntheticTraces traces_;
  SpeculationJob job_;
  TempFolder folder_;
};

TEST_F(Stopping, BeforeTheFirstStep) {
  ExpectStop([] { return true; });
  EXPECT_FALSE(fs::exists(state())) << "no step was taken";
}

// Between two steps: the step is saved, and its validation comes first when it goes on.
// At the last step as well, and with averages in the parameters' place.
TEST_F(Stopping, InAValidationItGoesOnWithThatValidation) {
  job_.options.ema = 0.9;
  job_.options.log_every = 1;
  const std::string undisturbed = Undisturbed();
  for (const std::string step : {"2", "4"}) {
    ExpectStop([&] { return Logged("\"step\":" + step); });
    EXPECT_TRUE(fs::exists(state() / ("step-0000000" + step)));
  }
  EXPECT_TRUE(Logged("valid_loss")) << "of step 2, once it went on";
  LocalCommunicator comm;
  Train(&comm);
  EXPECT_EQ(
      ReadFile(job_.out / "model.safetensors") + ReadFile(job_.out / "results.json"),
      undisturbed);
}

TEST_F(Stopping, AfterTheLastStepItGoesOnWithTheScores) {
  const std::string undisturbed = Undisturbed();
  ExpectStop([&] { return fs::exists(state() / "step-00000004"); });
  EXPECT_TRUE(fs::exists(state() / "step-00000004"));
  EXPECT_FALSE(fs::exists(job_.out / "results.json"));
  LocalCommunicator comm;
  Train(&comm);
  EXPECT_EQ(
      ReadFile(job_.out / "model.safetensors") + ReadFile(job_.out / "results.json"),
      undisturbed);
  EXPECT_FALSE(fs::exists(state()));
}

}  // namespace
}  // namespace routecast
