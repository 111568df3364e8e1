#include "models/equal_mass_calibration.h"

#include <algorithm>
#include <cmath>

namespace routecast {

void EqualMassCalibration::Add(double confidence, bool right) {
  answers_.push_back(right ? confidence : -confidence);
}

void EqualMassCalibration::Merge(std::span<const double> answers) {
  answers_.insert(answers_.end(), answers.begin(), answers.end());
}

double EqualMassCalibration::Value() const {
  auto answers = answers_;
  std::sort(answers.begin(), answers.end(),
            [](double a, double b) { return std::abs(a) < std::abs(b); });
  const size_t count = answers.size();
  // accuracy - confidence of each.
  for (size_t from = 0, to = 0; from < count; from = to) {
    const double confidence = std::abs(answers[from]);
    size_t right = 0;
    for (; to < count && std::abs(answers[to]) == confidence; ++to) {
      right += !std::signbit(answers[to]);
    }
    const double accuracy = static_cast<double>(right) / static_cast<double>(to - from);
    std::fill(answers.begin() + static_cast<int64_t>(from),
              answers.begin() + static_cast<int64_t>(to), accuracy - confidence);
  }
  double sum = 0;
  for (size_t b = 0, from = 0; b < kBins; ++b) {
    const size_t to = from + count / kBins + (b < count % kBins ? 1 : 0);
    double gap = 0;
    for (size_t i = from; i < to; ++i) gap += answers[i];
    sum += std::abs(gap);
    from = to;
  }
  return sum / static_cast<double>(count);
}

}  // namespace routecast
