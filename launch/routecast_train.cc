// routecast-train: trace store -> speculation model, scored beside its baselines.
#include <gflags/gflags.h>

#include <cstdio>
#include <optional>

#include "comm/mpi_session.h"
#include "common/errors.h"
#include "common/run_record.h"
#include "launch/flags.h"
#include "launch/main.h"
#include "trainer/speculation_trainer.h"

DECLARE_bool(quiet);
DECLARE_bool(dry_run);
DECLARE_uint64(seed);
DEFINE_string(store, "", "Trace store to learn from");
DEFINE_string(kind, "hidden", "Kind of model: hidden, interlayer");
DEFINE_string(out, "", "Folder of the new speculation model");
DEFINE_int32(epochs, 8, "Epochs at most; early stopping may end before");
DEFINE_int64(steps, 0, "Training steps at most, instead of --epochs; 0 = by --epochs");
DEFINE_int32(global_batch, 64, "Windows a step over all ranks");
DEFINE_int32(micro_batch, 16, "Windows a forward pass");
DEFINE_double(learning_rate, 0, "Peak learning rate; 0 = the kind's");
DEFINE_int32(patience, 5, "Validations without a better loss before it stops; 0 = never");
DEFINE_int32(validate_every, 0, "Steps between validations; 0 = eight a run or more");
DEFINE_uint64(validation_sequences, 256, "Sequences a source layer; 0 = all");
DEFINE_uint64(test_sequences, 0, "Sequences a source layer; 0 = all");
DEFINE_string(cache, "1GiB", "Memory for records on this host, shared by its ranks");
DEFINE_string(device, "auto", "auto, cpu, cuda or cuda:N");
DEFINE_string(dtype, "fp32", "fp32: speculation models train in single precision");
DEFINE_string(resume, "auto",
              "auto: go on with an unfinished run in --out; never: start anew; or the "
              "folder of an unfinished run");
DEFINE_bool(deterministic, true, "Refuse operations whose result may differ by run");
DEFINE_int64(stop_after, 0, "Save, end with 75 after this step; 0 = run to the end");

namespace routecast {
namespace {

constexpr char kUsage[] =
    "trains a speculation model on recorded routing\n"
    "  launch/train.sh [-n RANKS] --store=FOLDER --kind=hidden --out=FOLDER";

SpeculationJob Validate() {
  SpeculationJob job;
  SpeculationOptions& o = job.options;
  o.kind = SpeculationKinds().at(
      static_cast<size_t>(ParseChoice("--kind", FLAGS_kind, SpeculationKinds())));
  ParseChoice("--dtype", FLAGS_dtype, {"fp32"});
  o.epochs = FLAGS_epochs;
  o.steps = FLAGS_steps;
  o.global_batch = FLAGS_global_batch;
  o.micro_batch = FLAGS_micro_batch;
  o.learning_rate = FLAGS_learning_rate;
  o.patience = FLAGS_patience;
  o.validate_every = FLAGS_validate_every;
  o.validation_sequences = FLAGS_validation_sequences;
  o.test_sequences = FLAGS_test_sequences;
  o.seed = FLAGS_seed;
  o.Validate();
  if (FLAGS_store.empty()) {
    throw UsageError("--store is missing\n  give the folder that routecast-collect made");
  }
  if (FLAGS_out.empty())
    throw UsageError("--out is missing\n  give a folder for the model");
  job.out = FLAGS_out;
  job.resume = FLAGS_resume;
  job.stop_after = FLAGS_stop_after;
  return job;
}

// The routers serve the stale gate alone; a store of imported traces has none.
std::vector<RouterWeights> RoutersOf(const TraceReader& reader) {
  if (!fs::exists(reader.routers_path())) return {};
  return ReadRouters(reader.routers_path(), reader.config().geometry);
}

void Run(int argc, char** argv) {
  SpeculationJob job = Validate();
  TraceDatasetOptions data_options;
  data_options.cache_bytes = ParseBytes("--cache", FLAGS_cache);
  MpiSession session(&argc, &argv);
  SetAbortHook([](int code) { MpiSession::Abort(code); });
  const RankInfo rank = session.rank_info();
  job.device = ParseDevice(FLAGS_device, rank.local_rank);
  SetComputeThreads(ThreadsPerRank(rank.local_world));
  job.deterministic = FLAGS_deterministic;
  const auto comm = MakeCommunicator(session, job.device);
  job.quiet = FLAGS_quiet || !rank.is_root();

  const auto reader = std::make_shared<const TraceReader>(FLAGS_store);
  data_options.cache_bytes /= static_cast<uint64_t>(rank.local_world);
  TraceDataset dataset(reader, data_options);
  if (FLAGS_dry_run) {
    const std::string plan = DescribeSpeculation(job, &dataset, rank.world);
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
    const SpeculationResult result =
        TrainSpeculation(job, &dataset, RoutersOf(*reader), comm.get());
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
