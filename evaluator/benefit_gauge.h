// Does speculation pay on this machine, for this model and predictor? Steps with and
// without it are interleaved in short blocks; speculation is switched off unless its
// steps cost clearly less. A trial comes first, then again after ever longer spells, so
// that a change is noticed; each trial adds to the fading evidence of those before.
// Thread rule: one thread at a time. No clock: the caller measures.
#pragma once

#include <vector>

namespace routecast {

struct BenefitGaugeOptions {
  int block_steps =
      4;  // consecutive steps of one mode; the first of a block is not counted
  int trial_pairs = 6;    // blocks of each mode in a trial
  int first_spell = 512;  // steps until the second trial, then doubled each time
  int longest_spell = 8192;
  int most_extensions = 2;  // a trial without a clear answer goes on as long again
};

class BenefitGauge {
 public:
  explicit BenefitGauge(BenefitGaugeOptions options = {});

  // Whether the step that comes may speculate.
  bool Speculate() const;
  // The step is over: `seconds` that it cost (waiting for experts, and the predictor, who
  // took `asking` of them). A trial that is due begins after a step that `may_begin` one.
  // It ends early where asking alone takes what there is to win.
  void Record(double seconds, bool may_begin = true, double asking = 0);
  // The verdict of the last trial: false = speculation is off. True before the first one
  // ends.
  bool helps() const { return helps_; }
  bool in_trial() const { return in_trial_; }
  // The spell is over, and the next trial waits for a step that may begin it.
  bool due() const { return !in_trial_ && position_ >= spell_; }
  // Whether the predictor must know what is routed: it is asked now, or may be soon.
  bool needs_predictor() const { return in_trial_ || helps_ || due(); }
  // Seconds a step, by the evidence so far; 0 before the first trial ends.
  double with_seconds() const { return with_; }
  double without_seconds() const { return without_; }

 private:
  void Decide();
  // Whether the difference of the modes stands out of the noise of the trial's steps.
  bool IsClear() const;
  // Whether asking takes so long, beyond the noise, that no waiting saved could make up
  // for it.
  bool IsHopeless() const;
  BenefitGaugeOptions options_;
  bool helps_ = true, in_trial_ = true;
  int position_ = 0;  // step within the trial or the spell
  int extensions_ = 0;
  int spell_;
  double with_ = 0, without_ = 0;
  std::vector<double> on_, off_, asking_;  // of the trial's steps that count
};

}  // namespace routecast
