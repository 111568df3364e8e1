#include "models/beam_search.h"

#include <algorithm>
#include <cmath>
#include <stdexcept>

namespace routecast {
namespace {

// Far below every sum of log probabilities: at the first step all beams are the same, so
// all but one must lose.
constexpr float kOutOfTheRace = -1e9f;

}  // namespace

BeamSearch::BeamSearch(const BeamOptions& options, int64_t end_token, int max_new_tokens)
    : options_(options),
      end_token_(end_token),
      max_new_tokens_(max_new_tokens),
      running_(static_cast<size_t>(options.num_beams)) {
  for (size_t i = 1; i < running_.size(); ++i) running_[i].score = kOutOfTheRace;
}

void BeamSearch::Step(std::span<const float> log_probs) {
  if (done_) return;
  const std::vector<Candidate> candidates = BestCandidates(log_probs);
  const bool last_step = steps_ + 1 == max_new_tokens_;
  ++steps_;
  Finish(candidates, last_step);
  if (!last_step) GoOn(candidates);
  const bool enough = options_.early_stopping == EarlyStopping::kWhenFull && full();
  done_ = last_step || enough || !MayImprove();
}

std::vector<BeamSearch::Candidate> BeamSearch::BestCandidates(
    std::span<const float> log_probs) const {
  const size_t vocabulary = log_probs.size() / running_.size();
  // Twice the beams: each of them may end, and as many must be left to go on with.
  const size_t wanted = 2 * running_.size();
  if (vocabulary < wanted) throw std::logic_error("beam search: vocabulary too small");
  std::vector<Candidate> all;
  all.reserve(log_probs.size());
  for (size_t i = 0; i < log_probs.size(); ++i) {
    const size_t beam = i / vocabulary;
    all.push_back({running_[beam].score + log_probs[i], static_cast<int>(beam),
                   static_cast<int64_t>(i % vocabulary)});
  }
  const auto better = [](const Candidate& a, const Candidate& b) {
    if (a.score != b.score) return a.score > b.score;
    return a.beam != b.beam ? a.beam < b.beam : a.id < b.id;
  };
  std::partial_sort(all.begin(), all.begin() + static_cast<int64_t>(wanted), all.end(),
                    better);
  all.resize(wanted);
  return all;
}

void BeamSearch::Finish(const std::vector<Candidate>& candidates, bool last_step) {
  const auto divisor = static_cast<float>(std::pow(steps_, options_.length_penalty));
  // Only the first num_beams count: the others are there so that the search can go on.
  for (size_t i = 0; i < running_.size(); ++i) {
    const Candidate& c = candidates[i];
    if (!last_step && c.id != end_token_) continue;
    Finished sequence{running_[static_cast<size_t>(c.beam)].ids, c.score / divisor};
    sequence.ids.push_back(c.id);
    // Behind equal scores: who finished first stays in front.
    const auto place =
        std::find_if(finished_.begin(), finished_.end(),
                     [&](const Finished& other) { return other.score < sequence.score; });
    finished_.insert(place, std::move(sequence));
  }
  if (finished_.size() > running_.size()) finished_.resize(running_.size());
}

void BeamSearch::GoOn(const std::vector<Candidate>& candidates) {
  std::vector<Beam> next;
  for (const Candidate& c : candidates) {
    if (c.id == end_token_ || next.size() == running_.size()) continue;
    Beam beam{running_[static_cast<size_t>(c.beam)].ids, c.score, c.beam};
    beam.ids.push_back(c.id);
    next.push_back(std::move(beam));
  }
  running_ = std::move(next);
}

bool BeamSearch::MayImprove() const {
  if (!full()) return true;
  const bool at_full_length =
      options_.early_stopping == EarlyStopping::kNever && options_.length_penalty > 0;
  const int length = at_full_length ? max_new_tokens_ : steps_;
  const float best_possible =
      running_.front().score /
      static_cast<float>(std::pow(length, options_.length_penalty));
  return best_possible > finished_.back().score;
}

std::vector<GeneratedSequence> BeamSearch::Best(int count) const {
  if (!done_) throw std::logic_error("beam search: not done yet");
  std::vector<GeneratedSequence> best;
  for (int i = 0; i < count; ++i) {
    const Finished& f = finished_.at(static_cast<size_t>(i));
    best.push_back({f.ids, f.score});
  }
  return best;
}

}  // namespace routecast
