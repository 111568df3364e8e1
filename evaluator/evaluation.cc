#include "evaluator/evaluation.h"

#include <ATen/ATen.h>
#include <c10/core/GradMode.h>

#include <algorithm>
#include <cstdio>
#include <optional>
#include <sstream>
#include <stdexcept>

#include "common/errors.h"
#include "evaluator/evaluation_setup.h"
#include "evaluator/expert_copies.h"
#include "evaluator/generated_texts.h"
#include "evaluator/recorded_run.h"
#include "report/evaluation_report.h"

namespace routecast {
namespace {

// What a run writes beside run.json.
const std::vector<std::string> kOutputs = {"results.json",  "rows.csv",
                                           "table.txt",     "report.html",
                                           "timeline.json", "outputs.jsonl"};

// One comparison: a source of requests, a batch size, an order of requests, a budget.
struct Group {
  const RequestSet* requests = nullptr;
  int batch = 1;
  std::string schedule, budget;
};

ComparisonOptions ComparisonOf(const EvaluationOptions& options,
                               const EvaluationSetup& setup, const Group& group) {
  ComparisonOptions comparison;
  const ExpertFile& file = *setup.file;
  comparison.budget_bytes =
      BudgetOf(options, setup.placement.tiers.chain, group.budget,
               static_cast<uint64_t>(file.count()) * file.spec().stride_bytes());
  comparison.kv_in_budget = options.kv_in_budget;
  comparison.policies = ParsePolicies(options.policies);
  comparison.eviction = ParseEviction(options.eviction);
  comparison.rounds = options.rounds;
  comparison.warmup_rounds = options.warmup_rounds;
  comparison.batch = group.batch;
  comparison.link = options.link;
  if (!options.profile.empty()) comparison.profile = FindProfile(options.profile);
  comparison.oracle = comparison.resident = comparison.uncached = options.compare;
  comparison.oracle =
      options.compare ||
      std::count(options.predictor.begin(), options.predictor.end(), "oracle") > 0;
  comparison.synthetic_weights = IsReplay(options);
  comparison.dtype = ParseDtype("--dtype", options.dtype);
  comparison.quiet = options.quiet;
  comparison.peak_seconds = options.peak_seconds;
  return comparison;
}

// Where a command ran several comparisons: which one a row is of.
std::string GroupSuffix(const ComparisonResult& result, const RowResult& row) {
  return result.num_groups > 1 ? "/" + GroupName(row) : "";
}

// The best row of a predictor, beside the bound, for run.json.
Json Headline(const ComparisonResult& result) {
  Json headline = Json::object();
  for (const RowResult& row : result.rows) {
    const std::string name = std::string(StackName(row.phase)) + "/" + row.policy + "/" +
                             row.predictor + "/" + row.eviction +
                             (row.copies == "lossless" ? "" : "/" + row.copies) +
                             GroupSuffix(result, row);
    headline["speed_up"][name] = row.speed_up;
    if (row.copies == "lossless")  // what is told of a group is no row's own
      headline["bound"][StackName(row.phase) + GroupSuffix(result, row)] = row.bound;
  }
  headline["lossless"] = result.lossless;
  headline["device"] = result.device;
  headline["link"] = result.link;
  headline["link_bytes_per_second"] = result.link_bytes_per_second;
  headline["notes"] = result.notes;
  return headline;
}

void WriteOutputs(const EvaluationOptions& options, const ComparisonResult& result,
                  const std::string& generated) {
  if (options.out.empty()) return;
  if (!generated.empty()) WriteFileAtomic(options.out / "outputs.jsonl", generated);
  WriteFileAtomic(options.out / "results.json", result.ToJson().dump(1) + "\n");
  WriteFileAtomic(options.out / "rows.csv", result.ToCsv());
  WriteFileAtomic(options.out / "table.txt", ComparisonTable(result));
  WriteReport(options.out, options.report_with);
}

std::vector<Group> GroupsOf(const EvaluationOptions& options,
                            const EvaluationSetup& setup) {
  std::vector<Group> groups;
  for (const RequestSet& set : setup.requests) {
    for (int batch : options.batches) {
      for (const std::string& schedule : options.schedules) {
        // Batches of one hold nothing to group, unless that alone was asked for.
        if (schedule == "by_route" && batch == 1 && options.schedules.size() > 1)
          continue;
        for (const std::string& budget : options.budgets)
          groups.push_back({&set, batch, schedule, budget});
      }
    }
  }
  return groups;
}

ComparisonResult RunGroup(const EvaluationOptions& options, const EvaluationSetup& setup,
                          const Group& group, Timeline* timeline,
                          std::vector<Workload::Generated>* generated) {
  const auto workload = MakeWorkload(
      options, setup, *group.requests, group.batch,
      group.schedule == "by_route" ? Schedule::kByRoute : Schedule::kInOrder);
  std::vector<ExpertPredictor*> predictors;
  for (const auto& predictor : setup.predictors) predictors.push_back(predictor.get());
  ComparisonOptions comparing = ComparisonOf(options, setup, group);
  comparing.tiers = setup.placement.tiers;
  comparing.device = setup.placement.device;
  comparing.timeline = timeline;
  comparing.next_token = setup.next_token;
  comparing.warm_start = setup.warm_start;
  const CopyKind copies = ParseCopies(options.copies);
  CopyFigures copy;
  if (copies != CopyKind::kLossless) {
    comparing.copies = CompressedCopy(setup.file, copies, options.quiet);
    copy = MeasureCopy(*setup.file, *comparing.copies);
  }
  Comparison comparison(workload.get(), setup.file, predictors, comparing);
  ComparisonResult result = comparison.Run();
  *generated = workload->generated();
  for (RowResult& row : result.rows) {
    row.prompts = group.requests->name;
    row.schedule = group.schedule;
    if (row.copies != "lossless") row.copy = copy;
    if (options.budgets.size() > 1) row.budget = group.budget;
  }
  return result;
}

ComparisonResult RunGroups(const EvaluationOptions& options, const EvaluationSetup& setup,
                           Timeline* timeline, std::string* lines) {
  ComparisonResult all;
  std::optional<Tokenizer> tokenizer;
  if (!options.prompts.empty()) tokenizer = Tokenizer::Load(options.model);
  const RequestSet* written = nullptr;  // of several comparisons of one set the first
  const std::vector<Group> groups = GroupsOf(options, setup);
  for (const Group& group : groups) {
    if (groups.size() > 1 && !options.quiet) {
      std::fprintf(stderr, "%s, batch %d, %s, %s\n", group.requests->name.c_str(),
                   group.batch, group.schedule.c_str(), group.budget.c_str());
    }
    std::vector<Workload::Generated> generated;
    all.Append(RunGroup(options, setup, group, timeline, &generated));
    if (written == group.requests) continue;
    written = group.requests;
    *lines += GeneratedLines(group.requests->name, generated,
                             tokenizer ? &*tokenizer : nullptr);
  }
  return all;
}

void ValidateTiers(const EvaluationOptions& options) {
  const TierChain chain = UnsizedPlacementOf(options).tiers.chain;
  if (!options.profile.empty()) {
    FindProfile(options.profile);
    if (options.link != "auto") {
      throw UsageError(ErrorText("--profile has a link of its own",
                                 "--link=" + options.link, "leave one of them out"));
    }
  }
  for (const std::string& budget : options.budgets) {
    const uint64_t bytes = ParseBudget(budget, 1);
    // Of a share it is known later what it comes to.
    const bool sized = !chain.gpu_share && !chain.host_share;
    if (sized && budget.back() != '%') TierBudget(chain, bytes, options.budget_given);
  }
  if (options.budgets.size() > 1 && !options.tier.empty()) {
    throw UsageError(ErrorText("--tier names one budget",
                               std::to_string(options.budgets.size()) + " are asked for",
                               "leave --tier or the further budgets out"));
  }
}

// What would do nothing here.
void RequireHeeded(const EvaluationOptions& options) {
  const auto refuse = [](bool unheeded, const char* flag, const char* why) {
    if (unheeded)
      throw UsageError(
          ErrorText(std::string(flag) + " does nothing here", why, "leave it out"));
  };
  const bool replay = IsReplay(options);
  refuse(replay && !options.prompts.empty(), "--prompts",
         "a replay's tokens are the store's: prompts want --model");
  refuse(!replay && options.phase != "decoder", "--phase",
         "it is of a replay: generation runs both stacks");
  refuse(!options.compare && options.baselines != "all", "--baselines",
         "its rows are those of --compare");
  refuse(options.out.empty() && !options.report_with.empty(), "--report_with",
         "report.html is written into --out");
  const std::vector<std::string> on_demand = {"on_demand"};
  refuse(NamesPredictor(options.predictor) && options.policies == on_demand,
         "--predictor", "--policy=on_demand asks nobody");
  const bool alone = std::all_of(options.batches.begin(), options.batches.end(),
                                 [](int batch) { return batch == 1; });
  refuse(alone && options.schedules.size() > 1, "--schedule",
         "batches of one hold nothing to group");
}

void ValidateGroups(const EvaluationOptions& options) {
  for (const std::string& schedule : options.schedules) {
    if (ParseChoice("--schedule", schedule, {"in_order", "by_route"}) == 1 &&
        options.store.empty()) {
      throw UsageError(ErrorText("--schedule=by_route foretells routes from counts", "",
                                 "give --store=STORE as well"));
    }
  }
  std::vector<std::string> batches;
  for (int batch : options.batches) {
    RequireCount("--batch", batch, 1);
    batches.push_back(std::to_string(batch));
  }
  if (options.batches.empty() || options.schedules.empty() || options.budgets.empty()) {
    throw UsageError(ErrorText("a list of values is empty",
                               "--batch, --schedule and --expert_budget name one each",
                               "leave the flag out, or give it a value"));
  }
  RequireDistinct("--batch", batches);
  RequireDistinct("--schedule", options.schedules);
  RequireDistinct("--expert_budget", options.budgets);
  RequireDistinct("--prompts", options.prompts);
  const size_t groups = std::max<size_t>(1, options.prompts.size()) *
                        options.batches.size() * options.schedules.size() *
                        options.budgets.size();
  if (options.timeline && groups > 1) {
    throw UsageError(ErrorText("--timeline draws one comparison",
                               std::to_string(groups) + " are asked for",
                               "give one value of --batch, --schedule, --prompts and "
                               "--expert_budget"));
  }
}

}  // namespace

std::vector<int> ParseBatches(const std::string& text) {
  std::vector<int> batches;
  std::stringstream in(text);
  for (std::string item; std::getline(in, item, ',');) {
    const bool digits = !item.empty() && item.size() < 6 &&
                        std::all_of(item.begin(), item.end(),
                                    [](char c) { return c >= '0' && c <= '9'; });
    if (!digits || std::stoi(item) < 1) {
      throw UsageError(ErrorText("--batch=" + text + " is not a list of sizes",
                                 "'" + item + "' is not a number from 1 to 99999",
                                 "write --batch=1,4,16,32"));
    }
    batches.push_back(std::stoi(item));
  }
  return batches;
}

void RequireCount(const char* flag, int value, int least, int most) {
  if (value >= least && value <= most) return;
  const std::string from = std::to_string(least), to = std::to_string(most);
  throw UsageError(ErrorText(
      std::string(flag) + "=" + std::to_string(value) + " is out of bounds",
      from + " to " + to, std::string("write ") + flag + "=N with N from " + from));
}

void RequireDistinct(const char* flag, std::vector<std::string> items) {
  std::sort(items.begin(), items.end());
  const auto twice = std::adjacent_find(items.begin(), items.end());
  if (twice == items.end()) return;
  throw UsageError(ErrorText(std::string(flag) + " names one twice", *twice,
                             "name each once: their rows could not be told apart"));
}

bool NamesPredictor(const std::vector<std::string>& names) {
  return std::any_of(names.begin(), names.end(), [](const std::string& name) {
    return name != "none" && name != "oracle";
  });
}

Eviction ServedEviction(const std::string& name) {
  if (name.find(',') != std::string::npos) {
    throw UsageError(
        ErrorText("--eviction=" + name + " is a list",
                  "a measured comparison has one; --mode=simulate takes lists",
                  "give one of them a command, and show both with "
                  "--report_with"));
  }
  if (name == EvictionName(Eviction::kBelady)) {
    throw UsageError(ErrorText("--eviction=belady knows the future",
                               "bytes_belady of every row is what it would load; "
                               "--mode=simulate has a row of it",
                               "choose lru, or another that can be served"));
  }
  std::vector<std::string> names;
  for (int i = 0; i < static_cast<int>(Eviction::kBelady); ++i)
    names.push_back(EvictionName(static_cast<Eviction>(i)));
  return static_cast<Eviction>(ParseChoice("--eviction", name, names));
}

void WriteReport(const fs::path& out, const std::vector<fs::path>& with) {
  std::vector<fs::path> folders = {out};
  folders.insert(folders.end(), with.begin(), with.end());
  try {
    WriteEvaluationReport(out / "report.html", folders);
  } catch (const std::length_error&) {
    std::fprintf(stderr,
                 "report.html is left out: so many rows make a page too large; "
                 "rows.csv has them\n");
  }
}

void ValidateEvaluation(const EvaluationOptions& options) {
  if (options.model.empty() && options.store.empty()) {
    throw UsageError(
        ErrorText("nothing to evaluate", "",
                  "give --model=FOLDER (generate) or --store=STORE (replay)"));
  }
  if (!options.model.empty() && options.store.empty() && options.prompts.empty()) {
    throw UsageError(ErrorText("--model needs something to read", "",
                               "give --prompts=FILE (a prompt a line) or --store=STORE"));
  }
  if (!options.model.empty() && !fs::is_directory(options.model)) {
    throw UsageError(ErrorText("no checkpoint folder: " + options.model.string(), "",
                               "check --model"));
  }
  RequireHeeded(options);
  ParsePolicies(options.policies);
  ServedEviction(options.eviction);
  ParseChoice("--baselines", options.baselines, {"none", "simple", "all"});
  if (options.timeline && options.out.empty()) {
    throw UsageError(ErrorText("--timeline needs --out", "timeline.json is written there",
                               "give --out=FOLDER"));
  }
  ParseChoice("--phase", options.phase, {"decoder", "encoder", "both"});
  ParseChoice("--link", options.link, {"auto", "native", "emulated"});
  ParseDtype("--dtype", options.dtype);
  ParseCopies(options.copies);
  ValidateTiers(options);
  RequireCount("--max_new_tokens", options.max_new_tokens, 1);
  RequireCount("--rounds", options.rounds, 1);
  RequireCount("--warmup_rounds", options.warmup_rounds, 0);
  ValidateGroups(options);
}

Json Evaluate(const EvaluationOptions& options, const Json& configuration) {
  const c10::NoGradGuard no_grad;
  if (options.dry_run) {
    SetUpEvaluation(options);
    return {};
  }
  return Recorded(options.out, kOutputs, configuration, [&](const BeginRun& begin) {
    const EvaluationSetup setup = SetUpEvaluation(options);
    begin();
    Timeline timeline;
    const bool draws = options.timeline && !options.out.empty();
    std::string generated;
    const ComparisonResult result =
        RunGroups(options, setup, draws ? &timeline : nullptr, &generated);
    std::printf("%s", ComparisonTable(result).c_str());
    WriteOutputs(options, result, generated);
    if (draws) timeline.Write(options.out / "timeline.json");
    if (!result.lossless) throw std::logic_error("two rows put out different bits");
    return Headline(result);
  });
}

}  // namespace routecast
