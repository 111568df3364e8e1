// Where one rank works alone the others wait at a barrier, which has twenty times the
// deadline of any other collective call (communicator.h).
#include <fcntl.h>
#include <gtest/gtest.h>
#include <unistd.h>

#include <cstdio>
#include <string>
#include <vector>

#include "common/files.h"
#include "tests/storage/temp_folder.h"
#include "tests/trainer/synthetic_traces.h"
#include "trainer/leaderboard.h"

namespace routecast {
namespace {

// A world of one that keeps the names of its calls. With a `log`: of those alone that
// come after the log says `line`.
class CallsAfter final : public Communicator {
 public:
  explicit CallsAfter(fs::path log = {}, std::string line = {})
      : log_(std::move(log)), line_(std::move(line)) {}
  RankInfo rank_info() const override { return {}; }
  std::unique_ptr<PendingReduce> StartAllReduceSum(const at::Tensor& tensor) override {
    Note("all-reduce");
    return inner_.StartAllReduceSum(tensor);
  }
  void AllReduceSum(std::span<double>) override { Note("all-reduce"); }
  void Broadcast(const at::Tensor&, int) override { Note("broadcast"); }
  std::vector<at::Tensor> AllToAll(const std::vector<at::Tensor>& send,
                                   std::span<const int64_t>) override {
    Note("all-to-all");
    return send;
  }
  std::vector<std::string> AllGather(const std::string& bytes) override {
    Note("all-gather");
    return {bytes};
  }
  void Barrier() override { Note("barrier"); }
  const std::vector<std::string>& calls() const { return calls_; }

 private:
  void Note(const char* call) {
    if (!log_.empty() && ReadFile(log_).find(line_) == std::string::npos) return;
    calls_.emplace_back(call);
  }
  LocalCommunicator inner_;
  fs::path log_;
  std::string line_;
  std::vector<std::string> calls_;
};

// stderr goes to a file while this lives.
class StderrTo {
 public:
  explicit StderrTo(const fs::path& file) : kept_(dup(2)) {
    std::fflush(stderr);
    const int to = open(file.c_str(), O_CREAT | O_WRONLY | O_APPEND, 0600);
    dup2(to, 2);
    close(to);
  }
  ~StderrTo() {
    std::fflush(stderr);
    dup2(kept_, 2);
    close(kept_);
  }

 private:
  int kept_;
};

class RootAlone : public testing::Test {
 protected:
  RootAlone()
      : traces_(TraceSynthesizer(2, 8, 16, 60, 5).Make(40, 6, 12, true)),
        other_(TraceSynthesizer(2, 8, 16, 60, 6).Make(40, 6, 12, true)),
        store_(traces_.traces, traces_.geometry),
        shifted_(other_.traces, other_.geometry) {
    job_.options.kind = "simple";
    job_.options.steps = 1;
    job_.options.sizes = {16, 0, 0, 0, 0, -1};
    job_.options.global_batch = job_.options.micro_batch = 8;
    job_.options.validation_sequences = job_.options.test_sequences = 4;
    job_.out = folder_.path() / "run";
    job_.deterministic = true;
  }
  TempFolder folder_;
  const SyntheticTraces traces_, other_;
  TraceDataset store_, shifted_;
  SpeculationJob job_;
};

TEST_F(RootAlone, TheCostOfPinningEndsInABarrier) {
  const fs::path log = folder_.path() / "stderr";
  CallsAfter comm(log, "deterministic: a micro-batch takes");
  {
    const StderrTo file(log);
    job_.quiet = false;
    TrainSpeculation(job_, &store_, traces_.routers, &comm);
  }
  ASSERT_FALSE(comm.calls().empty());
  EXPECT_EQ(comm.calls()[0], "barrier");
}

TEST_F(RootAlone, TheTimesOfALeaderboardEndInABarrier) {
  job_.quiet = true;
  LocalCommunicator alone;
  TrainSpeculation(job_, &store_, traces_.routers, &alone);
  LeaderboardJob board;
  board.run = job_;
  board.run.out = folder_.path() / "board";
  MakeFolder(board.run.out);
  board.run.shift = {"elsewhere", &shifted_};
  board.entries = {job_.out.string()};
  CallsAfter comm;
  MakeLeaderboard(board, &store_, traces_.routers, &comm);
  ASSERT_FALSE(comm.calls().empty());
  EXPECT_EQ(comm.calls()[0], "barrier");
}

}  // namespace
}  // namespace routecast
