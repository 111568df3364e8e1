// What is asked of the model: requests of one source, which comparisons run in batches.
// T tokens, E experts. Thread rule: one thread.
#pragma once

#include <string>
#include <vector>

#include "common/files.h"
#include "corpus/tokenizer.h"
#include "models/expert_predictor.h"

namespace routecast {

struct RequestSet {
  std::string name;  // label of its rows: store, lines.txt, squad:xquad.en.json
  std::vector<std::vector<int64_t>> prompts;  // generate: token ids, ended with eos
  std::vector<RoutingTrace> traces;           // replay
  size_t size() const { return prompts.empty() ? traces.size() : prompts.size(); }
  // What the encoder reads of request `i`.
  std::vector<int64_t> SourceIds(size_t i) const;
};

// At most `wanted` prompts of `source`: a text file (a prompt a line), or KIND:PATH as
// --data takes it (text, jsonl, wikitext, squad, glue; test part only; texts longer than
// 128 tokens give several prompts). UsageError: nothing there, or no prompt in it.
RequestSet ReadPrompts(const std::string& source, const Tokenizer& tokenizer,
                       size_t wanted, bool quiet);

// By request: the probability that its encoder pass needs each expert of each encoder MoE
// layer [layers * E], as `predictor` foretells it from the tokens alone; zeros where it
// has nothing to say.
std::vector<std::vector<float>> PredictedRoutes(const RequestSet& requests,
                                                const MoeGeometry& geometry,
                                                ExpertPredictor* predictor);

// Order of the requests [0, count): the first `warm_up` as they came, the rest batched by
// predicted route.
std::vector<size_t> OrderByRoute(const RequestSet& requests, size_t count, size_t warm_up,
                                 size_t batch, const MoeGeometry& geometry,
                                 ExpertPredictor* predictor);

}  // namespace routecast
