// outputs.jsonl: what generation put out, a line a prompt that was run, to be read.
// Thread rule: one thread.
#pragma once

#include <string>
#include <vector>

#include "corpus/tokenizer.h"
#include "evaluator/workload.h"

namespace routecast {

// A line for each: `prompts` (their label), `prompt_ids` and `ids` (token ids), and where
// there is a tokenizer `prompt` and `text`, in UTF-8.
std::string GeneratedLines(const std::string& prompts,
                           const std::vector<Workload::Generated>& generated,
                           const Tokenizer* tokenizer);

}  // namespace routecast
