// routecast-evaluate: generation or replay under an expert budget, compared row by row.
#include <ATen/Parallel.h>
#include <gflags/gflags.h>

#include <algorithm>
#include <sstream>
#include <thread>

#include "common/errors.h"
#include "common/model_folder.h"
#include "evaluator/evaluation.h"
#include "launch/flags.h"
#include "launch/main.h"

DECLARE_bool(quiet);
DECLARE_bool(dry_run);
DECLARE_int32(threads);
DECLARE_uint64(seed);
DEFINE_string(
    model, "",
    "checkpoint to generate with: a folder, or a name in the Hugging Face cache; "
    "empty: replay of --store");
DEFINE_string(store, "",
              "trace store: sequences to replay, prompts, and counts of baselines");
DEFINE_string(prompts, "", "text file, one prompt a line (with --model)");
DEFINE_string(predictor, "",
              "comma list: baseline names, oracle, folders of trained runs");
DEFINE_string(policy, "auto", "on_demand, multi_look, top_k, intelligent or auto");
DEFINE_string(eviction, "lru", "none, lru, lfu, lfru, least_stale or phase_aware");
DEFINE_string(expert_budget, "25%",
              "expert memory: a share of the experts that run, or bytes");
DEFINE_string(mode, "generate", "generate (with --model, or a replay of --store)");
DEFINE_string(phase, "decoder", "stacks of a replay: decoder, encoder or both");
DEFINE_string(link, "auto",
              "native, emulated (paced), or auto: paced where the bound is < 1.5");
DEFINE_int32(batch, 1, "sequences decoded together");
DEFINE_int32(max_new_tokens, 16, "decoder steps of a round, at most");
DEFINE_int32(rounds, 20, "interleaved measured rounds");
DEFINE_int32(warmup_rounds, 3, "rounds before them that are not measured");
DEFINE_bool(compare, false,
            "all rows: no cache, LRU, baselines, predictors, oracle, resident");
DEFINE_string(out, "", "folder for results.json, run.json, table.txt and report.html");
DEFINE_string(report_with, "",
              "comma list of other output folders that report.html shows");
DEFINE_string(cache, "", "folder of expert files; default: the user's cache folder");
DEFINE_string(device, "auto", "auto or cpu");
DEFINE_string(dtype, "fp32", "fp32 or bf16");

namespace routecast {
namespace {

constexpr char kUsage[] =
    "Generates text under an expert-memory budget and reports what prefetching bought.\n"
    "  routecast-evaluate --compare --model=FOLDER --store=STORE --predictor=RUN "
    "--out=FOLDER\n"
    "  routecast-evaluate --compare --store=STORE --predictor=RUN --out=FOLDER   "
    "(replay)";

std::vector<std::string> List(const std::string& text) {
  std::vector<std::string> items;
  std::stringstream in(text);
  for (std::string item; std::getline(in, item, ',');) {
    if (!item.empty()) items.push_back(item);
  }
  return items;
}

EvaluationOptions OptionsFromFlags() {
  EvaluationOptions options;
  options.model = FindModelFolder(FLAGS_model);
  options.store = FLAGS_store;
  options.prompts = FLAGS_prompts;
  options.predictor = List(FLAGS_predictor);
  for (const std::string& folder : List(FLAGS_report_with)) {
    options.report_with.emplace_back(folder);
  }
  options.policy = FLAGS_policy;
  options.eviction = FLAGS_eviction;
  options.expert_budget = FLAGS_expert_budget;
  options.phase = FLAGS_phase;
  options.link = FLAGS_link;
  options.batch = FLAGS_batch;
  options.max_new_tokens = FLAGS_max_new_tokens;
  options.rounds = FLAGS_rounds;
  options.warmup_rounds = FLAGS_warmup_rounds;
  options.compare = FLAGS_compare;
  options.out = FLAGS_out;
  options.cache = FLAGS_cache;
  options.device = FLAGS_device;
  options.dtype = FLAGS_dtype;
  options.seed = FLAGS_seed;
  options.quiet = FLAGS_quiet;
  options.dry_run = FLAGS_dry_run;
  return options;
}

void Run() {
  ParseChoice("--mode", FLAGS_mode, {"generate"});
  // One core is left to the threads that bring experts.
  const int cores = static_cast<int>(std::thread::hardware_concurrency());
  at::set_num_threads(FLAGS_threads > 0 ? FLAGS_threads : std::max(1, cores - 1));
  const EvaluationOptions options = OptionsFromFlags();
  ValidateEvaluation(options);
  Evaluate(options, EffectiveFlags());
}

}  // namespace
}  // namespace routecast

int main(int argc, char** argv) {
  return routecast::Main(argc, argv, routecast::kUsage, routecast::Run);
}
