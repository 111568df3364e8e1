#include "evaluator/speculation_ledger.h"

#include <algorithm>

namespace routecast {
namespace {

constexpr double kFading = 0.98;      // of the evidence, an event
constexpr double kPriorEvents = 16;   // that the policy's own threshold counts as
constexpr double kPriorForetold = 4;  // probability that is believed before any is judged
constexpr double kMostTrust = 2;
// Price of bytes by the share of time in which transfers have the link: full from kBusy
// on, falling with it towards nothing at kFree, but never below kLeastPrice, which is
// enough to shut a lead that is always wrong. Chosen by planner_bench on validation
// sequences (docs/results/runtime.md).
constexpr double kFree = 0.3, kBusy = 0.8, kLeastPrice = 0.35;
constexpr double kLeastShare = 0.2;  // of the policy's threshold, at the least price

}  // namespace

SpeculationLedger::SpeculationLedger(int max_lead, double threshold)
    : threshold_(std::clamp(threshold, 0.0, 0.99)),
      byte_cost_(threshold_ / (1 - threshold_)) {
  for (auto& entries : entries_)
    entries.resize(static_cast<size_t>(std::max(max_lead, 0)) + 1);
}

void SpeculationLedger::SetLinkUse(Stack stack, double share) {
  price_[static_cast<int>(stack)] =
      std::clamp((share - kFree) / (kBusy - kFree), kLeastPrice, 1.0);
}

double SpeculationLedger::PaysFrom(const Entry& entry, double byte_cost) const {
  const double saved = (entry.saved + kPriorEvents) / (entry.used + kPriorEvents);
  // No cheaper than its bytes: a cancelled transfer has moved a part of them.
  const double cost = std::max(
      byte_cost, (byte_cost * (entry.unused_moved + kPriorEvents) + entry.harmed) /
                     (entry.unused + kPriorEvents));
  return cost > 0 ? cost / (saved + cost) : 0;
}

void SpeculationLedger::Judge(Stack stack, int lead, double probability, bool came) {
  Entry& entry = Of(stack, lead);
  ++entry.all.judged;
  entry.foretold = kFading * entry.foretold + probability;
  entry.came = kFading * entry.came + (came ? 1 : 0);
}

void SpeculationLedger::Used(Stack stack, int lead, double saved) {
  Entry& entry = Of(stack, lead);
  ++entry.all.used;
  entry.all.saved += saved;
  entry.used = kFading * entry.used + 1;
  entry.saved = kFading * entry.saved + saved;
}

void SpeculationLedger::Unused(Stack stack, int lead, double moved) {
  Entry& entry = Of(stack, lead);
  ++entry.all.unused;
  entry.all.moved_in_vain += moved;
  entry.all.cost += byte_cost_ * price_[static_cast<int>(stack)] * moved;
  entry.unused = kFading * entry.unused + 1;
  entry.unused_moved = kFading * entry.unused_moved + moved;
  entry.harmed *= kFading;
}

void SpeculationLedger::Harmed(Stack stack, int lead, double transfers) {
  Entry& entry = Of(stack, lead);
  entry.all.cost += transfers;
  entry.harmed += transfers;
}

double SpeculationLedger::TrustOf(const Entry& entry) const {
  return std::min(kMostTrust,
                  (entry.came + kPriorForetold) / (entry.foretold + kPriorForetold));
}

double SpeculationLedger::Threshold(Stack stack, int lead) const {
  const Entry& entry = Of(stack, lead);
  const double byte_cost = byte_cost_ * price_[static_cast<int>(stack)];
  return std::max(PaysFrom(entry, byte_cost) / TrustOf(entry), least_threshold(stack));
}

double SpeculationLedger::least_threshold(Stack stack) const {
  const double price = price_[static_cast<int>(stack)];
  const double idle = (1 - price) / (1 - kLeastPrice);
  return threshold_ * (0.5 + (kLeastShare - 0.5) * idle);
}

std::vector<SpeculationAccount> SpeculationLedger::Accounts(Stack stack) const {
  std::vector<SpeculationAccount> accounts;
  const auto leads = static_cast<int>(entries_[static_cast<int>(stack)].size());
  for (int lead = 1; lead < leads; ++lead) {
    accounts.push_back(Of(stack, lead).all);
    accounts.back().lead = lead;
    accounts.back().trust = TrustOf(Of(stack, lead));
    accounts.back().threshold = Threshold(stack, lead);
  }
  return accounts;
}

}  // namespace routecast
