// What a plan refuses before anything is computed.
#include "collector/chunk_plan.h"

#include <gmock/gmock.h>

#include "common/errors.h"
#include "tests/storage/temp_folder.h"
#include "tests/support/tiny_checkpoint.h"

namespace routecast {
namespace {

constexpr uint64_t kIds = 1 << kSegmentBits;  // of a document's sequences

class ChunkPlanTest : public testing::Test {
 protected:
  static void SetUpTestSuite() {
    const TempFolder folder;
    WriteCheckpoint(folder.path(), 1);
    tokenizer_ = std::make_unique<Tokenizer>(Tokenizer::Load(folder.path()));
  }
  static void TearDownTestSuite() { tokenizer_.reset(); }
  // Two documents: a short one, and one of `tokens` tokens.
  Corpus CorpusWith(uint64_t tokens) {
    WriteFileAtomic(folder_.path() / "short.txt", "two words");
    const std::string word = "a ";
    const size_t each =
        tokenizer_->EncodePlain("a a a").size() - tokenizer_->EncodePlain("a a").size();
    std::string text;
    for (uint64_t i = 0; i < tokens / each; ++i) text += word;
    WriteFileAtomic(folder_.path() / "long.txt", text);
    return Corpus::Open({"text:" + folder_.path().string()}, "", 1, true);
  }
  static void Check(const Corpus& corpus, uint64_t max_sequences) {
    const SequenceLimit limit =
        FindSequenceLimit(corpus, 0, *tokenizer_, 2, max_sequences, 1);
    RequireWholeDocuments(corpus, 0, limit, *tokenizer_, 2);
  }
  TempFolder folder_;
  static inline std::unique_ptr<Tokenizer> tokenizer_;
};

TEST_F(ChunkPlanTest, ADocumentWithMoreSequencesThanIdsIsRefused) {
  const Corpus corpus = CorpusWith(2 * kIds + 20);
  try {
    Check(corpus, 0);
    ADD_FAILURE() << "taken";
  } catch (const UsageError& e) {
    EXPECT_THAT(e.what(), testing::HasSubstr("long.txt: a document is too long"));
    EXPECT_THAT(e.what(), testing::HasSubstr("#blocks"));
  }
}

TEST_F(ChunkPlanTest, ADocumentThatIsCutByALimitIsTaken) {
  EXPECT_NO_THROW(Check(CorpusWith(2 * kIds + 20), 50));
}

TEST_F(ChunkPlanTest, ADocumentWithFewerSequencesThanIdsIsTaken) {
  EXPECT_NO_THROW(Check(CorpusWith(2 * kIds - 200), 0));
}

}  // namespace
}  // namespace routecast
