#include "evaluator/generated_texts.h"

#include "common/run_record.h"

namespace routecast {
namespace {

std::string TextOf(const std::vector<int64_t>& ids, const Tokenizer& tokenizer) {
  return tokenizer.Decode(std::vector<int32_t>(ids.begin(), ids.end()));
}

}  // namespace

std::string GeneratedLines(const std::string& prompts,
                           const std::vector<Workload::Generated>& generated,
                           const Tokenizer* tokenizer) {
  std::string lines;
  for (const Workload::Generated& one : generated) {
    Json line = {{"prompts", prompts}, {"prompt_ids", one.prompt}, {"ids", one.ids}};
    if (tokenizer != nullptr) {
      line["prompt"] = TextOf(one.prompt, *tokenizer);
      line["text"] = TextOf(one.ids, *tokenizer);
    }
    // Bytes of a token may be a part of a character alone.
    lines += line.dump(-1, ' ', false, Json::error_handler_t::replace) + "\n";
  }
  return lines;
}

}  // namespace routecast
