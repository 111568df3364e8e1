// routecast-evaluate: generation or replay under an expert budget, compared row by row.
#include <ATen/Parallel.h>
#include <gflags/gflags.h>

#include <algorithm>
#include <functional>
#include <limits>
#include <sstream>
#include <utility>

#include "common/errors.h"
#include "common/model_folder.h"
#include "common/output_folder.h"
#include "evaluator/evaluation.h"
#include "evaluator/evaluation_setup.h"
#include "evaluator/expert_store.h"
#include "evaluator/machine_sweep.h"
#include "evaluator/policy_simulation.h"
#include "evaluator/predictor_set.h"
#include "evaluator/quality.h"
#include "evaluator/recorded_run.h"
#include "evaluator/status.h"
#include "launch/flags.h"
#include "launch/main.h"

DECLARE_bool(quiet);
DECLARE_bool(dry_run);
DECLARE_int32(threads);
DECLARE_uint64(seed);
DEFINE_string(
    model, "",
    "checkpoint to generate with: a folder, or a name in the Hugging Face cache; "
    "empty: replay of --store; --mode=simulate: whose sizes are imagined");
DEFINE_string(store, "",
              "trace store: sequences to replay, prompts, and counts of baselines");
DEFINE_string(prompts, "",
              "with --model, a comma list: text files (a prompt a line), or KIND:PATH as "
              "--data of routecast-collect (their test part); rows for each");
DEFINE_string(predictor, "",
              "comma list: baseline names, oracle, folders of trained runs");
DEFINE_string(
    policy, "auto",
    "on_demand, multi_look, top_k, adaptive_top_k, intelligent, confident, "
    "memory_manager or auto; a comma list, or all that speculate, gives rows for "
    "each");
DEFINE_string(eviction, "lru",
              "one of none, lru, lfu, lfru, least_stale and phase_aware; --mode=simulate "
              "takes a comma list, and belady");
DEFINE_string(expert_budget, "25%",
              "expert memory: a share of the experts that run, or bytes; a list gives "
              "rows for each");
DEFINE_bool(
    kv_in_budget, false,
    "the model's keys and values share the budget: experts make room as sequences "
    "grow");
DEFINE_string(
    tier, "",
    "memories that experts move through: host:SIZE,disk or "
    "gpu:SIZE,host:SIZE,disk (the default on a CUDA device, every expert in host "
    "memory), or managed:SIZE,disk (CUDA's managed memory); the first SIZE is the "
    "budget; bytes, or a share of that memory, as in gpu:30%,host:50%,disk");
DEFINE_string(
    copies, "lossless",
    "int8, int8_tensor, int4 or sparse: rows on compressed copies as well, LOSSY and "
    "named so");
DEFINE_string(warm_start, "none",
              "experts that slots hold before the first step: none, auto (the most used "
              "of --store's train part), another store, or load.csv of routecast-trace "
              "stats");
DEFINE_string(
    mode, "generate",
    "generate (with --model, or a replay of --store), quality (predictors on "
    "--store), simulate (policies on --store under --profile), transfer "
    "(measures the disk, and a CUDA device's link), status (what there is below --in)");
DEFINE_string(
    profile, "rtx3090",
    "device of --mode=simulate: rtx3090, or a file of --mode=transfer; where given "
    "with other modes, rows are limited to its memory, link and compute");
DEFINE_int32(sequences, 200, "test sequences of --mode=quality and simulate, at most");
DEFINE_string(shift_store, "",
              "with --mode=quality, a store of the same model that is asked about next: "
              "how predictors take a change of domain");
DEFINE_string(
    answers, "none",
    "--mode=quality: csv or npz leaves answers.csv or answers.npz in --out, what "
    "each predictor said of every token");
DEFINE_int32(answer_ranks, 8, "the likeliest experts of an answer that --answers keeps");
DEFINE_double(question_us, 200, "cost of a question in --mode=simulate");
DEFINE_string(expert_bytes, "",
              "--mode=simulate: what an expert takes, as 12.6MiB; empty: by --model's "
              "sizes, or switch-base's in fp32");
DEFINE_double(
    layer_us, 0,
    "--mode=simulate: microseconds of a MoE layer without its experts, batch 1; "
    "where it is not given: its weights read once from --profile's memory");
DEFINE_double(expert_us, 0,
              "--mode=simulate: microseconds of computing one expert; where it is not "
              "given: the expert read once");
DEFINE_double(head_us, 0,
              "--mode=simulate: microseconds behind the last layer, with the vocabulary "
              "head; where it is not given: the head read once");
DEFINE_string(in, ".", "folder that --mode=status looks into");
DEFINE_string(phase, "decoder",
              "stacks of a replay: decoder, encoder or both; --mode=simulate: decoder or "
              "both");
DEFINE_string(link, "auto",
              "native, emulated (paced), or auto: paced where the bound is < 1.5");
DEFINE_bool(guess_next_token, true,
            "ask about the next token while the vocabulary head runs, where it is known");
DEFINE_string(batch, "1", "sequences decoded together; a list gives rows for each");
DEFINE_string(schedule, "in_order",
              "how requests are batched: in_order, by_route (foretold experts overlap), "
              "or a list of the two");
DEFINE_int32(max_new_tokens, 16,
             "decoder steps of a round, at most; --mode=simulate: decoder tokens of a "
             "sequence, at most; quality: the same, but all where it is not given");
DEFINE_int32(rounds, 20, "interleaved measured rounds");
DEFINE_int32(warmup_rounds, 3, "rounds before them that are not measured");
DEFINE_bool(compare, false,
            "all rows: no cache, LRU, baselines, predictors, oracle, resident");
DEFINE_string(baselines, "all",
              "baselines beside --predictor, in --compare, quality and simulate: all, "
              "simple (frequency, token_table, markov, stale_gate) or none");
DEFINE_bool(timeline, false,
            "writes timeline.json for Perfetto: one more round of every row");
DEFINE_string(
    out, "",
    "folder for results.json (quality.json, simulation.json, .. of other modes), "
    "table.txt and run.json; where there are rows also rows.csv and report.html");
DEFINE_string(report_with, "",
              "comma list of other output folders that report.html shows");
DEFINE_string(cache, "", "folder of expert files; default: the user's cache folder");
DEFINE_string(device, "auto",
              "auto, cpu, cuda or cuda:N; on a CUDA device the budget is of its memory");
DEFINE_string(dtype, "fp32", "Of the model and its experts: fp32, bf16 or fp16");

namespace routecast {
namespace {

constexpr char kUsage[] =
    "Generates text under an expert-memory budget and reports what prefetching bought.\n"
    "  routecast-evaluate --compare --model=FOLDER --store=STORE --predictor=RUN "
    "--out=FOLDER\n"
    "  routecast-evaluate --compare --store=STORE --predictor=RUN --out=FOLDER   "
    "(replay)\n"
    "  routecast-evaluate --mode=status --in=FOLDER";

std::vector<std::string> List(const std::string& text) {
  std::vector<std::string> items;
  std::stringstream in(text);
  for (std::string item; std::getline(in, item, ',');) {
    if (!item.empty()) items.push_back(item);
  }
  return items;
}

// The folders of --report_with.
std::vector<fs::path> ShownBeside() {
  std::vector<fs::path> folders;
  for (const std::string& folder : List(FLAGS_report_with)) folders.emplace_back(folder);
  return folders;
}

EvaluationOptions OptionsFromFlags() {
  EvaluationOptions options;
  options.model = FindModelFolder(FLAGS_model);
  options.store = FLAGS_store;
  options.prompts = List(FLAGS_prompts);
  options.predictor = List(FLAGS_predictor);
  options.report_with = ShownBeside();
  options.policies = List(FLAGS_policy);
  options.eviction = FLAGS_eviction;
  options.budgets = List(FLAGS_expert_budget);
  options.budget_given = IsGiven("expert_budget");
  options.kv_in_budget = FLAGS_kv_in_budget;
  options.tier = FLAGS_tier;
  options.copies = FLAGS_copies;
  options.warm_start = FLAGS_warm_start;
  options.phase = FLAGS_phase;
  options.link = FLAGS_link;
  if (IsGiven("profile")) options.profile = FLAGS_profile;
  options.guess_next_token = FLAGS_guess_next_token;
  options.batches = ParseBatches(FLAGS_batch);
  options.schedules = List(FLAGS_schedule);
  options.max_new_tokens = FLAGS_max_new_tokens;
  options.rounds = FLAGS_rounds;
  options.warmup_rounds = FLAGS_warmup_rounds;
  options.compare = FLAGS_compare;
  options.baselines = FLAGS_baselines;
  options.timeline = FLAGS_timeline;
  options.out = FLAGS_out;
  options.cache = FLAGS_cache;
  options.device = FLAGS_device;
  options.dtype = FLAGS_dtype;
  options.seed = FLAGS_seed;
  options.quiet = FLAGS_quiet;
  options.dry_run = FLAGS_dry_run;
  return options;
}

struct Findings {
  std::string text;
  Json json;
  std::string csv{};  // of rows that report.html shows as well; empty: no rows
};

// Prints what `work` finds and, where there is an --out, keeps it in the first of `files`
// (all that the mode leaves), the text in table.txt, and rows where there are some.
// `work` reads its inputs, says that they are sound and finds; a dry run's prints a plan
// before that and returns, and nothing is kept.
void Report(const std::vector<std::string>& files,
            const std::function<Findings(const BeginRun& begin)>& work) {
  if (FLAGS_dry_run) return (void)work([] {});
  const fs::path out = FLAGS_out;
  Recorded(out, files, EffectiveFlags(), [&](const BeginRun& begin) -> Json {
    const Findings found = work(begin);
    std::printf("%s", found.text.c_str());
    if (!out.empty()) {
      WriteFileAtomic(out / files[0], found.json.dump(1) + "\n");
      WriteFileAtomic(out / "table.txt", found.text);
      if (!found.csv.empty()) {
        WriteFileAtomic(out / "rows.csv", found.csv);
        WriteReport(out, ShownBeside());
      }
    }
    return {{"mode", FLAGS_mode}};
  });
}

// Records may lack token ids; who needs them is refused by name.
TraceReader OpenStore() {
  if (FLAGS_store.empty()) {
    throw UsageError(ErrorText("--mode=" + FLAGS_mode + " works on recorded routing", "",
                               "give --store=STORE"));
  }
  return TraceReader(FLAGS_store, NeedTokens::kNo);
}

std::vector<std::unique_ptr<ExpertPredictor>> Predictors(const TraceReader& reader,
                                                         ToldInputs told) {
  const std::vector<std::string> asked = List(FLAGS_predictor);
  return MakePredictors(WithBaselines(asked, FLAGS_baselines), asked,
                        reader.config().geometry, StoredRouters(reader), &reader,
                        FLAGS_quiet, told);
}

// Of a recorded sequence whose answers are scored. A simulation keeps all answers in
// memory, so there the default stands.
int ScoredTokens() {
  return IsGiven("max_new_tokens") ? FLAGS_max_new_tokens
                                   : std::numeric_limits<int>::max();
}

void RequireSequences() {
  RequireCount("--sequences", FLAGS_sequences, 1, std::numeric_limits<int>::max());
  RequireCount("--max_new_tokens", FLAGS_max_new_tokens, 1);
}

// Before anything is read.
void RequireAnswers() {
  const bool none = ParseChoice("--answers", FLAGS_answers, {"none", "csv", "npz"}) == 0;
  RequireCount("--answer_ranks", FLAGS_answer_ranks, 1, 65'535);
  if (none && IsGiven("answer_ranks"))
    RefuseUseless("--answer_ranks", "it is of --answers", "give --answers=npz as well");
  if (none) return;
  if (FLAGS_out.empty())
    RefuseUseless("--answers", "the file is written into --out", "give --out=FOLDER");
  if (!FLAGS_shift_store.empty())
    RefuseUseless("--answers", "rows of two stores could not be told apart",
                  "leave --shift_store out, and ask about that store alone");
}

// Null where nothing is asked for.
std::unique_ptr<AnswerLog> OpenAnswers() {
  if (FLAGS_answers == "none") return nullptr;
  return std::make_unique<AnswerLog>(
      FLAGS_out, FLAGS_answers == "csv" ? AnswerFormat::kCsv : AnswerFormat::kNpz,
      FLAGS_answer_ranks);
}

Findings AskPredictors(const BeginRun& begin) {
  const TraceReader reader = OpenStore();
  std::optional<TraceReader> shift;
  ToldInputs told = ToldBy(reader);
  if (!FLAGS_shift_store.empty()) {
    shift.emplace(FLAGS_shift_store, NeedTokens::kNo);
    const ToldInputs then = ToldBy(*shift);
    told = {told.token_ids && then.token_ids, told.router_inputs && then.router_inputs};
  }
  const std::vector<std::string> asked = List(FLAGS_predictor);
  if (std::count(asked.begin(), asked.end(), "oracle") > 0)
    RefuseUseless("--predictor=oracle",
                  "it is always right: there is nothing to measure");
  const auto predictors = Predictors(reader, told);
  CheckQuality(reader, predictors);
  if (shift) CheckShift(reader, *shift, predictors);
  if (FLAGS_dry_run) {
    std::printf("quality: %zu predictors, %d sequences at most\n", predictors.size(),
                FLAGS_sequences);
    return {};
  }
  begin();
  QualityOptions options;
  options.sequences = FLAGS_sequences;
  options.tokens = ScoredTokens();
  options.seed = FLAGS_seed;
  options.quiet = FLAGS_quiet;
  Json json = {{"store", FLAGS_store}, {"predictors", Json::array()}};
  const auto add = [&](const char* key, const std::vector<PredictorQuality>& all) {
    for (const auto& quality : all) json[key].push_back(quality.ToJson());
    return QualityTable(all);
  };
  if (!shift) {
    const std::unique_ptr<AnswerLog> answers = OpenAnswers();
    options.answers = answers.get();
    const std::string table =
        add("predictors", MeasureQuality(reader, predictors, options));
    if (answers) answers->Finish();
    return {table, json};
  }
  const ShiftedQuality shifted = MeasureShift(reader, *shift, predictors, options);
  json["shift_store"] = FLAGS_shift_store;
  const std::string before = add("predictors", shifted.before),
                    after = add("predictors_after_shift", shifted.after);
  return {before + "then " + FLAGS_shift_store + ":\n" + after, json};
}

void Quality() {
  RequireSequences();
  RequireAnswers();
  Report({"quality.json", "table.txt", "answers.csv", "answers.npz"}, AskPredictors);
}

// What --expert_bytes and its like, or a checkpoint, say of the model that is imagined.
ImaginedSizes SizesOfModel() {
  ImaginedSizes sizes;
  if (!FLAGS_model.empty()) {
    const fs::path config = FindModelFolder(FLAGS_model) / "config.json";
    const at::ScalarType dtype = ParseDtype("--dtype", FLAGS_dtype);
    sizes.work =
        LayerWorkOf(SwitchConfig::FromJson(ReadJsonFile(config), config.string()),
                    static_cast<double>(c10::elementSize(dtype)));
    sizes.work_from = "--model's sizes, " + FLAGS_dtype;
  } else if (IsGiven("dtype")) {
    RefuseUseless("--dtype", "it is of --model's weights",
                  "give --model=FOLDER, or --expert_bytes in place of it");
  }
  if (IsGiven("expert_bytes")) {
    sizes.expert_bytes = ParseBytes("--expert_bytes", FLAGS_expert_bytes);
    if (*sizes.expert_bytes == 0 || *sizes.expert_bytes > uint64_t{1} << 40) {
      throw UsageError(ErrorText("--expert_bytes is out of bounds", FLAGS_expert_bytes,
                                 "from 1 to 1TiB, e.g. --expert_bytes=12.6MiB"));
    }
  }
  sizes.layer_seconds = GivenSeconds("layer_us", FLAGS_layer_us);
  sizes.expert_seconds = GivenSeconds("expert_us", FLAGS_expert_us);
  sizes.head_seconds = GivenSeconds("head_us", FLAGS_head_us);
  if (sizes.layer_seconds == 0. && sizes.expert_seconds == 0. &&
      sizes.head_seconds == 0.) {
    throw UsageError(ErrorText("a step would take no time",
                               "--layer_us=0 --expert_us=0 --head_us=0",
                               "give one of them above 0: rates follow from it"));
  }
  return sizes;
}

void Simulate() {
  RequireSequences();
  PolicySimulationOptions options;
  options.policies = ParsePolicies(List(FLAGS_policy));
  options.evictions = List(FLAGS_eviction);
  for (const auto& eviction : options.evictions) ParseEviction(eviction);
  RequireDistinct("--eviction", options.evictions);
  if (FLAGS_out.empty() && !FLAGS_report_with.empty()) {
    RefuseUseless("--report_with", "report.html is written into --out",
                  "give --out=FOLDER, or leave it out");
  }
  if (FLAGS_policy == "on_demand" && NamesPredictor(List(FLAGS_predictor)))
    RefuseUseless("--predictor", "--policy=on_demand asks nobody");
  options.sizes = SizesOfModel();
  options.sequences = FLAGS_sequences;
  options.tokens = FLAGS_max_new_tokens;
  options.question_seconds = FLAGS_question_us * 1e-6;
  options.encoder = ParseChoice("--phase", FLAGS_phase, {"decoder", "both"}) == 1;
  options.budget_names = List(FLAGS_expert_budget);
  GivenSeconds("question_us", FLAGS_question_us);  // within its bounds
  const std::vector<std::string> files = {"simulation.json", "table.txt", "rows.csv",
                                          "report.html"};
  Report(files, [&](const BeginRun& begin) -> Findings {
    const DeviceProfile profile = FindProfile(FLAGS_profile);
    const TraceReader reader = OpenStore();
    const auto predictors = Predictors(reader, ToldBy(reader));
    options.warm_start = WarmStartOf(FLAGS_warm_start, &reader, reader.config().geometry);
    const ImaginedModel imagined = ImaginedModelOf(profile, options);
    options.budget_shares =
        SharesOfBudgets(options.budget_names,
                        NumSimulatedExperts(reader.config().geometry, options), imagined);
    CheckSimulation(reader, predictors, options);
    if (FLAGS_dry_run) {
      std::printf(
          "simulate: %zu predictors x %zu policies x %zu evictions x %zu budgets on %s\n"
          "%s\n",
          predictors.size(), options.policies.size(), options.evictions.size(),
          options.budget_shares.size(), profile.name.c_str(), imagined.Text().c_str());
      return {};
    }
    begin();
    const auto result = SimulatePolicies(reader, predictors, profile, options);
    return {PolicyTable(result), result.ToJson(), result.ToCsv()};
  });
}

void Transfer() {
  DiskSweepOptions options;
  options.folder = ExpertCacheFolder(FLAGS_cache);
  options.quiet = FLAGS_quiet;
  Report({"device_profile.json", "table.txt"}, [&](const BeginRun& begin) -> Findings {
    const at::Device device = ParseDevice(FLAGS_device, 0);
    if (FLAGS_dry_run) {
      std::printf("transfer: a scratch file of %s in %s\n",
                  FormatBytes(options.file_bytes).c_str(), options.folder.c_str());
      return {};
    }
    begin();
    const DeviceProfile profile = MeasureMachine(device, options);
    return {ProfileTable(profile), profile.ToJson()};
  });
}

void Status() {
  Report({"status.json", "table.txt"}, [](const BeginRun& begin) -> Findings {
    const Json machine = MachineStatus();
    auto artefacts = FindArtefacts(FLAGS_in);
    std::error_code absent;  // this run's own folder, which has begun
    std::erase_if(artefacts, [&](const Artefact& a) {
      return fs::equivalent(a.path, FLAGS_out, absent);
    });
    const std::string text = StatusText(machine, artefacts);
    if (FLAGS_dry_run) std::printf("%s", text.c_str());
    begin();
    return {text, StatusJson(machine, artefacts)};
  });
}

// A flag that another mode heeds would do nothing here. What names inputs, --device and
// --cache may be handed to all: scripts do.
void RefuseOtherModesFlags() {
  static const HeededFlags kHeeded = {
      {"generate", {"prompts",       "policy",   "eviction",       "expert_budget",
                    "kv_in_budget",  "tier",     "copies",         "warm_start",
                    "profile",       "phase",    "link",           "guess_next_token",
                    "batch",         "schedule", "max_new_tokens", "rounds",
                    "warmup_rounds", "compare",  "baselines",      "timeline",
                    "report_with",   "dtype"}},
      {"quality",
       {"sequences", "shift_store", "max_new_tokens", "baselines", "answers",
        "answer_ranks"}},
      {"simulate",
       {"policy", "eviction", "expert_budget", "warm_start", "profile", "sequences",
        "question_us", "phase", "max_new_tokens", "baselines", "report_with", "dtype",
        "expert_bytes", "layer_us", "expert_us", "head_us"}},
      {"transfer", {}},
      {"status", {"in"}}};
  RefuseUnheeded(kHeeded, "--mode=", FLAGS_mode);
}

void Generate() {
  const EvaluationOptions options = OptionsFromFlags();
  ValidateEvaluation(options);
  for (const char* flag : {"max_new_tokens", "guess_next_token"}) {
    if (options.phase == "encoder" && IsGiven(flag))
      RefuseUseless(std::string("--") + flag, "--phase=encoder decodes nothing");
  }
  Evaluate(options, EffectiveFlags());
}

void Run() {
  constexpr void (*kModes[])() = {Generate, Quality, Simulate, Transfer, Status};
  const int mode = ParseChoice("--mode", FLAGS_mode,
                               {"generate", "quality", "simulate", "transfer", "status"});
  RefuseOtherModesFlags();
  RequireOutput("--out", FLAGS_out);
  // Where nothing is said, one core is left to the threads that bring experts.
  const int threads = ThreadsPerRank(1);
  at::set_num_threads(FLAGS_threads > 0 ? threads : std::max(1, threads - 1));
  kModes[mode]();
}

}  // namespace
}  // namespace routecast

int main(int argc, char** argv) {
  return routecast::Main(argc, argv, routecast::kUsage, routecast::Run);
}
