// Generation in every type: experts of so many bits on disk, and the same bits in every
// row.
#include <unistd.h>

#include <set>

#include "evaluator/evaluation.h"
#include "gtest/gtest.h"
#include "tests/evaluator/synthetic_store.h"
#include "tests/models/switch_test_support.h"

namespace routecast {
namespace {

class DtypeTest : public testing::TestWithParam<std::string> {
 protected:
  void SetUp() override { fs::create_directories(folder_ / "model"); }
  void TearDown() override { fs::remove_all(folder_); }
  const fs::path folder_ =
      fs::temp_directory_path() / ("dtype_test." + std::to_string(::getpid()));
};

TEST_P(DtypeTest, EveryRowHasTheBitsOfTheResidentModel) {
  const Checkpoint made = RandomCheckpoint(SmallConfig(), 3);
  SaveCheckpoint(folder_ / "model", made.config, made.parameters, at::kFloat);
  EvaluationOptions options;
  WriteSyntheticStore(folder_ / "store", made.config);
  options.model = folder_ / "model";
  options.store = folder_ / "store";  // its tokens are the prompts
  options.cache = folder_ / "cache";
  options.out = folder_ / "out";
  options.dtype = GetParam();
  options.compare = true;
  options.rounds = options.warmup_rounds = 1;
  options.max_new_tokens = 4;
  options.quiet = true;
  options.peak_seconds = 0.02;
  ValidateEvaluation(options);
  Evaluate(options, Json::object());
  const Json results = ReadJsonFile(options.out / "results.json");
  const std::string hash = results["rows"][0]["output_sha256"];
  bool moved = false, resident = false;
  for (const Json& row : results["rows"]) {
    EXPECT_EQ(row["output_sha256"], hash);
    moved = moved || row["bytes_useful"] > 0;
    resident = resident || row["policy"] == "resident";
  }
  EXPECT_TRUE(moved && resident);
  int files = 0;
  for (const auto& entry : fs::directory_iterator(options.cache)) {
    if (entry.path().extension() != ".experts") continue;
    ++files;
    EXPECT_NE(entry.path().stem().string().find("-" + GetParam()), std::string::npos);
  }
  EXPECT_EQ(files, 1);
}

// The same where the model is synthetic.
TEST_P(DtypeTest, EveryRowOfAReplayHasTheSameBits) {
  WriteSyntheticStore(folder_ / "store", RandomCheckpoint(SmallConfig(), 3).config);
  EvaluationOptions options;
  options.store = folder_ / "store";
  options.cache = folder_ / "cache";
  options.out = folder_ / "out";
  options.dtype = GetParam();
  options.compare = true;
  options.phase = "both";
  options.rounds = options.warmup_rounds = 1;
  options.max_new_tokens = 4;
  options.quiet = true;
  options.peak_seconds = 0.02;
  options.replay.d_model = 32;
  options.replay.d_ff = 64;
  options.replay.d_kv = 8;
  options.replay.num_heads = 4;
  options.replay.vocab_size = 128;
  ValidateEvaluation(options);
  Evaluate(options, Json::object());
  const Json results = ReadJsonFile(options.out / "results.json");
  std::set<std::string> hashes;
  for (const Json& row : results["rows"]) hashes.insert(row["output_sha256"]);
  EXPECT_EQ(hashes.size(), 1u);
  const uint64_t expert = 2 * 32 * 64 * (GetParam() == "fp32" ? 4u : 2u);
  EXPECT_EQ(results["rows"][0]["held_bytes_peak"].get<uint64_t>() %
                ((expert + 4095) / 4096 * 4096),
            0u);
  bool suffix = GetParam() == "fp32";
  for (const auto& entry : fs::directory_iterator(options.cache))
    suffix = suffix || entry.path().stem().string().ends_with("-" + GetParam());
  EXPECT_TRUE(suffix) << "files of other types are others";
}

INSTANTIATE_TEST_SUITE_P(Types, DtypeTest, testing::Values("fp32", "bf16", "fp16"),
                         [](const auto& test) { return test.param; });

}  // namespace
}  // namespace routecast
