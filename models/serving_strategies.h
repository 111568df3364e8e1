// Strategies that start with nothing and count while they serve a decoder: what the
// original system's multi-look, top-k and intelligent modes count, by (layer, expert),
// behind the door of all predictors. T tokens, E experts.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "models/expert_predictor.h"

namespace routecast {

// `token_patterns`: four tables (the newest three token ids, the source layer's expert,
// the position modulo 64, the newest two and three choices), each speaking from three
// counts on; their mean, 32 experts at most.
// `recent_frequency`: the 32 most frequent (layer, expert) of the stack; counts fade by
// .999 a token, the list is renewed every 100 tokens.
// `mixed_scores`: .4 transitions, .3 frequency, .2 recency, .1 patterns; counts fade by
// .99 a token, and each weight follows its part's F1 (+ .01 (F1 - .5), renormalised).
// The first and the last need token ids. Where tokens take K experts each of them is
// counted, contexts are their first choices, and numbers of experts and of counts are K
// times as large.
std::vector<std::string> ServingStrategyNames();

// `name` of ServingStrategyNames(). Serving only: Predict says nothing. PredictLast
// REQUIRES calls in the order of the pass, the same sequences in the same rows; what a
// sequence's last token chose is not learnt, nor what was never asked about. Encoders get
// no answer. Tables stop growing at a bound. Thread rule: one thread at a time.
std::unique_ptr<ExpertPredictor> MakeServingStrategy(const std::string& name,
                                                     const MoeGeometry& geometry);

}  // namespace routecast
