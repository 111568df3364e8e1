// Near-duplicate groups: MinHash over word 5-grams, banded LSH for candidates, true
// Jaccard to decide (Broder 1997; Leskovec, Rajaraman, Ullman, Mining of Massive
// Datasets, chapter 3). Thread rule: free functions, pure; NearDuplicateGroups runs
// `threads` threads of its own.
#pragma once

#include <array>
#include <cstdint>
#include <functional>
#include <string_view>
#include <vector>

namespace routecast {

constexpr int kShingleWords = 5;
constexpr double kNearDuplicateJaccard = 0.8;
// 16 bands of 4 rows: a pair at Jaccard 0.8 shares a band with probability 0.9998, at 0.5
// with 0.64 (and is then refused by its true Jaccard).
constexpr int kBands = 16, kRows = 4, kHashes = kBands * kRows;
using MinHash = std::array<uint32_t, kHashes>;

// Hashes of the word 5-grams (words: runs of letters, digits and non-ASCII bytes, ASCII
// letters lowered), sorted, each once. Empty for texts of fewer than five words.
std::vector<uint64_t> Shingles(std::string_view text);
MinHash ComputeMinHash(const std::vector<uint64_t>& shingles);  // REQUIRES not empty
// |A and B| / |A or B| of sorted sets.
double Jaccard(const std::vector<uint64_t>& a, const std::vector<uint64_t>& b);

struct Signature {
  uint64_t document = 0;
  MinHash values{};
};

// For each of `num_documents` documents the smallest document of its group. Documents
// without a signature are groups of their own. `text` gives a document's text (any
// thread). Groups are the connected components of pairs with Jaccard >= 0.8. In a bucket
// a document is compared with at most kMaxCompared representatives, so that time stays
// linear in crowded ones. The first documents may have their groups already: `earlier`
// names the smallest document of each one's; two such groups are joined here where a
// document is near both, and it is the caller who keeps them apart.
constexpr int kMaxCompared = 16;
std::vector<uint64_t> NearDuplicateGroups(
    uint64_t num_documents, const std::vector<Signature>& signatures,
    const std::function<std::string_view(uint64_t)>& text, int threads,
    const std::vector<uint64_t>& earlier = {});

}  // namespace routecast
