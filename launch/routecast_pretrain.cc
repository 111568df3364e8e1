// routecast-pretrain: text -> a small Switch Transformer with routing worth learning.
#include <gflags/gflags.h>

#include <algorithm>
#include <cstdio>
#include <optional>

#include "comm/mpi_session.h"
#include "common/errors.h"
#include "common/output_folder.h"
#include "common/recorded_run.h"
#include "launch/flags.h"
#include "launch/main.h"
#include "trainer/pretrainer.h"

DECLARE_bool(quiet);
DECLARE_bool(dry_run);
DECLARE_uint64(seed);
DEFINE_string(data, "",
              "Text: kind:path, repeatable (text: jsonl: wikitext: squad: glue:)");
DEFINE_string(preset, "demo", "Size: demo, small, small128, base128");
DEFINE_int32(steps, 0, "Training steps; 0 = the preset's");
DEFINE_int32(global_batch, 0, "Sequences a step over all ranks; 0 = the preset's");
DEFINE_int32(micro_batch, 0, "Sequences a forward pass; 0 = the preset's");
DEFINE_double(learning_rate, 0, "Peak learning rate; 0 = the preset's");
DEFINE_int32(encoder_blocks, 0, "Every second one is sparse; 0 = the preset's");
DEFINE_int32(decoder_blocks, 0, "Every second one is sparse; 0 = the preset's");
DEFINE_string(out, "", "Folder of the new checkpoint");
DEFINE_string(cache, "", "Folder of the corpus index; default: OUT/corpus");
DEFINE_string(device, "auto", "auto, cpu, cuda or cuda:N");
DEFINE_string(dtype, "fp32",
              "Weights as written: fp32, bf16 or fp16; training is in fp32");
DEFINE_int32(sequence_tokens, 0, "Raw tokens a sequence; 0 = the preset's");
DEFINE_int32(log_every, 0, "Steps between lines of metrics.jsonl; 0 = the preset's");
DEFINE_int32(checkpoint_every, 0, "Steps between checkpoints; 0 = the preset's");
DEFINE_int32(stop_after, 0,
             "Save, end with 75 after this step of the run; 0 = run to the end");
DEFINE_string(resume, "auto",
              "auto: go on with an unfinished run in --out; last_good: the same, without "
              "checkpoints that are damaged; never: start anew");

namespace routecast {
namespace {

constexpr char kUsage[] =
    "trains a small Switch Transformer from text\n"
    "  launch/pretrain.sh [-n RANKS] --data=text:FILE --out=FOLDER [--preset=demo]";

// A flag of 0 leaves the preset's value.
void Override(const char* flag, int value, int* option) {
  if (value < 0) {
    throw UsageError(ErrorText(std::string(flag) + " is a count",
                               "it is " + std::to_string(value),
                               "give 1 or more; 0 stands for what --help says"));
  }
  if (value > 0) *option = value;
}

PretrainJob Validate() {
  PretrainJob job;
  job.options = PretrainPreset(FLAGS_preset);
  Override("--steps", FLAGS_steps, &job.options.steps);
  Override("--global_batch", FLAGS_global_batch, &job.options.global_batch);
  Override("--micro_batch", FLAGS_micro_batch, &job.options.micro_batch);
  Override("--sequence_tokens", FLAGS_sequence_tokens, &job.options.sequence_tokens);
  Override("--log_every", FLAGS_log_every, &job.options.log_every);
  Override("--checkpoint_every", FLAGS_checkpoint_every, &job.options.checkpoint_every);
  SwitchConfig& model = job.options.model;
  Override("--encoder_blocks", FLAGS_encoder_blocks, &model.num_layers);
  Override("--decoder_blocks", FLAGS_decoder_blocks, &model.num_decoder_layers);
  model.num_sparse_encoder_layers = model.num_layers / 2;
  model.num_sparse_decoder_layers = model.num_decoder_layers / 2;
  if (FLAGS_learning_rate != 0) job.options.learning_rate = FLAGS_learning_rate;
  Override("--stop_after", FLAGS_stop_after, &job.stop_after);
  job.options.warmup_steps =
      std::min(job.options.warmup_steps, job.options.steps / 5 + 1);
  job.options.seed = FLAGS_seed;
  job.options.Validate();
  if (FLAGS_out.empty())
    throw UsageError("--out is missing\n  give a folder for the checkpoint");
  if (FlagValues("data").empty()) {
    throw UsageError("--data is missing\n  give text, e.g. --data=text:book.txt");
  }
  RequireOutput("--out", FLAGS_out, FolderKind::kCheckpoint);
  job.out = FLAGS_out;
  job.save_dtype = ParseDtype("--dtype", FLAGS_dtype);
  constexpr Resume kResumes[] = {Resume::kAuto, Resume::kLastGood, Resume::kNever};
  job.resume =
      kResumes[ParseChoice("--resume", FLAGS_resume, {"auto", "last_good", "never"})];
  job.quiet = FLAGS_quiet;
  return job;
}

constexpr double kDeadlineSeconds = 45;  // that a rank waits for the others

// Headline figures; nothing in a dry run.
Json PretrainOn(MpiSession& session, const RankInfo& rank, PretrainJob job) {
  job.device = ParseDevice(FLAGS_device, rank.local_rank);
  SetComputeThreads(ThreadsPerRank(rank.local_world));
  const auto comm =
      MakeCommunicator(session, job.device, kDeadlineSeconds, job.out / "watchdog");
  const fs::path cache = FLAGS_cache.empty() ? job.out.string() + ".corpus" : FLAGS_cache;
  const Corpus corpus =
      Corpus::Open(FlagValues("data"), cache, ThreadsPerRank(1), job.quiet);
  if (FLAGS_dry_run) {
    if (rank.is_root())
      std::printf("%s", DescribePretraining(job, corpus, rank.world).c_str());
    RequirePretrainingRoom(job);
    return {};
  }
  const RoutingMeasures measures = Pretrain(job, corpus, comm.get());
  if (!job.quiet) std::printf("%s", measures.Table().c_str());
  return measures.ToJson();
}

void Run(int argc, char** argv) {
  PretrainJob job = Validate();
  MpiSession session(&argc, &argv);
  SetAbortHook([](int code) { MpiSession::Abort(code); });
  const RankInfo rank = session.rank_info();
  job.quiet = job.quiet || !rank.is_root();
  RecordedRun record(job.out, "routecast-pretrain", EffectiveFlags());
  record.Set("ranks", rank.world);
  record.Set("options", job.options.ToJson());
  const bool records = rank.is_root() && !FLAGS_dry_run;
  Recorded(records ? &record : nullptr, [&] { return PretrainOn(session, rank, job); });
}

}  // namespace
}  // namespace routecast

int main(int argc, char** argv) {
  return routecast::Main(argc, argv, routecast::kUsage,
                         [&] { routecast::Run(argc, argv); });
}
