#include "collector/collector.h"

#include <mpi.h>
#include <torch/version.h>

#include <algorithm>
#include <cmath>
#include <memory>
#include <optional>
#include <thread>

#include "collector/chunk_runner.h"
#include "collector/collect_job.h"
#include "collector/collect_sources.h"
#include "collector/collected_model.h"
#include "collector/dry_run.h"
#include "collector/life_signs.h"
#include "collector/rank_watch.h"
#include "collector/span_log.h"
#include "collector/store_estimate.h"
#include "common/errors.h"
#include "common/exit_code.h"
#include "common/recorded_run.h"
#include "common/safetensors.h"
#include "common/stop.h"
#include "models/checkpoint.h"
#include "storage/context_coder.h"
#include "storage/drop_shares.h"
#include "storage/store_lock.h"
#include "storage/store_routers.h"
#include "storage/trace_reader.h"
#include "storage/trace_store.h"

namespace routecast {
namespace {

// `values` of rank 0 on every rank.
void Share(std::vector<int64_t>* values) {
  int64_t count = static_cast<int64_t>(values->size());
  MPI_Bcast(&count, 1, MPI_INT64_T, 0, MPI_COMM_WORLD);
  values->resize(static_cast<size_t>(count));
  MPI_Bcast(values->data(), static_cast<int>(count), MPI_INT64_T, 0, MPI_COMM_WORLD);
}

std::string ShareText(const std::string& text) {
  std::vector<int64_t> codes(text.begin(), text.end());
  Share(&codes);
  return std::string(codes.begin(), codes.end());
}

// Everybody's numbers on rank 0 (and everywhere), in any order.
std::vector<uint32_t> Gather(const std::vector<uint32_t>& mine, int world) {
  int count = static_cast<int>(mine.size());
  std::vector<int> counts(static_cast<size_t>(world)), starts(static_cast<size_t>(world));
  MPI_Allgather(&count, 1, MPI_INT, counts.data(), 1, MPI_INT, MPI_COMM_WORLD);
  int total = 0;
  for (size_t r = 0; r < counts.size(); ++r) {
    starts[r] = total;
    total += counts[r];
  }
  std::vector<uint32_t> all(static_cast<size_t>(total));
  MPI_Allgatherv(mine.data(), count, MPI_UINT32_T, all.data(), counts.data(),
                 starts.data(), MPI_UINT32_T, MPI_COMM_WORLD);
  return all;
}

// Each host of the job once, in the order of its first rank.
Json Hosts(const RankInfo& rank) {
  constexpr int kNameBytes = MPI_MAX_PROCESSOR_NAME;
  char mine[kNameBytes] = {};
  int length = 0;
  MPI_Get_processor_name(mine, &length);
  std::vector<char> all(static_cast<size_t>(rank.world) * kNameBytes);
  MPI_Allgather(mine, kNameBytes, MPI_CHAR, all.data(), kNameBytes, MPI_CHAR,
                MPI_COMM_WORLD);
  Json hosts = Json::array();
  for (size_t r = 0; r < static_cast<size_t>(rank.world); ++r) {
    const std::string name = all.data() + r * kNameBytes;
    if (std::find(hosts.begin(), hosts.end(), name) == hosts.end()) hosts.push_back(name);
  }
  return hosts;
}

int ThreadsOf(const CollectOptions& options, const RankInfo& rank) {
  if (options.threads > 0) return options.threads;
  // An unfinished store goes on with its own count, whatever the number of ranks is now.
  if (fs::exists(fs::path(options.store) / "store.json")) {
    return TraceStore::Open(options.store).threads;
  }
  const int cores = static_cast<int>(std::thread::hardware_concurrency());
  return std::max(1, cores / rank.local_world);
}

StoreConfig ConfigOf(const CollectOptions& options, const Checkpoint& checkpoint,
                     const Tokenizer& tokenizer, at::Device device, int threads) {
  StoreConfig c;
  c.model = options.model;
  c.model_fingerprint = checkpoint.fingerprint;
  c.tokenizer_fingerprint = tokenizer.fingerprint();
  c.geometry = checkpoint.config.geometry();
  c.record = options.record;
  std::sort(c.record.begin(), c.record.end());
  c.top_k = c.Records("topk") ? std::min(options.top_k, c.geometry.num_experts) : 0;
  c.task = options.task;
  c.threads = threads;
  c.dtype = options.dtype;
  c.device_kind = device.is_cuda() ? "cuda" : "cpu";
  c.expert_parallel = options.expert_parallel;
  c.num_shards = options.num_shards;
  c.hidden_share = c.Records("hidden") ? options.hidden_share : 0;
  c.attention_heads = c.Records("attention") ? checkpoint.config.num_heads : 0;
  c.max_length = options.max_length;
  c.compression = options.compression;
  c.batch_size = options.batch_size;
  c.noise_density = options.task == Task::kEncode ? 0 : options.noise_density;
  if (options.task == Task::kGenerate && options.temperature > 0) {
    c.sampling = {options.temperature, options.top_k_sampling, options.top_p,
                  options.sample_seed};
  }
  c.seed = options.seed;
  return c;
}

// With the vocabulary head where states are recorded: what reads the decoder's output
// needs it to know the next token.
void WriteRouters(const fs::path& file, const Checkpoint& checkpoint, bool with_head) {
  const std::vector<RouterWeights> routers =
      RoutersOf(checkpoint.config, checkpoint.parameters);
  std::vector<at::Tensor> alive;
  std::vector<TensorToWrite> tensors;
  const auto add = [&](size_t layer, const char* what, const at::Tensor& tensor) {
    if (!tensor.defined()) return;
    alive.push_back(tensor.to(at::kCPU, at::kFloat).contiguous());
    tensors.push_back({"layer." + std::to_string(layer) + "." + what, "F32",
                       alive.back().sizes().vec(), alive.back().const_data_ptr()});
  };
  for (size_t l = 0; l < routers.size(); ++l) {
    add(l, "weight", routers[l].weight_ED);
    add(l, "bias", routers[l].bias_E);
    add(l, "norm_gain", routers[l].norm_gain_D);
  }
  if (with_head && checkpoint.config.num_decoder_layers > 0) {
    alive.push_back(VocabularyHeadOf(checkpoint.config, checkpoint.parameters)
                        .to(at::kBFloat16)
                        .contiguous());
    tensors.push_back({"vocabulary_head", "BF16", alive.back().sizes().vec(),
                       alive.back().const_data_ptr()});
  }
  WriteSafetensors(file, tensors);
}

// A seal of a damaged file would vouch for it: each start compares.
void MakeSureOfRouters(const fs::path& store, const Checkpoint& checkpoint,
                       bool with_head) {
  const bool replaced = KeepRouters(
      store, [&](const fs::path& file) { WriteRouters(file, checkpoint, with_head); });
  if (!replaced) return;
  std::fprintf(stderr, "collect: %s was not as the model gives it, and is made anew\n",
               RoutersPath(store).c_str());
}

void SayDamage(const Corpus& corpus) {
  const std::string damage = corpus.Damage();
  if (!damage.empty())
    std::fprintf(stderr, "collect: of the documents: %s\n", damage.c_str());
}

// Another rank hangs: no call that waits for ranks can be made any more, so this process
// simply ends, and mpirun ends the others.
void EndJob(const std::string& error) {
  std::fprintf(stderr, "routecast-collect: %s\n", error.c_str());
  std::fflush(stderr);
  std::_Exit(kExitEnvironment);
}

Json LibraryVersions() {
  char mpi[MPI_MAX_LIBRARY_VERSION_STRING];
  int length = 0;
  MPI_Get_library_version(mpi, &length);
  return {{"torch", TORCH_VERSION}, {"mpi", std::string(mpi)}};
}

// Of all runs that made the store: what lacks from the corpus, by name.
void NameLeftOut(const TraceReader& reader, Json* results) {
  constexpr size_t kMaxNamed = 100;
  const auto& all = reader.left_out();
  Json ids = Json::array();
  for (size_t i = 0; i < std::min(all.size(), kMaxNamed); ++i) {
    ids.push_back(all[i].sequence_id);
  }
  if (all.empty()) return;
  (*results)["left_out"] = {{"sequences", all.size()}, {"ids", ids}};
  std::fprintf(stderr,
               "collect: %zu sequences are left out: no numbers came out of the model; "
               "run.json names them\n",
               all.size());
}

void NameDrops(const TraceReader& reader, bool quiet, Json* results) {
  const DropShares shares = SampleDrops(reader);
  Json& dropped = (*results)["dropped"] = {{"sequences", shares.sequences}};
  dropped["encoder"] = shares.encoder ? Json(*shares.encoder) : Json();
  dropped["decoder"] = shares.decoder ? Json(*shares.decoder) : Json();
  if (quiet || !shares.many()) return;
  std::fprintf(stderr, "collect: capacity dropped %s\n  %s\n",
               DropsText(shares, reader.sequences().size()).c_str(), DropsHint().c_str());
}

// A run that found nothing to do has the figures of the one that did it.
void KeepEarlierResults(RecordedRun* run, Json* results) {
  const Json earlier = run->Earlier();
  const Json before = earlier.value("results", Json::object());
  if (!before.is_object() || !before.contains("sequences") || before["sequences"] == 0)
    return;
  *results = before;
  if (earlier.contains("collected")) return run->Set("collected", earlier["collected"]);
  Json collected = Json::object();
  for (const char* key : {"version", "git_commit", "start", "end", "ranks", "device"}) {
    if (earlier.contains(key)) collected[key] = earlier[key];
  }
  run->Set("collected", collected);
}

// Of the whole store, which several runs may have collected.
void DescribeStore(const TraceReader& reader, bool quiet, Json* results) {
  uint64_t tokens = 0;
  for (const SequenceInfo& s : reader.sequences())
    tokens += s.encoder_tokens + s.decoder_tokens;
  (*results)["store"] = {{"sequences", reader.sequences().size()}, {"tokens", tokens}};
  NameLeftOut(reader, results);
  NameDrops(reader, quiet, results);
}

// Codes and merges what is in the store. A rank that is asked to stop must not leave the
// others waiting for it, so all of them learn of it: false, and the next start goes on.
bool FinishStore(const fs::path& store, const StoreConfig& config, const RankInfo& rank,
                 ShardOwner* owner) {
  const auto unless_stopped = [](const std::function<void()>& work) {
    try {
      work();
    } catch (const StoppedError&) {
      return false;
    }
    return true;
  };
  std::vector<int64_t> modelled = {1};
  if (rank.is_root()) {
    modelled[0] = unless_stopped([&] {
      DeclareLeftOut(store);
      MakeContextModel(store, config);
    });
  }
  Share(&modelled);
  if (modelled[0] == 0) return false;
  const bool coded = unless_stopped([&] { owner->Finish(); });
  const std::vector<uint32_t> all = Gather({coded ? 1u : 0u}, rank.world);
  return std::count(all.begin(), all.end(), 1u) == rank.world;
}

}  // namespace

void CollectOptions::Validate() const {
  const auto require = [](bool ok, const char* what, const char* advice) {
    if (!ok) throw UsageError(ErrorText(what, "", advice));
  };
  require(!model.empty(), "--model is missing", "give a checkpoint's folder");
  require(!data.empty(), "--data is missing", "give text, e.g. --data=text:book.txt");
  require(!store.empty(), "--store is missing", "give the trace store's folder");
  for (const std::string& what : record) {
    ParseChoice("--record", what,
                {"ids", "probs", "topk", "hidden", "output", "attention"});
  }
  const auto has = [&](const char* what) {
    return std::find(record.begin(), record.end(), what) != record.end();
  };
  require(!has("output") || has("hidden"), "--record has output without hidden",
          "the output is recorded beside the router inputs: add hidden to the list");
  require(!has("attention") || has("hidden"), "--record has attention without hidden",
          "summaries are recorded beside the router inputs: add hidden to the list");
  require(!has("attention") || max_length <= kNoKey,
          "--record=attention goes up to --max_length=65535", "cut documents shorter");
  require(has("ids"), "--record lacks ids",
          "traces are made of expert ids: add ids to the list");
  require(top_k >= 1 && top_k <= 64, "--top_k is out of range", "use 1 to 64");
  require(!top_k_given || has("topk"), "--top_k does nothing: --record lacks topk",
          "add topk to the list, or leave it out");
  require(hidden_share >= 0 && hidden_share <= 1, "--hidden_share is out of range",
          "use a share from 0 to 1");
  RequireCompression(compression, MoeGeometry());
  require(num_shards >= 1 && num_shards <= 4096, "--num_shards is out of range",
          "use 1 to 4096");
  require(max_sequences >= 0, "--max_sequences is negative", "use 0 for all");
  require(max_length >= 8 && max_length <= 1 << 20, "--max_length is out of range",
          "use 8 to 1048576 tokens");
  require(batch_size >= 1 && batch_size <= 65536, "--batch_size is out of range",
          "use 1 to 65536");
  require(noise_density > 0 && noise_density < 1, "--noise_density is out of range",
          "use a share between 0 and 1");
  if (noise_given && task == Task::kEncode) {
    throw UsageError(ErrorText("--noise_density does nothing with --task=encode",
                               "only denoise and generate mask tokens",
                               "leave it out, or use another --task"));
  }
  require(expert_parallel >= 1 && expert_parallel <= 4096,
          "--expert_parallel is out of range", "use 1 to the number of ranks");
  require(temperature >= 0 && std::isfinite(temperature), "--temperature is out of range",
          "use 0 (greedy) or more");
  require(top_k_sampling >= 0 && top_k_sampling <= 1 << 24,
          "--top_k_sampling is out of range", "use 0 (all tokens) to 16777216");
  require(top_p > 0 && top_p <= 1, "--top_p is out of range",
          "use more than 0, at most 1");
  require(temperature == 0 || task == Task::kGenerate,
          "--temperature needs --task=generate", "the other tasks choose no tokens");
  require(temperature > 0 || (top_k_sampling == 0 && top_p == 1),
          "--top_k_sampling and --top_p need --temperature", "e.g. --temperature=1");
  require(!sample_seed_given || temperature > 0, "--sample_seed needs --temperature",
          "e.g. --temperature=1");
  ParseChoice("--nonfinite", nonfinite, {"refuse", "skip"});
  require(max_hours >= 0, "--max_hours is negative", "use 0 for no limit");
  require(hang_seconds >= 1, "--hang_seconds is below 1", "45 is the default");
}

namespace {

// What rank 0 alone has: the store's lock once it is taken, and the record of the run.
struct Rooted {
  std::unique_ptr<StoreLock> lock;
  std::optional<RecordedRun> run;
};

// An end before run.json was written. Where there is a store, or a job that makes one,
// only who has the lock writes.
void RecordEarlyEnd(const fs::path& store, int code, Rooted* root) {
  if (!root->run) return;
  try {
    MakeFolder(store);
    const bool others =
        fs::exists(store / "store.json") || fs::exists(store / "lock.guard");
    if (!root->lock && others) root->lock = std::make_unique<StoreLock>(store, EndJob);
    root->run->ReadEarlier();
    // What this run has not come to say of the store stays said.
    const Json earlier =
        fs::exists(store / "store.json") ? root->run->Earlier() : Json::object();
    for (const auto& [key, value] : earlier.items()) root->run->SetMissing(key, value);
    Json results = Json::object();
    const Json before = earlier.value("results", Json::object());
    if (before.contains("left_out")) results["left_out"] = before["left_out"];
    root->run->Finish(code, results);
  } catch (const std::exception&) {
    // Another job has the store, or the disk is full: the end itself says more.
  }
}

CollectEnd CollectInto(const CollectOptions& options, const RankInfo& rank,
                       Rooted* root) {
  const fs::path store = options.store;
  const at::Device device = ParseDevice(options.device, rank.local_rank);
  const int threads = ThreadsOf(options, rank);
  SetComputeThreads(threads);
  const Tokenizer tokenizer = Tokenizer::Load(options.model);
  const at::ScalarType dtype = ParseDtype("--dtype", options.dtype);
  const Checkpoint planned =
      options.dry_run
          ? PlannedModel(options.model, device, rank, options.expert_parallel, store)
          : Checkpoint{CollectedConfig(options.model, dtype, device, rank,
                                       options.expert_parallel),
                       {},
                       ""};
  RequireVocabulary(options.model, tokenizer, planned.config);
  RequireRouting(options.model, planned.config.geometry(), options.task);
  // Weights take minutes to read: what is wrong with the text is told before.
  const auto sources = OpenSources(options, tokenizer, rank, threads, Share);
  if (!sources) return CollectEnd::kStopped;
  std::optional<CollectedModel> model;
  Json record;  // of the checkpoint, while its files are those that were read
  if (!options.dry_run) {
    const Json files = rank.is_root() ? CheckpointFiles(options.model) : Json();
    model.emplace(options.model, dtype, device, rank, options.expert_parallel);
    record = CheckpointRecord(options.model, model->checkpoint().fingerprint, files);
  }
  const Checkpoint& checkpoint = model ? model->checkpoint() : planned;
  const Corpus& corpus = sources->corpus;
  const ChunkPlan& plan = sources->plan;
  StoreConfig config = ConfigOf(options, checkpoint, tokenizer, device, threads);
  config.SetIntakes(sources->intakes);
  RequireShardFiles(store, config, rank.world);
  if (rank.is_root() && !options.quiet && config.top_k > 0 &&
      config.top_k < options.top_k) {
    std::fprintf(stderr,
                 "collect: --top_k=%d: the model has %d experts, so all are stored\n",
                 options.top_k, config.top_k);
  }
  if (options.dry_run) {
    const uint64_t weights = CollectedModel::WeightBytes(checkpoint.config, dtype, rank,
                                                         options.expert_parallel);
    DryRun(options, config, *sources, tokenizer, {weights, device}, rank);
    CollectedModel::RequireMemory(checkpoint.config, dtype, device, rank,
                                  options.expert_parallel);
    return CollectEnd::kComplete;
  }

  const Json hosts = Hosts(rank);
  if (rank.is_root()) {
    MakeFolder(store);
    root->lock = std::make_unique<StoreLock>(store, EndJob);
    RecordedRun* run = &*root->run;
    run->ReadEarlier();
    TraceStore::CreateOrOpen(store, config);
    TraceStore::CleanStaging(store);
    MakeSureOfRouters(store, checkpoint, config.Records("output"));
    run->Set("hosts", hosts);
    run->Set("ranks", rank.world);
    run->Set("device", device.str());
    run->Set("threads", threads);
    run->Set("seed", options.seed);
    run->Set("libraries", LibraryVersions());
    if (!record.is_null()) run->Set("checkpoint", record);
    run->Set("corpus", {{"documents", corpus.stats().documents},
                        {"groups", corpus.stats().groups},
                        {"exact_duplicates", corpus.stats().exact_duplicates},
                        {"binary_documents", corpus.stats().binary_documents},
                        {"replaced_bytes", corpus.stats().replaced_bytes},
                        {"skipped_files", corpus.stats().skipped.count},
                        {"first_skipped_file", corpus.stats().skipped.first},
                        {"intake_ends", corpus.intake_ends()}});
    run->Start();
    if (!options.quiet) SayDamage(corpus);
  }
  const std::string token = ShareText(root->lock ? root->lock->token() : "");
  const RankWatch watch(store / "staging", token, rank, options.hang_seconds, EndJob);
  SpanLog spans(store, rank);
  const auto opened = SpanLog::Clock::now();
  const auto step = [&store, &token](std::string_view name) {
    ShowLife();
    if (name != kHashStep) StoreLock::RequireHeld(store, token);
  };
  ShardOwner owner(store, config, rank.rank, rank.world, step);
  std::vector<uint32_t> done = Gather(owner.CompletedChunks(), rank.world);
  std::sort(done.begin(), done.end());
  std::deque<uint32_t> todo;
  for (uint32_t c = 0; c < plan.chunks.size(); ++c) {
    if (!std::binary_search(done.begin(), done.end(), c)) todo.push_back(c);
  }
  spans.Write("open", opened, {{"rank", rank.rank}, {"ranks", rank.world}});

  if (rank.is_root() && !todo.empty()) {
    const TextTokens tokens = EstimatedTokens(config, corpus, plan, tokenizer);
    RequireFreeBytes(
        store, EstimatedStoreBytes(config, tokens) / plan.chunks.size() * todo.size());
  }

  ChunkRunner runner(&model->model(), &corpus, &tokenizer, &plan, config,
                     options.nonfinite == "skip");
  CollectJob job({&options, &config, &plan, &runner, &owner, &spans, token,
                  [&model] { model->Serve(); }},
                 rank, todo);
  job.Run();
  std::vector<int64_t> completed = {job.complete() ? 1 : 0};
  Share(&completed);
  const bool complete = completed[0] == 1;
  const auto finishing = SpanLog::Clock::now();
  const bool finished = complete && FinishStore(store, config, rank, &owner);
  if (complete) spans.Write("finish", finishing, Json::object());
  MPI_Barrier(MPI_COMM_WORLD);
  if (root->run) {
    Json results = job.Results();
    if (todo.empty()) KeepEarlierResults(&*root->run, &results);
    if (finished) {
      const TraceReader reader(store, NeedTokens::kNo);
      job.FinishProgress(reader.sequences().size());
      DescribeStore(reader, options.quiet, &results);
    }
    root->run->Finish(finished ? kExitDone : kExitStopped, results);
  }
  return finished ? CollectEnd::kComplete : CollectEnd::kStopped;
}

}  // namespace

CollectEnd Collect(const CollectOptions& options, const RankInfo& rank,
                   const Json& configuration) {
  RequireWholeGroups(options.expert_parallel, rank.world);
  Rooted root;
  if (rank.is_root() && !options.dry_run)
    root.run.emplace(options.store, "routecast-collect", configuration);
  try {
    const CollectEnd end = CollectInto(options, rank, &root);
    if (end == CollectEnd::kStopped && !root.lock)
      RecordEarlyEnd(options.store, kExitStopped, &root);
    return end;
  } catch (const std::exception& e) {
    RecordEarlyEnd(options.store, ExitCodeOf(e), &root);
    throw;
  }
}

}  // namespace routecast
