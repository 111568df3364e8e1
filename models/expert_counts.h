// Counts of experts that are kept while serving. E experts. Thread rule: one thread at a
// time.
#pragma once

#include <cstdint>
#include <numeric>
#include <unordered_map>
#include <vector>

namespace routecast {

// By key. Takes 64 MiB at most: further keys are not counted.
class CountTable {
 public:
  // `choices`: experts that are counted a time.
  CountTable(int num_experts, int choices)
      : num_experts_(num_experts), least_(kLeastCount * static_cast<float>(choices)) {}
  void Add(uint64_t key, int expert) {
    auto row = rows_.find(key);
    if (row == rows_.end()) {
      if (rows_.size() * (num_experts_ + 1) * sizeof(float) >= kBytes) return;
      row = rows_.emplace(key, std::vector<float>(num_experts_ + 1)).first;
    }
    ++row->second[expert];
    ++row->second[num_experts_];
  }
  // [E] counts and their sum; null where less than kLeastCount times was counted.
  const float* Row(uint64_t key) const {
    const auto row = rows_.find(key);
    if (row == rows_.end() || row->second[num_experts_] < least_) return nullptr;
    return row->second.data();
  }

 private:
  static constexpr size_t kBytes = size_t{64} << 20;
  static constexpr float kLeastCount = 3;  // a row speaks from here on
  size_t num_experts_;
  float least_;
  std::unordered_map<uint64_t, std::vector<float>> rows_;
};

// Rows of counts that fade with every token. What is new weighs ever more instead: only
// shares of a row matter.
class FadingCounts {
 public:
  FadingCounts(int rows, int experts, float keep)
      : experts_(experts),
        growth_(1 / keep),
        counts_(static_cast<size_t>(rows) * experts) {}
  void Add(int row, int expert) {
    counts_[static_cast<size_t>(row) * experts_ + expert] += weight_;
  }
  void Fade() {
    weight_ *= growth_;
    if (weight_ < 1e20f) return;
    for (float& count : counts_) count /= weight_;
    weight_ = 1;
  }
  const float* At(int row) const {
    return counts_.data() + static_cast<size_t>(row) * experts_;
  }
  float Sum(int row) const { return std::accumulate(At(row), At(row) + experts_, 0.f); }
  const std::vector<float>& all() const { return counts_; }

 private:
  int experts_;
  float growth_, weight_ = 1;
  std::vector<float> counts_;
};

}  // namespace routecast
