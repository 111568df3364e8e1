// How much memory checkpoints take: written and read piece by piece. The peak of a
// process only grows, so these tests have a program of their own and an order.
#include <ATen/ATen.h>
#include <gtest/gtest.h>

#include <fstream>

#include "models/checkpoint.h"
#include "models/switch_model.h"
#include "models/synthetic_checkpoint.h"
#include "tests/common/torch_file_builder.h"
#include "tests/support/reference.h"

namespace routecast {
namespace {

// A line of /proc/self/status, in bytes: VmHWM (peak), VmRSS (now).
uint64_t Status(const std::string& key) {
  std::ifstream lines("/proc/self/status");
  for (std::string line; std::getline(lines, line);) {
    if (line.rfind(key + ":", 0) == 0)
      return std::stoull(line.substr(key.size() + 1)) << 10;
  }
  ADD_FAILURE() << "no " << key;
  return 0;
}

constexpr uint64_t kMiB = uint64_t{1} << 20;

// From now on VmHWM is the peak since now.
void ForgetPeak() { std::ofstream("/proc/self/clear_refs") << "5"; }

SwitchConfig Config() {
  SwitchConfig c;
  c.vocab_size = 8000;
  c.d_model = 512;
  c.d_ff = 1024;
  c.d_kv = 64;
  c.num_heads = 8;
  c.num_layers = c.num_decoder_layers = 4;
  c.num_sparse_encoder_layers = c.num_sparse_decoder_layers = 2;
  c.num_experts = 10;
  return c;
}

// As bfloat16: the files hold twice of what is kept, and it is never there as a whole.
void ExpectLoadingTakesWhatIsKept(const fs::path& folder) {
  ForgetPeak();
  const uint64_t before = Status("VmRSS");
  const Checkpoint read = LoadCheckpoint(folder, at::kBFloat16, at::kCPU);
  uint64_t kept = 0;
  for (const auto& [name, tensor] : read.parameters.items()) kept += tensor.nbytes();
  ASSERT_GT(kept, 100 * kMiB);
  const uint64_t peak = Status("VmHWM") - before;
  EXPECT_LT(static_cast<double>(peak), 1.1 * static_cast<double>(kept));
  testing::Test::RecordProperty("kept_mib", static_cast<int>(kept / kMiB));
  testing::Test::RecordProperty("peak_mib", static_cast<int>(peak / kMiB));
}

TEST(CheckpointMemory, WritingTakesABufferAndLoadingTakesWhatIsKept) {
  const fs::path folder = TestFolder("checkpoint-memory");
  at::ones({4}).to(at::kBFloat16);  // what LibTorch takes at its first use
  const uint64_t at_start = Status("VmRSS");
  const uint64_t bytes = WriteSyntheticCheckpoint(
      folder, {Config(), at::kFloat, 1, /*max_shard_bytes=*/100'000'000});
  ASSERT_GT(bytes, 200 * kMiB);
  ASSERT_GT(WeightFiles(folder).files().size(), 2u);
  EXPECT_LT(Status("VmHWM") - at_start, 24 * kMiB);

  ExpectLoadingTakesWhatIsKept(folder);
  fs::remove_all(folder);
}

// A pytorch_model.bin of these parameters, all of them zeros, a storage each.
std::string TorchFileOf(const SwitchConfig& config) {
  std::string items;
  std::vector<ZipPart> parts = {{"archive/data.pkl", ""}};
  for (const auto& [name, shape] : ParameterShapes(config)) {
    const std::string key = std::to_string(parts.size() - 1);
    std::vector<int64_t> strides(shape.size(), 1);
    for (size_t i = shape.size() - 1; i > 0; --i) strides[i - 1] = strides[i] * shape[i];
    const int64_t numbers = strides[0] * shape[0];
    items +=
        pickle::Text(name) +
        pickle::Tensor(pickle::Storage("FloatStorage", key, numbers), 0, shape, strides);
    parts.push_back(
        {"archive/data/" + key, std::string(static_cast<size_t>(numbers) * 4, '\0')});
  }
  parts[0].data = pickle::Dict(items);
  parts.push_back({"archive/version", "3\n"});
  return MakeZip(parts);
}

TEST(CheckpointMemory, LoadingATorchFileTakesWhatIsKept) {
  const fs::path folder = TestFolder("checkpoint-memory-bin");
  std::ofstream(folder / "config.json") << Config().ToJson();
  std::ofstream(folder / "pytorch_model.bin", std::ios::binary) << TorchFileOf(Config());
  ASSERT_GT(fs::file_size(folder / "pytorch_model.bin"), 200 * kMiB);
  ExpectLoadingTakesWhatIsKept(folder);
  fs::remove_all(folder);
}

}  // namespace
}  // namespace routecast
