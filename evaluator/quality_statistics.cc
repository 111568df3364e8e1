#include "evaluator/quality_statistics.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>

namespace routecast {
namespace {

constexpr double kFloor = 1e-8;   // added to probabilities before logarithms
constexpr double kSettled = 0.9;  // of the accuracy that is reached in the end

double Mean(double sum, int64_t count) {
  return count > 0 ? sum / static_cast<double>(count)
                   : std::numeric_limits<double>::quiet_NaN();
}

double MeanOf(const std::vector<float>& values, size_t from, size_t to) {
  const auto at = [&](size_t i) { return values.begin() + static_cast<int64_t>(i); };
  return Mean(std::accumulate(at(from), at(to), 0.0), static_cast<int64_t>(to - from));
}

// The k largest, the lower id first of equal ones.
std::vector<int> Largest(const float* values, int experts, int k) {
  std::vector<int> order(static_cast<size_t>(experts));
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(),
                   [&](int a, int b) { return values[a] > values[b]; });
  order.resize(static_cast<size_t>(std::min(k, experts)));
  return order;
}

}  // namespace

void Correlation::Add(double a, double b) {
  ++n_;
  x_ += a;
  y_ += b;
  xx_ += a * a;
  yy_ += b * b;
  xy_ += a * b;
}

double Correlation::Value() const {
  const double spread_x = n_ * xx_ - x_ * x_, spread_y = n_ * yy_ - y_ * y_;
  if (spread_x <= 1e-9 * n_ * n_ || spread_y <= 1e-9 * n_ * n_)
    return std::numeric_limits<double>::quiet_NaN();
  return (n_ * xy_ - x_ * y_) / std::sqrt(spread_x * spread_y);
}

bool RouterDistribution(const RoutingSpan& span, int layer, int token,
                        std::vector<float>* probs) {
  const auto k = static_cast<size_t>(span.top_k);
  if (k == 0 || span.topk_probs.empty()) return false;
  const size_t from = (static_cast<size_t>(layer) * static_cast<size_t>(span.num_tokens) +
                       static_cast<size_t>(token)) *
                      k;
  double rest = 1;
  for (size_t i = 0; i < k; ++i) rest -= span.topk_probs[from + i];
  const size_t others = probs->size() > k ? probs->size() - k : 1;
  std::fill(probs->begin(), probs->end(),
            static_cast<float>(std::max(0.0, rest) / static_cast<double>(others)));
  for (size_t i = 0; i < k; ++i) {
    const size_t expert = span.topk_ids[from + i];
    if (expert < probs->size()) (*probs)[expert] = span.topk_probs[from + i];
  }
  return true;
}

void RouterAgreement::Add(const float* predicted, const std::vector<float>& router,
                          int k) {
  const int experts = static_cast<int>(router.size());
  ++rows_;
  double p_sum = 0, q_sum = 0;
  Correlation across;
  for (int e = 0; e < experts; ++e) {
    p_sum += predicted[e] + kFloor;
    q_sum += router[e] + kFloor;
    // In units of an even share, so that what counts as constant depends on no E.
    across.Add(predicted[e] * static_cast<double>(experts),
               router[e] * static_cast<double>(experts));
  }
  for (int e = 0; e < experts; ++e) {
    const double p = (predicted[e] + kFloor) / p_sum, q = (router[e] + kFloor) / q_sum;
    kl_ += q * std::log(q / p);
  }
  const double correlation = across.Value();
  if (std::isfinite(correlation)) {
    correlation_ += correlation;
  } else {
    ++constant_;
  }
  const std::vector<int> ours = Largest(predicted, experts, k),
                         theirs = Largest(router.data(), experts, k);
  int64_t both = 0;
  for (int e : theirs) both += std::find(ours.begin(), ours.end(), e) != ours.end();
  overlap_ += Mean(static_cast<double>(both), static_cast<int64_t>(theirs.size()));
}

double RouterAgreement::kl() const { return Mean(kl_, rows_); }
double RouterAgreement::overlap() const { return Mean(overlap_, rows_); }
double RouterAgreement::correlation() const {
  return Mean(correlation_, rows_ - constant_);
}

std::optional<Adaptation> AdaptationOf(const std::vector<float>& before,
                                       const std::vector<float>& after) {
  constexpr size_t kWindow = kAdaptationWindow;
  if (before.size() < 2 * kWindow || after.size() < 2 * kWindow) return std::nullopt;
  Adaptation adaptation;
  adaptation.before = MeanOf(before, before.size() / 2, before.size());
  adaptation.first = MeanOf(after, 0, kWindow);
  adaptation.after = MeanOf(after, after.size() / 2, after.size());
  size_t end = kWindow;
  while (end < after.size() &&
         MeanOf(after, end - kWindow, end) < kSettled * adaptation.after) {
    ++end;
  }
  adaptation.tokens = static_cast<int64_t>(end);
  return adaptation;
}

}  // namespace routecast
