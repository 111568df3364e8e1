// Bookkeeping of beam search over one sequence: no model, no tensors. Reference:
// transformers 5.23.0, GenerationMixin._beam_search (one end-of-sequence token, no
// sampling). Thread rule: one thread.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

namespace routecast {

// When a sequence's search ends before the last step.
enum class EarlyStopping : uint8_t {
  kHeuristic,  // no running beam, scored at its present length, beats the worst finished
  kWhenFull,   // as soon as num_beams sequences are finished
  kNever,      // as kHeuristic, but a positive length penalty is taken at full length
};

struct BeamOptions {
  int num_beams = 1;
  double length_penalty = 1;  // scores are divided by (new tokens ^ penalty)
  EarlyStopping early_stopping = EarlyStopping::kHeuristic;
};

struct GeneratedSequence {
  std::vector<int64_t> ids;  // new tokens, ended by (and including) end-of-sequence
  double score = 0;          // beams: log probability / length ^ penalty; else 0
  bool no_numbers = false;   // GenerationOptions::end_without_numbers: ended by logits
};

class BeamSearch {
 public:
  struct Beam {
    std::vector<int64_t> ids;  // new tokens so far
    float score = 0;           // sum of log probabilities
    int source = 0;            // the beam before the last step that it goes on from
  };

  BeamSearch(const BeamOptions& options, int64_t end_token, int max_new_tokens);

  // log_probs: num_beams * vocabulary fp32 values, beam-major, of running()'s next
  // tokens; -inf forbids one. REQUIRES vocabulary >= 2 * num_beams, fewer than
  // max_new_tokens steps so far. Equal scores: the lower beam, then the lower id, comes
  // first. Nothing happens once done().
  void Step(std::span<const float> log_probs);
  // Always num_beams, the best first.
  const std::vector<Beam>& running() const { return running_; }
  bool done() const { return done_; }
  // The best `count` finished sequences, best first. REQUIRES done(), count <= num_beams.
  std::vector<GeneratedSequence> Best(int count) const;

 private:
  struct Finished {
    std::vector<int64_t> ids;
    float score = 0;
  };
  struct Candidate {
    float score;
    int beam;
    int64_t id;
  };
  std::vector<Candidate> BestCandidates(std::span<const float> log_probs) const;
  void Finish(const std::vector<Candidate>& candidates, bool last_step);
  void GoOn(const std::vector<Candidate>& candidates);
  bool MayImprove() const;
  bool full() const { return finished_.size() == running_.size(); }

  BeamOptions options_;
  int64_t end_token_;
  int max_new_tokens_;
  int steps_ = 0;
  bool done_ = false;
  std::vector<Beam> running_;
  std::vector<Finished> finished_;  // best first, at most num_beams
};

}  // namespace routecast
