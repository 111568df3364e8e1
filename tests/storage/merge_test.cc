#include "storage/merge.h"

#include <unistd.h>

#include <algorithm>
#include <cstring>
#include <limits>

#include "common/errors.h"
#include "common/stop.h"
#include "storage/export.h"
#include "storage/store_builder.h"
#include "storage/verify.h"
#include "tests/storage/store_fixture.h"

namespace routecast {
namespace {

using testing::Test;

class MergeTest : public Test {
 protected:
  fs::path At(const std::string& name) const { return folder_.path() / name; }
  // A store that holds `traces`, in chunks of three.
  fs::path Make(const std::string& name, const std::vector<RoutingTrace>& traces,
                StoreConfig config) {
    config.num_chunks = static_cast<int64_t>((traces.size() + 2) / 3);
    TraceStore::CreateOrOpen(At(name), config);
    ShardOwner owner(At(name), config, 0, 1);
    for (uint32_t c = 0; c < config.num_chunks; ++c) {
      ChunkWriter writer(At(name), config, c, "t");
      for (size_t i = 3 * c; i < std::min<size_t>(traces.size(), 3 * c + 3); ++i) {
        writer.Add(traces[i]);
      }
      writer.Finish();
      owner.Ingest(c, "t");
    }
    return At(name);
  }
  fs::path Make(const std::string& name, const std::vector<RoutingTrace>& traces) {
    return Make(name, traces, config_);
  }
  std::vector<RoutingTrace> Traces(uint64_t first, uint64_t last) const {
    std::vector<RoutingTrace> traces;
    for (uint64_t id = first; id < last; ++id) traces.push_back(RandomTrace(id, shape_));
    return traces;
  }
  static std::vector<RoutingTrace> Read(const fs::path& store) {
    std::vector<RoutingTrace> traces;
    TraceReader(store).Scan([&](RoutingTrace&& t) { traces.push_back(std::move(t)); },
                            WithHidden::kYes);
    return traces;
  }
  std::string Exported(const fs::path& store) {
    const auto files = ExportTraces(TraceReader(store), At("export"), {});
    return ReadFile(files.at(0));
  }
  // The error of merging; empty where there was none.
  template <typename Error>
  std::string ErrorOf(const std::vector<fs::path>& stores, bool renumber = false) {
    try {
      MergeStores(stores, At("refused"), {.renumber = renumber});
    } catch (const Error& e) {
      EXPECT_FALSE(fs::exists(At("refused")));
      EXPECT_LE(std::count(e.what(), e.what() + std::strlen(e.what()), '\n'), 2);
      return e.what();
    }
    return "";
  }

  TempFolder folder_;
  TraceShape shape_;
  StoreConfig config_ = ConfigOf(shape_, 4, 0);
};

// store.json does not say that an import lacks drops; their union was a store that no
// export of arrays could write.
TEST_F(MergeTest, RefusesRecordsOfOtherPlanes) {
  std::vector<RoutingTrace> without = Traces(20, 23);
  for (RoutingTrace& trace : without) {
    trace.encoder.dropped.clear();
    trace.decoder.dropped.clear();
  }
  const std::string error =
      ErrorOf<UsageError>({Make("a", Traces(0, 3)), Make("b", without)});
  EXPECT_NE(error.find("/b cannot be merged with"), std::string::npos) << error;
  EXPECT_NE(error.find("beside the ids: drops, margins, "), std::string::npos) << error;
  EXPECT_NE(error.find(", not margins, "), std::string::npos) << error;
}

TEST_F(MergeTest, HoldsTheSequencesOfAllStoresOnce) {
  Make("a", Traces(0, 20));
  Make("b", Traces(12, 31));
  const MergeReport report = MergeStores({At("a"), At("b")}, At("c"), {});
  EXPECT_EQ(report.sequences, 31u);
  EXPECT_EQ(report.repeated, 8u);
  EXPECT_EQ(Read(At("c")), Traces(0, 31));
  EXPECT_TRUE(TraceReader(At("c")).complete());
}

TEST_F(MergeTest, TwoJobsDoNotBuildInOnePlace) {
  StoreBuilder first(At("c"), config_);
  first.Add(RandomTrace(1, shape_));
  for (const std::string name : {"c", "c/"}) {
    try {
      StoreBuilder second(At(name), config_);
      FAIL() << "two jobs build " << name;
    } catch (const EnvironmentError& e) {
      EXPECT_NE(std::string(e.what()).find("is being made by another process"),
                std::string::npos);
    }
  }
  first.Finish();
  EXPECT_EQ(Read(At("c")), std::vector<RoutingTrace>{RandomTrace(1, shape_)});
}

TEST_F(MergeTest, TheLockOfAKilledJobHoldsNobodyAndGoesWithTheNext) {
  const fs::path lock = At("c.tmp.lock");
  WriteFileAtomic(lock, "");
  {
    StoreBuilder builder(At("c"), config_);
    builder.Add(RandomTrace(1, shape_));
    builder.Finish();
  }
  EXPECT_TRUE(VerifyStore(At("c")).sound());
  EXPECT_FALSE(fs::exists(lock));
}

TEST_F(MergeTest, TheResultIsSound) {
  Make("a", Traces(0, 20));
  Make("b", Traces(12, 31));
  MergeStores({At("a"), At("b")}, At("c"), {});
  const VerifyReport report = VerifyStore(At("c"));
  EXPECT_TRUE(report.sound()) << report.problems.at(0);
  EXPECT_EQ(report.sequences, 31u);
}

TEST_F(MergeTest, MergingAgainChangesNoByteOfTheExport) {
  Make("a", Traces(0, 20));
  Make("b", Traces(12, 31));
  MergeStores({At("a"), At("b")}, At("c"), {});
  MergeStores({At("c"), At("a"), At("c")}, At("d"), {});
  EXPECT_EQ(Exported(At("d")), Exported(At("c")));
}

TEST_F(MergeTest, TheOrderOfStoresChangesNoByteOfTheExport) {
  Make("a", Traces(0, 20));
  Make("b", Traces(12, 31));
  MergeStores({At("a"), At("b")}, At("c"), {});
  MergeStores({At("b"), At("a")}, At("d"), {});
  EXPECT_EQ(Exported(At("d")), Exported(At("c")));
}

TEST_F(MergeTest, EqualSequencesWithoutNumbersThatEqualThemselvesAreEqual) {
  std::vector<RoutingTrace> traces = Traces(0, 2);
  traces[0].decoder.margins[0] = std::numeric_limits<float>::quiet_NaN();
  Make("a", traces);
  EXPECT_EQ(MergeStores({At("a"), At("a")}, At("c"), {}).repeated, 2u);
}

TEST_F(MergeTest, ADifferentSequenceUnderOneIdIsNamed) {
  std::vector<RoutingTrace> other = Traces(5, 9);
  other[2].decoder.expert_ids[1] ^= 1;
  Make("a", Traces(0, 20));
  Make("b", other);
  const std::string error = ErrorOf<DataError>({At("a"), At("b")});
  EXPECT_NE(error.find("sequence 7 differs between"), std::string::npos) << error;
}

TEST_F(MergeTest, RouterInputsArePartOfASequence) {
  std::vector<RoutingTrace> other = Traces(0, 20);
  const auto hidden = std::find_if(other.begin(), other.end(), [](const auto& t) {
    return t.encoder.hidden_width > 0;
  });
  ASSERT_NE(hidden, other.end());
  hidden->encoder.hidden[0] ^= 1;
  Make("a", Traces(0, 20));
  Make("b", other);
  EXPECT_NE(ErrorOf<DataError>({At("a"), At("b")}), "");
}

TEST_F(MergeTest, AnotherModelIsRefusedWithBothValues) {
  StoreConfig other = config_;
  other.model_fingerprint = "00000000000000bb";
  Make("a", Traces(0, 2));
  Make("b", Traces(2, 4), other);
  const std::string error = ErrorOf<UsageError>({At("a"), At("b")});
  EXPECT_NE(error.find("00000000000000aa\", not \"00000000000000bb"), std::string::npos)
      << error;
}

// One case a key that must agree, and one that need not.
struct KeyCase {
  const char* name;
  void (*change)(StoreConfig*);
  bool may_differ;
};
std::ostream& operator<<(std::ostream& out, const KeyCase& c) { return out << c.name; }
class MergeKeys : public testing::TestWithParam<KeyCase> {};
TEST_P(MergeKeys, AgreeOrMayDiffer) {
  const StoreConfig a = ConfigOf({}, 4, 2);
  StoreConfig b = a;
  GetParam().change(&b);
  EXPECT_EQ(MergeDifferences(a, b).empty(), GetParam().may_differ);
}
INSTANTIATE_TEST_SUITE_P(
    AllKeys, MergeKeys,
    testing::Values(
        KeyCase{"model", [](StoreConfig* c) { c->model = "x"; }, true},
        KeyCase{"data", [](StoreConfig* c) { c->data = {"x"}; }, true},
        KeyCase{"seed", [](StoreConfig* c) { c->seed = 7; }, true},
        KeyCase{"num_shards", [](StoreConfig* c) { c->num_shards = 1; }, true},
        KeyCase{"num_chunks", [](StoreConfig* c) { c->num_chunks = 9; }, true},
        KeyCase{"threads", [](StoreConfig* c) { c->threads = 9; }, true},
        KeyCase{"device_kind", [](StoreConfig* c) { c->device_kind = "cuda"; }, true},
        KeyCase{"compression", [](StoreConfig* c) { c->compression = "zstd"; }, true},
        KeyCase{"tokenizer", [](StoreConfig* c) { c->tokenizer_fingerprint = "x"; },
                false},
        KeyCase{"geometry", [](StoreConfig* c) { c->geometry.num_experts = 8; }, false},
        KeyCase{"record", [](StoreConfig* c) { c->record = {"ids"}; }, false},
        KeyCase{"top_k", [](StoreConfig* c) { c->top_k = 1; }, false},
        KeyCase{"task", [](StoreConfig* c) { c->task = Task::kEncode; }, false},
        KeyCase{"dtype", [](StoreConfig* c) { c->dtype = "bf16"; }, false},
        KeyCase{"sampling", [](StoreConfig* c) { c->sampling.temperature = 1; }, false},
        KeyCase{"max_length", [](StoreConfig* c) { c->max_length = 9; }, false},
        KeyCase{"hidden_share", [](StoreConfig* c) { c->hidden_share = 1; }, false},
        KeyCase{"noise_density", [](StoreConfig* c) { c->noise_density = 1; }, false}),
    [](const auto& info) { return std::string(info.param.name); });

TEST_F(MergeTest, AnotherCorpusIsRefusedWithTheWayOut) {
  StoreConfig other = config_;
  other.corpus_fingerprint = "other";
  Make("a", Traces(0, 4));
  Make("b", Traces(0, 4), other);
  const std::string error = ErrorOf<UsageError>({At("a"), At("b")});
  EXPECT_NE(error.find("--renumber"), std::string::npos) << error;
}

TEST_F(MergeTest, RenumberPutsFurtherCorporaAboveTheFirst) {
  StoreConfig other = config_;
  other.corpus_fingerprint = "other";
  Make("a", Traces(0, 4));
  Make("a2", Traces(2, 6));
  Make("b", Traces(0, 4), other);
  MergeStores({At("a"), At("b"), At("a2")}, At("c"), {.renumber = true});
  // Documents of the first corpus are 0 and 1: the second's begin at 2.
  std::vector<RoutingTrace> expected = Traces(0, 6), moved = Traces(0, 4);
  for (RoutingTrace& t : moved) {
    t.sequence_id += 2 * 65536;
    t.document_id += 2;
    expected.push_back(t);
  }
  EXPECT_EQ(Read(At("c")), expected);
}

TEST_F(MergeTest, ARenumberedStoreHasACorpusOfItsOwn) {
  StoreConfig other = config_;
  other.corpus_fingerprint = "other";
  Make("a", Traces(0, 4));
  Make("b", Traces(0, 4), other);
  MergeStores({At("a"), At("b")}, At("c"), {.renumber = true});
  EXPECT_NE(ErrorOf<UsageError>({At("c"), At("a")}), "");
}

TEST_F(MergeTest, IdsThatWouldLeave64BitsAreRefused) {
  StoreConfig other = config_;
  other.corpus_fingerprint = "other";
  Make("a", {RandomTrace(~uint64_t{0} - 5, shape_)});
  Make("b", Traces(0, 4), other);
  const std::string error = ErrorOf<UsageError>({At("a"), At("b")}, true);
  EXPECT_NE(error.find("64 bits"), std::string::npos) << error;
}

// An id that was left out is moved as the others are: it must not come to another's.
TEST_F(MergeTest, IdsLeftOutThatWouldLeave64BitsAreRefused) {
  StoreConfig other = config_;
  other.corpus_fingerprint = "other";
  RoutingTrace none;
  none.sequence_id = ~uint64_t{0} - 5;
  Make("a", Traces(0, 4));
  Make("b", {RandomTrace(0, shape_), none}, other);
  const std::string error = ErrorOf<UsageError>({At("a"), At("b")}, true);
  EXPECT_NE(error.find("64 bits"), std::string::npos) << error;
}

TEST_F(MergeTest, AnUnfinishedStoreIsRefused) {
  StoreConfig more = config_;
  more.num_chunks = 2;
  TraceStore::CreateOrOpen(At("a"), more);
  ShardOwner owner(At("a"), more, 0, 1);
  StageChunk(At("a"), more, 0, 2, shape_, "t");
  owner.Ingest(0, "t");
  const std::string error = ErrorOf<UsageError>({At("a")});
  EXPECT_NE(error.find("1 of 2 chunks"), std::string::npos) << error;
}

TEST_F(MergeTest, RoutersAreCopied) {
  Make("a", Traces(0, 2));
  Make("b", Traces(2, 4));
  WriteFileAtomic(At("b") / "routers.safetensors", "weights");
  MergeStores({At("a"), At("b")}, At("c"), {});
  EXPECT_EQ(ReadFile(At("c") / "routers.safetensors"), "weights");
}

TEST_F(MergeTest, OtherRoutersAreRefused) {
  Make("a", Traces(0, 2));
  Make("b", Traces(2, 4));
  WriteFileAtomic(At("a") / "routers.safetensors", "others");
  WriteFileAtomic(At("b") / "routers.safetensors", "weights");
  EXPECT_NE(ErrorOf<DataError>({At("a"), At("b")}), "");
}

TEST_F(MergeTest, AFolderThatIsThereIsKept) {
  Make("a", Traces(0, 2));
  Make("b", Traces(2, 4));
  EXPECT_THROW(MergeStores({At("a")}, At("b"), {}), UsageError);
  EXPECT_EQ(Read(At("b")), Traces(2, 4));
}

// Commit removes what was there: only the run.json of a run that failed, and what a
// killed one wrote of it.
TEST_F(MergeTest, ARunThatFailedMayHaveItsRecordThere) {
  Make("a", Traces(0, 2));
  MakeFolder(At("out"));
  WriteFileAtomic(At("out") / "run.json", "{}");
  WriteFileAtomic(At("out") / "run.json.123.tmp", "{");
  MergeStores({At("a")}, At("out"), {});
  EXPECT_EQ(Read(At("out")), Traces(0, 2));
}

TEST_F(MergeTest, WhatIsNamedLikeARecordIsKept) {
  Make("a", Traces(0, 2));
  MakeFolder(At("folder") / "run.json.d");
  MakeFolder(At("hidden") / "run.json");
  for (const char* name : {"run.json.bak", "run.json.tmp", "run.jsonl"}) {
    MakeFolder(At(name));
    WriteFileAtomic(At(name) / name, "mine");
    EXPECT_THROW(MergeStores({At("a")}, At(name), {}), UsageError);
    EXPECT_EQ(ReadFile(At(name) / name), "mine");
  }
  EXPECT_THROW(MergeStores({At("a")}, At("folder"), {}), UsageError);
  EXPECT_THROW(MergeStores({At("a")}, At("hidden"), {}), UsageError);
  EXPECT_TRUE(fs::is_directory(At("folder") / "run.json.d"));
  EXPECT_TRUE(fs::is_directory(At("hidden") / "run.json"));
}

// Its place is emptied before the result is built there.
TEST_F(MergeTest, AStoreWhereTheResultIsBuiltIsKept) {
  Make("out.tmp", Traces(0, 2));
  EXPECT_THROW(MergeStores({At("out.tmp")}, At("out"), {}), UsageError);
  EXPECT_THROW(MergeStores({At("out.tmp")}, At("out/"), {}), UsageError);
  EXPECT_EQ(Read(At("out.tmp")), Traces(0, 2));
}

TEST_F(MergeTest, ANameWithASlashIsTheName) {
  Make("a", Traces(0, 2));
  MergeStores({At("a")}, At("out/"), {});
  EXPECT_EQ(Read(At("out")), Traces(0, 2));
}

TEST_F(MergeTest, AnInterruptedMergeLeavesNothingAndStartsAgain) {
  struct Interrupted {};
  Make("a", Traces(0, 9));
  int steps = 0;
  MergeStores({At("a")}, At("all"), {}, [&](const char*) { ++steps; });
  ASSERT_GT(steps, 5);
  for (int stop = 1; stop <= steps; ++stop) {
    int step = 0;
    const auto at = [&](const char*) {
      if (++step == stop) throw Interrupted();
    };
    EXPECT_THROW(MergeStores({At("a")}, At("c"), {}, at), Interrupted);
    ASSERT_FALSE(fs::exists(At("c")));
  }
  // What a killed job leaves, which runs no destructor.
  MakeFolder(At("c.tmp") / "shards" / "00000");
  WriteFileAtomic(At("c.tmp") / "shards" / "00000" / "CURRENT", "half");
  MergeStores({At("a")}, At("c"), {});
  EXPECT_EQ(Read(At("c")), Traces(0, 9));
}

// In a process of its own: a requested stop stays requested.
TEST_F(MergeTest, AStopLeavesNothing) {
  GTEST_FLAG_SET(death_test_style, "threadsafe");
  const auto stopped = [&] {
    Make("a", Traces(0, 9));
    RequestStop();
    int code = 1;
    try {
      MergeStores({At("a")}, At("c"), {});
    } catch (const StoppedError&) {
      code = fs::exists(At("c")) || fs::exists(At("c.tmp")) ? 2 : kExitStopped;
    }
    fs::remove_all(folder_.path());  // no destructor runs
    ::_exit(code);
  };
  EXPECT_EXIT(stopped(), testing::ExitedWithCode(kExitStopped), "");
}

TEST_F(MergeTest, ManyChunksKeepTheirPlaces) {
  shape_.width = 512;
  shape_.hidden_share = 1;
  config_ = ConfigOf(shape_, 3, 0);
  shape_.min_tokens = shape_.max_tokens = 300;
  Make("a", Traces(0, 15));
  MergeStores({At("a")}, At("c"), {});
  EXPECT_GT(TraceReader(At("c")).config().num_chunks, 2);
  EXPECT_EQ(Read(At("c")), Traces(0, 15));
}

}  // namespace
}  // namespace routecast
