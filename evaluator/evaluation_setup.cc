#include "evaluator/evaluation_setup.h"

#include <ATen/ATen.h>

#include <algorithm>
#include <cstdio>
#include <iterator>
#include <utility>

#include "common/errors.h"
#include "common/machine.h"
#include "evaluator/expert_budget.h"
#include "evaluator/expert_store.h"
#include "evaluator/predictor_set.h"
#include "evaluator/recorded_visits.h"
#include "evaluator/replay.h"
#include "models/device_choice.h"

namespace routecast {
namespace {

constexpr int kLeastReplayTokens = 4;

size_t LargestBatch(const EvaluationOptions& options) {
  return static_cast<size_t>(
      *std::max_element(options.batches.begin(), options.batches.end()));
}

size_t WantedSequences(const EvaluationOptions& options) {
  return LargestBatch(options) *
         static_cast<size_t>(options.rounds + options.warmup_rounds);
}

std::vector<std::string> PredictorsOf(const EvaluationOptions& options) {
  const bool shown = options.compare && !options.store.empty();
  return WithBaselines(options.predictor, shown ? options.baselines : "none");
}

// Test-part sequences that serve, ascending by id.
std::vector<uint64_t> TestSequences(const TraceReader& reader,
                                    const EvaluationOptions& options, bool needs_hidden) {
  const size_t wanted = WantedSequences(options), batch = LargestBatch(options);
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
  if (ids.size() >= batch) return ids;
  throw UsageError(ErrorText(
      "the store has too few test sequences" +
          std::string(needs_hidden ? " with router inputs" : "") + ": " +
          options.store.string(),
      std::to_string(ids.size()) + " found, a batch needs " + std::to_string(batch),
      "collect more sequences (--record=ids,probs,hidden --hidden_share), or choose "
      "--predictor=none"));
}

void LoadPredictors(const EvaluationOptions& options,
                    const std::vector<RouterWeights>& routers, EvaluationSetup* setup) {
  // Of each policy its own: they learn while they serve.
  for (size_t policy = 0; policy < ParsePolicies(options.policies).size(); ++policy) {
    auto made = MakePredictors(PredictorsOf(options), options.predictor, setup->geometry,
                               routers, setup->reader.get(), options.quiet || policy > 0);
    std::move(made.begin(), made.end(), std::back_inserter(setup->predictors));
  }
  if (std::count(options.schedules.begin(), options.schedules.end(), "by_route") == 0)
    return;
  const std::vector<std::string> name = {"token_table"};
  setup->scheduler = std::move(MakePredictors(name, name, setup->geometry, routers,
                                              setup->reader.get(), options.quiet)[0]);
}

std::shared_ptr<const NextTokenGuess> GuessOf(const at::Tensor& head_VD, int64_t rows,
                                              const TraceReader* reader) {
  // Without a store nobody knows which ids are frequent: all are looked at.
  const int64_t longest = reader ? NextTokenGuess::kShortlist : rows;
  std::vector<int64_t> shortlist;
  if (reader) shortlist = FrequentIds(*reader, head_VD.size(0), longest);
  return std::make_shared<NextTokenGuess>(head_VD, std::min(rows, longest),
                                          std::move(shortlist));
}

ReplayOptions ReplayOf(const EvaluationOptions& options, const EvaluationSetup& setup,
                       int batch) {
  ReplayOptions replay = options.replay;
  replay.batch = batch;
  replay.tokens = options.max_new_tokens;
  replay.encoder = RunsEncoder(options);
  replay.decoder = RunsDecoder(options);
  replay.seed = options.seed;
  replay.device = setup.placement.device;
  replay.steps = options.steps;
  replay.dtype = ParseDtype("--dtype", options.dtype);
  return replay;
}

// The way of an expert, for a dry run.
std::string WayOf(const Placement& placement) {
  const TierChain& chain = placement.tiers.chain;
  if (!chain.gpu) return "disk -> host memory";
  if (chain.managed)
    return "disk -> managed memory (every expert) -> " + placement.device.str();
  const std::string held = chain.passes_host  ? "a few in passing"
                           : chain.host_bytes ? FormatBytes(*chain.host_bytes)
                                              : "every expert";
  return "disk -> host memory (" + held + ") -> " + placement.device.str();
}

ExpertFileSpec ReplaySpec(const EvaluationSetup& setup, const ReplayOptions& replay) {
  ExpertFileSpec spec;
  spec.geometry = ReplayConfig(setup.geometry, replay).geometry();
  spec.d_ff = replay.d_ff;
  spec.dtype = ExpertDtypeOf(replay.dtype);
  return spec;
}

// What each budget holds; a wrong one is refused before anything is counted or written.
std::vector<std::string> BudgetTexts(const EvaluationOptions& options,
                                     const EvaluationSetup& setup,
                                     const ExpertFileSpec& spec, int count) {
  std::vector<std::string> texts;
  for (const std::string& budget : options.budgets) {
    const uint64_t bytes = BudgetOf(options, setup.placement.tiers.chain, budget,
                                    static_cast<uint64_t>(count) * spec.stride_bytes());
    const int slots =
        SlotsOfBudget(bytes, spec, StagingBytes(ParseCopies(options.copies), spec));
    texts.push_back(BudgetText(slots, count, spec));
  }
  return texts;
}

int CountOfReplay(const ReplayOptions& replay, const MoeGeometry& full) {
  const int layers = (replay.encoder ? full.encoder_layers : 0) +
                     (replay.decoder ? full.decoder_layers : 0);
  return layers * full.num_experts;
}

void PrintReplayPlan(const EvaluationOptions& options, const EvaluationSetup& setup,
                     const ExpertFileSpec& spec, int count, size_t sequences,
                     const std::vector<std::string>& budgets) {
  const int experts = spec.geometry.num_experts;
  std::printf("replay of %zu test sequences: %d x %d experts of %s, %s on disk in %s\n",
              sequences, count / experts, experts, FormatBytes(spec.blob_bytes()).c_str(),
              FormatBytes(static_cast<uint64_t>(count) * spec.stride_bytes()).c_str(),
              ExpertCacheFolder(options.cache).string().c_str());
  for (const std::string& budget : budgets) {
    std::printf("%s; %s; %zu rows of predictors, %d + %d rounds\n", budget.c_str(),
                WayOf(setup.placement).c_str(), setup.predictors.size(),
                options.warmup_rounds, options.rounds);
  }
}

void SetUpReplay(const EvaluationOptions& options, EvaluationSetup* setup) {
  setup->geometry = setup->reader->config().geometry;
  RequireOneExpertAToken(setup->geometry, "a replay");
  const ReplayOptions replay = ReplayOf(options, *setup, 1);
  const ExpertFileSpec spec = ReplaySpec(*setup, replay);
  const int count = CountOfReplay(replay, spec.geometry);
  const std::vector<std::string> budgets = BudgetTexts(options, *setup, spec, count);
  setup->warm_start =
      WarmStartOf(options.warm_start, setup->reader.get(), setup->geometry);
  LoadPredictors(options, StoredRouters(*setup->reader), setup);
  const bool needs_hidden =
      std::any_of(setup->predictors.begin(), setup->predictors.end(),
                  [](const auto& p) { return p->needs_hidden(); });
  const std::vector<uint64_t> ids = TestSequences(*setup->reader, options, needs_hidden);
  if (options.dry_run) {
    PrintReplayPlan(options, *setup, spec, count, ids.size(), budgets);
    return;
  }
  setup->requests.push_back(
      {"store", {}, setup->reader->ReadMany(ids, WithHidden::kYes)});
  const at::Tensor head =
      ReadVocabularyHead(setup->reader->routers_path(), setup->geometry.d_model);
  if (options.guess_next_token && head.defined()) {
    setup->next_token = GuessOf(head, replay.vocab_size, setup->reader.get());
  }
  setup->file = SyntheticExperts(ExpertCacheFolder(options.cache), spec.geometry,
                                 replay.d_ff, options.seed, replay.encoder,
                                 replay.decoder, replay.dtype, options.quiet);
}

void CheckRequests(const EvaluationOptions& options, const SwitchConfig& config,
                   const RequestSet& set) {
  for (const auto& prompt : set.prompts) {
    for (int64_t id : prompt) {
      if (id < config.vocab_size) continue;
      throw UsageError(ErrorText("a prompt's token does not exist in this model",
                                 "id " + std::to_string(id) + ", vocabulary " +
                                     std::to_string(config.vocab_size),
                                 "do --model and --store belong together?"));
    }
  }
  if (set.size() >= LargestBatch(options)) return;
  throw UsageError(ErrorText("fewer prompts than a batch: " + set.name,
                             std::to_string(set.size()) + " prompts, a batch of " +
                                 std::to_string(LargestBatch(options)),
                             "give more prompts or a smaller --batch"));
}

void LoadRequests(const EvaluationOptions& options, EvaluationSetup* setup) {
  if (!options.prompts.empty()) {
    const Tokenizer tokenizer = Tokenizer::Load(options.model);
    for (const std::string& source : options.prompts) {
      setup->requests.push_back(
          ReadPrompts(source, tokenizer, WantedSequences(options), options.quiet));
    }
  } else {  // what the store's encoder read: span-corrupted test text
    RequestSet set{"store", {}, {}};
    for (uint64_t id : TestSequences(*setup->reader, options, false)) {
      const RoutingTrace trace = setup->reader->Read(id, WithHidden::kNo);
      set.prompts.emplace_back(trace.encoder.token_ids.begin(),
                               trace.encoder.token_ids.end());
    }
    setup->requests.push_back(std::move(set));
  }
  for (const RequestSet& set : setup->requests)
    CheckRequests(options, setup->checkpoint->config, set);
}

void CheckStore(const EvaluationSetup& setup) {
  const MoeGeometry& stored = setup.reader->config().geometry;
  const MoeGeometry& model = setup.geometry;
  if (stored.num_keys() == model.num_keys() && stored.d_model == model.d_model) return;
  throw UsageError(ErrorText("--store was collected from a model of another geometry",
                             std::to_string(stored.num_keys()) + " experts of width " +
                                 std::to_string(stored.d_model) + ", the model has " +
                                 std::to_string(model.num_keys()) + " of " +
                                 std::to_string(model.d_model),
                             "give the store of this model"));
}

void SetUpGenerate(const EvaluationOptions& options, EvaluationSetup* setup) {
  const at::ScalarType dtype = ParseDtype("--dtype", options.dtype);
  setup->checkpoint = options.dry_run
                          ? LoadRouters(options.model)
                          : LoadCheckpoint(options.model, dtype, setup->placement.device,
                                           ExpertLoading::kLeaveOut);
  const SwitchConfig& config = setup->checkpoint->config;
  setup->geometry = config.geometry();
  if (setup->reader) CheckStore(*setup);
  const ExpertFileSpec spec = SpecOfCheckpoint(config, dtype);
  const int count = spec.geometry.num_keys();
  const std::vector<std::string> budgets = BudgetTexts(options, *setup, spec, count);
  setup->warm_start =
      WarmStartOf(options.warm_start, setup->reader.get(), setup->geometry);
  LoadPredictors(options, RoutersOf(config, setup->checkpoint->parameters), setup);
  LoadRequests(options, setup);
  if (options.dry_run) {
    size_t prompts = 0;
    for (const RequestSet& set : setup->requests) prompts += set.size();
    std::printf(
        "generate: %zu prompts, %d MoE layers x %d experts, %s; %zu rows of predictors, "
        "%d + %d rounds\n",
        prompts, setup->geometry.num_layers(), setup->geometry.num_experts,
        WayOf(setup->placement).c_str(), setup->predictors.size(), options.warmup_rounds,
        options.rounds);
    for (const std::string& budget : budgets) std::printf("%s\n", budget.c_str());
    std::printf("beside them: %s of weights that are always there\n",
                FormatBytes(SizesOfWeights(config, dtype).dense).c_str());
    return;
  }
  if (options.guess_next_token) {
    setup->next_token = GuessOf(VocabularyHeadOf(config, setup->checkpoint->parameters),
                                config.vocab_size, setup->reader.get());
  }
  setup->file =
      ExpertsOfCheckpoint(ExpertCacheFolder(options.cache), options.model, config,
                          setup->checkpoint->fingerprint, dtype, options.quiet);
}

}  // namespace

uint64_t BudgetOf(const EvaluationOptions& options, const TierChain& chain,
                  const std::string& budget, uint64_t whole_bytes) {
  const uint64_t bytes =
      TierBudget(chain, ParseBudget(budget, whole_bytes), options.budget_given);
  const uint64_t memory =
      options.profile.empty() ? 0 : FindProfile(options.profile).memory_bytes;
  if (memory == 0 || bytes <= memory) return bytes;
  throw UsageError(ErrorText(
      "the budget is larger than the profile's memory",
      FormatBytes(bytes) + ", " + options.profile + " has " + FormatBytes(memory),
      "use a smaller --expert_budget or --tier"));
}

namespace {

// A profile's memory stands for the device's.
TierChain Sized(const TierChain& chain, const EvaluationOptions& options,
                const ExpertTierOptions& tiers) {
  if (!chain.gpu_share && !chain.host_share) return chain;
  uint64_t device =
      options.profile.empty() ? 0 : FindProfile(options.profile).memory_bytes;
  if (device == 0 && chain.gpu_share) device = tiers.open_device()->MemoryBytes();
  return WithSizes(chain, device, MachineMemoryBytes());
}

}  // namespace

Placement UnsizedPlacementOf(const EvaluationOptions& options) {
  Placement placement;
  TierChain& chain = placement.tiers.chain;
  chain = ParseTiers(options.tier);
  placement.tiers.open_device = options.open_device;
  if (options.open_device) return placement;  // a test's device computes on the CPU
  const bool open = options.tier.empty() && options.device != "cpu";
  if (chain.gpu && options.device == "cpu") {
    throw UsageError(ErrorText("--device=cpu has no gpu tier", "--tier=" + options.tier,
                               "use --tier=host:SIZE,disk, or leave --device out"));
  }
  if (chain.managed && NumCudaDevices() == 0) {
    throw EnvironmentError(ErrorText("managed memory is a CUDA device's",
                                     "--tier=" + options.tier + ", and no such device",
                                     "use --tier=host:SIZE,disk, or a build and a "
                                     "machine with CUDA"));
  }
  const bool asks = chain.gpu && options.device == "auto";
  const at::Device device = ParseDevice(asks ? "cuda" : options.device, 0);
  if (device.is_cuda() && !chain.gpu && !open && options.device != "auto") {
    throw UsageError(ErrorText(
        "--device=" + options.device + " runs on experts in a gpu tier",
        "--tier=" + options.tier, "use --tier=gpu:SIZE,host,disk, or --device=cpu"));
  }
  if (open) chain.gpu = device.is_cuda();
  if (!chain.gpu) return placement;
  placement.device = device;
  placement.tiers.open_device = [device] { return OpenCudaDevice(device.index()); };
  return placement;
}

Placement PlacementOf(const EvaluationOptions& options) {
  Placement placement = UnsizedPlacementOf(options);
  placement.tiers.chain = Sized(placement.tiers.chain, options, placement.tiers);
  return placement;
}

std::shared_ptr<const UseShares> WarmStartOf(const std::string& warm_start,
                                             const TraceReader* store,
                                             const MoeGeometry& geometry) {
  if (warm_start == "none") return nullptr;
  if (warm_start == "auto") {
    if (!store) {
      throw UsageError(ErrorText("--warm_start=auto counts recorded routing", "",
                                 "give --store=STORE, or --warm_start=load.csv"));
    }
    return std::make_shared<UseShares>(CountUses(*store, geometry));
  }
  const fs::path path = warm_start;
  if (fs::is_directory(path))
    return std::make_shared<UseShares>(CountUses(TraceReader(path), geometry));
  if (!fs::exists(path)) {
    throw UsageError(ErrorText("--warm_start=" + warm_start + " does not exist", "",
                               "give none, auto, a trace store, or load.csv of "
                               "routecast-trace stats"));
  }
  return std::make_shared<UseShares>(ReadUseShares(path, geometry));
}

EvaluationSetup SetUpEvaluation(const EvaluationOptions& options) {
  EvaluationSetup setup;
  setup.placement = PlacementOf(options);
  if (!options.store.empty()) setup.reader = std::make_unique<TraceReader>(options.store);
  if (IsReplay(options)) {
    SetUpReplay(options, &setup);
  } else {
    SetUpGenerate(options, &setup);
  }
  return setup;
}

std::unique_ptr<Workload> MakeWorkload(const EvaluationOptions& options,
                                       const EvaluationSetup& setup,
                                       const RequestSet& set, int batch,
                                       Schedule schedule) {
  const auto size = static_cast<size_t>(batch);
  size_t count = std::min(
      set.size(), size * static_cast<size_t>(options.rounds + options.warmup_rounds));
  count -= count % size;  // both schedules run the same requests
  std::vector<size_t> order;
  if (schedule == Schedule::kByRoute) {
    order = OrderByRoute(set, count, size * static_cast<size_t>(options.warmup_rounds),
                         size, setup.geometry, setup.scheduler.get());
  } else {
    for (size_t i = 0; i < count; ++i) order.push_back(i);
  }
  if (IsReplay(options)) {
    std::vector<RoutingTrace> traces;
    for (size_t i : order) traces.push_back(set.traces[i]);
    return std::make_unique<ReplayWorkload>(setup.geometry, std::move(traces),
                                            ReplayOf(options, setup, batch));
  }
  std::vector<std::vector<int64_t>> prompts;
  for (size_t i : order) prompts.push_back(set.prompts[i]);
  return std::make_unique<GenerateWorkload>(*setup.checkpoint, prompts, batch,
                                            options.max_new_tokens, options.steps);
}

}  // namespace routecast
