// What is summed up of answers and of what then happened. docs/metrics.md has the
// formulas. E experts, K recorded choices. Thread rule: one thread at a time.
#pragma once

#include <cstdint>
#include <optional>
#include <vector>

#include "common/routing.h"

namespace routecast {

// Pearson's correlation of two series; NaN where one of them is constant.
class Correlation {
 public:
  void Add(double a, double b);
  double Value() const;

 private:
  double n_ = 0, x_ = 0, y_ = 0, xx_ = 0, yy_ = 0, xy_ = 0;
};

// The router's probabilities [E] of one token: those of its K recorded choices, what is
// left spread evenly. False where none were recorded.
bool RouterDistribution(const RoutingSpan& span, int layer, int token,
                        std::vector<float>* probs);

// How near predicted distributions are to the router's own. NaN where nothing was added.
class RouterAgreement {
 public:
  // Both [E]; k: of the overlap.
  void Add(const float* predicted, const std::vector<float>& router, int k);
  int64_t rows() const { return rows_; }
  double kl() const;           // mean KL(router || predicted), nats
  double overlap() const;      // mean share of the router's k that are among the k
  double correlation() const;  // mean over rows of Pearson's across experts
  int64_t constant_rows() const { return constant_; }  // without a correlation

 private:
  double kl_ = 0, overlap_ = 0, correlation_ = 0;
  int64_t rows_ = 0, constant_ = 0;
};

// From one domain to another: right answers a token, before and after.
constexpr size_t kAdaptationWindow = 100;  // tokens
struct Adaptation {
  double before = 0;  // mean of the last half before
  double first = 0;   // mean of the first window after
  double after = 0;   // mean of the last half after
  // Tokens after the change until a window reaches 90 % of that: kAdaptationWindow where
  // the first does.
  int64_t tokens = 0;
};
// nullopt where there are fewer than two windows on a side.
std::optional<Adaptation> AdaptationOf(const std::vector<float>& before,
                                       const std::vector<float>& after);

}  // namespace routecast
