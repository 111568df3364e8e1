// --dry_run of a model: headers are looked at, no weights.
#include <gtest/gtest.h>
#include <sys/resource.h>
#include <sys/wait.h>

#include <fstream>

#include "tests/support/process.h"
#include "tests/support/tiny_checkpoint.h"

namespace routecast {
namespace {

constexpr int64_t kMostMemoryKiB = int64_t{3} << 19;  // LibTorch itself takes .5 GiB

SwitchConfig LargeConfig() {
  SwitchConfig c = TinyConfig();
  c.d_ff = 1 << 18;  // 72 projections of 32 MiB each, 2.25 GiB
  return c;
}

// A safetensors file whose data is one hole.
void WriteHollowWeights(const fs::path& file, const SwitchConfig& config) {
  Json header = Json::object();
  uint64_t end = 0;
  for (const auto& [name, shape] : ParameterShapes(config)) {
    const uint64_t begin = end;
    uint64_t bytes = sizeof(float);
    for (const int64_t size : shape) bytes *= static_cast<uint64_t>(size);
    end += bytes;
    header[name] = {{"dtype", "F32"}, {"shape", shape}, {"data_offsets", {begin, end}}};
  }
  const std::string text = header.dump();
  const uint64_t length = text.size();
  std::ofstream out(file, std::ios::binary);
  out.write(reinterpret_cast<const char*>(&length), sizeof length);
  out << text;
  out.close();
  fs::resize_file(file, sizeof length + length + end);
}

class DryRunTest : public testing::Test {
 protected:
  static void SetUpTestSuite() {
    folder_ = TestFolder("dry-run");
    WriteCheckpoint(folder_ / "model", 1);
    WriteFileAtomic(folder_ / "model" / "config.json", LargeConfig().ToJson().dump());
    WriteHollowWeights(folder_ / "model" / "model.safetensors", LargeConfig());
    WriteCorpus(folder_, 100);
    std::ofstream prompts(folder_ / "prompts.txt");
    for (int i = 0; i < 100; ++i) prompts << RandomText(Mix(5, i), 10) << "\n\n";
  }
  static void TearDownTestSuite() { fs::remove_all(folder_); }

  // Ends well and has taken no weights into memory.
  static void ExpectSmall(std::vector<std::string> command) {
    command.insert(command.end(), {"--dry_run", "--quiet", "--device=cpu", "--threads=1",
                                   "--model=" + (folder_ / "model").string()});
    const pid_t child = Start(command);
    int status = 0;
    rusage used{};
    ASSERT_EQ(::wait4(child, &status, 0, &used), child);
    EXPECT_TRUE(WIFEXITED(status));
    EXPECT_EQ(WEXITSTATUS(status), 0);
    EXPECT_LT(used.ru_maxrss, kMostMemoryKiB);
  }
  static inline fs::path folder_;
};

TEST_F(DryRunTest, OfACollectionReadsNoWeights) {
  ExpectSmall({Bin("routecast-collect"), "--store=" + (folder_ / "store").string(),
               "--data=jsonl:" + (folder_ / "corpus.jsonl").string() + "#text"});
}

TEST_F(DryRunTest, OfAnEvaluationReadsNoWeightsButRouters) {
  ExpectSmall({Bin("routecast-evaluate"), "--compare",
               "--prompts=text:" + (folder_ / "prompts.txt").string() + "#blocks",
               "--batch=1", "--rounds=1", "--warmup_rounds=0"});
}

}  // namespace
}  // namespace routecast
