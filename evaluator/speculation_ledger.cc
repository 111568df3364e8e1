#include "evaluator/speculation_ledger.h"

#include <algorithm>

namespace routecast {
namespace {

constexpr double kFading = 0.98;      // of the evidence, an event
constexpr double kPriorEvents = 16;   // that the policy's own threshold counts as
constexpr double kPriorForetold = 4;  // probability that is believed before any is judged
constexpr double kMostTrust = 2;

}  // namespace

SpeculationLedger::SpeculationLedger(int max_lead, double threshold)
    : threshold_(std::clamp(threshold, 0.0, 0.99)),
      byte_cost_(threshold_ / (1 - threshold_)) {
  for (auto& entries : entries_)
    entries.resize(static_cast<size_t>(std::max(max_lead, 0)) + 1);
  for (auto& entries : entries_) {
    for (Entry& entry : entries) Weigh(&entry);
  }
}

void SpeculationLedger::Weigh(Entry* entry) const {
  const double saved = (entry->saved + kPriorEvents) / (entry->used + kPriorEvents);
  // No cheaper than its bytes: a cancelled transfer has moved a part of them.
  const double cost =
      std::max(byte_cost_, (entry->unused_cost + kPriorEvents * byte_cost_) /
                               (entry->unused + kPriorEvents));
  entry->pays_from = cost > 0 ? cost / (saved + cost) : 0;
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
  Weigh(&entry);
}

void SpeculationLedger::Unused(Stack stack, int lead, double moved) {
  Entry& entry = Of(stack, lead);
  const double cost = byte_cost_ * moved;
  ++entry.all.unused;
  entry.all.moved_in_vain += moved;
  entry.all.cost += cost;
  entry.unused = kFading * entry.unused + 1;
  entry.unused_cost = kFading * entry.unused_cost + cost;
  Weigh(&entry);
}

void SpeculationLedger::Harmed(Stack stack, int lead, double transfers) {
  Entry& entry = Of(stack, lead);
  entry.all.cost += transfers;
  entry.unused_cost += transfers;
  Weigh(&entry);
}

double SpeculationLedger::TrustOf(const Entry& entry) const {
  return std::min(kMostTrust,
                  (entry.came + kPriorForetold) / (entry.foretold + kPriorForetold));
}

double SpeculationLedger::Threshold(Stack stack, int lead) const {
  const Entry& entry = Of(stack, lead);
  return std::max(entry.pays_from / TrustOf(entry), least_threshold());
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
