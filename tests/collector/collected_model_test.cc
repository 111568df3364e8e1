// What a collection says of a model before it loads it.
#include "collector/collected_model.h"

#include <gtest/gtest.h>

#include <fstream>
#include <thread>

#include "common/errors.h"
#include "tests/support/reference.h"
#include "tests/support/tiny_checkpoint.h"

namespace routecast {
namespace {

constexpr uint64_t kGiB = uint64_t{1} << 30;

TEST(CollectedModel, WeightBytesAreThoseThatItKeeps) {
  const fs::path folder = WriteCheckpoint(TestFolder("collected-model"), 1);
  for (const at::ScalarType dtype : {at::kFloat, at::kBFloat16}) {
    const CollectedModel model(folder, dtype, at::kCPU, RankInfo{}, 1);
    uint64_t kept = 0, routers = 0;  // routers stay fp32
    for (const auto& [name, tensor] : model.checkpoint().parameters.items()) {
      kept += tensor.nbytes();
      if (tensor.scalar_type() != dtype) routers += tensor.nbytes() / 2;
    }
    EXPECT_EQ(CollectedModel::WeightBytes(TinyConfig(), dtype, RankInfo{}, 1),
              kept - routers);
  }
}

TEST(CollectedModel, RanksOfAGroupShareTheBytesOfExperts) {
  const SwitchConfig config = TinyConfig();
  const WeightSizes sizes = SizesOfWeights(config, at::kFloat);
  uint64_t experts = 0;
  for (int r = 0; r < 3; ++r) {
    experts += CollectedModel::WeightBytes(config, at::kFloat, {r, 3, r, 3}, 3);
  }
  EXPECT_EQ(experts, sizes.experts + 3 * sizes.dense);
}

TEST(CollectedModel, ATaskThatRoutesNothingIsRefused) {
  const MoeGeometry none{0, 0, 8, 1, 32}, decoder{0, 2, 8, 1, 32},
      encoder{2, 0, 8, 1, 32};
  for (const Task task : {Task::kEncode, Task::kDenoise, Task::kGenerate}) {
    EXPECT_THROW(RequireRouting("model", none, task), UsageError);
    EXPECT_NO_THROW(RequireRouting("model", encoder, task));
  }
  EXPECT_THROW(RequireRouting("model", decoder, Task::kEncode), UsageError);
  EXPECT_NO_THROW(RequireRouting("model", decoder, Task::kDenoise));
}

TEST(CollectedModel, ThatDoesNotFitAMachineWithItsRanksIsRefused) {
  EXPECT_NO_THROW(RequireMemoryFor(20 * kGiB, 2, 20 * kGiB));
  EXPECT_THROW(RequireMemoryFor(21 * kGiB, 2, 20 * kGiB), EnvironmentError);
}

// A dry run on a store of a model of 100 GB must not take minutes.
TEST(CollectedModel, ADryRunKnowsTheFingerprintOfFilesThatTheStoresLastRunSaw) {
  const fs::path folder = WriteCheckpoint(TestFolder("planned-model"), 1);
  const fs::path store = TestFolder("planned-store");
  const auto fingerprint = [&] {
    return PlannedModel(folder, at::kCPU, RankInfo{}, 1, store).fingerprint;
  };
  EXPECT_EQ(fingerprint(), "");
  WriteFileAtomic(store / "store.json", "{}");
  const std::string real = fingerprint();
  EXPECT_EQ(real, LoadCheckpoint(folder, at::kFloat, at::kCPU).fingerprint);
  const Json run = {{"checkpoint", CheckpointRecord(folder, "as the last run saw it",
                                                    CheckpointFiles(folder))}};
  WriteFileAtomic(store / "run.json", run.dump());
  EXPECT_EQ(fingerprint(), "as the last run saw it");
  const fs::path weights = folder / "model.safetensors";
  fs::last_write_time(weights, fs::last_write_time(weights) + std::chrono::seconds(1));
  EXPECT_EQ(fingerprint(), real);
  WriteFileAtomic(store / "run.json", "{\"checkpoint\": [1]}");
  EXPECT_EQ(fingerprint(), real);
}

// Contents and time of the last change can be set, the change itself is on record.
TEST(CollectedModel, ADryRunIsNotMisledByATimeThatWasPutBack) {
  const fs::path folder = WriteCheckpoint(TestFolder("touched-model"), 1);
  const fs::path store = TestFolder("touched-store");
  WriteFileAtomic(store / "store.json", "{}");
  const Json run = {
      {"checkpoint", CheckpointRecord(folder, "before", CheckpointFiles(folder))}};
  WriteFileAtomic(store / "run.json", run.dump());
  const fs::path weights = folder / "model.safetensors";
  const auto time = fs::last_write_time(weights);
  std::this_thread::sleep_for(std::chrono::milliseconds(20));  // file times have ticks
  std::string bytes = ReadFile(weights);
  bytes.back() = static_cast<char>(bytes.back() ^ 1);
  std::ofstream(weights, std::ios::binary) << bytes;
  fs::last_write_time(weights, time);
  EXPECT_EQ(PlannedModel(folder, at::kCPU, RankInfo{}, 1, store).fingerprint,
            CheckpointReader(folder).Fingerprint());
}

TEST(CollectedModel, FilesThatChangedWhileTheyWereReadLeaveNoRecord) {
  const fs::path folder = WriteCheckpoint(TestFolder("rewritten-model"), 1);
  const Json before = CheckpointFiles(folder);
  const fs::path weights = folder / "model.safetensors";
  EXPECT_FALSE(CheckpointRecord(folder, "read", before).is_null());
  fs::last_write_time(weights, fs::last_write_time(weights) + std::chrono::seconds(1));
  EXPECT_TRUE(CheckpointRecord(folder, "read", before).is_null());
  fs::remove_all(folder);
  EXPECT_TRUE(CheckpointRecord(folder, "read", before).is_null());
}

}  // namespace
}  // namespace routecast
