// routecast-collect: checkpoint + corpus -> trace store.
#include <gflags/gflags.h>

#include <sstream>

#include "collector/collector.h"
#include "comm/mpi_session.h"
#include "common/errors.h"
#include "common/model_folder.h"
#include "common/output_folder.h"
#include "launch/main.h"

DECLARE_bool(quiet);
DECLARE_bool(dry_run);
DECLARE_int32(threads);
DECLARE_uint64(seed);
DEFINE_string(
    model, "",
    "Checkpoint: folder with config.json, weights and spiece.model, or a name in "
    "the Hugging Face cache: google/switch-base-8[@REVISION]");
DEFINE_string(
    data, "",
    "Corpus: kind:path, repeatable (text: jsonl: wikitext: squad: glue:); a store "
    "is given those that it does not have");
DEFINE_string(store, "", "Folder of the trace store: made anew, or gone on with");
DEFINE_string(cache, "", "Folder of the corpus index; default: STORE.corpus");
DEFINE_string(task, "denoise", "encode, denoise or generate");
DEFINE_string(record, "ids,probs,hidden,output",
              "List of: ids, probs, topk, hidden (router inputs), output (the "
              "decoder's), attention "
              "(summaries by head)");
DEFINE_int32(
    top_k, 4,
    "Experts stored a token where topk is recorded, up to 64; all of the model's "
    "where it has fewer");
DEFINE_double(hidden_share, 0.1, "Share of document groups with router inputs");
DEFINE_int32(num_shards, 16, "Databases of the store; fixed at creation");
DEFINE_string(
    compression, "none",
    "none, zstd (blocks), context (ids, once all chunks are in) or context+zstd");
DEFINE_int64(max_sequences, 0, "Sequences to collect, of what --data adds; 0 = all");
DEFINE_int32(max_length, 512, "Tokens a sequence; longer documents are cut into several");
DEFINE_int32(batch_size, 32, "Sequences a forward pass");
DEFINE_double(noise_density, 0.15, "Share of masked tokens in denoise and generate");
DEFINE_int32(expert_parallel, 1,
             "Ranks that share the experts between them; divides the ranks");
DEFINE_double(temperature, 0, "Generate: sample at this temperature; 0 = greedily");
DEFINE_int32(top_k_sampling, 0, "Sample among the k most probable tokens; 0 = all");
DEFINE_double(top_p, 1, "Sample among the most probable tokens that reach this sum");
DEFINE_uint64(sample_seed, 1, "Seed of sampling");
DEFINE_string(nonfinite, "refuse",
              "A sequence for which the model gives no numbers (an overflow of fp16): "
              "refuse ends the job, skip leaves it out and names it in run.json");
DEFINE_double(max_hours, 0, "Stop with everything saved after this time; 0 = no limit");
DEFINE_double(hang_seconds, 45, "A rank without a sign of life for so long ends the job");
DEFINE_string(device, "auto", "auto, cpu, cuda or cuda:N");
DEFINE_string(dtype, "fp32", "Compute type: fp32, bf16 or fp16");

namespace routecast {
namespace {

constexpr char kUsage[] =
    "records the routing of a Switch Transformer over a corpus into a trace store\n"
    "  launch/collect.sh [-n RANKS] --model=FOLDER --data=text:FILE --store=FOLDER";

std::vector<std::string> List(const std::string& text) {
  std::vector<std::string> items;
  std::stringstream in(text);
  for (std::string item; std::getline(in, item, ',');) items.push_back(item);
  return items;
}

CollectOptions Options() {
  CollectOptions o;
  o.model = FindModelFolder(FLAGS_model).string();
  o.data = FlagValues("data");
  RequireOutput("--store", FLAGS_store, FolderKind::kStore);
  o.store = FLAGS_store;
  o.cache = FLAGS_cache;
  o.task = ParseTask(FLAGS_task);
  o.record = List(FLAGS_record);
  o.top_k = FLAGS_top_k;
  o.hidden_share = FLAGS_hidden_share;
  o.num_shards = FLAGS_num_shards;
  o.compression = FLAGS_compression;
  o.max_sequences = FLAGS_max_sequences;
  o.max_length = FLAGS_max_length;
  o.batch_size = FLAGS_batch_size;
  o.noise_density = FLAGS_noise_density;
  const auto given = [](const char* flag) {
    return !gflags::GetCommandLineFlagInfoOrDie(flag).is_default;
  };
  o.noise_given = given("noise_density");
  o.top_k_given = given("top_k");
  o.sample_seed_given = given("sample_seed");
  o.expert_parallel = FLAGS_expert_parallel;
  o.temperature = FLAGS_temperature;
  o.top_k_sampling = FLAGS_top_k_sampling;
  o.top_p = FLAGS_top_p;
  o.sample_seed = FLAGS_sample_seed;
  o.nonfinite = FLAGS_nonfinite;
  o.max_hours = FLAGS_max_hours;
  o.hang_seconds = FLAGS_hang_seconds;
  o.device = FLAGS_device;
  o.dtype = FLAGS_dtype;
  o.threads = FLAGS_threads;
  o.seed = FLAGS_seed;
  o.quiet = FLAGS_quiet;
  o.dry_run = FLAGS_dry_run;
  o.Validate();
  return o;
}

void Run(int argc, char** argv) {
  const CollectOptions options = Options();
  CollectEnd end;
  {
    MpiSession session(&argc, &argv);
    SetAbortHook([](int code) { MpiSession::Abort(code); });
    end = Collect(options, session.rank_info(), EffectiveFlags());
  }
  if (end == CollectEnd::kStopped) {
    throw StoppedError(
        "stopped with everything saved\n  start the same command to go on");
  }
}

}  // namespace
}  // namespace routecast

int main(int argc, char** argv) {
  return routecast::Main(argc, argv, routecast::kUsage,
                         [&] { routecast::Run(argc, argv); });
}
