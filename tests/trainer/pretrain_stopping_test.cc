// A stop of a pre-training inside its measuring, which takes as long as many steps: it is
// heard there, and made up for when the run goes on.
#include <gtest/gtest.h>

#include <fstream>

#include "common/errors.h"
#include "common/stop.h"
#include "tests/storage/temp_folder.h"
#include "tests/support/synthetic_text.h"
#include "trainer/pretrainer.h"

namespace routecast {
namespace {

// A world of one in which somebody asks to stop when a sum over ranks is made, the
// `stop`th one; 0 = never. Each step makes one of three numbers, and the end of each
// measuring one of one.
class StoppedAtSum final : public Communicator {
 public:
  StoppedAtSum(size_t numbers, int stop) : numbers_(numbers), stop_(stop) {}
  RankInfo rank_info() const override { return {}; }
  std::unique_ptr<PendingReduce> StartAllReduceSum(const at::Tensor& tensor) override {
    return inner_.StartAllReduceSum(tensor);
  }
  void AllReduceSum(std::span<double> values) override {
    if (values.size() == numbers_ && ++sums_ == stop_) RequestStop();
  }
  void Broadcast(const at::Tensor&, int) override {}
  std::vector<at::Tensor> AllToAll(const std::vector<at::Tensor>& send,
                                   std::span<const int64_t>) override {
    return send;
  }
  std::vector<std::string> AllGather(const std::string& bytes) override {
    return {bytes};
  }
  void Barrier() override {}

 private:
  LocalCommunicator inner_;
  size_t numbers_;
  int stop_, sums_ = 0;
};

constexpr size_t kOfAStep = 3, kOfMeasuring = 1;
constexpr int kSteps = 3;

class PretrainStopping : public testing::Test {
 protected:
  PretrainStopping() {
    const fs::path text = folder_.path() / "text.txt";
    WriteFileAtomic(text, SyntheticText(120, 60, 9));
    corpus_.emplace(Corpus::Open({"text:" + text.string() + "#blocks"},
                                 folder_.path() / "cache", 1, /*quiet=*/true));
    job_.options = PretrainPreset("demo");
    job_.options.steps = kSteps;
    job_.options.warmup_steps = 1;
    job_.options.global_batch = job_.options.micro_batch = 2;
    job_.options.sequence_tokens = 32;
    job_.options.validation_sequences = 4;
    job_.options.log_every = 1;
    job_.save_dtype = at::kFloat;
    job_.out = folder_.path() / "run";
    job_.quiet = true;
  }
  void Run(Communicator* comm) { Pretrain(job_, *corpus_, comm); }
  void RunUndisturbed() {
    LocalCommunicator comm;
    Run(&comm);
  }
  // In a process of its own: a stop is for good.
  void ExpectStop(size_t numbers, int stop) {
    EXPECT_EXIT(
        {
          StoppedAtSum comm(numbers, stop);
          try {
            Run(&comm);
          } catch (const StoppedError&) {
            std::_Exit(kExitStopped);
          }
          std::_Exit(kExitDone);
        },
        testing::ExitedWithCode(kExitStopped), "");
  }
  std::vector<Json> Lines() const {
    std::ifstream in(job_.out / "metrics.jsonl");
    std::vector<Json> lines;
    for (std::string line; std::getline(in, line);) {
      lines.push_back(ParseJson(line, "metrics"));
      lines.back().erase("samples_per_second");
    }
    return lines;
  }
  // What the run leaves, and a new place for the next one.
  std::string TakeResult() {
    const std::string result = Json(Lines()).dump() +
                               ReadFile(job_.out / "pretrain.json") +
                               ReadFile(job_.out / "model.safetensors");
    fs::remove_all(job_.out);
    return result;
  }

  TempFolder folder_;
  std::optional<Corpus> corpus_;
  PretrainJob job_;
};

// Before the tokenizer is trained, and not at the first checkpoint.
TEST_F(PretrainStopping, ARunWithoutRoomForItsCheckpointsIsNotBegun) {
  job_.options.model.num_experts = 60000;
  job_.options.model.d_ff = 1 << 17;
  LocalCommunicator comm;
  EXPECT_THROW(Run(&comm), EnvironmentError);
  EXPECT_FALSE(fs::exists(job_.out));
}

// The sum of the last step is made before its validation.
TEST_F(PretrainStopping, InValidationItGoesOnWithThatValidation) {
  RunUndisturbed();
  ASSERT_TRUE(Lines().at(kSteps - 1).contains("valid"));
  const std::string undisturbed = TakeResult();
  ExpectStop(kOfAStep, kSteps);
  EXPECT_EQ(Lines().size(), kSteps - 1u) << "the last line waits for its validation";
  RunUndisturbed();
  EXPECT_TRUE(TakeResult() == undisturbed);
}

// The sum behind the validation is made before the last measuring.
TEST_F(PretrainStopping, InTheLastMeasuringItGoesOnWithIt) {
  RunUndisturbed();
  const std::string undisturbed = TakeResult();
  ExpectStop(kOfMeasuring, 1);
  EXPECT_EQ(Lines().size(), size_t{kSteps});
  EXPECT_FALSE(fs::exists(job_.out / "pretrain.json"));
  RunUndisturbed();
  EXPECT_TRUE(TakeResult() == undisturbed);
}

}  // namespace
}  // namespace routecast
