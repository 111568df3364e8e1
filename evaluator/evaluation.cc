#include "evaluator/evaluation.h"

#include <ATen/ATen.h>
#include <c10/core/GradMode.h>

#include <algorithm>
#include <cstdio>
#include <fstream>
#include <stdexcept>

#include "common/errors.h"
#include "common/stop.h"
#include "corpus/tokenizer.h"
#include "evaluator/expert_store.h"
#include "evaluator/predictor_set.h"
#include "evaluator/replay.h"
#include "models/predictor_factory.h"
#include "report/evaluation_report.h"
#include "storage/trace_reader.h"

namespace routecast {
namespace {

constexpr int kLeastReplayTokens = 4;

// Everything that a comparison borrows.
struct Setting {
  std::unique_ptr<TraceReader> reader;
  std::unique_ptr<Workload> workload;
  std::shared_ptr<const ExpertFile> file;
  std::vector<std::unique_ptr<ExpertPredictor>> predictors;
};

bool IsReplay(const EvaluationOptions& options) { return options.model.empty(); }
bool RunsEncoder(const EvaluationOptions& o) {
  return !IsReplay(o) || o.phase != "decoder";
}
bool RunsDecoder(const EvaluationOptions& o) {
  return !IsReplay(o) || o.phase != "encoder";
}

std::vector<std::string> PredictorsOf(const EvaluationOptions& options) {
  const bool shown = options.compare && !options.store.empty();
  return WithBaselines(options.predictor, shown ? options.baselines : "none");
}

// Test-part sequences that serve, ascending by id.
std::vector<uint64_t> TestSequences(const TraceReader& reader,
                                    const EvaluationOptions& options, bool needs_hidden,
                                    size_t wanted) {
  std::vector<uint64_t> ids;
  for (const SequenceInfo& info : reader.sequences()) {
    if (SplitOf(info.group_id) != SplitPart::kTest) continue;
    if (needs_hidden && !info.has_hidden) continue;
    if (RunsEncoder(options) && info.encoder_tokens == 0) continue;
    if (IsReplay(options) && RunsDecoder(options) &&
        info.decoder_tokens < static_cast<uint32_t>(kLeastReplayTokens)) {
      continue;
    }
    ids.push_back(info.sequence_id);
    if (ids.size() == wanted) break;
  }
  if (ids.size() >= static_cast<size_t>(options.batch)) return ids;
  throw UsageError(ErrorText(
      "the store has too few test sequences" +
          std::string(needs_hidden ? " with router inputs" : "") + ": " +
          options.store.string(),
      std::to_string(ids.size()) + " found, a batch needs " +
          std::to_string(options.batch),
      "collect more sequences (--record=ids,probs,hidden --hidden_share), or choose "
      "--predictor=none"));
}

void LoadPredictors(const EvaluationOptions& options, const MoeGeometry& geometry,
                    const std::vector<RouterWeights>& routers, Setting* setting) {
  setting->predictors = MakePredictors(PredictorsOf(options), options.predictor, geometry,
                                       routers, setting->reader.get(), options.quiet);
}

bool NeedHidden(const Setting& setting) {
  return std::any_of(setting.predictors.begin(), setting.predictors.end(),
                     [](const auto& p) { return p->needs_hidden(); });
}

size_t WantedSequences(const EvaluationOptions& options) {
  return static_cast<size_t>(options.batch) *
         static_cast<size_t>(options.rounds + options.warmup_rounds);
}

void PrepareReplay(const EvaluationOptions& options, Setting* setting) {
  const MoeGeometry geometry = setting->reader->config().geometry;
  LoadPredictors(options, geometry, StoredRouters(*setting->reader), setting);
  const std::vector<uint64_t> ids = TestSequences(
      *setting->reader, options, NeedHidden(*setting), WantedSequences(options));
  ReplayOptions replay = options.replay;
  replay.batch = options.batch;
  replay.tokens = options.max_new_tokens;
  replay.encoder = RunsEncoder(options);
  replay.decoder = RunsDecoder(options);
  replay.seed = options.seed;
  const MoeGeometry full = ReplayConfig(geometry, replay).geometry();
  if (options.dry_run) {
    ExpertFileSpec spec;
    spec.geometry = full;
    spec.d_ff = replay.d_ff;
    const int layers = (replay.encoder ? full.encoder_layers : 0) +
                       (replay.decoder ? full.decoder_layers : 0);
    const uint64_t whole =
        static_cast<uint64_t>(layers) * full.num_experts * spec.stride_bytes();
    const int slots = SlotsOfBudget(ParseBudget(options.expert_budget, whole), spec);
    std::printf("replay of %zu test sequences: %d x %d experts of %s, %s on disk in %s\n",
                ids.size(), layers, full.num_experts,
                FormatBytes(spec.blob_bytes()).c_str(), FormatBytes(whole).c_str(),
                ExpertCacheFolder(options.cache).string().c_str());
    std::printf("budget: %d experts, %s; %zu predictors, %d + %d rounds\n", slots,
                FormatBytes(static_cast<uint64_t>(slots) * spec.stride_bytes()).c_str(),
                setting->predictors.size(), options.warmup_rounds, options.rounds);
    return;
  }
  std::vector<RoutingTrace> traces = setting->reader->ReadMany(ids, WithHidden::kYes);
  setting->workload =
      std::make_unique<ReplayWorkload>(geometry, std::move(traces), replay);
  setting->file = SyntheticExperts(
      ExpertCacheFolder(options.cache), setting->workload->geometry(), replay.d_ff,
      options.seed, replay.encoder, replay.decoder, options.quiet);
}

std::vector<std::vector<int64_t>> Prompts(const EvaluationOptions& options,
                                          const SwitchConfig& config,
                                          const Setting& setting) {
  std::vector<std::vector<int64_t>> prompts;
  if (!options.prompts.empty()) {
    const Tokenizer tokenizer = Tokenizer::Load(options.model);
    std::ifstream lines(options.prompts);
    if (!lines) throw UsageError("cannot read --prompts=" + options.prompts.string());
    for (std::string line; std::getline(lines, line);) {
      const std::vector<int32_t> ids = tokenizer.Encode(line);
      if (ids.empty()) continue;
      prompts.emplace_back(ids.begin(), ids.end());
      prompts.back().push_back(Tokenizer::kEos);
    }
  } else {  // what the store's encoder read: span-corrupted test text
    for (uint64_t id :
         TestSequences(*setting.reader, options, false, WantedSequences(options))) {
      const RoutingTrace trace = setting.reader->Read(id, WithHidden::kNo);
      prompts.emplace_back(trace.encoder.token_ids.begin(),
                           trace.encoder.token_ids.end());
    }
  }
  for (const auto& prompt : prompts) {
    for (int64_t id : prompt) {
      if (id < config.vocab_size) continue;
      throw UsageError(ErrorText("a prompt's token does not exist in this model",
                                 "id " + std::to_string(id) + ", vocabulary " +
                                     std::to_string(config.vocab_size),
                                 "do --model and --store belong together?"));
    }
  }
  return prompts;
}

void PrepareGenerate(const EvaluationOptions& options, Setting* setting) {
  const at::ScalarType dtype = ParseDtype("--dtype", options.dtype);
  Checkpoint checkpoint =
      LoadCheckpoint(options.model, dtype, at::kCPU, ExpertLoading::kLeaveOut);
  const MoeGeometry geometry = checkpoint.config.geometry();
  if (setting->reader) {
    MoeGeometry stored = setting->reader->config().geometry;
    if (stored.num_keys() != geometry.num_keys() || stored.d_model != geometry.d_model) {
      throw UsageError(ErrorText("--store was collected from a model of another geometry",
                                 std::to_string(stored.num_keys()) +
                                     " experts of width " +
                                     std::to_string(stored.d_model) + ", the model has " +
                                     std::to_string(geometry.num_keys()) + " of " +
                                     std::to_string(geometry.d_model),
                                 "give the store of this model"));
    }
  }
  LoadPredictors(options, geometry, RoutersOf(checkpoint.config, checkpoint.parameters),
                 setting);
  const auto prompts = Prompts(options, checkpoint.config, *setting);
  if (options.dry_run) {
    std::printf(
        "generate: %zu prompts, %d MoE layers x %d experts, %zu predictors, "
        "%d + %d rounds\n",
        prompts.size(), geometry.num_layers(), geometry.num_experts,
        setting->predictors.size(), options.warmup_rounds, options.rounds);
    return;
  }
  setting->file = ExpertsOfCheckpoint(ExpertCacheFolder(options.cache), options.model,
                                      checkpoint.config, checkpoint.fingerprint, dtype,
                                      options.quiet);
  setting->workload = std::make_unique<GenerateWorkload>(
      std::move(checkpoint), prompts, options.batch, options.max_new_tokens);
}

ComparisonOptions ComparisonOf(const EvaluationOptions& options, const ExpertFile& file) {
  ComparisonOptions comparison;
  comparison.budget_bytes =
      ParseBudget(options.expert_budget,
                  static_cast<uint64_t>(file.count()) * file.spec().stride_bytes());
  comparison.policy = options.policy;
  comparison.eviction = ParseEviction(options.eviction);
  comparison.rounds = options.rounds;
  comparison.warmup_rounds = options.warmup_rounds;
  comparison.batch = options.batch;
  comparison.link = options.link;
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

// The best row of a predictor, beside the bound, for run.json.
Json Headline(const ComparisonResult& result) {
  Json headline = Json::object();
  for (const RowResult& row : result.rows) {
    const std::string name = std::string(StackName(row.phase)) + "/" + row.policy + "/" +
                             row.predictor + "/" + row.eviction;
    headline["speed_up"][name] = row.speed_up;
    headline["bound"][StackName(row.phase)] = row.bound;
  }
  headline["lossless"] = result.lossless;
  headline["link"] = result.link;
  headline["link_bytes_per_second"] = result.link_bytes_per_second;
  headline["notes"] = result.notes;
  return headline;
}

void WriteOutputs(const EvaluationOptions& options, const ComparisonResult& result) {
  if (options.out.empty()) return;
  WriteFileAtomic(options.out / "results.json", result.ToJson().dump(1) + "\n");
  WriteFileAtomic(options.out / "table.txt", ComparisonTable(result));
  std::vector<fs::path> folders = {options.out};
  folders.insert(folders.end(), options.report_with.begin(), options.report_with.end());
  WriteEvaluationReport(options.out / "report.html", folders);
}

}  // namespace

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
  ParsePolicy(options.policy);
  if (ParseEviction(options.eviction) == Eviction::kBelady) {
    throw UsageError(ErrorText("--eviction=belady knows the future", "",
                               "its bytes stand in every row; choose lru"));
  }
  ParseChoice("--baselines", options.baselines, {"none", "simple", "all"});
  if (options.timeline && options.out.empty()) {
    throw UsageError(ErrorText("--timeline needs --out", "timeline.json is written there",
                               "give --out=FOLDER"));
  }
  ParseChoice("--phase", options.phase, {"decoder", "encoder", "both"});
  ParseChoice("--link", options.link, {"auto", "native", "emulated"});
  ParseDtype("--dtype", options.dtype);
  ParseBudget(options.expert_budget, 1);
  if (IsReplay(options) && options.dtype != "fp32") {
    throw UsageError(ErrorText("replay runs in fp32", "", "leave --dtype out"));
  }
  if (options.device != "auto" && options.device != "cpu") {
    ParseDevice(options.device, 0);  // says when there is none
    throw UsageError(ErrorText(
        "--device=" + options.device + " is not served by this program",
        "experts run on the CPU, under a budget of host memory", "use --device=cpu"));
  }
  if (options.batch < 1 || options.max_new_tokens < 1 || options.rounds < 1 ||
      options.warmup_rounds < 0) {
    throw UsageError(
        ErrorText("--batch, --max_new_tokens and --rounds are at least 1", "", ""));
  }
}

Json Evaluate(const EvaluationOptions& options, const Json& configuration) {
  const c10::NoGradGuard no_grad;
  Setting setting;
  if (!options.store.empty())
    setting.reader = std::make_unique<TraceReader>(options.store);
  if (IsReplay(options)) {
    PrepareReplay(options, &setting);
  } else {
    PrepareGenerate(options, &setting);
  }
  if (options.dry_run) return {};
  std::unique_ptr<RunRecord> record;
  if (!options.out.empty()) {
    MakeFolder(options.out);
    record =
        std::make_unique<RunRecord>(options.out, "routecast-evaluate", configuration);
    record->WriteStart();
  }
  std::vector<ExpertPredictor*> predictors;
  for (const auto& predictor : setting.predictors) predictors.push_back(predictor.get());
  ComparisonOptions comparing = ComparisonOf(options, *setting.file);
  Timeline timeline;
  if (options.timeline && !options.out.empty()) comparing.timeline = &timeline;
  Comparison comparison(setting.workload.get(), setting.file, predictors, comparing);
  ComparisonResult result;
  try {
    result = comparison.Run();
  } catch (const StoppedError&) {
    if (record) record->Finish(kExitStopped, {});
    throw;
  }
  std::printf("%s", ComparisonTable(result).c_str());
  const Json headline = Headline(result);
  WriteOutputs(options, result);
  if (comparing.timeline) timeline.Write(options.out / "timeline.json");
  if (record) record->Finish(result.lossless ? kExitDone : kExitDefect, headline);
  if (!result.lossless) throw std::logic_error("two rows put out different bits");
  return headline;
}

}  // namespace routecast
