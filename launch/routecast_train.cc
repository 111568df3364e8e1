// routecast-train: trace store -> speculation model, scored beside its baselines.
#include <gflags/gflags.h>

#include <cstdio>
#include <deque>
#include <optional>
#include <sstream>

#include "comm/mpi_session.h"
#include "common/errors.h"
#include "common/model_folder.h"
#include "common/output_folder.h"
#include "common/process_memory.h"
#include "common/recorded_run.h"
#include "launch/flags.h"
#include "launch/main.h"
#include "launch/train_flags.h"
#include "models/checkpoint.h"
#include "models/speculation_onnx.h"
#include "trainer/run_plan.h"
#include "trainer/speculation_size.h"
#include "trainer/training_checks.h"

DECLARE_bool(quiet);
DECLARE_bool(dry_run);
DEFINE_string(store, "", "Trace store to learn from");
DEFINE_string(also, "",
              "Further stores, comma-separated, of other models, whose routing one trunk "
              "learns together with --store (pre-training; kinds that embed experts)");
DEFINE_string(shift_store, "",
              "Another store of the same traced model: scores of its test documents as "
              "well, a change of domain");
DEFINE_string(out, "", "Folder of the new speculation model");
DEFINE_string(cache, "1GiB", "Memory for records on this host, shared by its ranks");
DEFINE_string(device, "auto", "auto, cpu, cuda or cuda:N");
DEFINE_string(resume, "auto",
              "auto: go on with an unfinished run in --out; last_good: the same, without "
              "checkpoints that are damaged; never: start anew; or the folder of an "
              "unfinished run");
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

SpeculationJob Validate() {
  SpeculationJob job;
  job.options = OptionsOfFlags();
  const SpeculationOptions& o = job.options;
  if (FLAGS_store.empty()) {
    throw UsageError(ErrorText("--store is missing", "a model learns a store's routing",
                               "give the folder that routecast-collect made"));
  }
  if (FLAGS_out.empty()) {
    throw UsageError(ErrorText("--out is missing", "the model and its scores go there",
                               "give a new folder, or that of a stopped run"));
  }
  RequireOutput("--out", FLAGS_out, FolderKind::kPredictor);
  job.out = FLAGS_out;
  job.store = FLAGS_store;
  job.resume = FLAGS_resume;
  job.stop_after = FLAGS_stop_after;
  job.keep_checkpoints = FLAGS_keep_checkpoints;
  if (FLAGS_keep_checkpoints < 1) {
    throw UsageError(ErrorText("--keep_checkpoints must be 1 or more",
                               "it is " + std::to_string(FLAGS_keep_checkpoints),
                               "use 1 or more: a stopped run goes on from the newest"));
  }
  job.onnx = FLAGS_onnx;
  if (job.onnx && !(FLAGS_leaderboard.empty() && FLAGS_search.empty())) {
    throw UsageError(ErrorText("--onnx is of one model",
                               "--leaderboard and --search train many",
                               "train it without them"));
  }
  if (job.onnx) {
    RequireOnnxKind(o.kind, o.backup_experts, o.attention_inputs, o.has_further_inputs());
  }
  if (!(FLAGS_collective_deadline >= 1)) {
    throw UsageError(
        ErrorText("--collective_deadline is out of range",
                  "it is " + std::to_string(FLAGS_collective_deadline) + " seconds",
                  "use 1 or more; steps of a busy machine may take some"));
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
  RequireUse(job->settings[name]);
  RequirePartners(job->settings[name]);
  job->entries.push_back(name);
}

LeaderboardJob Leaderboard(const SpeculationJob& run) {
  LeaderboardJob job;
  job.run = run;
  job.seeds = FLAGS_seeds;
  job.pass_us = FLAGS_pass_us;
  job.kind_seconds = FLAGS_kind_seconds;
  if (FLAGS_pass_us > 0 && !FLAGS_model.empty()) {
    throw UsageError(ErrorText("--model and --pass_us exclude each other",
                               "the one times the pass that the other one says",
                               "leave one of the two out"));
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
    throw UsageError(ErrorText("--seeds is out of range",
                               "it is " + std::to_string(FLAGS_seeds),
                               "use 1 to 100; 3 or more say how far seeds differ"));
  }
  return job;
}

// What flags ask for, checked before anything is written.
struct Asked {
  SpeculationJob job;
  std::optional<LeaderboardJob> board;
  std::optional<SearchSpace> space;
  TraceDatasetOptions data;
};

void RequireTogether() {
  if (!FLAGS_also.empty() && !(FLAGS_leaderboard.empty() && FLAGS_search.empty())) {
    throw UsageError(ErrorText("--also is of one training",
                               "--leaderboard and --search train many",
                               "leave them out, or --also"));
  }
  if (!FLAGS_shift_store.empty() && !(FLAGS_also.empty() && FLAGS_search.empty())) {
    throw UsageError(ErrorText("--shift_store is of one model, or of --leaderboard",
                               "--also and --search have other tables",
                               "leave them out, or --shift_store"));
  }
  if (!FLAGS_leaderboard.empty() && !FLAGS_search.empty()) {
    throw UsageError(ErrorText("--leaderboard and --search are two jobs",
                               "a table of kinds, or the best options of one",
                               "leave one of the two out"));
  }
  if (!FLAGS_model.empty() && FLAGS_leaderboard.empty()) {
    throw UsageError(ErrorText("--model is of --leaderboard",
                               "a pass is timed to say which rows can be served",
                               "give both, or neither"));
  }
  if (!(FLAGS_kind_seconds >= 0) ||
      (FLAGS_kind_seconds > 0 && FLAGS_leaderboard.empty())) {
    throw UsageError(ErrorText("--kind_seconds is a time of 0 or more, of --leaderboard",
                               "it is " + std::to_string(FLAGS_kind_seconds),
                               "give both, or neither"));
  }
}

Asked AskedByFlags() {
  Asked asked;
  asked.job = Validate();
  RequireTogether();
  asked.job.deterministic = FLAGS_deterministic;
  if (!FLAGS_leaderboard.empty()) asked.board = Leaderboard(asked.job);
  if (!asked.board) RequireUse(asked.job.options);
  if (!FLAGS_search.empty()) asked.space = SpaceOf(FLAGS_search);
  if (!asked.space) RequirePartners(asked.job.options);
  asked.data.cache_bytes = ParseBytes("--cache", FLAGS_cache);
  // A search may draw --distill_weight.
  asked.data.keep_top_k = asked.job.options.reads_top_k() || asked.space.has_value();
  if (asked.board) {
    for (const auto& [name, options] : asked.board->settings) {
      asked.data.keep_top_k = asked.data.keep_top_k || options.reads_top_k();
    }
  }
  return asked;
}

// The stores that are learned from and looked at, open.
struct Datasets {
  std::shared_ptr<const TraceReader> reader;
  std::optional<TraceDataset> first, shift;
  std::deque<TraceDataset> others;
};

void OpenDatasets(TraceDatasetOptions options, int local_world, SpeculationJob* job,
                  Datasets* open) {
  const auto reader_of = [](const std::string& store) {
    return std::make_shared<const TraceReader>(store, NeedTokens::kNo);
  };
  open->reader = reader_of(FLAGS_store);
  const std::vector<std::string> also = Listed(FLAGS_also);
  const size_t stores = 1 + also.size() + (FLAGS_shift_store.empty() ? 0 : 1);
  options.cache_bytes /= static_cast<uint64_t>(local_world) * stores;
  open->first.emplace(open->reader, options);
  for (const std::string& store : also) {
    open->others.emplace_back(reader_of(store), options);
    job->also.push_back({store, &open->others.back()});
  }
  if (FLAGS_shift_store.empty()) return;
  open->shift.emplace(reader_of(FLAGS_shift_store), options);
  RequireShift(&*open->shift, *open->first, WithHidden::kNo);
  job->shift = {FLAGS_shift_store, &*open->shift};
}

// Trains what is asked for and prints it; headline figures. `record`: null where another
// rank has it.
Json Train(MpiSession& session, const RankInfo& rank, Asked asked, RecordedRun* record) {
  SpeculationJob& job = asked.job;
  job.device = ParseDevice(FLAGS_device, rank.local_rank);
  SetComputeThreads(ThreadsPerRank(rank.local_world));
  const auto comm =
      MakeCommunicator(session, job.device,
                       FLAGS_search.empty() ? FLAGS_collective_deadline : kSearchDeadline,
                       job.out / "watchdog");
  job.quiet = FLAGS_quiet || !rank.is_root();
  if (record) record->Set("device", job.device.str());
  Datasets open;
  OpenDatasets(asked.data, rank.local_world, &job, &open);
  TraceDataset* dataset = &*open.first;
  if (asked.board) asked.board->run = job;  // with the device
  if (FLAGS_dry_run) {
    const bool routers = fs::exists(open.reader->routers_path());
    const std::string plan =
        asked.board   ? DescribeLeaderboard(*asked.board, dataset, routers, rank.world)
        : asked.space ? DescribeSearch({*asked.space, job}, dataset, rank.world)
                      : DescribeSpeculation(job, dataset, rank.world);
    if (rank.is_root()) std::printf("%s", plan.c_str());
    return {};
  }
  const auto routers = RoutersOf(*open.reader);
  if (asked.board) {
    const Json made = MakeLeaderboard(*asked.board, dataset, routers, comm.get());
    if (!rank.is_root()) return {};
    std::printf("%s%s\n", LeaderboardText(made).c_str(),
                (job.out / "leaderboard.html").c_str());
    return {{"rows", made["rows"].size()}};
  }
  if (asked.space) {
    const Json search =
        Search({*asked.space, job, GivenOptions()}, dataset, routers, comm.get());
    if (!rank.is_root()) return {};
    std::printf("%s%s\n", SearchText(search).c_str(), (job.out / "best.flags").c_str());
    return {{"best", search["trials"][0]}};
  }
  // Scores on --shift_store and models of --also would be new: those commands train.
  const bool alone = job.also.empty() && job.shift.dataset == nullptr;
  if (alone && job.resume == "auto" && IsFinished(job, *dataset)) {
    if (!rank.is_root()) return {};
    record->LeavesAll();
    const Json results = KeepFinished(job);
    std::printf("%s is finished: nothing to do; --resume=never trains it anew\n",
                job.out.c_str());
    return {{"validation", results["validation"]}, {"scores", results["scores"]}};
  }
  const SpeculationResult result = TrainSpeculation(job, dataset, routers, comm.get());
  if (!rank.is_root()) return {};
  std::printf("%s", result.table.c_str());
  return {{"validation", result.results["validation"]},
          {"scores", result.results["scores"]}};
}

void Run(int argc, char** argv) {
  const Asked asked = AskedByFlags();
  KeepAllFreedMemory();
  MpiSession session(&argc, &argv);
  SetAbortHook([](int code) { MpiSession::Abort(code); });
  const RankInfo rank = session.rank_info();
  RecordedRun record(asked.job.out, "routecast-train", EffectiveFlags());
  record.Set("ranks", rank.world);
  RecordedRun* recorded = rank.is_root() && !FLAGS_dry_run ? &record : nullptr;
  Recorded(recorded, [&] { return Train(session, rank, asked, recorded); });
}

}  // namespace
}  // namespace routecast

int main(int argc, char** argv) {
  return routecast::Main(argc, argv, routecast::kUsage,
                         [&] { routecast::Run(argc, argv); });
}
