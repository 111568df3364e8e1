// What speculation is worth by stack and lead (layer visits between a prediction and its
// visit), learned while it runs, and the threshold that follows from it.
//
// Two things are kept, both fading. Trust: how many of the candidates that were foretold
// came, over the sum of their probabilities; it is judged whether or not they are
// fetched, so that what is shut can open again. Economy, in transfers: the waiting that a
// used speculation saved, and what an unused one cost - its bytes, at what the policy's
// own threshold takes them for, demands that stood behind it on the link, and experts
// that it pushed out and that were missed soon after. Where S is saved and C costs,
// speculation pays from a chance of C / (S + C) on. Thread rule: one thread at a time.
#pragma once

#include <cstdint>
#include <vector>

#include "common/routing.h"

namespace routecast {

struct SpeculationAccount {
  int lead = 0;
  double threshold = 0;  // on what the predictor says; above 1: shut
  double trust = 1;
  uint64_t judged = 0;            // candidates whose visit has come
  uint64_t used = 0, unused = 0;  // of what was fetched, once it is known
  // All told, in transfers.
  double moved_in_vain = 0, saved = 0, cost = 0;
  bool open() const { return threshold <= 1; }
};

class SpeculationLedger {
 public:
  // `threshold`: the policy's, which holds until there is evidence; in [0, 1).
  SpeculationLedger(int max_lead, double threshold);

  // A candidate's visit has come. REQUIRES 1 <= lead <= max_lead, here and below.
  void Judge(Stack stack, int lead, double probability, bool came);
  // A speculation was used, and saved this share of a transfer's waiting.
  void Used(Stack stack, int lead, double saved);
  // One was not, and had moved this share of its bytes.
  void Unused(Stack stack, int lead, double moved);
  // One stood in the way, for so many transfers' time.
  void Harmed(Stack stack, int lead, double transfers);

  // Never below half the policy's.
  double Threshold(Stack stack, int lead) const;
  // The lowest that a threshold can get: what is judged.
  double least_threshold() const { return threshold_ / 2; }
  // By lead, from 1.
  std::vector<SpeculationAccount> Accounts(Stack stack) const;

 private:
  struct Entry {
    SpeculationAccount all;
    double foretold = 0, came = 0;                            // fading
    double used = 0, saved = 0, unused = 0, unused_cost = 0;  // fading
    double pays_from = 0;                                     // follows from these
  };
  Entry& Of(Stack stack, int lead) {
    return entries_[static_cast<int>(stack)][static_cast<size_t>(lead)];
  }
  const Entry& Of(Stack stack, int lead) const {
    return entries_[static_cast<int>(stack)][static_cast<size_t>(lead)];
  }
  double TrustOf(const Entry& entry) const;
  void Weigh(Entry* entry) const;  // pays_from

  double threshold_;
  double byte_cost_;  // of a transfer in vain, in transfers
  std::vector<Entry> entries_[2];
};

}  // namespace routecast
