// Pre-training through its program: one rank against two, a run cut and resumed against
// one that was not, and what it leaves.
#include <ATen/ATen.h>
#include <gtest/gtest.h>
#include <signal.h>
#include <sys/wait.h>
#include <unistd.h>

#include <chrono>
#include <cmath>
#include <fstream>
#include <thread>

#include "common/run_record.h"
#include "models/checkpoint.h"
#include "tests/support/reference.h"
#include "tests/support/synthetic_text.h"
#include "trainer/train_state.h"

namespace routecast {
namespace {

int RunPretrain(const std::string& ranks, const std::string& flags) {
  const std::string program =
      EnvOr("ROUTECAST_BIN_DIR", "build/bin") + "/routecast-pretrain";
  const std::string launch =
      ranks.empty() ? "" : "mpirun --bind-to none --oversubscribe -n " + ranks + " ";
  const int status =
      std::system((launch + program + " --quiet --threads=1 " + flags).c_str());
  return WIFEXITED(status) ? WEXITSTATUS(status) : -1;
}

std::vector<Json> Lines(const fs::path& out) {
  std::ifstream in(out / "metrics.jsonl");
  std::vector<Json> lines;
  for (std::string line; std::getline(in, line);) {
    lines.push_back(ParseJson(line, "metrics"));
  }
  return lines;
}

std::vector<double> Losses(const fs::path& out) {
  std::vector<double> losses;
  for (const Json& line : Lines(out)) losses.push_back(line["train_loss"].get<double>());
  return losses;
}

class Pretraining : public testing::Test {
 protected:
  static void SetUpTestSuite() {
    folder_ = TestFolder("pretrain");
    text_ = WriteSyntheticText(folder_);
    data_ = Data(text_);
  }
  static std::string Data(const fs::path& text) {
    return "--data=text:" + text.string() +
           "#blocks --cache=" + (folder_ / "cache").string() +
           " --global_batch=4 --micro_batch=1 --sequence_tokens=32 --log_every=1 ";
  }
  static std::string OtherData() {
    const fs::path other = folder_ / "other.txt";
    const std::string text = ReadFile(text_);
    WriteFileAtomic(other, text.substr(0, text.size() * 2 / 3));
    return Data(other);
  }
  static std::string Out(const std::string& name) { return (folder_ / name).string(); }
  static fs::path folder_, text_;
  static std::string data_;
};
fs::path Pretraining::folder_, Pretraining::text_;
std::string Pretraining::data_;

TEST_F(Pretraining, TwoRanksEqualOne) {
  ASSERT_EQ(RunPretrain("", data_ + "--steps=60 --out=" + Out("one")), 0);
  ASSERT_EQ(RunPretrain("2", data_ + "--steps=60 --out=" + Out("two")), 0);
  const auto one = Losses(Out("one")), two = Losses(Out("two"));
  ASSERT_EQ(one.size(), 60u);
  ASSERT_EQ(two.size(), 60u);
  for (size_t i = 0; i < one.size(); ++i) EXPECT_NEAR(two[i], one[i], 1e-5 * one[i]) << i;
  EXPECT_LT(one.back(), one.front()) << "it must learn something";
}

TEST_F(Pretraining, ResumeIsBitExact) {
  const std::string flags = data_ + "--steps=12 --checkpoint_every=4 ";
  ASSERT_EQ(RunPretrain("", flags + "--out=" + Out("whole")), 0);
  // Stops by itself at step 8 with everything saved, as on SIGTERM.
  ASSERT_EQ(RunPretrain("", flags + "--stop_after=8 --out=" + Out("cut")), 75);
  ASSERT_EQ(RunPretrain("", flags + "--out=" + Out("cut")), 0);
  const Checkpoint whole = LoadCheckpoint(Out("whole"), at::kFloat, at::kCPU);
  const Checkpoint cut = LoadCheckpoint(Out("cut"), at::kFloat, at::kCPU);
  for (const auto& [name, tensor] : whole.parameters.items()) {
    EXPECT_TRUE(at::equal(tensor, cut.parameters.Get(name))) << name;
  }
  EXPECT_EQ(Losses(Out("whole")), Losses(Out("cut")));
}

// Long steps: asked to stop in one, it saves behind it and not some steps later.
TEST_F(Pretraining, AStopIsHeardInTheStepItComesIn) {
  const fs::path out = Out("asked");
  const std::string program =
      EnvOr("ROUTECAST_BIN_DIR", "build/bin") + "/routecast-pretrain";
  const std::string command =
      "exec " + program + " --quiet --threads=1 " + data_ +
      "--global_batch=96 --micro_batch=4 --steps=1000 --out=" + out.string() +
      " 2>/dev/null";
  const pid_t child = ::fork();
  if (child == 0) {
    ::execl("/bin/sh", "sh", "-c", command.c_str(), nullptr);
    ::_exit(127);
  }
  const auto steps = [&] {
    return fs::exists(out / "metrics.jsonl") ? Losses(out).size() : 0;
  };
  for (int i = 0; i < 6000 && steps() == 0; ++i)
    std::this_thread::sleep_for(std::chrono::milliseconds(10));
  const size_t before = steps();
  ::kill(child, SIGUSR1);
  int status = 0;
  ::waitpid(child, &status, 0);
  ASSERT_TRUE(WIFEXITED(status));
  EXPECT_EQ(WEXITSTATUS(status), 75);
  EXPECT_LE(steps(), before + 3);
}

// A weight that is no number: the step that meets it is not taken, and nothing is saved.
TEST_F(Pretraining, AGradientThatIsNoNumberEndsItAndIsNotTaken) {
  const std::string flags = data_ + "--steps=12 --checkpoint_every=1 ";
  const std::string out = Out("diverged"), error = out + ".err";
  ASSERT_EQ(RunPretrain("", flags + "--stop_after=4 --out=" + out), 75);
  const fs::path state = fs::path(out) / "state";
  const TrainState found = FindTrainState(state).value();
  const Parameters parameters = ReadParameters(
      state / "step-00000004/parameters.safetensors", at::ScalarType::Undefined);
  AdamW optimizer(parameters, {});
  LoadTrainState(state, found.step, parameters, &optimizer);
  at::Tensor(parameters.items().front().second).fill_(std::nan(""));
  SaveTrainState(state, found, parameters, optimizer);
  EXPECT_EQ(RunPretrain("", flags + "--out=" + out + " 2> " + error), 2);
  EXPECT_NE(ReadFile(error).find("the gradient is not finite at step 4"),
            std::string::npos)
      << ReadFile(error);
  EXPECT_EQ(NewestStep(state), 4);
}

TEST_F(Pretraining, AnotherConfigurationIsRefused) {
  const std::string out = "--out=" + Out("refused");
  ASSERT_EQ(
      RunPretrain("", data_ + "--steps=12 --stop_after=4 --checkpoint_every=4 " + out),
      75);
  EXPECT_EQ(RunPretrain("", data_ + "--steps=13 " + out + " 2>/dev/null"), 2);
  const std::string same = "--steps=12 --checkpoint_every=4 " + out;
  EXPECT_EQ(RunPretrain("", OtherData() + same + " 2>/dev/null"), 2);
  EXPECT_EQ(RunPretrain("", data_ + same), 0);
}

// The tokenizer is that of the text, not one that lies there.
TEST_F(Pretraining, StartedAnewOnOtherTextItHasThatTextsTokenizer) {
  const std::string flags = "--steps=2 --quiet --threads=1 ";
  ASSERT_EQ(RunPretrain("", OtherData() + flags + "--out=" + Out("other")), 0);
  ASSERT_EQ(RunPretrain("", data_ + flags + "--out=" + Out("anew")), 0);
  ASSERT_EQ(RunPretrain("", OtherData() + flags + "--out=" + Out("anew")), 0);
  const auto pieces = [](const std::string& out) {
    return ReadFile(fs::path(out) / "spiece.model");
  };
  EXPECT_TRUE(pieces(Out("anew")) == pieces(Out("other")));
}

TEST_F(Pretraining, FromTheLastGoodCheckpointToTheSameBits) {
  const std::string flags = data_ + "--steps=12 --checkpoint_every=4 ";
  ASSERT_EQ(RunPretrain("", flags + "--out=" + Out("good")), 0);
  ASSERT_EQ(RunPretrain("", flags + "--stop_after=9 --out=" + Out("spoilt")), 75);
  const fs::path newest = fs::path(Out("spoilt")) / "state/step-00000009";
  std::ofstream(newest / "optimizer.safetensors", std::ios::binary) << "cut";
  EXPECT_EQ(RunPretrain("", flags + "--out=" + Out("spoilt") + " 2>/dev/null"), 3);
  ASSERT_EQ(RunPretrain("", flags + "--resume=last_good --out=" + Out("spoilt")), 0);
  EXPECT_TRUE(ReadFile(fs::path(Out("good")) / "model.safetensors") ==
              ReadFile(fs::path(Out("spoilt")) / "model.safetensors"));
}

TEST_F(Pretraining, LeavesARunRecordAndAWholeFolder) {
  ASSERT_EQ(RunPretrain("", data_ + "--steps=3 --dtype=bf16 --out=" + Out("record")), 0);
  const Json run = ReadJsonFile(fs::path(Out("record")) / "run.json");
  EXPECT_EQ(run["exit_status"], 0);
  EXPECT_TRUE(run["results"]["encoder"].contains("load_entropy"));
  for (const char* file : {"config.json", "model.safetensors", "spiece.model",
                           "tokenizer_config.json", "pretrain.json", "metrics.jsonl"}) {
    EXPECT_TRUE(fs::exists(fs::path(Out("record")) / file)) << file;
  }
  EXPECT_FALSE(fs::exists(fs::path(Out("record")) / "state"));
}

TEST_F(Pretraining, DryRunWritesNothing) {
  EXPECT_EQ(RunPretrain("", data_ + "--dry_run --out=" + Out("dry") + " >/dev/null"), 0);
  EXPECT_FALSE(fs::exists(Out("dry")));
}

}  // namespace
}  // namespace routecast
