#include "corpus/near_duplicates.h"

#include <algorithm>
#include <limits>
#include <numeric>
#include <tuple>
#include <utility>

#include "common/files.h"
#include "common/random.h"
#include "corpus/parallel.h"

namespace routecast {
namespace {

// Below this estimate a true Jaccard of 0.8 is four standard deviations away (64 hashes).
constexpr double kMinEstimate = 0.6;

bool IsWordByte(unsigned char c) {
  return c >= 0x80 || (c >= '0' && c <= '9') || (c >= 'a' && c <= 'z') ||
         (c >= 'A' && c <= 'Z');
}

std::vector<uint64_t> WordHashes(std::string_view text) {
  std::vector<uint64_t> words;
  constexpr uint64_t kStart = 0xcbf29ce484222325ULL;  // FNV-1a, finished by Mix
  uint64_t hash = kStart;
  bool inside = false;
  for (const unsigned char c : text) {
    if (IsWordByte(c)) {
      const unsigned char lower = c >= 'A' && c <= 'Z' ? c + 32 : c;
      hash = (hash ^ lower) * 0x100000001b3ULL;
      inside = true;
    } else if (inside) {
      words.push_back(Mix(hash));
      hash = kStart;
      inside = false;
    }
  }
  if (inside) words.push_back(Mix(hash));
  return words;
}

class UnionFind {
 public:
  explicit UnionFind(uint64_t n) : parent_(n) {
    std::iota(parent_.begin(), parent_.end(), 0);
  }
  uint64_t Find(uint64_t i) const {
    while (parent_[i] != i) i = parent_[i];
    return i;
  }
  void Join(uint64_t a, uint64_t b) {  // the smaller becomes the root
    a = Find(a);
    b = Find(b);
    if (a != b) parent_[std::max(a, b)] = std::min(a, b);
  }
  void Flatten() {  // roots are smaller than their children
    for (uint64_t i = 0; i < parent_.size(); ++i) parent_[i] = parent_[parent_[i]];
  }
  std::vector<uint64_t>& parents() { return parent_; }

 private:
  std::vector<uint64_t> parent_;
};

using Pairs = std::vector<std::pair<uint64_t, uint64_t>>;
struct Entry {
  uint64_t band_hash;
  uint32_t signature;
};

// A member of a bucket; shingles are made when first needed.
struct Member {
  const Signature* signature;
  std::vector<uint64_t> shingles;
};

double Estimate(const MinHash& a, const MinHash& b) {
  int equal = 0;
  for (int i = 0; i < kHashes; ++i) equal += a[i] == b[i];
  return static_cast<double>(equal) / kHashes;
}

class BucketJoiner {
 public:
  BucketJoiner(const std::vector<Signature>& signatures, const UnionFind& groups,
               const std::function<std::string_view(uint64_t)>& text)
      : signatures_(signatures), groups_(groups), text_(text) {}

  // Appends the near-duplicate pairs of one bucket, by comparison with representatives.
  void Join(const Entry* first, const Entry* last, Pairs* pairs) const {
    std::vector<Member> representatives;
    for (; first != last; ++first) {
      Member member{&signatures_[first->signature], {}};
      bool joined = false;
      for (Member& other : representatives) {
        if (!AreNear(&member, &other)) continue;
        joined = true;
        pairs->emplace_back(member.signature->document, other.signature->document);
      }
      if (!joined && representatives.size() < kMaxCompared) {
        representatives.push_back(std::move(member));
      }
    }
  }

 private:
  bool AreNear(Member* a, Member* b) const {
    const uint64_t i = a->signature->document, j = b->signature->document;
    if (groups_.Find(i) == groups_.Find(j)) return true;
    if (Estimate(a->signature->values, b->signature->values) < kMinEstimate) return false;
    if (a->shingles.empty()) a->shingles = Shingles(text_(i));
    if (b->shingles.empty()) b->shingles = Shingles(text_(j));
    return Jaccard(a->shingles, b->shingles) >= kNearDuplicateJaccard;
  }
  const std::vector<Signature>& signatures_;
  const UnionFind& groups_;
  const std::function<std::string_view(uint64_t)>& text_;
};

std::vector<Entry> SortedBand(const std::vector<Signature>& signatures, int band) {
  std::vector<Entry> entries(signatures.size());
  for (size_t i = 0; i < entries.size(); ++i) {
    entries[i] = {Hash64(&signatures[i].values[band * kRows], kRows * sizeof(uint32_t)),
                  static_cast<uint32_t>(i)};
  }
  std::sort(entries.begin(), entries.end(), [](const Entry& a, const Entry& b) {
    return std::tie(a.band_hash, a.signature) < std::tie(b.band_hash, b.signature);
  });
  return entries;
}

// Start of each bucket of at least two entries, with its end.
std::vector<std::pair<size_t, size_t>> Buckets(const std::vector<Entry>& entries) {
  std::vector<std::pair<size_t, size_t>> buckets;
  for (size_t start = 0, end = 0; start < entries.size(); start = end) {
    while (end < entries.size() && entries[end].band_hash == entries[start].band_hash)
      ++end;
    if (end - start > 1) buckets.emplace_back(start, end);
  }
  return buckets;
}

}  // namespace

std::vector<uint64_t> Shingles(std::string_view text) {
  const std::vector<uint64_t> words = WordHashes(text);
  std::vector<uint64_t> shingles;
  if (words.size() < kShingleWords) return shingles;
  shingles.reserve(words.size() - kShingleWords + 1);
  for (size_t i = 0; i + kShingleWords <= words.size(); ++i) {
    uint64_t hash = words[i];
    for (int k = 1; k < kShingleWords; ++k)
      hash = (hash << 7 | hash >> 57) ^ words[i + k];
    shingles.push_back(Mix(hash));
  }
  std::sort(shingles.begin(), shingles.end());
  shingles.erase(std::unique(shingles.begin(), shingles.end()), shingles.end());
  return shingles;
}

MinHash ComputeMinHash(const std::vector<uint64_t>& shingles) {
  static const auto kFactors = [] {
    std::array<std::pair<uint32_t, uint32_t>, kHashes> factors;
    for (uint32_t i = 0; i < kHashes; ++i) {
      const uint64_t bits = Mix(0x6d696e68617368ULL, i);
      factors[i] = {static_cast<uint32_t>(bits) | 1u, static_cast<uint32_t>(bits >> 32)};
    }
    return factors;
  }();
  MinHash minima;
  minima.fill(std::numeric_limits<uint32_t>::max());
  for (const uint64_t shingle : shingles) {
    const auto low = static_cast<uint32_t>(shingle),
               high = static_cast<uint32_t>(shingle >> 32);
    for (int i = 0; i < kHashes; ++i) {
      // A multiply and xor-shift round a hash: the shingle is mixed well already.
      uint32_t h = (low ^ kFactors[i].second) * kFactors[i].first;
      h = (h ^ (h >> 15) ^ high) * 0x85ebca6bu;
      minima[i] = std::min(minima[i], h ^ (h >> 13));
    }
  }
  return minima;
}

double Jaccard(const std::vector<uint64_t>& a, const std::vector<uint64_t>& b) {
  size_t i = 0, j = 0, common = 0;
  while (i < a.size() && j < b.size()) {
    if (a[i] == b[j]) {
      ++common, ++i, ++j;
    } else if (a[i] < b[j]) {
      ++i;
    } else {
      ++j;
    }
  }
  const size_t all = a.size() + b.size() - common;
  return all == 0 ? 1.0 : static_cast<double>(common) / static_cast<double>(all);
}

std::vector<uint64_t> NearDuplicateGroups(
    uint64_t num_documents, const std::vector<Signature>& signatures,
    const std::function<std::string_view(uint64_t)>& text, int threads,
    const std::vector<uint64_t>& earlier) {
  UnionFind groups(num_documents);
  for (uint64_t i = 0; i < earlier.size(); ++i) groups.Join(earlier[i], i);
  for (int band = 0; band < kBands; ++band) {
    const std::vector<Entry> entries = SortedBand(signatures, band);
    const auto buckets = Buckets(entries);
    // Workers read the groups of the bands before; their pairs are joined afterwards in
    // the order of the buckets, so that the result does not depend on the threads.
    std::vector<Pairs> pairs(buckets.size());
    const BucketJoiner joiner(signatures, groups, text);
    ParallelFor(buckets.size(), threads, [&](size_t i) {
      joiner.Join(&entries[buckets[i].first], &entries[0] + buckets[i].second, &pairs[i]);
    });
    for (const Pairs& list : pairs) {
      for (const auto& [a, b] : list) groups.Join(a, b);
    }
    groups.Flatten();
  }
  return std::move(groups.parents());
}

}  // namespace routecast
