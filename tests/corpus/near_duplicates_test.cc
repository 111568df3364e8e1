#include "corpus/near_duplicates.h"

#include <gtest/gtest.h>

#include <set>
#include <string>
#include <utility>
#include <vector>

#include "common/random.h"

namespace routecast {
namespace {

std::vector<std::string> Words(uint64_t seed, int n) {
  std::vector<std::string> words;
  for (int w = 0; w < n; ++w) {
    words.push_back("w" +
                    std::to_string(ToRange(Mix(seed, static_cast<uint64_t>(w)), 5000)));
  }
  return words;
}

std::string Joined(const std::vector<std::string>& words) {
  std::string text;
  for (const auto& word : words) text += word + ' ';
  return text;
}

// A text with every `stride`-th word replaced: the Jaccard falls with smaller strides.
std::string Changed(uint64_t seed, int n, int stride) {
  auto words = Words(seed, n);
  for (int w = stride; w < n; w += stride)
    words[w] = "changed" + std::to_string(w + stride);
  return Joined(words);
}

// Shingles as sets of strings, the slow and obvious way.
double SlowJaccard(const std::string& a, const std::string& b) {
  const auto shingles = [](const std::string& text) {
    std::vector<std::string> words;
    for (size_t at = 0, end; (end = text.find(' ', at)) != text.npos; at = end + 1) {
      words.push_back(text.substr(at, end - at));
    }
    std::set<std::string> all;
    for (size_t i = 0; i + kShingleWords <= words.size(); ++i) {
      all.insert(Joined({words.begin() + i, words.begin() + i + kShingleWords}));
    }
    return all;
  };
  const auto sa = shingles(a), sb = shingles(b);
  size_t common = 0;
  for (const auto& s : sa) common += sb.count(s);
  return static_cast<double>(common) / (sa.size() + sb.size() - common);
}

TEST(NearDuplicates, JaccardEqualsTheSlowOne) {
  for (int stride : {3, 10, 37, 200}) {
    const std::string a = Joined(Words(1, 300)), b = Changed(1, 300, stride);
    EXPECT_DOUBLE_EQ(Jaccard(Shingles(a), Shingles(b)), SlowJaccard(a, b)) << stride;
  }
}

TEST(NearDuplicates, CaseAndPunctuationDoNotMatter) {
  EXPECT_EQ(Shingles("The cat sat on the mat, again."),
            Shingles("the CAT sat -- on the mat again"));
  EXPECT_NE(Shingles("the cat sat on the mat"), Shingles("the mat sat on the cat"));
  EXPECT_TRUE(Shingles("only four words here").empty());
}

// 64 hashes estimate a Jaccard with a standard deviation of at most 1/16; the mean over
// 100 pairs with at most 1/160.
TEST(NearDuplicates, MinHashEstimatesTheJaccard) {
  for (int stride : {12, 30, 100}) {
    double estimate = 0, truth = 0;
    for (uint64_t seed = 0; seed < 100; ++seed) {
      const auto a = Shingles(Joined(Words(seed, 400))),
                 b = Shingles(Changed(seed, 400, stride));
      const MinHash ma = ComputeMinHash(a), mb = ComputeMinHash(b);
      for (int i = 0; i < kHashes; ++i) estimate += (ma[i] == mb[i]) / (100.0 * kHashes);
      truth += Jaccard(a, b) / 100;
    }
    EXPECT_NEAR(estimate, truth, 4.0 / 160) << stride;
  }
}

// Groups equal the connected components of all pairs, found by comparing every pair.
TEST(NearDuplicates, GroupsEqualAllPairs) {
  std::vector<std::string> texts;
  for (uint64_t seed = 0; seed < 40; ++seed) {
    texts.push_back(Joined(Words(seed, 200)));
    texts.push_back(Changed(seed, 200, 15 + static_cast<int>(seed) * 3));
    if (seed % 3 == 0) texts.push_back(Joined(Words(seed, 200)) + "and a tail");
  }
  std::vector<Signature> signatures;
  std::vector<uint64_t> expected(texts.size());
  for (uint64_t i = 0; i < texts.size(); ++i) {
    signatures.push_back({i, ComputeMinHash(Shingles(texts[i]))});
    expected[i] = i;
  }
  std::vector<std::pair<size_t, size_t>> near;
  for (size_t i = 0; i < texts.size(); ++i) {
    for (size_t j = 0; j < i; ++j) {
      if (SlowJaccard(texts[i], texts[j]) >= kNearDuplicateJaccard)
        near.emplace_back(i, j);
    }
  }
  EXPECT_GT(near.size(), 20u);
  for (bool changed = true; changed;) {
    changed = false;
    for (const auto& [i, j] : near) {
      changed |= expected[i] != expected[j];
      expected[i] = expected[j] = std::min(expected[i], expected[j]);
    }
  }
  const auto text = [&texts](uint64_t i) { return std::string_view(texts[i]); };
  EXPECT_EQ(NearDuplicateGroups(texts.size(), signatures, text, 1), expected);
  EXPECT_EQ(NearDuplicateGroups(texts.size(), signatures, text, 3), expected);
}

TEST(NearDuplicates, CrowdedBucketsStayLinear) {
  std::vector<std::string> texts;
  for (int i = 0; i < 20000; ++i) {
    texts.push_back("this line is the same everywhere but for number " +
                    std::to_string(i % 2));
  }
  std::vector<Signature> signatures;
  for (uint64_t i = 0; i < texts.size(); ++i) {
    signatures.push_back({i, ComputeMinHash(Shingles(texts[i]))});
  }
  const auto groups = NearDuplicateGroups(
      texts.size(), signatures,
      [&texts](uint64_t i) { return std::string_view(texts[i]); }, 2);
  EXPECT_EQ(std::set<uint64_t>(groups.begin(), groups.end()).size(), 2u);
}

}  // namespace
}  // namespace routecast
