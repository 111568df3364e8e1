// A save of a checkpoint stopped at every file call (failing calls, kills, power losses)
// leaves the checkpoint before it or its own, whole; a damaged one is refused by name;
// and a training goes on from whatever is left to the same bits. ROUTECAST_LONG_TESTS=1
// trains on from every disk (minutes), else from some of them, in even steps.
#include <ATen/ATen.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cstdlib>
#include <fstream>

#include "common/errors.h"
#include "common/random.h"
#include "tests/storage/temp_folder.h"
#include "tests/support/watched_files.h"
#include "tests/trainer/synthetic_traces.h"
#include "trainer/speculation_trainer.h"
#include "trainer/train_state.h"

namespace routecast {
namespace {

constexpr int64_t kSaves = 3;
constexpr int kFlips = 400;
constexpr size_t kLastDisks = 16;
constexpr size_t kPointsOfASave = 200;  // what R2 of the goals asks for

class TrainStateFaults : public testing::Test {
 protected:
  fs::path disk() const { return folder_.path() / "disk"; }
  fs::path state() const { return disk() / "run" / "state"; }
  void Empty() {
    fs::remove_all(disk());
    fs::create_directories(disk());
  }
  // A model and its optimizer after `step` steps.
  struct Trained {
    Parameters parameters;
    std::unique_ptr<AdamW> optimizer;
  };
  static Trained After(int64_t step) {
    Trained t;
    for (int i = 0; i < 6; ++i) {
      at::Tensor p = at::full({2 + i, 3}, 0.5f);
      p.mutable_grad() = at::full({2 + i, 3}, 0.25f + float(i));
      t.parameters.Add("layer." + std::to_string(i), p);
    }
    t.optimizer = std::make_unique<AdamW>(t.parameters, AdamWOptions{});
    for (int64_t s = 0; s < step; ++s) t.optimizer->Step(0.1);
    return t;
  }
  // As the trainer saves: the file that the state needs first, the state after it.
  void Save(int64_t step) {
    const Trained t = After(step);
    const std::string best = "best-" + std::to_string(step) + ".safetensors";
    MakeFolder(state());
    WriteParameters(state() / best, t.parameters, at::kFloat);
    SaveTrainState(state(), {step, {{"seed", 1}}, {{"loss", 0.5 * double(step)}}, {best}},
                   t.parameters, *t.optimizer);
  }
  void Job(int64_t from, FileWatch* watch = nullptr) {
    for (int64_t step = from; step <= kSaves; ++step) {
      Save(step);
      if (watch != nullptr) watch->Promise();
    }
  }
  // The newest checkpoint's step, 0 where none is; fails unless it is that step's, whole.
  int64_t Newest() {
    const auto found = FindTrainState(state());
    if (!found) return 0;
    const Trained expected = After(found->step), loaded = After(0);
    LoadTrainState(state(), found->step, loaded.parameters, loaded.optimizer.get());
    ExpectEqual(loaded.parameters, expected.parameters);
    ExpectEqual(loaded.optimizer->State(), expected.optimizer->State());
    EXPECT_EQ(found->extra["loss"], 0.5 * double(found->step));
    ExpectEqual(ReadParameters(state() / found->beside.at(0), at::kFloat),
                expected.parameters);
    return found->step;
  }
  static void ExpectEqual(const Parameters& a, const Parameters& b) {
    ASSERT_EQ(a.items().size(), b.items().size());
    for (const auto& [name, tensor] : a.items()) {
      EXPECT_TRUE(at::equal(tensor, b.Get(name))) << name;
    }
  }
  // The last save's points, with the two before undisturbed.
  size_t FailAtEvery(Fault fault) {
    Empty();
    Job(1);
    Empty();
    for (int64_t step = 1; step < kSaves; ++step) Save(step);
    std::vector<SeenCall> calls;
    {
      FileWatch watch(disk());
      Save(kSaves);
      calls = watch.calls();
    }
    size_t points = 0;
    for (size_t n = 0; n < calls.size(); ++n) {
      if (!Applies(fault, calls[n].call)) continue;
      SCOPED_TRACE("call " + std::to_string(n) + ": " + FileCallName(calls[n].call) +
                   " " + calls[n].path);
      Empty();
      for (int64_t step = 1; step < kSaves; ++step) Save(step);
      bool failed = false;
      {
        FileWatch watch(disk(), static_cast<int64_t>(n), fault);
        try {
          Save(kSaves);
        } catch (const EnvironmentError& e) {
          failed = true;
          EXPECT_NE(std::string(e.what()).find(disk().string()), std::string::npos)
              << e.what();
        }
        EXPECT_TRUE(watch.fired());
      }
      ++points;
      EXPECT_TRUE(!failed || fault != Fault::kPartial);
      EXPECT_GE(Newest(), failed ? kSaves - 1 : kSaves);
      Save(kSaves);
      EXPECT_EQ(Newest(), kSaves);
      ExpectNothingTemporary();
    }
    return points;
  }
  // Between any two calls of all saves; returns how many disks the last save has.
  size_t StopEverywhere(Lost lost) {
    Empty();
    std::vector<int> promises;
    std::vector<DiskState> disks;
    {
      FileWatch watch(disk());
      Job(1, &watch);
      disks = watch.PowerLosses(lost, &promises);
    }
    for (size_t i = 0; i < disks.size(); ++i) {
      SCOPED_TRACE("disk " + std::to_string(i) + " of " + std::to_string(disks.size()));
      fs::remove_all(disk());
      disks[i].WriteTo(disk());
      const int64_t newest = Newest();
      EXPECT_GE(newest, promises[i]);
      EXPECT_LE(newest, promises[i] + 1);
      Job(newest + 1);
      EXPECT_EQ(Newest(), kSaves);
      if (newest < kSaves) ExpectNothingTemporary();
    }
    return static_cast<size_t>(std::count(promises.begin(), promises.end(), kSaves - 1));
  }
  void ExpectNothingTemporary() {
    for (const auto& entry : fs::directory_iterator(state())) {
      EXPECT_NE(entry.path().extension(), ".tmp") << entry.path();
    }
  }

  TempFolder folder_;
};

TEST_F(TrainStateFaults, ASaveStoppedAnywhereLeavesTheLastCheckpointOrItsOwn) {
  size_t points = 0;
  for (const Fault fault :
       {Fault::kIoError, Fault::kNoSpace, Fault::kCutWrite, Fault::kPartial}) {
    points += FailAtEvery(fault);
  }
  for (const Lost lost : {Lost::kNothing, Lost::kUnsynced, Lost::kUnsyncedBytes}) {
    points += StopEverywhere(lost);
  }
  EXPECT_GE(points, kPointsOfASave);
  RecordProperty("points", static_cast<int>(points));
}

// Flips and cuts of every file that the newest checkpoint needs.
TEST_F(TrainStateFaults, ADamagedCheckpointIsRefusedByName) {
  Empty();
  Job(1);
  const std::string newest = "step-0000000" + std::to_string(kSaves);
  const std::vector<fs::path> files = {
      state() / newest / "parameters.safetensors",
      state() / newest / "optimizer.safetensors", state() / newest / "state.json",
      state() / ("best-" + std::to_string(kSaves) + ".safetensors")};
  for (const fs::path& file : files) {
    const std::string whole = ReadFile(file);
    int refused = 0;
    for (uint64_t i = 0; i < kFlips; ++i) {
      const uint64_t at = ToRange(Mix(7, i), whole.size());
      std::string bytes = whole;
      if (i % 4 == 0) {
        bytes.resize(at);
      } else {
        bytes[at] = static_cast<char>(bytes[at] ^ (1 << ToRange(Mix(8, i), 8)));
      }
      std::ofstream(file, std::ios::binary) << bytes;
      try {
        EXPECT_EQ(FindTrainState(state())->extra["loss"], 0.5 * double(kSaves));
        EXPECT_EQ(file.extension(), ".json") << "not noticed: byte " << at;
      } catch (const DataError& e) {
        ++refused;
        EXPECT_NE(std::string(e.what()).find(file.string()), std::string::npos)
            << e.what();
      }
    }
    // Of JSON, blanks between values may change.
    EXPECT_GE(refused, file.extension() == ".json" ? kFlips / 2 : kFlips) << file;
    fs::remove(file);
    EXPECT_THROW(FindTrainState(state()), DataError);
    std::ofstream(file, std::ios::binary) << whole;
  }
  EXPECT_EQ(Newest(), kSaves);
  // Without that folder it goes on from the one before.
  fs::remove_all(state() / newest);
  EXPECT_EQ(Newest(), kSaves - 1);
}

// The error names the newest checkpoint of which every file is whole, and RemoveDamaged
// leaves that one as the newest.
TEST_F(TrainStateFaults, TheLastGoodCheckpointIsNamedAndGoneBackTo) {
  const auto spoil = [&](const fs::path& file) {
    std::ofstream(state() / file, std::ios::binary) << "cut";
  };
  const auto error = [&] {
    try {
      FindTrainState(state());
    } catch (const DataError& e) {
      return std::string(e.what());
    }
    return std::string("none");
  };
  const std::string newest = "step-0000000" + std::to_string(kSaves);
  const std::string before = "step-0000000" + std::to_string(kSaves - 1);
  const fs::path best = "best-" + std::to_string(kSaves) + ".safetensors";
  for (const fs::path& file : {newest / fs::path("optimizer.safetensors"),
                               newest / fs::path("state.json"), best}) {
    Empty();
    Job(1);
    EXPECT_EQ(error(), "none");
    RemoveDamagedStates(state());
    EXPECT_EQ(Newest(), kSaves) << "what is whole stays";
    spoil(file);
    EXPECT_NE(error().find("that of step " + std::to_string(kSaves - 1)),
              std::string::npos)
        << error();
    EXPECT_NE(error().find("--resume=last_good"), std::string::npos) << error();
    const std::string text = error();
    EXPECT_EQ(std::count(text.begin(), text.end(), '\n'), 2) << text;
    RemoveDamagedStates(state());
    EXPECT_EQ(Newest(), kSaves - 1) << file;
  }
  // Where the one before is damaged as well there is nothing to go back to.
  spoil(before / fs::path("parameters.safetensors"));
  EXPECT_EQ(error().find("last_good"), std::string::npos) << error();
  EXPECT_NE(error().find("--resume=never"), std::string::npos) << error();
  RemoveDamagedStates(state());
  EXPECT_NE(error(), "none") << "nothing goes where nothing is whole";
}

class TrainingFaults : public TrainStateFaults {
 protected:
  TrainingFaults()
      : traces_(TraceSynthesizer(/*layers=*/2, /*experts=*/4, /*width=*/8,
                                 /*vocabulary=*/40, /*seed=*/5)
                    .Make(24, 4, 8, /*every_hidden=*/false)) {
    job_.options.kind = "interlayer";
    job_.options.sizes = {8, 2, 8, 1, 0, -1};
    job_.options.steps = 9;
    job_.options.validate_every = 3;
    job_.options.global_batch = 4;
    job_.options.micro_batch = 4;
    job_.options.ema = 0.5;
    job_.options.training.learning_rate = 3e-3;
    job_.options.validation_sequences = 4;
    job_.options.test_sequences = 4;
    job_.out = disk() / "run";
    job_.quiet = true;
  }
  std::string Train() {
    TraceDataset dataset(traces_.traces, traces_.geometry);
    LocalCommunicator comm;
    TrainSpeculation(job_, &dataset, traces_.routers, &comm);
    return ReadFile(job_.out / "model.safetensors") + ReadFile(job_.out / "results.json");
  }
  void GoOnFromEveryDisk(Lost lost, size_t stride_of_the_short_form) {
    const bool all = std::getenv("ROUTECAST_LONG_TESTS") != nullptr;
    Empty();
    std::vector<int> promises;
    std::vector<DiskState> disks;
    std::string undisturbed;
    {
      FileWatch watch(disk());
      undisturbed = Train();
      disks = watch.PowerLosses(lost, &promises);
    }
    RecordProperty("disks", static_cast<int>(disks.size()));
    for (size_t i = 0; i < disks.size(); ++i) {
      // The last ones are those at which the checkpoints go.
      const bool taken =
          all || i % stride_of_the_short_form == 0 || i + kLastDisks > disks.size();
      if (!taken) continue;
      SCOPED_TRACE("disk " + std::to_string(i) + " of " + std::to_string(disks.size()));
      fs::remove_all(disk());
      disks[i].WriteTo(disk());
      EXPECT_EQ(Train(), undisturbed);
      EXPECT_FALSE(fs::exists(state()));
    }
  }
  SyntheticTraces traces_;
  SpeculationJob job_;
};

TEST_F(TrainingFaults, KilledAnywhere) { GoOnFromEveryDisk(Lost::kNothing, 67); }
TEST_F(TrainingFaults, PowerLossAnywhere) { GoOnFromEveryDisk(Lost::kUnsynced, 13); }
TEST_F(TrainingFaults, PowerLossWithNamesAheadOfBytes) {
  GoOnFromEveryDisk(Lost::kUnsyncedBytes, 17);
}

// However many are kept: each of them, with the best that it names, is a place to go on
// from where the newer ones are damaged, to the same bits.
TEST_F(TrainingFaults, WithoutADamagedCheckpointItGoesOnFromTheOneBefore) {
  Empty();
  const std::string undisturbed = Train();
  for (const int keep : {1, 3}) {
    Empty();
    job_.keep_checkpoints = keep;
    job_.options.validate_every = 2;
    job_.options.training.learning_rate = 0.3;  // a new best not every time
    const std::string expected = Train();
    EXPECT_NE(expected, undisturbed);
    Empty();
    job_.stop_after = 7;
    EXPECT_THROW(Train(), StoppedError);
    job_.stop_after = 0;
    std::vector<fs::path> kept;
    for (const auto& entry : fs::directory_iterator(state())) {
      if (fs::is_directory(entry)) kept.push_back(entry.path());
    }
    std::sort(kept.rbegin(), kept.rend());
    ASSERT_EQ(kept.size(), static_cast<size_t>(keep));
    for (int i = 0; i < keep; ++i) {
      const fs::path newest = kept[static_cast<size_t>(i)];
      std::ofstream(newest / "optimizer.safetensors", std::ios::binary) << "cut";
      try {
        Train();
        FAIL() << newest;
      } catch (const DataError& e) {
        EXPECT_NE(std::string(e.what()).find(newest.string()), std::string::npos)
            << e.what();
        EXPECT_EQ(std::string(e.what()).find("remove") != std::string::npos, i + 1 < keep)
            << "only where there is an older one: " << e.what();
      }
      if (i + 1 == keep) break;
      fs::remove_all(newest);
      const fs::path older = folder_.path() / "older";
      fs::copy(state(), older, fs::copy_options::recursive);
      EXPECT_EQ(Train(), expected);
      Empty();
      MakeFolder(state().parent_path());
      fs::copy(older, state(), fs::copy_options::recursive);
      fs::remove_all(older);
    }
  }
}

TEST_F(TrainingFaults, FromTheLastGoodCheckpointToTheSameBits) {
  Empty();
  const std::string undisturbed = Train();
  for (const char* file : {"step-00000007/optimizer.safetensors", "seconds.json"}) {
    Empty();
    job_.stop_after = 7;
    EXPECT_THROW(Train(), StoppedError);
    job_.stop_after = 0;
    std::ofstream(state() / file, std::ios::binary) << "cut";
    EXPECT_THROW(Train(), DataError) << file;
    job_.resume = "last_good";
    if (std::string(file) == "seconds.json") {
      EXPECT_THROW(Train(), DataError) << "it belongs to no checkpoint";
      fs::remove(state() / file);  // as the error says
    }
    EXPECT_EQ(Train(), undisturbed) << file;
    job_.resume = "auto";
  }
}

// A run that begins from another's checkpoint is its own from then on: asked again it
// goes on where it came to, and what OUT holds of another run is not mixed with it.
TEST_F(TrainingFaults, ARunFromAnothersCheckpointGoesOnFromItsOwn) {
  Empty();
  const std::string undisturbed = Train();
  const fs::path out = job_.out;
  job_.stop_after = 3;
  job_.out = folder_.path() / "first";
  EXPECT_THROW(Train(), StoppedError);
  job_.resume = job_.out.string();
  job_.out = out;
  Empty();
  job_.stop_after = 5;
  EXPECT_THROW(Train(), StoppedError);
  EXPECT_EQ(NewestStep(state()), 5);
  job_.stop_after = 4;  // reached only by one that begins at the other's again
  EXPECT_EQ(Train(), undisturbed);

  Empty();
  job_.resume = "auto";
  job_.options.seed = 9;
  job_.stop_after = 8;
  EXPECT_THROW(Train(), StoppedError);
  job_.resume = (folder_.path() / "first").string();
  job_.options.seed = 1;
  job_.stop_after = 0;
  EXPECT_THROW(Train(), UsageError) << "OUT holds an unfinished run of another seed";
}

// What is not said any more is another configuration as well.
TEST_F(TrainingFaults, AnOptionThatIsLeftOutIsRefused) {
  Empty();
  job_.options.augment.mask = 0.2;
  job_.options.augment.mask_mode = "block";
  job_.stop_after = 4;
  EXPECT_THROW(Train(), StoppedError);
  job_.options.augment.mask_mode = "tokens";
  try {
    Train();
    FAIL() << "it went on";
  } catch (const UsageError& e) {
    EXPECT_NE(std::string(e.what()).find("augment.mask_mode"), std::string::npos)
        << e.what();
  }
}

// The best parameters are written before the first checkpoint: those of a run that was
// killed in between are not another run's.
TEST_F(TrainingFaults, BestParametersOfAnotherRunAreNotTaken) {
  const auto best_after_four_steps = [&] {
    job_.stop_after = 4;
    EXPECT_THROW(Train(), StoppedError);
    return ReadFile(state() / "best-3.safetensors");
  };
  Empty();
  const std::string undisturbed = best_after_four_steps();
  Empty();
  MakeFolder(state());
  WriteParameters(state() / "best-3.safetensors", After(1).parameters, at::kFloat);
  EXPECT_TRUE(best_after_four_steps() == undisturbed);
}

}  // namespace
}  // namespace routecast
