// Models asked about another store of the traced model: the same scores on the same
// documents, lower ones where routing differs, and no row for what cannot be asked.
#include "trainer/domain_shift.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "common/errors.h"
#include "tests/storage/temp_folder.h"
#include "tests/trainer/synthetic_traces.h"
#include "tests/trainer/training_in_memory.h"
#include "trainer/leaderboard.h"

namespace routecast {
namespace {

using testing::HasSubstr;

class DomainShift : public testing::Test {
 protected:
  // Another seed is other routing of other tokens, and more of them.
  DomainShift()
      : traces_(TraceSynthesizer(2, 8, 16, 60, 5).Make(40, 6, 12, true)),
        other_(TraceSynthesizer(2, 8, 16, 90, 6).Make(40, 6, 12, true)),
        store_(traces_.traces, traces_.geometry),
        same_(traces_.traces, traces_.geometry),
        shifted_(other_.traces, other_.geometry) {
    board_.entries = {"hidden"};
    board_.seeds = 2;
    board_.run.options.steps = 40;
    board_.run.options.sizes = {16, 2, 32, 1, 0, -1};
    board_.run.options.global_batch = board_.run.options.micro_batch = 16;
    board_.run.options.validation_sequences = 4;
    board_.run.quiet = true;
  }
  Json Make(const std::string& name, TraceDataset* shift) {
    board_.run.out = folder_.path() / name;
    board_.run.shift = {"elsewhere", shift};
    LocalCommunicator comm;
    return MakeLeaderboard(board_, &store_, traces_.routers, &comm);
  }
  static Json RowOf(const Json& board, const std::string& kind) {
    for (const Json& row : board["rows"]) {
      if (row["kind"] == kind) return row;
    }
    ADD_FAILURE() << "no row of " << kind;
    return {};
  }
  TempFolder folder_;
  const SyntheticTraces traces_, other_;
  TraceDataset store_, same_, shifted_;
  LeaderboardJob board_;
};

TEST_F(DomainShift, TheSameDocumentsAreNoChange) {
  const Json board = Make("same", &same_);
  for (const char* kind : {"hidden", "token_table", "stale_gate"}) {
    const Json row = RowOf(board, kind);
    EXPECT_EQ(row["scores_after_shift"], row["scores"]) << kind;
    EXPECT_EQ(row["decoder_next_top1_lost"], 0) << kind;
  }
}

TEST_F(DomainShift, OtherRoutingLosesPointsAndTheTableSaysSo) {
  const Json board = Make("other", &shifted_);
  const Json row = RowOf(board, "hidden");
  for (const char* phase : {"encoder", "decoder"}) {
    const std::string next = phase + std::string("_next_top1");
    EXPECT_GT(row[next + "_lost"].get<double>(), 0.05) << phase;
    EXPECT_DOUBLE_EQ(row[next + "_lost"],
                     row[next].get<double>() - row[next + "_after_shift"].get<double>());
  }
  EXPECT_TRUE(row["decoder_next_top4_after_shift"].is_number());
  EXPECT_EQ(board["shift_store"], "elsewhere");
  EXPECT_THAT(LeaderboardText(board), HasSubstr("shifted: dec next top-1"));
  EXPECT_THAT(ReadFile(board_.run.out / "leaderboard.csv"), HasSubstr("points lost"));
  EXPECT_THAT(ReadFile(board_.run.out / "leaderboard.html"), HasSubstr("elsewhere"));
  const Json results =
      ReadJsonFile(board_.run.out / "hidden" / "seed-1" / "results.json");
  EXPECT_EQ(results["shift_store"], "elsewhere");
  EXPECT_EQ(results["scores_after_shift"].size(), results["scores"].size());
  EXPECT_TRUE(results["baselines_after_shift"].contains("markov"));
}

// Runs that knew of no other store are asked when the table is made, to the same scores.
TEST_F(DomainShift, FinishedRunsAreAskedAsWell) {
  EXPECT_FALSE(RowOf(Make("run", nullptr), "hidden").contains("scores_after_shift"));
  const Json before = ReadJsonFile(board_.run.out / "hidden/seed-1/results.json");
  EXPECT_FALSE(before.contains("shift_store"));
  const Json late = RowOf(Make("run", &shifted_), "hidden");
  EXPECT_EQ(ReadJsonFile(board_.run.out / "hidden/seed-1/results.json"), before);
  const Json soon = RowOf(Make("other", &shifted_), "hidden");
  EXPECT_EQ(late["scores_after_shift"], soon["scores_after_shift"]);
}

TEST_F(DomainShift, AStoreOfAnotherModelIsRefusedBeforeTheFirstStep) {
  const SyntheticTraces small = TraceSynthesizer(2, 4, 16, 60, 5).Make(40, 6, 12, true);
  TraceDataset dataset(small.traces, small.geometry);
  SpeculationJob job = board_.run;
  job.out = folder_.path() / "run";
  job.shift = {"elsewhere", &dataset};
  const std::string why = Refusal(job, traces_);
  EXPECT_THAT(why, HasSubstr("--shift_store: 2 + 2 layers of 4 experts"));
  EXPECT_THAT(why, HasSubstr("\n  give two stores of one model"));
  EXPECT_EQ(std::count(why.begin(), why.end(), '\n'), 2);
}

TEST_F(DomainShift, AStoreWithoutWhatIsAskedIsRefused) {
  SpeculationJob job = board_.run;
  job.out = folder_.path() / "run";
  SyntheticTraces ids = other_;
  for (RoutingTrace& t : ids.traces) {
    for (RoutingSpan* span : {&t.encoder, &t.decoder}) {
      span->hidden.clear();
      span->hidden_width = 0;
    }
  }
  TraceDataset no_hidden(ids.traces, ids.geometry);
  job.shift = {"elsewhere", &no_hidden};
  EXPECT_THAT(Refusal(job, traces_), HasSubstr("--shift_store has no router inputs"));
  std::erase_if(ids.traces, [](const RoutingTrace& t) {
    return SplitOf(t.group_id) == SplitPart::kTest;
  });
  TraceDataset no_test(ids.traces, ids.geometry);
  job.shift = {"elsewhere", &no_test};
  job.options.kind = "interlayer";
  EXPECT_THAT(Refusal(job, traces_), HasSubstr("in a test document"));
}

}  // namespace
}  // namespace routecast
