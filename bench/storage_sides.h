// What storage_bench compares: each side keeps the same traces in its own way.
// Thread rule: one thread.
#pragma once

#include <gflags/gflags_declare.h>

#include <algorithm>
#include <bit>
#include <chrono>
#include <ctime>
#include <functional>
#include <memory>
#include <sstream>
#include <string>
#include <vector>

#include "bench/child_process.h"
#include "bench/flat_traces.h"
#include "common/random.h"
#include "storage/context_coder.h"
#include "storage/trace_reader.h"
#include "storage/trace_store.h"

DECLARE_string(folder);
DECLARE_int32(chunk);
DECLARE_int32(reads);
DECLARE_int32(slow_reads);

namespace routecast {

// Seconds of the clock, and of this process' cores: on a busy machine only the second
// says what the store costs. Baselines in Python have the first alone.
struct Moment {
  double wall = 0, cpu = 0;
};
inline Moment Now() {
  return {
      std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch())
          .count(),
      static_cast<double>(std::clock()) / CLOCKS_PER_SEC};
}
inline Moment Since(Moment start) {
  const Moment now = Now();
  return {now.wall - start.wall, now.cpu - start.cpu};
}
inline Moment Timed(const std::function<void()>& work) {
  const Moment start = Now();
  work();
  return Since(start);
}

inline uint64_t TableBytes(const fs::path& store) {
  uint64_t bytes = 0;
  for (const auto& entry : fs::recursive_directory_iterator(store / "shards")) {
    if (entry.path().extension() == ".sst") bytes += entry.file_size();
  }
  return bytes;
}

// Sink of what is read, so that no reading is optimised away.
inline uint64_t sum = 0;
inline void Use(const RoutingTrace& t) {
  const RoutingSpan& s = t.encoder.num_tokens > 0 ? t.encoder : t.decoder;
  sum += s.expert_ids[0];
}

// `config` records ids, probabilities, margins and drops, so do the traces: no top-k.
// `token_bytes`: as records (and the flat file) hold them.
struct Data {
  StoreConfig config;
  std::vector<RoutingTrace> traces;
  std::vector<const RoutingSpan*> spans;
  uint64_t record_bytes = 0, num_ids = 0, token_bytes = 0, flat_token_bytes = 0;
};

// What a round of random reads gave. A span is one record, (sequence, stack): the sample
// of docs/results/store.md. `sequences`: 0 where a side reads spans.
struct Reads {
  double spans = 0, sequences = 0;
};

// What ends a store after its last chunk, apart from `write`; nothing of other formats.
struct Finishing {
  double count = 0, code_and_merge = 0, seal = 0;  // seconds
};

class Side {
 public:
  virtual ~Side() = default;
  virtual Moment Write(bool only_ids) = 0;
  virtual uint64_t Bytes() const = 0;
  virtual Moment Scan() = 0;
  virtual Moment Random(uint64_t round, Reads* reads) = 0;
  virtual bool Finishes() const { return false; }

  std::string name;
  // Of ids: everything that a store of ids alone takes (keys, index, checksums, model),
  // and their planes alone; negative where that cannot be told.
  double id_bytes = -1, plane_bytes = -1, all_bytes = 0;
  std::vector<double> write, scan, random, random_sequences, scan_cpu,
      write_cpu;              // bytes/s; spans/s; sequences/s
  std::vector<double> whole;  // bytes/s of writing and finishing together
  Finishing finishing;        // of the last write
  // Writes ids alone and sets id_bytes and plane_bytes.
  virtual void MeasureIds(const Data& data) {
    Write(true);
    id_bytes = static_cast<double>(Bytes()) - static_cast<double>(data.flat_token_bytes);
  }
};

class OurSide final : public Side {
 public:
  OurSide(const Data& data, const std::string& compression) : data_(data) {
    name = "ours, " + compression;
    config_ = data.config;
    config_.compression = compression;
    path_ = fs::path(FLAGS_folder) / compression;
  }
  Moment Write(bool only_ids) override { return Write(config_, only_ids, true); }
  bool Finishes() const override { return true; }
  // Ids that are packed need no token ids, and a store without them is nothing but ids.
  // The coder needs them; they are subtracted as they lie where no block is compressed.
  void MeasureIds(const Data& data) override {
    StoreConfig config = config_;
    config.record = {"ids"};
    const bool coded = config.ContextCoded();
    if (coded && config.ZstdBlocks()) return;  // token ids shrink by what is not known
    config.token_ids = coded && data.token_bytes > 0;
    Write(config, true, coded);
    id_bytes = static_cast<double>(Bytes());
    if (coded) id_bytes -= static_cast<double>(data.token_bytes);
    const std::unique_ptr<ContextModel> model = LoadContextModel(path_, config);
    plane_bytes = 0;
    for (const RoutingTrace& t : data.traces) {
      plane_bytes += static_cast<double>(PlaneBytes(t, Stack::kEncoder, model.get()) +
                                         PlaneBytes(t, Stack::kDecoder, model.get()));
    }
  }
  uint64_t Bytes() const override {
    const fs::path model = ContextModelPath(path_);
    return TableBytes(path_) + (fs::exists(model) ? fs::file_size(model) : 0);
  }
  Moment Scan() override {
    Open();
    return Timed(
        [&] { reader_->Scan([](RoutingTrace&& t) { Use(t); }, WithHidden::kNo); });
  }
  Moment Random(uint64_t round, Reads* reads) override {
    Open();
    const std::vector<uint64_t> ids = reader_->sequence_ids();
    return Timed([&] {
      for (int i = 0; i < FLAGS_reads; i += 64) {
        std::vector<uint64_t> some;
        for (int k = 0; k < 64; ++k) {
          some.push_back(ids[ToRange(Mix(round, i, k), ids.size())]);
        }
        for (const RoutingTrace& t : reader_->ReadMany(some, WithHidden::kNo)) {
          Use(t);
          reads->spans += (t.encoder.num_tokens > 0) + (t.decoder.num_tokens > 0);
          ++reads->sequences;
        }
      }
    });
  }

 private:
  void Open() {
    if (!reader_) reader_ = std::make_unique<TraceReader>(path_, NeedTokens::kNo);
  }
  Moment Write(const StoreConfig& config, bool only_ids, bool tokens) {
    reader_.reset();
    fs::remove_all(path_);
    TraceStore::CreateOrOpen(path_, config);
    ShardOwner owner(path_, config, 0, 1);
    const Moment written = Timed([&] {
      for (int64_t c = 0; c < config.num_chunks; ++c) {
        WriteChunk(config, static_cast<uint32_t>(c), only_ids, tokens);
        owner.Ingest(static_cast<uint32_t>(c), "bench");
      }
    });
    finishing.count = Timed([&] { MakeContextModel(path_, config); }).wall;
    finishing.code_and_merge = Timed([&] { owner.Compact(); }).wall;
    finishing.seal = Timed([&] { owner.Finish(); }).wall;
    return written;
  }
  void WriteChunk(const StoreConfig& config, uint32_t chunk, bool only_ids, bool tokens) {
    ChunkWriter writer(path_, config, chunk, "bench");
    const size_t begin = size_t{chunk} * FLAGS_chunk;
    const size_t end = std::min(data_.traces.size(), begin + FLAGS_chunk);
    for (size_t i = begin; i < end; ++i) {
      if (!only_ids) {
        writer.Add(data_.traces[i]);
        continue;
      }
      RoutingTrace trace = data_.traces[i];
      for (RoutingSpan* s : {&trace.encoder, &trace.decoder}) {
        s->gate_probs.clear();
        s->margins.clear();
        s->dropped.clear();
        if (!tokens) s->token_ids.clear();
      }
      writer.Add(trace);
    }
    writer.Finish();
  }
  // As a record holds them: coded where that is smaller, else packed.
  uint64_t PlaneBytes(const RoutingTrace& trace, Stack stack, const ContextModel* model) {
    const RoutingSpan& span = stack == Stack::kEncoder ? trace.encoder : trace.decoder;
    if (span.num_tokens == 0) return 0;
    const auto experts = static_cast<unsigned>(config_.geometry.num_experts);
    const uint64_t bits = std::max<uint64_t>(1, std::bit_width(experts - 1));
    const uint64_t packed = (span.expert_ids.size() * bits + 7) / 8;
    if (model == nullptr) return packed;
    std::string coded;
    model->EncodeIds(stack, span, &coded);
    return std::min<uint64_t>(packed, coded.size());
  }

  const Data& data_;
  StoreConfig config_;
  fs::path path_;
  std::unique_ptr<TraceReader> reader_;
};

class FlatSide final : public Side {
 public:
  explicit FlatSide(const Data& data) : data_(data) { name = "flat file"; }
  Moment Write(bool only_ids) override {
    const int experts = data_.config.geometry.num_experts;
    flat_ = std::make_unique<FlatTraces>(Folder(), experts, only_ids);
    return Timed([&] { flat_->Write(data_.spans); });
  }
  uint64_t Bytes() const override { return flat_->Bytes(); }
  Moment Scan() override {
    return Timed([&] {
      const FlatTraces::Reader reader(*flat_);
      for (size_t i = 0; i < reader.size(); ++i) sum += reader.Read(i).expert_ids[0];
    });
  }
  Moment Random(uint64_t round, Reads* reads) override {
    reads->spans = FLAGS_reads;
    return Timed([&] {
      const FlatTraces::Reader reader(*flat_);
      for (int i = 0; i < FLAGS_reads; ++i) {
        sum += reader.Read(ToRange(Mix(round, i), reader.size())).expert_ids[0];
      }
    });
  }
  static fs::path Folder() { return fs::path(FLAGS_folder) / "flat"; }

 private:
  const Data& data_;
  std::unique_ptr<FlatTraces> flat_;
};

// A format of the Python process; all share one.
class PythonSide final : public Side {
 public:
  PythonSide(LineProcess* process, const std::string& format)
      : process_(process), format_(format) {
    name = format;
  }
  Moment Write(bool only_ids) override {
    return Ask("write " + format_ + (only_ids ? " ids" : " all"));
  }
  // Parquet compresses token ids, too, by what is not known.
  void MeasureIds(const Data& data) override {
    if (format_ != "parquet") Side::MeasureIds(data);
  }
  uint64_t Bytes() const override { return bytes_; }
  Moment Scan() override { return Ask("scan " + format_); }
  Moment Random(uint64_t, Reads* reads) override {
    reads->spans = FLAGS_slow_reads;
    return Ask("random " + format_ + " " + std::to_string(FLAGS_slow_reads));
  }

 private:
  Moment Ask(const std::string& line) {
    std::istringstream answer(process_->Ask(line));
    Moment moment;
    answer >> moment.wall >> bytes_;
    return moment;
  }
  LineProcess* process_;
  std::string format_;
  uint64_t bytes_ = 0;
};

}  // namespace routecast
