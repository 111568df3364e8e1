// Generation in every type: experts of so many bits on disk, and the same bits in every
// row.
#include <unistd.h>

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

INSTANTIATE_TEST_SUITE_P(Types, DtypeTest, testing::Values("fp32", "bf16", "fp16"),
                         [](const auto& test) { return test.param; });

}  // namespace
}  // namespace routecast
