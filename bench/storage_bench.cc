// The trace store beside a flat file, npz, Parquet and MosaicML's MDS, each side once a
// round: bytes an id, durable writes, scans, random reads warm in the page cache. Rates
// are in bytes of the uncompressed records, whatever a side keeps them in. Debian's
// RocksDB has its assertions on and no io_uring: the figures are of that build.
// Traces are uniform random ids (the hardest to store), or those of --store, without
// top-k, router inputs and attention.
#include <gflags/gflags.h>

#include <algorithm>
#include <cstdio>
#include <memory>
#include <sstream>

#include "bench/storage_sides.h"
#include "common/errors.h"
#include "storage/held_out_entropy.h"

DEFINE_string(folder, "", "Folder for what is written; emptied");
DEFINE_string(store, "", "Take the traces of this store; empty: uniform random ones");
DEFINE_string(python, "python3",
              "Python with numpy, pyarrow and streaming; empty: no baselines in Python");
DEFINE_string(script, "bench/reference_store.py", "The baselines' side");
DEFINE_int32(rounds, 5, "Rounds; all sides once a round");
DEFINE_int32(sequences, 2000, "Sequences");
DEFINE_int32(tokens, 512, "Tokens a sequence and stack");
DEFINE_int32(layers, 6, "MoE layers a stack");
DEFINE_int32(experts, 128, "Experts a layer");
DEFINE_int32(chunk, 250, "Sequences a chunk");
DEFINE_int32(reads, 20000, "Random reads a round, of sequences, 64 at a time");
DEFINE_int32(slow_reads, 200, "Random reads a round of the baselines, of spans");
DEFINE_int64(index_sequences, 0,
             "Measure only this: opening a store of so many sequences of one token");

namespace routecast {
namespace {

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

Data Load() {
  Data data;
  StoreConfig& config = data.config;
  if (!FLAGS_store.empty()) {
    const TraceReader reader(FLAGS_store);
    config = reader.config();
    config.top_k = config.attention_heads = 0;
    config.intakes.clear();
    reader.Scan(
        [&](RoutingTrace&& t) {
          for (RoutingSpan* s : {&t.encoder, &t.decoder}) {
            s->top_k = 0;
            s->topk_ids.clear();
            s->topk_probs.clear();
          }
          data.traces.push_back(std::move(t));
        },
        WithHidden::kNo);
  } else {
    config.geometry = {FLAGS_layers, FLAGS_layers, FLAGS_experts, 1, 768};
    for (int i = 0; i < FLAGS_sequences; ++i) {
      RoutingTrace& t = data.traces.emplace_back();
      t.sequence_id = static_cast<uint64_t>(i) << 16;
      t.document_id = static_cast<uint64_t>(i);
      t.group_id = Mix(i);
      t.encoder = MakeSpan(Mix(i, 1));
      t.decoder = MakeSpan(Mix(i, 2));
    }
  }
  config.record = {"ids", "probs"};
  config.num_chunks =
      static_cast<int64_t>((data.traces.size() + FLAGS_chunk - 1) / FLAGS_chunk);
  for (const RoutingTrace& t : data.traces) {
    for (const Stack s : {Stack::kEncoder, Stack::kDecoder}) {
      const RoutingSpan& span = s == Stack::kEncoder ? t.encoder : t.decoder;
      if (span.num_tokens == 0) continue;
      data.spans.push_back(&span);
      data.num_ids += span.expert_ids.size();
      const auto& tokens = span.token_ids;
      const bool wide =
          !tokens.empty() && *std::max_element(tokens.begin(), tokens.end()) > 0xFFFF;
      data.token_bytes += (wide ? 4 : 2) * tokens.size();
      data.flat_token_bytes += 2 * tokens.size();
      data.record_bytes += EncodeSpan(EncodeKey(KindOf(s), t.sequence_id), span, t.task,
                                      config.geometry.num_experts)
                               .size();
    }
  }
  return data;
}

double Quantile(std::vector<double> values, double q) {
  std::sort(values.begin(), values.end());
  return values[static_cast<size_t>(q * static_cast<double>(values.size() - 1) + 0.5)];
}

void Round(const Data& data, uint64_t round, Side* side) {
  const auto bytes = static_cast<double>(data.record_bytes);
  if (round == 0) side->MeasureIds(data);
  const Moment write = side->Write(false);
  const Finishing& end = side->finishing;
  side->whole.push_back(bytes / (write.wall + end.count + end.code_and_merge + end.seal));
  side->all_bytes = static_cast<double>(side->Bytes());
  side->Scan();  // warm
  const Moment scan = side->Scan();
  Reads reads;
  const Moment random = side->Random(round, &reads);
  side->write.push_back(bytes / write.wall);
  side->scan.push_back(bytes / scan.wall);
  side->random.push_back(reads.spans / random.wall);
  if (reads.sequences > 0) {
    side->random_sequences.push_back(reads.sequences / random.wall);
  }
  if (scan.cpu <= 0) return;
  side->write_cpu.push_back(bytes / write.cpu);
  side->scan_cpu.push_back(bytes / scan.cpu);
}

void Print(const Data& data, const Side& side) {
  const auto ids = static_cast<double>(data.num_ids);
  const auto rate = [](const std::vector<double>& values) {
    char text[64];
    std::snprintf(text, sizeof text, "%6.0f [%.0f-%.0f]", Quantile(values, .5) / 1e6,
                  Quantile(values, .25) / 1e6, Quantile(values, .75) / 1e6);
    return std::string(text);
  };
  const auto each = [&](double value) {
    char text[32] = "      -";
    if (value >= 0) std::snprintf(text, sizeof text, "%7.4f", value / ids);
    return std::string(text);
  };
  std::printf("%-19s %s %s  %6.3f  %20s  %20s  %10.0f", side.name.c_str(),
              each(side.id_bytes).c_str(), each(side.plane_bytes).c_str(),
              side.all_bytes / ids, rate(side.write).c_str(), rate(side.scan).c_str(),
              Quantile(side.random, .5));
  if (side.random_sequences.empty()) {
    std::printf("  %10s", "-");
  } else {
    std::printf("  %10.0f", Quantile(side.random_sequences, .5));
  }
  if (!side.scan_cpu.empty()) {
    std::printf("  %6.0f %6.0f", Quantile(side.write_cpu, .5) / 1e6,
                Quantile(side.scan_cpu, .5) / 1e6);
  }
  std::printf("\n");
}

void PrintFinishing(const Side& side) {
  const Finishing& f = side.finishing;
  std::printf("%-19s %8.2f  %15.2f  %6.2f  %20.0f\n", side.name.c_str(), f.count,
              f.code_and_merge, f.seal, Quantile(side.whole, .5) / 1e6);
}

// What a context coder is held against, of planes alone; what `stats` prints by layer.
double HeldOutBytes(const Data& data) {
  const MoeGeometry& g = data.config.geometry;
  HeldOutEntropy entropy(g);
  uint64_t tokens[2] = {0, 0};
  for (const RoutingTrace& t : data.traces) {
    entropy.Add(t);
    tokens[0] += static_cast<uint64_t>(t.encoder.num_tokens);
    tokens[1] += static_cast<uint64_t>(t.decoder.num_tokens);
  }
  const std::vector<double> bits = entropy.Bits();
  double sum = 0;
  for (int l = 0; l < g.num_layers(); ++l) {
    const uint64_t ids = tokens[static_cast<size_t>(g.StackOf(l))];
    if (ids > 0) sum += bits[static_cast<size_t>(l)] * static_cast<double>(ids);
  }
  return sum / 8 / static_cast<double>(data.num_ids);
}

// How long a reader takes to know all sequences. Documents are spread over chunks as a
// permuted corpus spreads them.
void MeasureIndex() {
  constexpr int64_t kPerChunk = 20000;
  const fs::path path = fs::path(FLAGS_folder) / "index";
  fs::remove_all(path);
  StoreConfig config;
  config.geometry = {0, 1, 2, 1, 0};
  config.num_chunks = (FLAGS_index_sequences + kPerChunk - 1) / kPerChunk;
  TraceStore::CreateOrOpen(path, config);
  {
    ShardOwner owner(path, config, 0, 1);
    for (int64_t c = 0; c < config.num_chunks; ++c) {
      ChunkWriter writer(path, config, static_cast<uint32_t>(c), "bench");
      for (int64_t i = c; i < FLAGS_index_sequences; i += config.num_chunks) {
        RoutingTrace t;
        t.sequence_id = static_cast<uint64_t>(i) << 16;
        t.document_id = static_cast<uint64_t>(i);
        t.group_id = Mix(i);
        t.decoder.num_tokens = t.decoder.num_layers = 1;
        t.decoder.token_ids = {1};
        t.decoder.expert_ids = {static_cast<uint16_t>(i % 2)};
        writer.Add(t);
      }
      writer.Finish();
      owner.Ingest(static_cast<uint32_t>(c), "bench");
    }
    owner.Compact();
  }
  for (int round = 0; round < FLAGS_rounds; ++round) {
    const Moment open = Timed([&] { sum += TraceReader(path).sequences().size(); });
    std::printf("index of %lld sequences: %.2f s (%.2f s of CPU)\n",
                (long long)FLAGS_index_sequences, open.wall, open.cpu);
  }
}

void Run() {
  if (FLAGS_folder.empty()) {
    throw UsageError("--folder is missing\n  give a folder on the disk");
  }
  if (FLAGS_index_sequences > 0) return MeasureIndex();
  const Data data = Load();
  std::vector<std::unique_ptr<Side>> sides;
  for (const char* compression : {"none", "zstd", "context", "context+zstd"}) {
    sides.push_back(std::make_unique<OurSide>(data, compression));
  }
  sides.push_back(std::make_unique<FlatSide>(data));
  std::unique_ptr<LineProcess> python;
  if (!FLAGS_python.empty()) {
    sides.back()->Write(false);  // what the baselines read
    const bool wide = data.config.geometry.num_experts > 256;
    python = std::make_unique<LineProcess>(std::vector<std::string>{
        FLAGS_python, FLAGS_script, FlatSide::Folder(), fs::path(FLAGS_folder) / "python",
        wide ? "1" : "0", std::to_string(2 * FLAGS_chunk)});
    std::istringstream ready(python->Read());
    std::string word;
    ready >> word;
    for (const std::string name : {"npz", "parquet", "mds"}) {
      if (ready.str().find(name) == std::string::npos) {
        std::printf("%s: not installed for %s\n", name.c_str(), FLAGS_python.c_str());
      } else {
        sides.push_back(std::make_unique<PythonSide>(python.get(), name));
      }
    }
  }
  for (int round = 0; round < FLAGS_rounds; ++round) {
    for (const auto& side : sides) Round(data, static_cast<uint64_t>(round), side.get());
  }
  std::printf("%zu sequences, %zu spans, %llu ids, %.1f MB of records; %d rounds\n",
              data.traces.size(), data.spans.size(), (unsigned long long)data.num_ids,
              static_cast<double>(data.record_bytes) / 1e6, FLAGS_rounds);
  if (!FLAGS_store.empty()) {
    std::printf("held-out entropy, given token and expert before: %.4f B an id\n",
                HeldOutBytes(data));
  }
  std::printf(
      "                    B an id: all, plane  B all   write MB/s [quartiles]"
      "             scan MB/s   random spans/s  sequences/s  a CPU second: write, "
      "scan\n");
  for (const auto& side : sides) Print(data, *side);
  std::printf(
      "what ends a store, s: count the model  code and merge  seal  (last round); MB/s "
      "with it (median)\n");
  for (const auto& side : sides) {
    if (side->Finishes()) PrintFinishing(*side);
  }
  if (sum == 0) std::printf("no expert was ever chosen\n");
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
