// What speculation is worth by stack and lead (layer visits between a prediction and its
// visit), learned while it runs, and the threshold that follows from it.
//
// Two things are kept, both fading. Trust: how many of the candidates that were foretold
// came, over the sum of their probabilities; it is judged whether or not they are
// fetched, so that what is shut can open again. Economy, in transfers: the waiting that a
// used speculation saved, and what an unused one cost - its bytes, at what the policy's
// own threshold takes them for, demands that stood behind it on the link, and experts
// that it pushed out and that were missed soon after. Where S is saved and C costs,
// speculation pays from a chance of C / (S + C) on. On a link that is idle for most of
// the time bytes cost less. Thread rule: one thread at a time.
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

  // How busy the link is while this stack runs, in [0, 1] (evaluator/link_use.h); 1 until
  // it is said.
  void SetLinkUse(Stack stack, double share);

  // Never below least_threshold().
  double Threshold(Stack stack, int lead) const;
  // The lowest that a threshold can get: what is judged. Half the policy's on a busy
  // link, a fifth on an idle one.
  double least_threshold(Stack stack) const;
  // By lead, from 1.
  std::vector<SpeculationAccount> Accounts(Stack stack) const;

 private:
  struct Entry {
    SpeculationAccount all;
    double foretold = 0, came = 0;                    // fading
    double used = 0, saved = 0;                       // fading
    double unused = 0, unused_moved = 0, harmed = 0;  // fading
  };
  Entry& Of(Stack stack, int lead) {
    return entries_[static_cast<int>(stack)][static_cast<size_t>(lead)];
  }
  const Entry& Of(Stack stack, int lead) const {
    return entries_[static_cast<int>(stack)][static_cast<size_t>(lead)];
  }
  double TrustOf(const Entry& entry) const;
  double PaysFrom(const Entry& entry, double byte_cost) const;

  double threshold_;
  double byte_cost_;          // of a transfer in vain on a busy link, in transfers
  double price_[2] = {1, 1};  // by stack: share of that
  std::vector<Entry> entries_[2];
};

}  // namespace routecast
