#include "evaluator/link_use.h"

#include <algorithm>

namespace routecast {
namespace {

constexpr double kFading = 0.99;    // of the evidence, a visit
constexpr double kPriorVisits = 8;  // of a link that is always busy

}  // namespace

void LinkUse::BeginPass(double now, bool rested) {
  if (!rested) return;
  began_ = -1;  // when that visit ended is not known
  moving_ = 0;
  rested_ = now;
}

void LinkUse::BeginVisit(Stack stack, double now) {
  if (began_ >= 0) {
    Account& account = accounts_[static_cast<int>(stack_)];
    account.visits = kFading * account.visits + 1;
    account.seconds = kFading * account.seconds + (now - began_);
    account.busy = kFading * account.busy + moving_;
  }
  moving_ = 0;
  stack_ = stack;
  began_ = now;
}

void LinkUse::Moved(double began, double now) {
  moving_ += std::max(0.0, now - std::max(began, rested_));
}

double LinkUse::Share(Stack stack) const {
  const Account& account = accounts_[static_cast<int>(stack)];
  if (account.seconds <= 0) return 1;
  const double share = std::min(1.0, account.busy / account.seconds);
  return (account.visits * share + kPriorVisits) / (account.visits + kPriorVisits);
}

}  // namespace routecast
