// A tiny checkpoint, a corpus, and routecast-collect over them, as people run it.
#pragma once

#include <gtest/gtest.h>

#include <cerrno>

#include "tests/support/process.h"
#include "tests/support/tiny_checkpoint.h"

namespace routecast {

class CollectFixture : public testing::Test {
 protected:
  static void SetUpTestSuite() {
    folder_ = TestFolder(program_invocation_short_name);  // tests run side by side
    WriteCheckpoint(folder_ / "model", 1);
    WriteCheckpoint(folder_ / "other", 2);
    WriteCorpus(folder_, 1500);
  }
  // The last of a flag wins, so `more` may replace any.
  static std::vector<std::string> Program(const std::string& store,
                                          const std::vector<std::string>& more) {
    std::vector<std::string> command = {
        Bin("routecast-collect"),
        "--quiet",
        "--threads=1",
        "--device=cpu",
        "--num_shards=3",
        "--max_length=64",
        "--batch_size=8",
        "--max_sequences=1200",
        "--hidden_share=0.2",
        "--model=" + (folder_ / "model").string(),
        "--data=jsonl:" + (folder_ / "corpus.jsonl").string() + "#text",
        "--cache=" + (folder_ / "cache").string(),
        "--store=" + (folder_ / store).string()};
    command.insert(command.end(), more.begin(), more.end());
    return command;
  }
  static std::vector<std::string> Command(int ranks, const std::string& store,
                                          const std::vector<std::string>& more) {
    return UnderMpirun(ranks, Program(store, more));
  }
  // One rank without mpirun, which takes two seconds to see a program fail.
  static int Collect(int ranks, const std::string& store,
                     const std::vector<std::string>& more = {}) {
    return RunProgram(ranks == 1 ? Program(store, more) : Command(ranks, store, more));
  }
  static std::string Export(const std::string& store) {
    const std::string out = (folder_ / ("export-" + store)).string();
    EXPECT_EQ(RunProgram({Bin("routecast-trace"), "export", "--quiet",
                          "--store=" + (folder_ / store).string(), "--out=" + out}),
              0);
    return ReadFile(fs::path(out) / "traces.npz");
  }
  // What nobody disturbed: made once.
  static const std::string& Golden() {
    static const std::string golden = [] {
      EXPECT_EQ(Collect(1, "golden"), 0);
      return Export("golden");
    }();
    return golden;
  }
  static inline fs::path folder_;
};

}  // namespace routecast
