// What a plan refuses before anything is computed, and how large its chunks are.
#include "collector/chunk_plan.h"

#include <gmock/gmock.h>

#include "common/errors.h"
#include "tests/storage/temp_folder.h"
#include "tests/support/tiny_checkpoint.h"

namespace routecast {
namespace {

constexpr uint64_t kMinBytes = 8 << 10;  // of a chunk
constexpr uint64_t kLongBytes = 3'000'000, kShortBytes = 700;
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
  // A document of kLongBytes where `with_long`, and `num_short` others.
  Corpus MixedCorpus(bool with_long, int num_short) {
    const auto text = [](int key, uint64_t bytes) {
      std::string words;
      for (uint64_t i = 0; words.size() < bytes; ++i) {
        words += std::to_string(key) + "w" + std::to_string(i) + " ";
      }
      words.resize(bytes, 'x');
      return words;
    };
    fs::create_directories(folder_.path() / "mixed");
    std::string blocks;
    for (int d = 1; d <= num_short; ++d) blocks += text(d, kShortBytes) + "\n\n";
    if (with_long) blocks += text(0, kLongBytes);
    WriteFileAtomic(folder_.path() / "mixed.txt", blocks);
    return Corpus::Open({"text:" + (folder_.path() / "mixed.txt").string() + "#blocks"},
                        "", 2, true);
  }
  static ChunkPlan PlanOf(const Corpus& corpus,
                          const std::vector<uint64_t>& stored = {}) {
    return MakeChunkPlan(corpus, {{corpus.size(), 0}}, stored);
  }
  static std::vector<uint64_t> Sizes(const Corpus& corpus, const ChunkPlan& plan) {
    const DocumentOrder order(corpus);
    std::vector<uint64_t> sizes;
    for (const Chunk& chunk : plan.chunks) {
      sizes.push_back(0);
      for (uint64_t p = chunk.begin; p < chunk.end; ++p) {
        sizes.back() += corpus.document(order(p)).length_bytes / chunk.num_slices;
      }
    }
    return sizes;
  }
  // No chunk is larger than an earlier one, but for a short document and, with 1.5, for
  // how a long one divides. What a long one cuts short is only smaller.
  static void ExpectTapers(const Corpus& corpus, double factor) {
    const ChunkPlan plan = PlanOf(corpus);
    const std::vector<uint64_t> sizes = Sizes(corpus, plan);
    uint64_t smallest = sizes.at(0);
    for (size_t c = 0; c + 1 < sizes.size(); ++c) {
      const bool cut_short =
          plan.chunks[c].num_slices == 1 && plan.chunks[c + 1].num_slices > 1;
      if (!cut_short) smallest = std::min(smallest, sizes[c]);
      EXPECT_LE(sizes[c + 1], factor * double(smallest) + kShortBytes) << c;
    }
    EXPECT_GT(sizes[0], 4 * kMinBytes);
    EXPECT_GE(sizes.size(), 60u);
    for (size_t c = sizes.size() - 8; c < sizes.size(); ++c) {
      EXPECT_LE(sizes[c], 2 * kMinBytes + kShortBytes) << c;
    }
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

TEST_F(ChunkPlanTest, ChunksOfShortDocumentsTaper) {
  const Corpus corpus = MixedCorpus(false, 4000);
  ExpectTapers(corpus, 1);
}

TEST_F(ChunkPlanTest, SlicesOfALongDocumentTaper) {
  const Corpus corpus = MixedCorpus(true, 0);
  ASSERT_EQ(corpus.size(), 1u);
  ExpectTapers(corpus, 1);
}

TEST_F(ChunkPlanTest, ChunksOfBothTaper) {
  const Corpus corpus = MixedCorpus(true, 3000);
  ExpectTapers(corpus, 1.5);
}

// As chunk_runner.cc tells them apart.
TEST_F(ChunkPlanTest, EachSegmentIsInOneSlice) {
  const ChunkPlan plan = PlanOf(MixedCorpus(true, 0));
  for (const size_t segments : {1, 7, 1000, 12345}) {
    for (size_t s = 0; s < segments; ++s) {
      int holders = 0;
      for (const Chunk& c : plan.chunks) {
        holders += s * c.num_slices / segments == c.slice;
      }
      ASSERT_EQ(holders, 1) << s << " of " << segments;
    }
  }
}

// What was begun with equal slices goes on with them.
TEST_F(ChunkPlanTest, AStoreOfBeforeKeepsItsPlan) {
  const Corpus corpus = MixedCorpus(true, 0);
  const std::vector<uint64_t> sizes = Sizes(corpus, PlanOf(corpus, {48}));
  EXPECT_EQ(sizes, std::vector<uint64_t>(48, kLongBytes / 48));
  const auto tapered = Sizes(corpus, PlanOf(corpus));
  EXPECT_EQ(Sizes(corpus, PlanOf(corpus, {tapered.size()})), tapered);
  // Of another corpus, or another program: the store refuses it by its number of chunks.
  EXPECT_EQ(Sizes(corpus, PlanOf(corpus, {47})), tapered);
}

}  // namespace
}  // namespace routecast
