// What recording costs: batches through a Switch Transformer with nobody listening, with
// the recorder and a store, and with each part of a record added. Sides are interleaved
// batch by batch; a chunk is written, synced and ingested every --chunk batches, as one
// rank does that owns all shards. What ends a store (merging, closing, seals) is timed
// apart: once a store, whatever its size in part.
#include <ATen/ATen.h>
#include <c10/core/GradMode.h>
#include <gflags/gflags.h>

#include <algorithm>
#include <chrono>
#include <cstdio>

#include "collector/routing_recorder.h"
#include "common/errors.h"
#include "common/process_memory.h"
#include "models/checkpoint.h"
#include "storage/trace_reader.h"
#include "storage/trace_store.h"

DEFINE_string(model, "configs/checkpoints/small-16", "Checkpoint folder");
DEFINE_string(folder, "", "Folder for the stores; emptied");
DEFINE_int32(batch, 32, "Sequences a batch");
DEFINE_int32(tokens, 128, "Tokens a sequence, each stack");
DEFINE_int32(batches, 32, "Batches a side");
DEFINE_int32(chunk, 8, "Batches a chunk");
DEFINE_int32(threads, 1, "Threads");
DEFINE_double(hidden_share, 0.1, "Share of sequences with router inputs, last side");

namespace routecast {
namespace {

class Side {
 public:
  Side(std::string name, std::vector<std::string> record, double hidden_share,
       SwitchModel* model)
      : name_(std::move(name)), hidden_share_(hidden_share), model_(model) {
    config_.geometry = model->geometry();
    config_.record = std::move(record);
    config_.num_chunks = FLAGS_batches / FLAGS_chunk;
    if (config_.record.empty()) return;
    store_ = fs::path(FLAGS_folder) / name_;
    TraceStore::CreateOrOpen(store_, config_);
    owner_ = std::make_unique<ShardOwner>(store_, config_, 0, 1);
  }

  void Batch(int index, const at::Tensor& ids, const at::Tensor& valid) {
    const auto start = std::chrono::steady_clock::now();
    if (config_.record.empty()) {
      Forward(ids, valid, nullptr);
    } else {
      Record(index, ids, valid);
    }
    seconds_.push_back(
        std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count());
  }
  void Finish() {
    if (!owner_) return;
    const auto start = std::chrono::steady_clock::now();
    owner_->Finish();
    finish_seconds_ =
        std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
    const int64_t chunks = TraceReader(store_).completed_chunks();
    if (chunks != config_.num_chunks) {
      throw std::logic_error(name_ + " has " + std::to_string(chunks) + " chunks of " +
                             std::to_string(config_.num_chunks));
    }
  }
  double finish_seconds() const { return finish_seconds_; }
  double total() const {
    double sum = 0;
    for (double s : seconds_) sum += s;
    return sum;
  }
  const std::string& name() const { return name_; }
  uint64_t bytes() const { return bytes_; }
  // Of the paired ratios to `base`, a chunk at a time: a chunk's end is part of its cost.
  std::vector<double> Ratios(const Side& base) const {
    std::vector<double> ratios;
    for (int c = 0; c < FLAGS_batches / FLAGS_chunk; ++c) {
      double mine = 0, its = 0;
      for (int i = c * FLAGS_chunk; i < (c + 1) * FLAGS_chunk; ++i) {
        mine += seconds_[size_t(i)];
        its += base.seconds_[size_t(i)];
      }
      ratios.push_back(mine / its);
    }
    std::sort(ratios.begin(), ratios.end());
    return ratios;
  }

 private:
  void Forward(const at::Tensor& ids, const at::Tensor& valid,
               RoutingObserver* observer) {
    const c10::NoGradGuard no_grad;
    ForwardOptions options;
    options.observer = observer;
    model_->Decode(ids, valid, model_->Encode(ids, valid, options), valid, nullptr,
                   options);
  }
  void Record(int index, const at::Tensor& ids, const at::Tensor& valid) {
    std::vector<bool> hidden(size_t(FLAGS_batch), false);
    for (int b = 0; b < int(hidden_share_ * FLAGS_batch + .5); ++b) hidden[b] = true;
    RoutingRecorder recorder(model_->geometry(), {config_.Records("probs"), 0}, hidden);
    Forward(ids, valid, &recorder);
    const auto chunk = static_cast<uint32_t>(index / FLAGS_chunk);
    if (!writer_) {
      writer_ = std::make_unique<ChunkWriter>(store_, config_, chunk, "bench");
    }
    for (int b = 0; b < FLAGS_batch; ++b) {
      RoutingTrace trace;
      trace.sequence_id = uint64_t(index) * uint64_t(FLAGS_batch) + uint64_t(b);
      trace.encoder = recorder.Take(Stack::kEncoder, b);
      trace.decoder = recorder.Take(Stack::kDecoder, b);
      writer_->Add(trace);
    }
    if ((index + 1) % FLAGS_chunk == 0) {
      bytes_ += writer_->record_bytes();
      writer_->Finish();
      writer_.reset();
      owner_->Ingest(chunk, "bench");
    }
  }

  std::string name_;
  double hidden_share_;
  SwitchModel* model_;
  StoreConfig config_;
  fs::path store_;
  std::unique_ptr<ChunkWriter> writer_;
  std::unique_ptr<ShardOwner> owner_;
  double finish_seconds_ = 0;
  std::vector<double> seconds_;
  uint64_t bytes_ = 0;
};

void Run() {
  if (FLAGS_folder.empty()) throw UsageError("--folder is needed");
  if (FLAGS_chunk < 1 || FLAGS_batches < 1 || FLAGS_batches % FLAGS_chunk != 0) {
    throw UsageError("--batches is no multiple of --chunk");
  }
  SetComputeThreads(FLAGS_threads);
  fs::remove_all(FLAGS_folder);
  ResidentModel resident(LoadCheckpoint(FLAGS_model, at::kFloat, at::kCPU));
  SwitchModel& model = resident.model();
  std::vector<std::unique_ptr<Side>> sides;
  const auto add = [&](const char* name, std::vector<std::string> record, double share) {
    sides.push_back(std::make_unique<Side>(name, std::move(record), share, &model));
  };
  add("off", {}, 0);
  add("ids", {"ids"}, 0);
  add("ids,probs", {"ids", "probs"}, 0);
  add("ids,probs,hidden", {"ids", "probs", "hidden"}, FLAGS_hidden_share);
  at::manual_seed(5);
  for (int i = 0; i < FLAGS_batches; ++i) {
    const at::Tensor ids =
        at::randint(3, model.config().vocab_size, {FLAGS_batch, FLAGS_tokens}, at::kLong);
    for (auto& side : sides) side->Batch(i, ids, at::ones_like(ids, at::kBool));
  }
  for (auto& side : sides) side->Finish();
  const double tokens = 2.0 * FLAGS_batches * FLAGS_batch * FLAGS_tokens;
  std::printf("%s, %d x %d tokens a batch and stack, %d thread(s)\n", FLAGS_model.c_str(),
              FLAGS_batch, FLAGS_tokens, FLAGS_threads);
  for (const auto& side : sides) {
    const std::vector<double> ratios = side->Ratios(*sides[0]);
    const size_t n = ratios.size();
    std::printf(
        "%-18s %9.0f tokens/s  %5.1f bytes a token  costs %+5.1f %% [%+.1f, %+.1f]  "
        "finishing %.2f s, %+.1f %%\n",
        side->name().c_str(), tokens / side->total(), double(side->bytes()) / tokens,
        100 * (ratios[n / 2] - 1), 100 * (ratios[n / 4] - 1),
        100 * (ratios[3 * n / 4] - 1), side->finish_seconds(),
        100 * side->finish_seconds() / sides[0]->total());
  }
}

}  // namespace
}  // namespace routecast

int main(int argc, char** argv) {
  routecast::KeepFreedMemory();
  routecast::PreferLargePages();
  gflags::SetUsageMessage("measures what recording routing costs");
  gflags::ParseCommandLineFlags(&argc, &argv, true);
  try {
    routecast::Run();
  } catch (const std::exception& e) {
    std::fprintf(stderr, "recording_bench: %s\n", e.what());
    return 1;
  }
  return 0;
}
