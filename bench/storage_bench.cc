// Measures the trace store: bytes an id, durable writes, scans, random reads, each a
// coder of blocks. Rates are in bytes of uncompressed records. Debian's RocksDB has its
// assertions on and no io_uring: the figures are of that build.
#include <gflags/gflags.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <ctime>

#include "common/errors.h"
#include "common/random.h"
#include "storage/trace_reader.h"
#include "storage/trace_store.h"

DEFINE_string(folder, "", "Folder for the stores; emptied");
DEFINE_int32(sequences, 4000, "Sequences");
DEFINE_int32(tokens, 512, "Tokens a sequence and stack");
DEFINE_int32(layers, 6, "MoE layers a stack");
DEFINE_int32(experts, 128, "Experts a layer");
DEFINE_int32(chunk, 250, "Sequences a chunk");

namespace routecast {
namespace {

// Seconds of the clock, and of this process' cores: on a busy machine only the second
// says what the store costs.
struct Moment {
  double wall, cpu;
};
Moment Now() {
  return {
      std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch())
          .count(),
      static_cast<double>(std::clock()) / CLOCKS_PER_SEC};
}
Moment Since(Moment start) {
  const Moment now = Now();
  return {now.wall - start.wall, now.cpu - start.cpu};
}

// Uniform ids: the hardest to store. Probabilities and margins fill few binades, as real
// ones.
RoutingSpan MakeSpan(uint64_t key) {
  RoutingSpan s;
  s.num_tokens = FLAGS_tokens;
  s.num_layers = FLAGS_layers;
  const int n = FLAGS_tokens * FLAGS_layers;
  for (int t = 0; t < FLAGS_tokens; ++t)
    s.token_ids.push_back(ToRange(Mix(key, 1, t), 32128));
  for (int i = 0; i < n; ++i) {
    const uint64_t r = Mix(key, 2, i);
    s.expert_ids.push_back(static_cast<uint16_t>(ToRange(r, FLAGS_experts)));
    s.gate_probs.push_back(static_cast<float>(ToUnit(Mix(r, 3))));
    s.dropped.push_back(r % 50 == 0);
    s.margins.push_back(static_cast<float>(ToUnit(Mix(r, 4)) * 4));
  }
  return s;
}

uint64_t TableBytes(const fs::path& store) {
  uint64_t bytes = 0;
  for (const auto& entry : fs::recursive_directory_iterator(store / "shards")) {
    if (entry.path().extension() == ".sst") bytes += entry.file_size();
  }
  return bytes;
}

struct Written {
  Moment seconds = {};
  uint64_t bytes = 0;
};

Written Write(const fs::path& path, const StoreConfig& config,
              const std::vector<RoutingTrace>& traces, bool only_ids) {
  TraceStore::CreateOrOpen(path, config);
  ShardOwner owner(path, config, 0, 1);
  Written written;
  const Moment start = Now();
  for (int64_t c = 0; c < config.num_chunks; ++c) {
    ChunkWriter writer(path, config, static_cast<uint32_t>(c), "bench");
    for (size_t i = c * FLAGS_chunk;
         i < std::min<size_t>(traces.size(), (c + 1) * FLAGS_chunk); ++i) {
      RoutingTrace trace = traces[i];
      if (only_ids) {
        for (RoutingSpan* s : {&trace.encoder, &trace.decoder}) {
          s->gate_probs.clear();
          s->margins.clear();
          s->dropped.clear();
        }
      }
      writer.Add(trace);
    }
    written.bytes += writer.record_bytes();
    writer.Finish();
    owner.Ingest(static_cast<uint32_t>(c), "bench");
  }
  written.seconds = Since(start);
  owner.Compact();
  return written;
}

void Measure(const std::string& compression, const std::vector<RoutingTrace>& traces) {
  const fs::path path = fs::path(FLAGS_folder) / compression;
  fs::remove_all(path);
  StoreConfig config;
  config.geometry = {FLAGS_layers, FLAGS_layers, FLAGS_experts, 1, 768};
  config.record = {"ids", "probs"};
  config.compression = compression;
  config.num_chunks = (FLAGS_sequences + FLAGS_chunk - 1) / FLAGS_chunk;
  const Written written = Write(path, config, traces, false);
  const double mb = static_cast<double>(written.bytes) / 1e6;

  const TraceReader reader(path);
  uint64_t sum = 0;
  Moment scan = {1e9, 1e9};
  for (int repeat = 0; repeat < 3; ++repeat) {
    const Moment start = Now();
    reader.Scan([&](RoutingTrace&& t) { sum += t.decoder.expert_ids[0]; },
                WithHidden::kNo);
    const Moment took = Since(start);
    scan = {std::min(scan.wall, took.wall), std::min(scan.cpu, took.cpu)};
  }
  const std::vector<uint64_t> ids = reader.sequence_ids();
  constexpr int kReads = 20000, kBatch = 64;
  const Moment start = Now();
  for (int i = 0; i < kReads; i += kBatch) {
    std::vector<uint64_t> some;
    for (int k = 0; k < kBatch; ++k) some.push_back(ids[ToRange(Mix(i, k), ids.size())]);
    for (const RoutingTrace& t : reader.ReadMany(some, WithHidden::kNo)) {
      sum += t.decoder.expert_ids[0];
    }
  }
  const Moment random = Since(start);

  const fs::path ids_path = fs::path(FLAGS_folder) / (compression + "-ids");
  fs::remove_all(ids_path);
  Write(ids_path, config, traces, true);
  const double num_ids =
      2.0 * FLAGS_tokens * FLAGS_layers * static_cast<double>(traces.size());
  const double token_bytes = 2.0 * 2 * FLAGS_tokens * static_cast<double>(traces.size());
  const auto print = [](const char* what, double amount, Moment took, const char* unit) {
    std::printf("  %-7s %9.0f %s (%9.0f a CPU second)\n", what, amount / took.wall, unit,
                amount / took.cpu);
  };
  std::printf("blocks %s: %.4f bytes an id (token ids apart), %.2f with all planes\n",
              compression.c_str(),
              (static_cast<double>(TableBytes(ids_path)) - token_bytes) / num_ids,
              static_cast<double>(TableBytes(path)) / num_ids);
  print("write", mb, written.seconds, "MB/s");
  print("scan", mb, scan, "MB/s");
  print("random", kReads, random, "sequences/s");
  print("random", kReads * mb / static_cast<double>(traces.size()), random, "MB/s");
  if (sum == 0) std::printf("no expert was ever chosen\n");
}

void Run() {
  if (FLAGS_folder.empty())
    throw UsageError("--folder is missing\n  give a folder on the disk");
  std::vector<RoutingTrace> traces;
  for (int i = 0; i < FLAGS_sequences; ++i) {
    RoutingTrace t;
    t.sequence_id = static_cast<uint64_t>(i) << 16;
    t.document_id = static_cast<uint64_t>(i);
    t.group_id = Mix(i);
    t.encoder = MakeSpan(Mix(i, 1));
    t.decoder = MakeSpan(Mix(i, 2));
    traces.push_back(std::move(t));
  }
  for (const char* compression : {"none", "zstd"}) Measure(compression, traces);
}

}  // namespace
}  // namespace routecast

int main(int argc, char** argv) {
  gflags::SetUsageMessage("measures the trace store");
  gflags::ParseCommandLineFlags(&argc, &argv, true);
  try {
    routecast::Run();
  } catch (const std::exception& e) {
    std::fprintf(stderr, "storage_bench: %s\n", e.what());
    return 1;
  }
  return 0;
}
