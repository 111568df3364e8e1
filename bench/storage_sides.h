// What storage_bench compares: each side keeps the same traces in its own way.
// Thread rule: one thread.
#pragma once

#include <gflags/gflags_declare.h>

#include <algorithm>
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

struct Data {
  StoreConfig config;
  std::vector<RoutingTrace> traces;
  std::vector<const RoutingSpan*> spans;
  uint64_t record_bytes = 0, num_ids = 0, token_bytes = 0;
};

class Side {
 public:
  virtual ~Side() = default;
  virtual Moment Write(bool only_ids) = 0;
  virtual uint64_t Bytes() const = 0;
  virtual Moment Scan() = 0;
  // Reads at random; says how many spans.
  virtual Moment Random(uint64_t round, double* spans) = 0;

  std::string name;
  double id_bytes = 0, all_bytes = 0;
  std::vector<double> write, scan, random, scan_cpu, write_cpu;  // bytes/s; spans/s
};

class OurSide final : public Side {
 public:
  OurSide(const Data& data, const std::string& compression) : data_(data) {
    name = "ours, " + compression;
    config_ = data.config;
    config_.compression = compression;
    path_ = fs::path(FLAGS_folder) / compression;
  }
  Moment Write(bool only_ids) override {
    reader_.reset();
    fs::remove_all(path_);
    TraceStore::CreateOrOpen(path_, config_);
    ShardOwner owner(path_, config_, 0, 1);
    const Moment written = Timed([&] {
      for (int64_t c = 0; c < config_.num_chunks; ++c) {
        WriteChunk(static_cast<uint32_t>(c), only_ids);
        owner.Ingest(static_cast<uint32_t>(c), "bench");
      }
    });
    MakeContextModel(path_, config_);
    owner.Compact();
    return written;
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
  Moment Random(uint64_t round, double* spans) override {
    Open();
    const std::vector<uint64_t> ids = reader_->sequence_ids();
    *spans = 0;
    return Timed([&] {
      for (int i = 0; i < FLAGS_reads; i += 64) {
        std::vector<uint64_t> some;
        for (int k = 0; k < 64; ++k) {
          some.push_back(ids[ToRange(Mix(round, i, k), ids.size())]);
        }
        for (const RoutingTrace& t : reader_->ReadMany(some, WithHidden::kNo)) {
          Use(t);
          *spans += (t.encoder.num_tokens > 0) + (t.decoder.num_tokens > 0);
        }
      }
    });
  }

 private:
  void Open() {
    if (!reader_) reader_ = std::make_unique<TraceReader>(path_);
  }
  void WriteChunk(uint32_t chunk, bool only_ids) {
    ChunkWriter writer(path_, config_, chunk, "bench");
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
      }
      writer.Add(trace);
    }
    writer.Finish();
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
  Moment Random(uint64_t round, double* spans) override {
    *spans = FLAGS_reads;
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
  uint64_t Bytes() const override { return bytes_; }
  Moment Scan() override { return Ask("scan " + format_); }
  Moment Random(uint64_t, double* spans) override {
    *spans = FLAGS_slow_reads;
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
