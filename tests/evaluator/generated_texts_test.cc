// outputs.jsonl of routecast-evaluate: what a generation under a budget put out is what
// the resident model puts out, and can be read.
#include "evaluator/generated_texts.h"

#include <ATen/ATen.h>
#include <c10/core/GradMode.h>
#include <gtest/gtest.h>
#include <unistd.h>

#include <sstream>

#include "evaluator/evaluation.h"
#include "models/checkpoint.h"
#include "models/generation.h"
#include "tests/support/reference.h"

namespace routecast {
namespace {

fs::path Shipped() {
  return fs::path(EnvOr("ROUTECAST_SOURCE_DIR", ".")) / "configs/checkpoints/small-16";
}

TEST(GeneratedTextsTest, AreThoseOfTheResidentModelInTheOrderOfThePrompts) {
  const c10::NoGradGuard no_grad;
  const fs::path folder = fs::path(testing::TempDir()) /
                          ("generated_texts_test." + std::to_string(::getpid()));
  fs::create_directories(folder);
  const std::vector<std::string> prompts = {
      "A small bird that sings.", "One who believes that men are equal.", "To take away"};
  WriteFileAtomic(folder / "p.txt", prompts[0] + "\n" + prompts[1] + "\n" + prompts[2]);
  EvaluationOptions options;
  options.model = Shipped();
  options.prompts = {(folder / "p.txt").string()};
  options.cache = folder / "cache";
  options.out = folder / "out";
  options.rounds = 3;
  options.warmup_rounds = 1;
  options.max_new_tokens = 5;
  options.link = "native";
  options.quiet = true;
  options.peak_seconds = 0.02;
  ValidateEvaluation(options);
  Evaluate(options, Json::object());

  ResidentModel resident(LoadCheckpoint(Shipped(), at::kFloat, at::kCPU));
  const Tokenizer tokenizer = Tokenizer::Load(Shipped());
  std::istringstream lines(ReadFile(options.out / "outputs.jsonl", 1 << 20));
  size_t count = 0;
  for (std::string line; std::getline(lines, line); ++count) {
    ASSERT_LT(count, prompts.size());
    const Json said = ParseJson(line, "outputs.jsonl");
    const at::Tensor ids =
        at::tensor(said["prompt_ids"].get<std::vector<int64_t>>()).unsqueeze(0);
    GenerationOptions generation;
    generation.max_new_tokens = 5;
    const auto wanted =
        Generate(&resident.model(), ids, at::ones_like(ids, at::kBool), generation)[0]
            .ids;
    EXPECT_EQ(said["prompts"], "p.txt");
    EXPECT_EQ(said["ids"].get<std::vector<int64_t>>(),
              std::vector<int64_t>(wanted.begin(), wanted.end()));
    EXPECT_EQ(said["prompt"], prompts[count]);
    EXPECT_EQ(said["text"],
              tokenizer.Decode(std::vector<int32_t>(wanted.begin(), wanted.end())));
  }
  EXPECT_EQ(count, prompts.size());
  fs::remove_all(folder);
}

TEST(GeneratedTextsTest, WithoutATokenizerALineHoldsIdsAlone) {
  EXPECT_EQ(GeneratedLines("store", {{{7, 1}, {3, 4}}}, nullptr),
            "{\"prompts\":\"store\",\"prompt_ids\":[7,1],\"ids\":[3,4]}\n");
}

}  // namespace
}  // namespace routecast
