// The expected calibration error over bins of equal mass; docs/metrics.md has the
// formula. Thread rule: one thread at a time.
#pragma once

#include <cstddef>
#include <span>
#include <vector>

namespace routecast {

// Confidence against being right in bins that hold as many answers each. Keeps every
// answer, 8 bytes each.
class EqualMassCalibration {
 public:
  static constexpr size_t kBins = 15;
  void Add(double confidence, bool right);  // REQUIRES confidence >= 0
  // Sum over bins of n_b / n * abs(accuracy_b - confidence_b); answers of one confidence
  // each count as their mean, so their order is none. NaN where nothing was added.
  double Value() const;
  // For another one's Merge.
  const std::vector<double>& answers() const { return answers_; }
  void Merge(std::span<const double> answers);

 private:
  std::vector<double> answers_;  // confidences; negated where wrong
};

}  // namespace routecast
