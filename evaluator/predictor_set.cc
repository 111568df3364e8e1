#include "evaluator/predictor_set.h"

#include <algorithm>
#include <cstdio>
#include <functional>
#include <map>
#include <numeric>

#include "common/errors.h"
#include "common/stop.h"
#include "evaluator/recorded_visits.h"
#include "models/checkpoint.h"
#include "models/predictor_factory.h"
#include "models/serving_strategies.h"

namespace routecast {
namespace {

const std::vector<std::string> kSimple = {"frequency", "token_table", "markov",
                                          "stale_gate"};
constexpr uint32_t kLeastVocabulary = 32128;  // ids unseen in training may come

bool Has(const std::vector<std::string>& names, const std::string& name) {
  return std::find(names.begin(), names.end(), name) != names.end();
}

// All sequences of the train part, some at a time: a store may be larger than memory, and
// a stop is heard between two reads. Returns how many there are.
size_t EachOfTrainPart(const TraceReader& reader,
                       const std::function<void(const RoutingTrace&)>& look) {
  constexpr size_t kAtOnce = 1024;
  std::vector<uint64_t> ids;
  size_t count = 0;
  const auto read = [&] {
    ThrowIfStopped("while counting the train part");
    for (const RoutingTrace& trace : reader.ReadMany(ids, WithHidden::kNo)) look(trace);
    count += ids.size();
    ids.clear();
  };
  for (const SequenceInfo& info : reader.sequences()) {
    if (SplitOf(info.group_id) != SplitPart::kTrain) continue;
    ids.push_back(info.sequence_id);
    if (ids.size() == kAtOnce) read();
  }
  read();
  return count;
}

// Counts of the train part: what the simple baselines predict from.
std::shared_ptr<const BaselineTables> FitTables(const TraceReader& reader, bool quiet) {
  uint32_t vocab = 0;
  EachOfTrainPart(reader, [&](const RoutingTrace& trace) {
    for (uint32_t id : trace.encoder.token_ids) vocab = std::max(vocab, id);
    for (uint32_t id : trace.decoder.token_ids) vocab = std::max(vocab, id);
  });
  auto tables = std::make_shared<BaselineTables>(
      reader.config().geometry, static_cast<int>(std::max(vocab + 1, kLeastVocabulary)));
  const size_t count =
      EachOfTrainPart(reader, [&](const RoutingTrace& trace) { tables->Fit(trace); });
  if (!quiet) std::fprintf(stderr, "baselines: %zu train sequences\n", count);
  return tables;
}

// A name may be of a trained run: those in this folder are looked at as well. A path, and
// what has a prefix, is LoadPredictor's to refuse.
void RequireKnown(const std::string& name, std::vector<std::string> known) {
  std::error_code none;
  if (name.find_first_of("/:") != std::string::npos || fs::is_directory(name, none))
    return;
  known.insert(known.begin(), {"none", "oracle"});
  if (!Has(known, name)) {
    for (fs::directory_iterator it(".", none), end; !none && it != end;
         it.increment(none)) {
      std::error_code unreadable;  // a link in a circle, another one's folder
      if (fs::exists(it->path() / "config.json", unreadable))
        known.push_back(it->path().filename().string());
    }
  }
  ParseChoice("--predictor", name, known);
}

}  // namespace

std::vector<std::string> WithBaselines(std::vector<std::string> names,
                                       const std::string& which) {
  const int kind = ParseChoice("--baselines", which, {"none", "simple", "all"});
  std::vector<std::string> missing;
  auto baselines = BaselineNames();
  const auto strategies = ServingStrategyNames();
  baselines.insert(baselines.end(), strategies.begin(), strategies.end());
  for (const std::string& name : names) RequireKnown(name, baselines);
  for (const std::string& name : baselines) {
    const bool wanted = kind == 2 || (kind == 1 && Has(kSimple, name));
    if (wanted && !Has(names, name)) missing.push_back(name);
  }
  names.insert(names.begin(), missing.begin(), missing.end());
  std::erase(names, "none");
  std::erase(names, "oracle");
  return names;
}

std::vector<RouterWeights> StoredRouters(const TraceReader& reader) {
  if (!fs::exists(reader.routers_path())) return {};
  return ReadRouters(reader.routers_path(), reader.config().geometry);
}

ToldInputs ToldBy(const TraceReader& records) {
  const auto& sequences = records.sequences();
  return {records.config().token_ids,
          std::any_of(sequences.begin(), sequences.end(),
                      [](const SequenceInfo& info) { return info.has_hidden; })};
}

namespace {

// What a predictor needs and nobody tells it; empty: nothing.
std::string Lacking(const ExpertPredictor& predictor, ToldInputs told) {
  if (predictor.needs_token_ids() && !told.token_ids) return "token ids";
  return predictor.needs_hidden() && !told.router_inputs ? "router inputs" : "";
}

// A counting predictor as it is before anything was counted.
std::unique_ptr<ExpertPredictor> EmptyBaseline(const std::string& name,
                                               const MoeGeometry& geometry) {
  return MakeBaseline(name, std::make_shared<BaselineTables>(geometry, 0), geometry, {});
}

// Trained runs of one kind get their folders' names behind it, and a number where these
// are equal too. `given[i]`: how the user named predictors[i].
void TellApart(const std::vector<std::string>& given,
               const std::vector<std::unique_ptr<ExpertPredictor>>& predictors) {
  std::map<std::string, int> named, labelled;
  for (const auto& predictor : predictors) ++named[predictor->name()];
  for (size_t i = 0; i < predictors.size(); ++i) {
    const std::string name = predictors[i]->name();
    if (named[name] == 1) continue;
    const fs::path folder = fs::path(given[i]).lexically_normal();
    const std::string last =
        (folder.has_filename() ? folder : folder.parent_path()).filename().string();
    const int before = labelled[name + " " + last]++;
    predictors[i]->SetLabel(
        name + " (" + last +
        (before > 0 ? ", " + std::to_string(before + 1) : std::string()) + ")");
  }
}

// The names without those that cannot be served.
std::vector<std::string> Servable(
    const std::vector<std::string>& names, const std::vector<std::string>& asked,
    const std::function<std::string(const std::string& name)>& lacking, bool quiet) {
  std::vector<std::string> servable;
  for (const std::string& name : names) {
    const std::string what = lacking(name);
    if (what.empty()) {
      servable.push_back(name);
    } else if (Has(asked, name)) {
      throw UsageError(ErrorText("the predictor " + name + " needs " + what,
                                 "the store has none",
                                 "leave it out, or use a store with " + what));
    } else if (!quiet) {
      std::fprintf(stderr, "%s is left out: it needs %s, and the store has none\n",
                   name.c_str(), what.c_str());
    }
  }
  return servable;
}

}  // namespace

std::vector<std::unique_ptr<ExpertPredictor>> MakePredictors(
    const std::vector<std::string>& names, const std::vector<std::string>& asked,
    const MoeGeometry& geometry, const std::vector<RouterWeights>& routers,
    const TraceReader* reader, bool quiet, ToldInputs told) {
  // A wrong name or folder is said before the store is read twice for counts, and so is
  // what cannot be served.
  std::map<std::string, std::unique_ptr<ExpertPredictor>> loaded;
  const auto lacking = [&](const std::string& name) -> std::string {
    if (!Has(BaselineNames(), name)) {
      auto& predictor = loaded[name];
      if (!predictor) predictor = LoadPredictor(name, geometry, "", routers);
      return Lacking(*predictor, told);
    }
    if (name == "stale_gate" && !told.router_inputs) return "router inputs";
    if (name == "stale_gate") return "";
    return Lacking(*EmptyBaseline(name, geometry), told);
  };
  std::vector<std::unique_ptr<ExpertPredictor>> predictors;
  std::vector<std::string> given;
  std::shared_ptr<const BaselineTables> tables;
  for (const std::string& name : Servable(names, asked, lacking, quiet)) {
    if (name == "stale_gate" && routers.empty() && !Has(asked, name)) continue;
    given.push_back(name);
    if (!Has(BaselineNames(), name)) {
      auto& predictor = loaded[name];
      predictors.push_back(predictor ? std::move(predictor)
                                     : LoadPredictor(name, geometry, "", routers));
      predictors.back()->PrepareServing();
      continue;
    }
    if (name != "stale_gate" && !tables) {
      if (!reader) {
        throw UsageError(ErrorText("--predictor=" + name + " counts recorded routing", "",
                                   "give --store=STORE as well"));
      }
      tables = FitTables(*reader, quiet);
    }
    predictors.push_back(MakeBaseline(name, tables, geometry, routers));
  }
  TellApart(given, predictors);
  return predictors;
}

UseShares CountUses(const TraceReader& reader, const MoeGeometry& geometry) {
  const MoeGeometry& g = reader.config().geometry;
  if (g.encoder_layers != geometry.encoder_layers ||
      g.decoder_layers != geometry.decoder_layers ||
      g.num_experts != geometry.num_experts) {
    throw UsageError(ErrorText("--warm_start counts a model of another geometry",
                               std::to_string(g.num_layers()) + " MoE layers x " +
                                   std::to_string(g.num_experts) + " experts, here are " +
                                   std::to_string(geometry.num_layers()) + " x " +
                                   std::to_string(geometry.num_experts),
                               "give a store of this model"));
  }
  std::vector<uint64_t> counts(static_cast<size_t>(g.num_keys()), 0);
  EachOfTrainPart(reader, [&](const RoutingTrace& trace) {
    for (const Stack stack : {Stack::kEncoder, Stack::kDecoder}) {
      const RoutingSpan& span = stack == Stack::kEncoder ? trace.encoder : trace.decoder;
      for (size_t i = 0; i < span.expert_ids.size(); ++i) {
        const auto layer = static_cast<int>(i / static_cast<size_t>(span.num_tokens));
        const auto token = static_cast<int>(i % static_cast<size_t>(span.num_tokens));
        for (const int expert : ChoicesOf(span, g, layer, token)) {
          const ExpertKey key{g.GlobalLayer(stack, layer), expert};
          ++counts[static_cast<size_t>(key.Index(g))];
        }
      }
    }
  });
  return SharesOf(counts, g, "train part of the store");
}

std::vector<int64_t> FrequentIds(const TraceReader& reader, int64_t vocab_size,
                                 int64_t count) {
  if (vocab_size <= count) return {};
  std::vector<int64_t> said(static_cast<size_t>(vocab_size)), ids(said.size());
  EachOfTrainPart(reader, [&](const RoutingTrace& trace) {
    for (uint32_t id : trace.decoder.token_ids) {
      if (id < said.size()) ++said[id];
    }
  });
  std::iota(ids.begin(), ids.end(), 0);
  std::stable_sort(ids.begin(), ids.end(), [&](int64_t a, int64_t b) {
    return said[static_cast<size_t>(a)] > said[static_cast<size_t>(b)];
  });
  ids.resize(static_cast<size_t>(count));
  return ids;
}

}  // namespace routecast
