// Sources that come in later: what was there keeps its ids, groups and split.
#include <gmock/gmock.h>

#include <algorithm>
#include <set>

#include "common/errors.h"
#include "common/random.h"
#include "corpus/corpus.h"
#include "tests/corpus/test_folder.h"

namespace routecast {
namespace {

std::string Prose(uint64_t seed, int words) {
  std::string text;
  for (int w = 0; w < words; ++w) {
    text +=
        "w" + std::to_string(ToRange(Mix(seed, static_cast<uint64_t>(w)), 100000)) + " ";
  }
  return text;
}

class IntakesTest : public TestFolder {
 protected:
  std::string Blocks(const std::string& name, const std::vector<std::string>& texts) {
    std::string all;
    for (const std::string& text : texts) all += text + "\n\n";
    return "text:" + Write(name, all) + "#blocks";
  }
  static Corpus Open(const std::vector<std::vector<std::string>>& intakes) {
    return Corpus::OpenIntakes(intakes, "", 2, true);
  }
};

TEST_F(IntakesTest, EarlierDocumentsStayAsTheyWere) {
  std::vector<std::string> first, second;
  for (uint64_t i = 0; i < 300; ++i) first.push_back(Prose(i, 60));
  // Every third near an earlier one, every third equal to one.
  for (uint64_t i = 0; i < 300; ++i) {
    second.push_back(i % 3 == 0   ? Prose(i, 60) + "a tail"
                     : i % 3 == 1 ? Prose(i, 60)
                                  : Prose(1000 + i, 60));
  }
  const auto a = Blocks("a.txt", first), b = Blocks("b.txt", second);
  const Corpus before = Open({{a}}), after = Open({{a}, {b}});
  ASSERT_THAT(after.intake_ends(), testing::ElementsAre(300, 500));
  EXPECT_EQ(after.stats().exact_duplicates, 100u);
  EXPECT_EQ(after.FingerprintAfter(0), before.fingerprint());
  EXPECT_NE(after.fingerprint(), before.fingerprint());
  for (uint64_t i = 0; i < 300; ++i) {
    EXPECT_EQ(after.document(i).group, before.document(i).group);
    EXPECT_EQ(after.Text(i), before.Text(i));
  }
  for (uint64_t i = 300, from = 0; i < 500; i += 2, from += 3) {
    EXPECT_EQ(after.document(i).group, before.document(from).group) << i;
    EXPECT_EQ(after.part(i), before.part(from));
    EXPECT_EQ(after.document(i + 1).group, after.document(i + 1).content_hash);
  }
}

// One pass over all would call the group by the smallest hash, whoever has it.
TEST_F(IntakesTest, ALaterDocumentWithASmallerHashDoesNotRenameTheGroup) {
  int smaller = 0;
  for (uint64_t i = 0; i < 20; ++i) {
    const auto a = Blocks("a.txt", {Prose(i, 60)});
    const auto b = Blocks("b.txt", {Prose(i, 60) + "tail"});
    const Corpus corpus = Open({{a}, {b}});
    ASSERT_EQ(corpus.size(), 2u);
    EXPECT_EQ(corpus.document(1).group, corpus.document(0).content_hash);
    smaller += corpus.document(1).content_hash < corpus.document(0).content_hash;
  }
  EXPECT_GT(smaller, 0);
}

TEST_F(IntakesTest, ABridgeBetweenTwoGroupsJoinsTheEarlierAndLeavesBothApart) {
  // 100 words and 100 more: the bridge shares enough with either, they not with another.
  std::vector<std::string> words;
  for (int w = 0; w < 120; ++w) words.push_back("w" + std::to_string(w));
  const auto part = [&](int begin, int end) {
    std::string text;
    for (int w = begin; w < end; ++w) text += words[static_cast<size_t>(w)] + " ";
    return text;
  };
  const auto a = Blocks("a.txt", {part(0, 100), part(20, 120)});
  const auto b = Blocks("b.txt", {part(10, 110)});
  const Corpus corpus = Open({{a}, {b}});
  ASSERT_EQ(corpus.size(), 3u);
  EXPECT_NE(corpus.document(0).group, corpus.document(1).group);
  EXPECT_EQ(corpus.document(2).group, corpus.document(0).group);
}

TEST_F(IntakesTest, NewDocumentsAmongThemselvesAreGroupedAsEver) {
  const auto a = Blocks("a.txt", {Prose(1, 60)});
  const auto b = Blocks("b.txt", {Prose(2, 60), Prose(2, 60) + "tail", Prose(3, 60)});
  const Corpus corpus = Open({{a}, {b}});
  EXPECT_EQ(corpus.document(1).group,
            std::min(corpus.document(1).content_hash, corpus.document(2).content_hash));
  EXPECT_EQ(corpus.document(2).group, corpus.document(1).group);
  EXPECT_EQ(corpus.stats().groups, 3u);
}

TEST_F(IntakesTest, ThreeIntakesGrowOneByOne) {
  const auto a = Blocks("a.txt", {Prose(1, 60), Prose(2, 60)});
  const auto b = Blocks("b.txt", {Prose(3, 60), Prose(1, 60)});
  const auto c = Blocks("c.txt", {Prose(3, 60) + "tail", Prose(4, 60)});
  const Corpus two = Open({{a}, {b}}), three = Open({{a}, {b}, {c}});
  EXPECT_THAT(three.intake_ends(), testing::ElementsAre(2, 3, 5));
  EXPECT_EQ(three.FingerprintAfter(1), two.fingerprint());
  EXPECT_EQ(three.document(3).group, three.document(2).group);
}

TEST_F(IntakesTest, TheCacheKnowsIntakesApart) {
  const auto a = Blocks("a.txt", {Prose(1, 60)});
  const auto b = Blocks("b.txt", {Prose(1, 60) + "tail", Prose(5, 60)});
  const auto open = [&](const std::vector<std::vector<std::string>>& intakes) {
    const Corpus made = Corpus::OpenIntakes(intakes, folder_ / "cache", 1, true);
    Corpus read = Corpus::OpenIntakes(intakes, folder_ / "cache", 1, true);
    EXPECT_FALSE(made.stats().from_cache);
    EXPECT_TRUE(read.stats().from_cache);
    EXPECT_EQ(made.fingerprint(), read.fingerprint());
    EXPECT_EQ(made.intake_ends(), read.intake_ends());
    return read;
  };
  EXPECT_THAT(open({{a}, {b}}).intake_ends(), testing::ElementsAre(1, 3));
  EXPECT_THAT(open({{a, b}}).intake_ends(), testing::ElementsAre(3));
}

TEST_F(IntakesTest, AnIntakeWithoutSourcesIsRefused) {
  const auto a = Blocks("a.txt", {Prose(1, 60)});
  EXPECT_THROW(Open({{a}, {}}), UsageError);
}

}  // namespace
}  // namespace routecast
