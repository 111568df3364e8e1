// Ids of another system (Debian's python3-sentencepiece on T5's model) for 2139 texts.
#include <gtest/gtest.h>

#include <cstdlib>
#include <sstream>

#include "common/run_record.h"
#include "corpus/tokenizer.h"

namespace routecast {
namespace {

fs::path DataFolder() {
  const char* source = std::getenv("ROUTECAST_SOURCE_DIR");
  return fs::path(source ? source : ".") / ".." / "shared" / "data" / "t5-tokenizer";
}

class TokenizerGolden : public testing::Test {
 protected:
  void SetUp() override {
    if (!fs::exists(DataFolder() / "golden.jsonl")) {
      GTEST_SKIP() << "no " << DataFolder() << " beside the clone";
    }
  }
};

TEST_F(TokenizerGolden, IdsEqualTheReference) {
  const Tokenizer tokenizer = Tokenizer::Load(DataFolder());
  std::istringstream lines(ReadFile(DataFolder() / "golden.jsonl"));
  int texts = 0;
  for (std::string line; std::getline(lines, line); ++texts) {
    const Json golden = ParseJson(line, "golden.jsonl");
    const auto ids = tokenizer.EncodePlain(golden["text"].get<std::string>());
    ASSERT_EQ(ids, golden["ids"].get<std::vector<int32_t>>()) << golden["text"];
  }
  EXPECT_EQ(texts, 2139);
}

// transformers 5.23 with the same model and 100 sentinels.
TEST_F(TokenizerGolden, SpecialTokensEqualTransformers) {
  const Tokenizer tokenizer = Tokenizer::Load(DataFolder());
  EXPECT_EQ(tokenizer.vocab_size(), 32100);
  EXPECT_EQ(tokenizer.Encode("Hello <extra_id_0> world<extra_id_99>x"),
            (std::vector<int32_t>{8774, 32099, 296, 32000, 3, 226}));
  EXPECT_EQ(tokenizer.Encode("<unk> a </s> b<pad>"),
            (std::vector<int32_t>{2, 3, 9, 1, 3, 115, 0}));
  EXPECT_EQ(tokenizer.Encode("x <extra_id_0> , y"),
            (std::vector<int32_t>{3, 226, 32099, 3, 6, 3, 63}));
}

}  // namespace
}  // namespace routecast
