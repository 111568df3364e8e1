// Sources added to a store later, as people do it: with other numbers of ranks, killed,
// by other names. What was there stays, and what comes in does not depend on how.
#include <gtest/gtest.h>

#include <fstream>

#include "common/errors.h"
#include "storage/trace_reader.h"
#include "tests/collector/collect_fixture.h"

namespace routecast {
namespace {

constexpr size_t kFirst = 150, kMore = 250;  // sequences

class CollectAddTest : public CollectFixture {
 protected:
  static void SetUpTestSuite() {
    CollectFixture::SetUpTestSuite();
    std::string lines;
    for (uint64_t d = 0; d < 400; ++d) {
      // A fifth repeats documents of the first corpus, a fifth is near one.
      const bool old = d % 5 < 2;
      std::string text = RandomText(Mix(old ? 1 : 5, d), 5 + ToRange(Mix(3, d), 56));
      if (d == 3) continue;  // the first corpus's long one
      if (d % 5 == 1) text += "tail";
      lines += Json{{"text", text}}.dump() + "\n";
    }
    WriteFileAtomic(folder_ / "more.jsonl", lines);
    // 48 KiB that are one document: its sequences are cut from slices.
    WriteFileAtomic(folder_ / "long.txt", RandomText(99, 9000));
    EXPECT_EQ(Collect(1, "base", {Limit(kFirst)}), 0);
  }
  static std::string Limit(size_t sequences) {
    return "--max_sequences=" + std::to_string(sequences);
  }
  static std::string More() {
    return "--data=jsonl:" + (folder_ / "more.jsonl").string() + "#text";
  }
  static std::string Long() { return "--data=text:" + (folder_ / "long.txt").string(); }
  // A copy of the store before anything was added.
  static void Copy(const std::string& store) {
    fs::remove_all(folder_ / store);
    fs::copy(folder_ / "base", folder_ / store, fs::copy_options::recursive);
  }
  static int Add(int ranks, const std::string& store,
                 std::vector<std::string> more = {More()}) {
    more.push_back(Limit(kMore));
    return Collect(ranks, store, more);
  }
  static const std::string& Added() {
    static const std::string added = [] {
      Copy("added");
      EXPECT_EQ(Add(1, "added"), 0);
      return Export("added");
    }();
    return added;
  }
  static int Trace(std::vector<std::string> command) {
    command.insert(command.begin(), Bin("routecast-trace"));
    command.push_back("--quiet");
    return RunProgram(command);
  }
  static std::string StoreFlag(const std::string& store) {
    return "--store=" + (folder_ / store).string();
  }
};

TEST_F(CollectAddTest, WhatWasThereStaysAndDuplicatesAreDropped) {
  Added();
  const TraceReader base(folder_ / "base"), added(folder_ / "added");
  EXPECT_TRUE(added.complete());
  ASSERT_EQ(base.sequences().size(), kFirst);
  ASSERT_EQ(added.sequences().size(), kFirst + kMore);
  std::set<uint64_t> groups;
  for (size_t i = 0; i < kFirst; ++i) {
    const uint64_t id = base.sequences()[i].sequence_id;
    groups.insert(base.sequences()[i].group_id);
    EXPECT_EQ(added.sequences()[i].sequence_id, id);
    EXPECT_EQ(added.sequences()[i].group_id, base.sequences()[i].group_id);
    EXPECT_EQ(added.Read(id, WithHidden::kYes), base.Read(id, WithHidden::kYes));
  }
  size_t joined = 0, hidden = 0;
  for (size_t i = kFirst; i < kFirst + kMore; ++i) {
    EXPECT_GE(added.sequences()[i].document_id, 1500u);  // behind the first corpus's
    joined += groups.contains(added.sequences()[i].group_id);
    hidden += added.sequences()[i].has_hidden;
  }
  EXPECT_GT(joined, 0u);
  EXPECT_GT(hidden, kMore / 10);  // a fifth of the groups
  const Json record = ReadJsonFile(folder_ / "added" / "run.json");
  EXPECT_EQ(record["corpus"]["exact_duplicates"], 80);
  EXPECT_EQ(Trace({"verify", StoreFlag("added")}), 0);
}

TEST_F(CollectAddTest, RanksDoNotChangeWhatIsAdded) {
  for (const int ranks : {2, 3, 4}) {
    const std::string store = "added" + std::to_string(ranks);
    Copy(store);
    ASSERT_EQ(Add(ranks, store), 0);
    EXPECT_TRUE(Export(store) == Added()) << ranks;
  }
}

TEST_F(CollectAddTest, ASubsetTakesNothingIn) {
  ASSERT_EQ(Trace({"subset", StoreFlag("base"), "--share=0.5",
                   "--out=" + (folder_ / "half").string()}),
            0);
  const std::string record = ReadFile(folder_ / "half" / "run.json");
  EXPECT_EQ(Add(1, "half"), kExitUsage);
  EXPECT_EQ(ReadFile(folder_ / "half" / "run.json"), record);
}

TEST_F(CollectAddTest, KilledWhileItAddsItEndsWithTheSameRecords) {
  Copy("killed");
  int killed = 0;
  for (int run = 0; run < 12 && killed < 4; ++run) {
    const fs::path record = folder_ / "killed" / "run.json";
    fs::remove(record);
    const pid_t job = Start(Command(1 + run % 3, "killed", {More(), Limit(kMore)}));
    for (int ms = 0; ms < 60000 && !fs::exists(record); ++ms) {
      std::this_thread::sleep_for(std::chrono::milliseconds(1));
    }
    std::this_thread::sleep_for(std::chrono::milliseconds(40 * run));
    ::kill(job, SIGKILL);
    const bool done = Wait(job) == 0;
    WaitForOrphans();
    killed += !done;
    if (done) Copy("killed");
  }
  EXPECT_EQ(killed, 4);
  ASSERT_EQ(Add(2, "killed"), 0);
  EXPECT_TRUE(Export("killed") == Added());
}

TEST_F(CollectAddTest, AnUnfinishedStoreCanBeGivenMore) {
  ASSERT_EQ(Collect(1, "early", {Limit(kFirst), "--max_hours=1e-9"}), kExitStopped);
  ASSERT_EQ(Add(2, "early"), 0);
  EXPECT_TRUE(Export("early") == Added());
}

TEST_F(CollectAddTest, TheSameCommandsAgainAddNothing) {
  Copy("again");
  ASSERT_EQ(Add(2, "again"), 0);
  ASSERT_EQ(Add(2, "again"), 0);
  ASSERT_EQ(Collect(1, "again", {Limit(kFirst)}), 0);  // the first command
  EXPECT_EQ(TraceReader(folder_ / "again").config().intakes.size(), 2u);
  EXPECT_TRUE(Export("again") == Added());
}

TEST_F(CollectAddTest, OtherNamesOfTheSameTextsAddNothing) {
  Copy("alias");
  fs::create_symlink(folder_ / "corpus.jsonl", folder_ / "alias.jsonl");
  ASSERT_EQ(Add(1, "alias", {"--data=jsonl:" + (folder_ / "alias.jsonl").string()}),
            kExitUsage);  // the limit is then the first sources', and another
  ASSERT_EQ(
      Collect(1, "alias",
              {"--data=jsonl:" + (folder_ / "alias.jsonl").string(), Limit(kFirst)}),
      0);
  EXPECT_TRUE(ReadFile(folder_ / "alias" / "store.json") ==
              ReadFile(folder_ / "base" / "store.json"));
}

TEST_F(CollectAddTest, AThirdSourceAndALongDocument) {
  Copy("third");
  ASSERT_EQ(Add(2, "third"), 0);
  ASSERT_EQ(Add(3, "third", {Long()}), 0);
  Copy("third1");
  ASSERT_EQ(Add(1, "third1"), 0);
  ASSERT_EQ(Add(1, "third1", {More(), Long()}), 0);  // all named
  EXPECT_TRUE(Export("third") == Export("third1"));
  const TraceReader reader(folder_ / "third");
  EXPECT_EQ(reader.config().intakes.size(), 3u);
  EXPECT_EQ(reader.sequences().size(), kFirst + 2 * kMore);
  EXPECT_EQ(Trace({"verify", StoreFlag("third")}), 0);
}

TEST_F(CollectAddTest, CodedIdsExportTheSame) {
  ASSERT_EQ(Collect(2, "coded", {Limit(kFirst), "--compression=context"}), 0);
  ASSERT_EQ(Add(2, "coded", {More(), "--compression=context"}), 0);
  EXPECT_EQ(Trace({"verify", StoreFlag("coded")}), 0);
  EXPECT_TRUE(Export("coded") == Added());
}

TEST_F(CollectAddTest, RefusesWhatWouldChangeWhatIsThere) {
  Copy("changed");
  ASSERT_EQ(Add(1, "changed"), 0);
  EXPECT_EQ(Collect(1, "changed", {More(), Limit(kMore + 1)}), kExitUsage);
  EXPECT_EQ(Collect(1, "changed", {More(), Limit(kMore), "--dtype=bf16"}), kExitUsage);
  const std::string before = ReadFile(folder_ / "more.jsonl");
  WriteFileAtomic(folder_ / "more.jsonl", before + "{\"text\": \"one more\"}\n");
  EXPECT_EQ(Add(1, "changed"), kExitUsage);
  fs::remove(folder_ / "more.jsonl");  // a source of the store that is gone
  EXPECT_EQ(Add(1, "changed", {}), kExitUsage);
  WriteFileAtomic(folder_ / "moved.jsonl", before);
  EXPECT_EQ(Add(2, "changed", {"--data=jsonl:" + (folder_ / "moved.jsonl").string()}), 0);
  EXPECT_TRUE(Export("changed") == Added());
  WriteFileAtomic(folder_ / "more.jsonl", before);
}

TEST_F(CollectAddTest, ADryRunChangesNothing) {
  Copy("dry");
  const std::string before = ReadFile(folder_ / "dry" / "store.json");
  EXPECT_EQ(Add(1, "dry", {More(), "--dry_run"}), 0);
  EXPECT_EQ(ReadFile(folder_ / "dry" / "store.json"), before);
  EXPECT_EQ(Trace({"verify", StoreFlag("dry")}), 0);
}

}  // namespace
}  // namespace routecast
