#include "evaluator/requests.h"

#include <ATen/ATen.h>

#include <algorithm>
#include <fstream>
#include <thread>

#include "common/errors.h"
#include "corpus/corpus.h"
#include "corpus/task_prompts.h"
#include "evaluator/route_schedule.h"

namespace routecast {
namespace {

constexpr size_t kMostPromptTokens = 128;  // as the collector cuts long texts
// Of a line, which is nobody's to cut: attention takes memory by its square.
constexpr size_t kMostLineTokens = 2048;

// Whole pieces of `ids`, each ended with eos.
void AddPieces(const std::vector<int32_t>& ids, size_t wanted, RequestSet* set) {
  for (size_t from = 0; from < ids.size() && set->prompts.size() < wanted;) {
    const size_t to = std::min(ids.size(), from + kMostPromptTokens - 1);
    set->prompts.emplace_back(ids.begin() + static_cast<std::ptrdiff_t>(from),
                              ids.begin() + static_cast<std::ptrdiff_t>(to));
    set->prompts.back().push_back(Tokenizer::kEos);
    from = to;
  }
}

void ReadLines(const fs::path& file, const Tokenizer& tokenizer, size_t wanted,
               RequestSet* set) {
  std::ifstream lines(file);
  if (!lines) {
    throw UsageError(ErrorText("cannot read --prompts=" + file.string(), "",
                               "give a text file, or KIND:PATH as for --data"));
  }
  set->name = file.filename().string();
  size_t number = 0;
  for (std::string line; std::getline(lines, line) && set->prompts.size() < wanted;) {
    ++number;
    const std::vector<int32_t> ids = tokenizer.Encode(line);
    if (ids.empty()) continue;
    if (ids.size() >= kMostLineTokens) {
      throw UsageError(ErrorText(
          "a prompt is too long: " + file.string() + ", line " + std::to_string(number),
          std::to_string(ids.size()) + " tokens, at most " +
              std::to_string(kMostLineTokens - 1),
          "make several lines of it"));
    }
    set->prompts.emplace_back(ids.begin(), ids.end());
    set->prompts.back().push_back(Tokenizer::kEos);
  }
}

void ReadCorpus(const std::string& source, const Tokenizer& tokenizer, size_t wanted,
                bool quiet, RequestSet* set) {
  const SourceSpec spec = ParseSourceSpec(source);
  set->name =
      source.substr(0, source.find(':') + 1) + fs::path(spec.path).filename().string();
  const int threads = std::max(1, static_cast<int>(std::thread::hardware_concurrency()));
  const Corpus corpus = Corpus::Open({source}, "", threads, quiet);
  for (uint64_t id : corpus.DocumentsOf(SplitPart::kTest)) {
    std::string_view rest = corpus.Text(id);
    while (!rest.empty() && set->prompts.size() < wanted) {
      const size_t end = rest.find(kPromptSeparator);
      AddPieces(tokenizer.EncodePlain(rest.substr(0, end)), wanted, set);
      rest = end == std::string_view::npos ? "" : rest.substr(end + 1);
    }
  }
}

}  // namespace

std::vector<int64_t> RequestSet::SourceIds(size_t i) const {
  if (!prompts.empty()) return prompts[i];
  const auto& ids = traces[i].encoder.token_ids;
  return {ids.begin(), ids.end()};
}

RequestSet ReadPrompts(const std::string& source, const Tokenizer& tokenizer,
                       size_t wanted, bool quiet) {
  RequestSet set;
  const bool is_corpus = !fs::exists(source) && source.find(':') != std::string::npos;
  if (is_corpus) {
    ReadCorpus(source, tokenizer, wanted, quiet, &set);
  } else {
    ReadLines(source, tokenizer, wanted, &set);
  }
  if (set.prompts.empty()) {
    throw UsageError(ErrorText("no prompt in --prompts=" + source,
                               is_corpus ? "its test part is empty" : "no line of text",
                               "give a larger source"));
  }
  return set;
}

std::vector<std::vector<float>> PredictedRoutes(const RequestSet& requests,
                                                const MoeGeometry& geometry,
                                                ExpertPredictor* predictor) {
  const int64_t experts = geometry.num_experts;
  std::vector<std::vector<float>> routes;
  for (size_t i = 0; i < requests.size(); ++i) {
    const std::vector<int64_t> ids = requests.SourceIds(i);
    const auto tokens = static_cast<int64_t>(ids.size());
    RoutingWindow window;
    window.num_layers = geometry.encoder_layers;
    window.num_experts = geometry.num_experts;
    window.token_ids_BT = at::tensor(ids, at::kLong).unsqueeze(0);
    window.valid_BT = at::ones({1, tokens}, at::kBool);
    window.experts_BTL =
        at::full({1, tokens, geometry.encoder_layers}, experts, at::kLong);
    std::vector<float> route;
    for (const auto& probs :
         predictor->PredictLeads(window, std::max(1, geometry.encoder_layers))) {
      const at::Tensor needed =
          probs ? (1 - (1 - probs->to(at::kFloat)[0]).prod(0)).contiguous()
                : at::zeros({experts}, at::kFloat);
      route.insert(route.end(), needed.data_ptr<float>(),
                   needed.data_ptr<float>() + experts);
    }
    routes.push_back(std::move(route));
  }
  return routes;
}

std::vector<size_t> OrderByRoute(const RequestSet& requests, size_t count, size_t warm_up,
                                 size_t batch, const MoeGeometry& geometry,
                                 ExpertPredictor* predictor) {
  auto routes = PredictedRoutes(requests, geometry, predictor);
  warm_up = std::min(warm_up, count);
  std::vector<size_t> order;
  for (size_t i = 0; i < warm_up; ++i) order.push_back(i);
  routes.resize(count);
  routes.erase(routes.begin(), routes.begin() + static_cast<std::ptrdiff_t>(warm_up));
  for (size_t i : ScheduleByRoute(routes, batch)) order.push_back(warm_up + i);
  return order;
}

}  // namespace routecast
