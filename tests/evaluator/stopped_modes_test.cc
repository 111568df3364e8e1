// What asks, simulates, counts and measures ends soon where a stop is requested, and
// leaves no file. In processes of their own: a requested stop stays requested.
#include <gtest/gtest.h>
#include <unistd.h>

#include <functional>

#include "common/errors.h"
#include "common/stop.h"
#include "evaluator/device_sweep.h"
#include "evaluator/disk_sweep.h"
#include "evaluator/disk_transfer_engine.h"
#include "evaluator/evaluation.h"
#include "evaluator/policy_simulation.h"
#include "evaluator/predictor_set.h"
#include "evaluator/quality.h"
#include "tests/evaluator/fake_device.h"
#include "tests/evaluator/synthetic_store.h"
#include "tests/models/switch_test_support.h"

namespace routecast {
namespace {

class StoppedModesTest : public testing::Test {
 protected:
  void SetUp() override {
    folder_ =
        fs::temp_directory_path() / ("stopped_modes_test." + std::to_string(::getpid()));
    WriteSyntheticStore(folder_ / "store", SmallConfig());
  }
  void TearDown() override {
    reader_.reset();
    fs::remove_all(folder_);
  }
  std::vector<std::unique_ptr<ExpertPredictor>> Markov() const {
    const std::vector<std::string> name = {"markov"};
    return MakePredictors(name, name, reader().config().geometry, {}, &reader(), true);
  }
  const TraceReader& reader() const {
    if (!reader_) reader_ = std::make_unique<TraceReader>(folder_ / "store");
    return *reader_;
  }
  fs::path out() const { return folder_ / "out"; }
  // 75: stopped, and `out` holds no file. `before` is done when nobody has asked for a
  // stop yet.
  void ExpectStops(const std::function<void()>& before,
                   const std::function<void()>& work) {
    GTEST_FLAG_SET(death_test_style, "threadsafe");
    const auto stopped = [&] {
      before();
      RequestStop();
      int code = kExitDone;
      try {
        work();
      } catch (const StoppedError&) {
        code = kExitStopped;
      }
      if (fs::exists(out()) && !fs::is_empty(out())) code = kExitDefect;
      fs::remove_all(folder_);  // no destructor runs
      ::_exit(code);
    };
    EXPECT_EXIT(stopped(), testing::ExitedWithCode(kExitStopped), "");
  }
  fs::path folder_;

 private:
  mutable std::unique_ptr<TraceReader> reader_;
};

TEST_F(StoppedModesTest, Quality) {
  std::vector<std::unique_ptr<ExpertPredictor>> predictors;
  ExpectStops([&] { predictors = Markov(); },
              [&] { MeasureQuality(reader(), predictors, {.quiet = true}); });
}
TEST_F(StoppedModesTest, Simulation) {
  DeviceProfile profile;
  profile.link_bytes_per_second = profile.memory_bytes_per_second = 1e9;
  std::vector<std::unique_ptr<ExpertPredictor>> predictors;
  ExpectStops([&] { predictors = Markov(); },
              [&] { SimulatePolicies(reader(), predictors, profile, {}); });
}
// Setting up takes minutes where a large model's experts are written.
TEST_F(StoppedModesTest, SettingUpAnEvaluationLeavesRunJson) {
  EvaluationOptions options;
  options.store = folder_ / "store";
  options.cache = folder_ / "cache";
  options.out = folder_ / "evaluated";
  options.predictor = {"markov"};
  options.quiet = true;
  ExpectStops([] {},
              [&] {
                try {
                  Evaluate(options, Json::object());
                } catch (const StoppedError&) {
                  const Json run = ReadJsonFile(options.out / "run.json");
                  if (run["exit_status"] == kExitStopped) throw;
                }
              });
}
TEST_F(StoppedModesTest, CountsOfBaselines) {
  ExpectStops([] {}, [&] { Markov(); });
}
TEST_F(StoppedModesTest, CountsOfAWarmStart) {
  ExpectStops([] {}, [&] { CountUses(reader(), reader().config().geometry); });
}
TEST_F(StoppedModesTest, Disk) {
  DiskSweepOptions options;
  options.folder = out();
  options.file_bytes = options.largest = 1 << 20;
  options.quiet = true;
  ExpectStops([] {}, [&] { MeasureDisk(options); });
}
TEST_F(StoppedModesTest, Device) {
  ExpectStops([] {},
              [&] {
                FakeDevice device(std::make_shared<FakeDeviceLog>(), 1e9);
                DeviceSweepOptions options;
                options.largest = 1 << 20;
                options.quiet = true;
                DeviceProfile profile;
                MeasureDevice(&device, options, &profile);
              });
}
// Reading every expert of a large model once takes minutes.
TEST_F(StoppedModesTest, PeakOfALink) {
  std::shared_ptr<const ExpertFile> file;
  const auto write = [&] {
    ExpertFileSpec spec;
    spec.geometry = {1, 1, 2, 1, 8};
    spec.d_ff = 16;
    WriteSyntheticExperts(folder_ / "experts", spec, {0, 1}, true);
    file = std::make_shared<const ExpertFile>(folder_ / "experts");
  };
  ExpectStops(write, [&] {
    DiskTransferEngine engine(file, 2, {});
    const std::vector<ExpertKey> keys = file->keys();
    MeasurePeak(&engine, keys, 2, 3600, 0);
  });
}

}  // namespace
}  // namespace routecast
