// routecast-train: trace store -> speculation model, scored beside its baselines.
#include <gflags/gflags.h>

#include <cstdio>
#include <deque>
#include <optional>
#include <sstream>

#include "comm/mpi_session.h"
#include "common/errors.h"
#include "common/model_folder.h"
#include "common/process_memory.h"
#include "common/run_record.h"
#include "launch/flags.h"
#include "launch/main.h"
#include "models/checkpoint.h"
#include "models/device_choice.h"
#include "models/speculation_onnx.h"
#include "trainer/run_plan.h"
#include "trainer/speculation_size.h"

DECLARE_bool(quiet);
DECLARE_bool(dry_run);
DECLARE_uint64(seed);
DEFINE_string(store, "", "Trace store to learn from");
DEFINE_string(also, "",
              "Further stores, comma-separated, of other models, whose routing one trunk "
              "learns together with --store (pre-training; kinds that embed experts)");
DEFINE_string(
    kind, "hidden",
    "Kind of model: hidden, stale_correction, interlayer, autoregressive, multiscale, "
    "moe, ensemble, contextual, transformer, hierarchical, simple, lstm, attention, "
    "conv1d or legacy_multiscale; docs/speculation.md says what each is");
DEFINE_string(out, "", "Folder of the new speculation model");
DEFINE_int32(epochs, 8, "Epochs at most; early stopping may end before");
DEFINE_int64(steps, 0, "Training steps at most, instead of --epochs; 0 = by --epochs");
DEFINE_int32(global_batch, 64, "Windows a step over all ranks");
DEFINE_int32(micro_batch, 16, "Windows a forward pass");
DEFINE_double(learning_rate, 0, "Peak learning rate; 0 = the kind's");
DEFINE_int32(width, 0, "Width of the model; 0 = the kind's, as the next five");
DEFINE_int32(heads, 0, "Attention heads");
DEFINE_int32(ff, 0, "Inner width; follows --width where it is not said");
DEFINE_int32(layers, 0, "Layers or blocks");
DEFINE_int32(context, 0, "Newest layers of a token whose experts are seen");
DEFINE_double(dropout, -1, "Share of activations; below 0 = the kind's");
DEFINE_string(
    members, "",
    "Members of an ensemble, e.g. interlayer:width=512,heads=16,lr=5e-5;hidden*2");
DEFINE_string(start_from, "",
              "Folder of a finished run of this kind whose weights training starts from");
DEFINE_bool(
    transfer, false,
    "Of --start_from, take only what does not belong to the traced model: layers, "
    "not embeddings and heads");
DEFINE_int32(freeze_layers, 0,
             "Lowest layers of --start_from that stay as they are at first");
DEFINE_int32(freeze_epochs, 1,
             "Epochs until the top one of them is trained, and from each to the next");
DEFINE_string(combine, "probabilities",
              "How an ensemble mixes: probabilities, logits, vote");
DEFINE_string(schedule, "cosine",
              "Learning rate: cosine, restarts, plateau, constant, one_cycle");
DEFINE_int32(warmup_steps, 100, "Linear warm-up, at most a tenth of the run");
DEFINE_double(last_rate, 0.02, "Share of the peak rate where a schedule ends");
DEFINE_int64(restart_steps, 0, "First wave of --schedule=restarts; 0 = a fifth");
DEFINE_double(restart_growth, 2, "Each wave is so many times as long as the last");
DEFINE_double(plateau_factor, 0.5, "What --schedule=plateau multiplies the rate by");
DEFINE_int32(plateau_patience, 2, "After so many validations without a better one");
DEFINE_double(weight_decay, 0.01, "Of matrices, decoupled");
DEFINE_double(clip_norm, 1, "Largest norm of a member's gradient");
DEFINE_double(beta1, 0.9, "Decay of AdamW's first moment");
DEFINE_double(beta2, 0.99, "Decay of AdamW's second moment");
DEFINE_double(label_smoothing, 0, "Share of a label that all experts get");
DEFINE_double(ema, 0, "Decay of averaged parameters, which are then kept; 0 = none");
DEFINE_double(confidence_weight, 0.1, "Of the loss of 'my top-1 is right'");
DEFINE_double(set_weight, 0, "Of the encoder's set prediction in the loss");
DEFINE_double(distill_weight, 0,
              "Share of the loss towards the routers' own top-k (--record=topk)");
DEFINE_double(distill_temperature, 1, "Of --distill_weight");
DEFINE_double(consistency_weight, 0,
              "Of 'neighbouring tokens are as alike as their experts' in the loss");
DEFINE_double(diversity_weight, 0, "Of 'all experts are named' in the loss");
DEFINE_double(contrastive_weight, 0,
              "Of InfoNCE between a lead and the experts' embeddings in the loss");
DEFINE_bool(
    attention_inputs, false,
    "`hidden` reads attention summaries, too (--record=ids,hidden,attention); the "
    "model is offline only");
DEFINE_int32(backup_experts, 0,
             "Heads for the router's second, third .. choice (published: 3); needs "
             "--record=topk, kinds interlayer and moe");
DEFINE_double(backup_weight, 0.3, "Of the mean of their cross-entropies in the loss");
DEFINE_double(augment_layers, 0, "Chance that a known layer is hidden in training");
DEFINE_double(augment_parts, 0, "Chance that a part of a sequence is taken");
DEFINE_double(augment_permutation, 0, "Chance that experts are relabelled (ablation)");
DEFINE_double(
    augment_mixup, 0,
    "Chance that a sequence's embedded experts are mixed with another's, labels "
    "alike");
DEFINE_double(augment_noise, 0, "Deviation of noise on embedded experts in training");
DEFINE_double(augment_context, 0,
              "Chance that a micro-batch looks at fewer layers than --context");
DEFINE_double(masked_ids, 0,
              "Share of known experts that are hidden and predicted, too (pre-training: "
              ".15)");
DEFINE_double(augment_mask, 0, "Share of tokens whose routing is hidden in training");
DEFINE_double(augment_unmasked, 1, "Weight of the other tokens' labels then");
DEFINE_int32(
    curriculum_epochs, 0,
    "Epochs until all targets count, those that a Markov table finds easy first; "
    "0 = all from the start");
DEFINE_string(monitor, "loss",
              "What validation must better: loss or top1 (models of several experts a "
              "token: recall of them)");
DEFINE_int32(patience, 5, "Validations without a better one before it stops; 0 = never");
DEFINE_int32(validate_every, 0, "Steps between validations; 0 = eight a run or more");
DEFINE_uint64(validation_sequences, 256, "Sequences a source layer; 0 = all");
DEFINE_uint64(test_sequences, 0, "Sequences a source layer; 0 = all");
DEFINE_string(cache, "1GiB", "Memory for records on this host, shared by its ranks");
DEFINE_string(device, "auto", "auto, cpu, cuda or cuda:N");
DEFINE_string(
    dtype, "fp32",
    "Of a training pass' products: fp32, or bf16 (autocast); parameters, losses "
    "and scores are fp32");
DEFINE_string(resume, "auto",
              "auto: go on with an unfinished run in --out; never: start anew; or the "
              "folder of an unfinished run");
DEFINE_int32(keep_checkpoints, 2,
             "Newest checkpoints that stay while it trains, 1 or more; the best "
             "parameters lie beside them");
DEFINE_bool(
    deterministic, true,
    "Pin algorithms: refuse those whose result may differ by run; prints its cost");
DEFINE_string(leaderboard, "",
              "Makes one table in --out of these, comma-separated: kinds and files of "
              "flags, NAME.flags (trained over --seeds seeds), folders of finished runs; "
              "or all (kinds)");
DEFINE_int32(seeds, 3, "Seeds a kind of --leaderboard, from --seed on");
DEFINE_double(
    kind_seconds, 0,
    "With --leaderboard: seconds of training a kind may take, its seeds in equal "
    "parts; a run that is over its part keeps its best so far; 0 = no limit");
DEFINE_double(pass_us, 0,
              "Microseconds of one token through the decoder: kinds whose questions take "
              "more than 5 % of it are marked; 0 = not known");
DEFINE_string(
    model, "",
    "With --leaderboard, instead of --pass_us: the checkpoint that the store was "
    "collected from; its pass is timed beside the questions");
DEFINE_string(
    search, "",
    "JSON file of a search space: successive halving over its trials, each on a "
    "rank of its own; docs/speculation.md has an example");
DEFINE_bool(
    onnx, false,
    "Also writes the model as ONNX into OUT/onnx; docs/speculation.md has the kinds");
DEFINE_double(collective_deadline, 45,
              "Seconds a rank waits for the others before the job ends and names them");
DEFINE_int64(stop_after, 0, "Save, end with 75 after this step; 0 = run to the end");

namespace routecast {
namespace {

constexpr char kUsage[] =
    "trains a speculation model on recorded routing\n"
    "  launch/train.sh [-n RANKS] --store=FOLDER --kind=hidden --out=FOLDER";

// Of the flags as they are now.
SpeculationOptions OptionsOfFlags() {
  SpeculationOptions o;
  o.kind = SpeculationKinds().at(
      static_cast<size_t>(ParseChoice("--kind", FLAGS_kind, SpeculationKinds())));
  o.dtype = FLAGS_dtype;
  o.epochs = FLAGS_epochs;
  o.steps = FLAGS_steps;
  o.global_batch = FLAGS_global_batch;
  o.micro_batch = FLAGS_micro_batch;
  o.sizes = {FLAGS_width,  FLAGS_heads,   FLAGS_ff,
             FLAGS_layers, FLAGS_context, FLAGS_dropout};
  o.members = FLAGS_members;
  o.combine = FLAGS_combine;
  o.training = {FLAGS_learning_rate, FLAGS_weight_decay, FLAGS_clip_norm,
                FLAGS_label_smoothing};
  o.schedule = {FLAGS_schedule,        FLAGS_warmup_steps,   FLAGS_last_rate,
                FLAGS_restart_steps,   FLAGS_restart_growth, FLAGS_plateau_factor,
                FLAGS_plateau_patience};
  o.beta1 = FLAGS_beta1;
  o.beta2 = FLAGS_beta2;
  o.ema = FLAGS_ema;
  o.confidence_weight = FLAGS_confidence_weight;
  o.set_weight = FLAGS_set_weight;
  o.start_from = FLAGS_start_from;
  o.transfer = FLAGS_transfer;
  o.freeze = {FLAGS_freeze_layers, FLAGS_freeze_epochs};
  o.distill_weight = FLAGS_distill_weight;
  o.distill_temperature = FLAGS_distill_temperature;
  o.contrastive_weight = FLAGS_contrastive_weight;
  o.consistency_weight = FLAGS_consistency_weight;
  o.diversity_weight = FLAGS_diversity_weight;
  o.attention_inputs = FLAGS_attention_inputs;
  o.backup_experts = FLAGS_backup_experts;
  o.backup_weight = FLAGS_backup_weight;
  o.augment = {FLAGS_augment_layers, FLAGS_augment_parts,    FLAGS_augment_permutation,
               FLAGS_augment_mask,   FLAGS_augment_unmasked, FLAGS_augment_mixup,
               FLAGS_augment_noise,  FLAGS_augment_context,  FLAGS_masked_ids};
  o.curriculum_epochs = FLAGS_curriculum_epochs;
  o.monitor = FLAGS_monitor;
  o.patience = FLAGS_patience;
  o.validate_every = FLAGS_validate_every;
  o.validation_sequences = FLAGS_validation_sequences;
  o.test_sequences = FLAGS_test_sequences;
  o.seed = FLAGS_seed;
  o.Validate();
  return o;
}

SpeculationJob Validate() {
  SpeculationJob job;
  job.options = OptionsOfFlags();
  const SpeculationOptions& o = job.options;
  if (FLAGS_store.empty()) {
    throw UsageError("--store is missing\n  give the folder that routecast-collect made");
  }
  if (FLAGS_out.empty())
    throw UsageError("--out is missing\n  give a folder for the model");
  job.out = FLAGS_out;
  job.store = FLAGS_store;
  job.resume = FLAGS_resume;
  job.stop_after = FLAGS_stop_after;
  job.keep_checkpoints = FLAGS_keep_checkpoints;
  if (FLAGS_keep_checkpoints < 1) {
    throw UsageError(ErrorText("--keep_checkpoints must be 1 or more",
                               "it is " + std::to_string(FLAGS_keep_checkpoints),
                               "the newest is what a stopped run goes on from"));
  }
  job.onnx = FLAGS_onnx;
  if (job.onnx && !(FLAGS_leaderboard.empty() && FLAGS_search.empty())) {
    throw UsageError(
        "--onnx is of one model\n  train it without --leaderboard and --search");
  }
  if (job.onnx) RequireOnnxKind(o.kind, o.backup_experts, o.attention_inputs);
  if (!(FLAGS_collective_deadline >= 1)) {
    throw UsageError("--collective_deadline must be 1 or more seconds");
  }
  return job;
}

// The routers serve the stale gate alone; a store of imported traces has none.
std::vector<RouterWeights> RoutersOf(const TraceReader& reader) {
  if (!fs::exists(reader.routers_path())) return {};
  return ReadRouters(reader.routers_path(), reader.config().geometry);
}

std::vector<std::string> Listed(const std::string& text) {
  std::vector<std::string> items;
  std::stringstream all(text);
  for (std::string item; std::getline(all, item, ',');) items.push_back(item);
  return items;
}

SearchSpace SpaceOf(const fs::path& file) {
  return SearchSpace::FromJson(ReadJsonFile(file), file.string());
}

// Trials of one rank may take much longer than another's.
constexpr double kSearchDeadline = 24 * 3600;

// A file of flags: its own kind and options, called by the file's name.
void AddSettings(const fs::path& file, LeaderboardJob* job) {
  const std::string name = file.filename();
  if (job->settings.contains(name)) {
    throw UsageError(ErrorText("--leaderboard names two files called " + name,
                               file.string(), "a row has its file's name: rename one"));
  }
  WithFlagFile(file, [&] { job->settings[name] = OptionsOfFlags(); });
  job->entries.push_back(name);
}

LeaderboardJob Leaderboard(const SpeculationJob& run) {
  LeaderboardJob job;
  job.run = run;
  job.seeds = FLAGS_seeds;
  job.pass_us = FLAGS_pass_us;
  job.kind_seconds = FLAGS_kind_seconds;
  if (FLAGS_pass_us > 0 && !FLAGS_model.empty()) {
    throw UsageError(
        "--model times the pass that --pass_us says\n  leave one of the two out");
  }
  job.checkpoint = FindModelFolder(FLAGS_model);
  for (const std::string& entry : Listed(FLAGS_leaderboard)) {
    if (entry.ends_with(".flags")) {
      AddSettings(entry, &job);
      continue;
    }
    if (entry.find('/') == std::string::npos && entry != "all" && !fs::exists(entry)) {
      ParseChoice("--leaderboard", entry, SpeculationKinds());
    }
    job.entries.push_back(entry);
  }
  if (FLAGS_seeds < 1 || FLAGS_seeds > 100) {
    throw UsageError("--seeds must be 1 to 100\n  it is " + std::to_string(FLAGS_seeds));
  }
  return job;
}

bool ReadsTopK(const SpeculationOptions& o) {
  return o.distill_weight > 0 || o.backup_experts > 0;
}

void Run(int argc, char** argv) {
  SpeculationJob job = Validate();
  if (!FLAGS_also.empty() && !(FLAGS_leaderboard.empty() && FLAGS_search.empty())) {
    throw UsageError(
        "--also is of one training\n  leave out --leaderboard and --search, or --also");
  }
  // What is wrong in them is said before anything is written.
  std::optional<LeaderboardJob> board;
  std::optional<SearchSpace> space;
  if (!FLAGS_leaderboard.empty() && !FLAGS_search.empty()) {
    throw UsageError(ErrorText("--leaderboard and --search are two jobs", "",
                               "leave one of the two out"));
  }
  if (!FLAGS_model.empty() && FLAGS_leaderboard.empty()) {
    throw UsageError("--model is of --leaderboard\n  give both, or neither");
  }
  if (!(FLAGS_kind_seconds >= 0) ||
      (FLAGS_kind_seconds > 0 && FLAGS_leaderboard.empty())) {
    throw UsageError(
        "--kind_seconds is a time of 0 or more, of --leaderboard\n  give both, or "
        "neither");
  }
  if (!FLAGS_leaderboard.empty()) board = Leaderboard(job);
  if (!FLAGS_search.empty()) space = SpaceOf(FLAGS_search);
  TraceDatasetOptions data_options;
  data_options.cache_bytes = ParseBytes("--cache", FLAGS_cache);
  // A search may draw --distill_weight.
  data_options.keep_top_k = ReadsTopK(job.options) || space.has_value();
  if (board) {
    for (const auto& [name, options] : board->settings) {
      data_options.keep_top_k = data_options.keep_top_k || ReadsTopK(options);
    }
  }
  KeepAllFreedMemory();
  MpiSession session(&argc, &argv);
  SetAbortHook([](int code) { MpiSession::Abort(code); });
  const RankInfo rank = session.rank_info();
  job.device = ParseDevice(FLAGS_device, rank.local_rank);
  CheckOwnDevice(FLAGS_device, job.device, rank.local_world, NumCudaDevices());
  SetComputeThreads(ThreadsPerRank(rank.local_world));
  job.deterministic = FLAGS_deterministic;
  const auto comm =
      MakeCommunicator(session, job.device,
                       FLAGS_search.empty() ? FLAGS_collective_deadline : kSearchDeadline,
                       job.out / "watchdog");
  job.quiet = FLAGS_quiet || !rank.is_root();

  const auto reader = std::make_shared<const TraceReader>(FLAGS_store, NeedTokens::kNo);
  const std::vector<std::string> also = Listed(FLAGS_also);
  data_options.cache_bytes /= static_cast<uint64_t>(rank.local_world) * (1 + also.size());
  TraceDataset dataset(reader, data_options);
  std::deque<TraceDataset> others;
  for (const std::string& store : also) {
    others.emplace_back(std::make_shared<const TraceReader>(store, NeedTokens::kNo),
                        data_options);
    job.also.push_back({store, &others.back()});
  }
  if (FLAGS_dry_run) {
    if (board) board->run = job;
    const bool routers = fs::exists(reader->routers_path());
    const std::string plan =
        board   ? DescribeLeaderboard(*board, &dataset, routers, rank.world)
        : space ? DescribeSearch({*space, job}, &dataset, rank.world)
                : DescribeSpeculation(job, &dataset, rank.world);
    if (rank.is_root()) std::printf("%s", plan.c_str());
    return;
  }
  std::optional<RunRecord> record;
  if (rank.is_root()) {
    MakeFolder(job.out);
    record.emplace(job.out, "routecast-train", EffectiveFlags());
    record->Set("ranks", rank.world);
    record->Set("device", job.device.str());
    record->WriteStart();
  }
  try {
    const auto routers = RoutersOf(*reader);
    if (board) {
      board->run = job;  // with the device
      const Json made = MakeLeaderboard(*board, &dataset, routers, comm.get());
      if (!record) return;
      record->Finish(kExitDone, {{"rows", made["rows"].size()}});
      std::printf("%s%s\n", LeaderboardText(made).c_str(),
                  (job.out / "leaderboard.html").c_str());
      return;
    }
    if (space) {
      const Json search = Search({*space, job}, &dataset, routers, comm.get());
      if (!record) return;
      record->Finish(kExitDone, {{"best", search["trials"][0]}});
      std::printf("%s%s\n", SearchText(search).c_str(), (job.out / "best.flags").c_str());
      return;
    }
    const SpeculationResult result = TrainSpeculation(job, &dataset, routers, comm.get());
    if (!record) return;
    record->Finish(kExitDone, {{"validation", result.results["validation"]},
                               {"scores", result.results["scores"]}});
    std::printf("%s", result.table.c_str());
  } catch (const StoppedError&) {
    if (record) record->Finish(kExitStopped, Json::object());
    throw;
  }
}

}  // namespace
}  // namespace routecast

int main(int argc, char** argv) {
  return routecast::Main(argc, argv, routecast::kUsage,
                         [&] { routecast::Run(argc, argv); });
}
