// Failing calls and power losses at every file call of a job: the error is named, nothing
// is half visible, what was promised is there, and the same job again completes.
// ROUTECAST_LONG_TESTS=1 takes every call and disk (five minutes), else some of them, in
// even steps.
#include <gtest/gtest.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <sstream>

#include "collector/span_log.h"
#include "common/errors.h"
#include "common/run_record.h"
#include "common/safetensors.h"
#include "storage/context_coder.h"
#include "storage/export.h"
#include "storage/salvage.h"
#include "storage/store_lock.h"
#include "storage/store_routers.h"
#include "storage/trace_reader.h"
#include "storage/trace_store.h"
#include "storage/verify.h"
#include "tests/storage/random_trace.h"
#include "tests/storage/temp_folder.h"
#include "tests/support/watched_files.h"

namespace routecast {
namespace {

constexpr uint32_t kJobChunks = 3;
constexpr uint64_t kSequences = 3;  // a chunk

size_t Stride(size_t of_the_short_form) {
  return std::getenv("ROUTECAST_LONG_TESTS") != nullptr ? 1 : of_the_short_form;
}

// The last two reads of a staged file: of its first and last key, where it is taken in.
// RocksDB 7.8 reports success where they fail, so the short form takes them, too.
bool ReadsKeys(const std::vector<SeenCall>& calls, size_t n) {
  const auto staged = [&calls](size_t i) {
    return i < calls.size() && calls[i].call == FileCall::kRead &&
           calls[i].path.find("/staging/") != std::string::npos;
  };
  return staged(n) && !(staged(n + 1) && staged(n + 2));
}

class StoreFaultsTest : public testing::Test {
 protected:
  fs::path disk() const { return folder_.path() / "disk"; }
  fs::path store() const { return disk() / "store"; }

  // What one rank does to a store, from its creation to its seal.
  void Job(const fs::path& store, FileWatch* watch = nullptr) {
    MakeFolder(store);
    const StoreLock lock(store);
    TraceStore::CreateOrOpen(store, config_);
    TraceStore::CleanStaging(store);
    KeepRouters(store, [this](const fs::path& file) { WriteRouters(file); });
    RunRecord run(store, "store_faults_test", Json::object());
    run.WriteStart();
    SpanLog spans(store, RankInfo{});
    ShardOwner owner(store, config_, 0, 1);
    const std::vector<uint32_t> done = owner.CompletedChunks();
    for (uint32_t c = 0; c < kJobChunks; ++c) {
      if (std::find(done.begin(), done.end(), c) != done.end()) continue;
      const auto begin = SpanLog::Clock::now();
      StageChunk(store, config_, c, kSequences, shape_, lock.token());
      owner.Ingest(c, lock.token());
      spans.Write("chunk", begin, {{"chunk", c}});
      if (watch != nullptr) watch->Promise();
    }
    MakeContextModel(store, config_);
    owner.Finish();
    run.Finish(kExitDone, Json::object());
    if (watch != nullptr) watch->Promise();
  }
  void WriteRouters(const fs::path& file) const {
    const MoeGeometry& g = config_.geometry;
    const std::vector<float> weight(static_cast<size_t>(g.num_experts * g.d_model), 0.5f);
    std::vector<TensorToWrite> tensors;
    for (int l = 0; l < g.num_layers(); ++l) {
      tensors.push_back({"layer." + std::to_string(l) + ".weight",
                         "F32",
                         {g.num_experts, g.d_model},
                         weight.data()});
    }
    WriteSafetensors(file, tensors);
  }
  // What no export shows: the routers' bytes, the run's end, the lines of spans.
  void ExpectTheRest() {
    const fs::path routers = folder_.path() / "routers";
    WriteRouters(routers);
    EXPECT_EQ(ReadFile(RoutersPath(store())), ReadFile(routers));
    EXPECT_EQ(ReadJsonFile(store() / "run.json")["exit_status"], kExitDone);
    std::istringstream lines(ReadFile(store() / "spans" / "rank-00000.jsonl"));
    size_t cut = 0;
    for (std::string line; std::getline(lines, line);) cut += !Json::accept(line);
    EXPECT_LE(cut, 1u);  // where the disk was full
    EXPECT_TRUE(VerifyStore(store()).sound());
  }
  std::string Exported(const fs::path& store) {
    const fs::path out = folder_.path() / "export";
    ExportOptions options;
    options.format = "safetensors";
    const auto files = ExportTraces(TraceReader(store), out, options);
    return ReadFile(files.at(0));
  }
  void Empty() {
    fs::remove_all(disk());
    fs::create_directories(disk());
  }
  // Whole chunks only, each record as it was written; returns how many chunks.
  int64_t ReadWholeChunks(const fs::path& store) {
    const TraceReader reader(store);
    EXPECT_EQ(reader.sequences().size(),
              static_cast<size_t>(reader.completed_chunks()) * kSequences);
    reader.Scan(
        [&](RoutingTrace&& t) { EXPECT_EQ(t, RandomTrace(t.sequence_id, shape_)); },
        WithHidden::kAttended);
    const VerifyReport report = VerifyStore(store);
    EXPECT_TRUE(report.sound()) << report.problems.at(0);
    return reader.completed_chunks();
  }
  // A job that died, or whose lock could not be removed: here it would be this process.
  void LetHolderDie() {
    const fs::path path = store() / "lock.json";
    if (!fs::exists(path)) return;
    Json lock = Json::parse(ReadFile(path), nullptr, /*allow_exceptions=*/false);
    if (lock.is_discarded()) return;  // it must cope with that itself
    lock["process_start"] = "1";
    std::ofstream(path) << lock.dump();
  }
  void ExpectNamed(const std::exception& e) {
    const std::string text = e.what();
    EXPECT_NE(text.find(disk().string()), std::string::npos) << text;
    EXPECT_LE(std::count(text.begin(), text.end(), '\n'), 2) << text;
    const bool kind = dynamic_cast<const EnvironmentError*>(&e) != nullptr ||
                      dynamic_cast<const DataError*>(&e) != nullptr;
    EXPECT_TRUE(kind) << text;
  }
  // Whole chunks, or the one refusal that is allowed: the manifest names files that its
  // failed sync made RocksDB remove.
  void ExpectReadable(int64_t chunks) {
    try {
      EXPECT_GE(ReadWholeChunks(store()), chunks);
    } catch (const DataError& e) {
      const std::string text = e.what();
      EXPECT_NE(text.find("No such file"), std::string::npos) << text;
      EXPECT_NE(text.find("computes the lost chunks anew"), std::string::npos) << text;
    }
  }
  void FailAt(int64_t n, Fault fault) {
    Empty();
    bool failed = false, fired = false;
    {
      FileWatch watch(disk(), n, fault);
      try {
        Job(store());
      } catch (const std::exception& e) {
        failed = true;
        ExpectNamed(e);
      }
      fired = watch.fired();
    }
    LetHolderDie();
    const bool may_fail = fired && fault != Fault::kPartial;
    EXPECT_TRUE(may_fail || !failed);
    if (fs::exists(store() / "store.json")) ExpectReadable(failed ? 0 : kJobChunks);
    Job(store());
    EXPECT_EQ(Exported(store()), undisturbed_);
    ExpectTheRest();
  }
  std::vector<SeenCall> Undisturbed() {
    Empty();
    FileWatch watch(disk());
    Job(store());
    undisturbed_ = Exported(store());
    return watch.calls();
  }
  void FailAtEvery(Fault fault, size_t stride) {
    const std::vector<SeenCall> calls = Undisturbed();
    std::vector<int64_t> at;
    for (size_t n = 0; n < calls.size(); ++n) {
      if (Applies(fault, calls[n].call)) at.push_back(static_cast<int64_t>(n));
    }
    ASSERT_GT(at.size(), 30u);
    size_t taken = 0;
    for (size_t i = 0; i < at.size(); ++i) {
      const auto n = static_cast<size_t>(at[i]);
      const SeenCall& call = calls[n];
      if (i % Stride(stride) != 0 && !ReadsKeys(calls, n)) continue;
      ++taken;
      SCOPED_TRACE("call " + std::to_string(at[i]) + ": " + FileCallName(call.call) +
                   " " + call.path);
      EXPECT_NO_THROW(FailAt(at[i], fault));
    }
    std::printf("%zu of %zu calls failed in turn\n", taken, calls.size());
  }
  void LosePowerEverywhere(Lost lost) {
    Empty();
    std::vector<int> promises;
    std::vector<DiskState> disks;
    {
      FileWatch watch(disk());
      Job(store(), &watch);
      disks = watch.PowerLosses(lost, &promises);
    }
    undisturbed_ = Exported(store());
    ASSERT_GT(disks.size(), 20u);
    std::printf("%zu disks\n", disks.size());
    EXPECT_EQ(promises.back(), static_cast<int>(kJobChunks) + 1);
    for (size_t i = 0; i < disks.size(); i += Stride(5)) {
      SCOPED_TRACE("disk " + std::to_string(i) + " of " + std::to_string(disks.size()));
      fs::remove_all(disk());
      disks[i].WriteTo(disk());
      LetHolderDie();
      const auto promised = std::min<int64_t>(promises[i], kJobChunks);
      if (fs::exists(store() / "store.json")) {
        EXPECT_GE(ReadWholeChunks(store()), promised);
      } else {
        EXPECT_EQ(promised, 0);
      }
      Job(store());
      EXPECT_EQ(Exported(store()), undisturbed_);
      EXPECT_TRUE(VerifyStore(store()).sealed);
    }
  }

  TempFolder folder_;
  TraceShape shape_ = {
      .num_experts = 16, .layers = 2, .width = 4, .max_tokens = 6, .heads = 1};
  StoreConfig config_ = ConfigOf(shape_, 2, kJobChunks);
  std::string undisturbed_;
};

TEST_F(StoreFaultsTest, IoErrors) { FailAtEvery(Fault::kIoError, 19); }
TEST_F(StoreFaultsTest, IoErrorsWhereIdsAreCoded) {
  config_.compression = "context";
  FailAtEvery(Fault::kIoError, 23);
}
TEST_F(StoreFaultsTest, FullDisk) { FailAtEvery(Fault::kNoSpace, 13); }
TEST_F(StoreFaultsTest, FullDiskInsideAWrite) { FailAtEvery(Fault::kCutWrite, 7); }
TEST_F(StoreFaultsTest, WritesInParts) { FailAtEvery(Fault::kPartial, 7); }
TEST_F(StoreFaultsTest, PowerLoss) { LosePowerEverywhere(Lost::kUnsynced); }
TEST_F(StoreFaultsTest, PowerLossWithNamesAheadOfBytes) {
  LosePowerEverywhere(Lost::kUnsyncedBytes);
}

// A sync is the most that a small chunk costs: what the next job throws away has none.
TEST_F(StoreFaultsTest, OfWhatIsStagedTheTablesAloneAreSynced) {
  Empty();
  TraceStore::CreateOrOpen(store(), config_);
  FileWatch watch(disk());
  StageChunk(store(), config_, 0, kSequences, shape_, "token");
  std::vector<std::string> synced;
  for (const SeenCall& call : watch.calls()) {
    if (call.call == FileCall::kSync) synced.push_back(fs::path(call.path).filename());
  }
  std::sort(synced.begin(), synced.end());
  EXPECT_EQ(synced,
            (std::vector<std::string>{"attention.sst", "hidden.sst", "routing.sst"}));
}

TEST_F(StoreFaultsTest, SalvageNamesTheFileThatTheDiskCannotRead) {
  Empty();
  Job(store());
  const auto salvage = [&](int64_t at) {
    FileWatch watch(disk(), at, Fault::kIoError);
    const Salvage salvaged(store());
    return watch.calls();
  };
  const std::vector<SeenCall> calls = salvage(-1);
  int reads = 0;
  for (size_t n = 0; n < calls.size(); ++n) {
    if (calls[n].call != FileCall::kRead || !calls[n].path.ends_with(".sst")) continue;
    ++reads;
    try {
      salvage(static_cast<int64_t>(n));
      ADD_FAILURE() << calls[n].path;
    } catch (const EnvironmentError& e) {
      EXPECT_NE(std::string(e.what()).find(disk() / calls[n].path), std::string::npos)
          << e.what();
    }
  }
  EXPECT_GE(reads, config_.num_shards * 3);  // of three column families
}

TEST_F(StoreFaultsTest, AFailedExportLeavesNoPart) {
  Job(store());
  const TraceReader reader(store());
  const fs::path out = folder_.path() / "out";
  for (const std::string format : {"csv", "jsonl", "npz", "safetensors"}) {
    for (const Fault fault : {Fault::kIoError, Fault::kCutWrite}) {
      std::string whole;
      size_t num_calls = 1;
      for (size_t n = 0; n <= num_calls; ++n) {  // the first of them without a fault
        SCOPED_TRACE(format + ", call " + std::to_string(n));
        fs::remove_all(out);
        fs::create_directories(out);
        {
          FileWatch watch(out, static_cast<int64_t>(n) - 1, fault);
          try {
            ExportTraces(reader, out, {.format = format});
          } catch (const EnvironmentError&) {
            EXPECT_TRUE(watch.fired());
          }
          if (n == 0) num_calls = watch.calls().size();
        }
        if (n == 0) whole = ReadFile(out / ("traces." + format));
        for (const auto& entry : fs::directory_iterator(out)) {
          EXPECT_EQ(entry.path().filename(), "traces." + format);
          EXPECT_EQ(ReadFile(entry.path()), whole);
        }
      }
      EXPECT_GT(num_calls, 3u);
    }
  }
}

}  // namespace
}  // namespace routecast
