#include "storage/verify.h"

#include <algorithm>
#include <map>
#include <memory>
#include <optional>

#include "common/errors.h"
#include "common/safetensors.h"
#include "common/stop.h"
#include "storage/salvage.h"
#include "storage/shard_db.h"
#include "storage/shard_seal.h"
#include "storage/store_routers.h"
#include "storage/trace_reader.h"
#include "storage/trace_store.h"

namespace routecast {
namespace {

constexpr size_t kMaxListed = 100;

class Verifier {
 public:
  explicit Verifier(const fs::path& store) : store_(store) {}

  VerifyReport Run() {
    if (!ReadConfiguration()) return std::move(report_);
    report_.num_chunks = config_.num_chunks;
    // Each look may throw; the next one still runs.
    Try([&] { CheckRouters(); });
    for (int shard = 0; shard < config_.num_shards; ++shard) {
      Try([&] { CheckShard(shard); });
    }
    report_.sealed = seals_.size() == static_cast<size_t>(config_.num_shards);
    Try([&] { CheckRecords(); });
    if (!reader_opened_) Try([&] { CountSalvageable(); });
    // A job makes all shards before its first chunk: until then they may be missing.
    if (report_.chunks > 0 || !reader_opened_) {
      for (const std::string& text : missing_) Problem(text);
    }
    if (records_ != expected_records_ && report_.num_problems == 0) {
      Problem("the shards hold " + std::to_string(records_) +
              " records, the chunk marks name " + std::to_string(expected_records_));
    }
    return std::move(report_);
  }

 private:
  void Problem(const std::string& text) {
    // Of store.json and the routers each shard's seal has its word.
    const auto& listed = report_.problems;
    if (std::find(listed.begin(), listed.end(), text) != listed.end()) return;
    ++report_.num_problems;
    if (report_.problems.size() < kMaxListed) report_.problems.push_back(text);
  }
  template <typename Look>
  void Try(const Look& look) {
    try {
      look();
    } catch (const StoppedError&) {
      throw;
    } catch (const std::runtime_error& e) {
      Problem(e.what());
    } catch (const UsageError& e) {
      Problem(e.what());
    }
  }

  // From store.json, held against the seals first: with a byte changed it may still read
  // well, or like that of another version. False where there is nothing to go on with.
  bool ReadConfiguration() {
    if (!fs::exists(store_ / "store.json") && !fs::exists(ShardPath(store_, 0))) {
      TraceStore::Open(store_);  // throws what it is instead
    }
    for (const int shard : SealedShards(store_)) {
      Try([&] {
        if (auto seal = ReadShardSeal(store_, shard)) seals_[shard] = std::move(*seal);
      });
    }
    if (seals_.empty()) {
      config_ = TraceStore::Open(store_);
      return true;
    }
    const std::string& sealed = seals_.begin()->second.config;
    const fs::path file = store_ / "store.json";
    if (!fs::exists(file) || ReadFile(file) != sealed) {
      Problem(file.string() + " is not as it was sealed");
    }
    Try([&] {
      config_ = StoreConfig::FromJson(ParseJson(sealed, "the seal"), "the seal");
    });
    return config_.num_shards > 0;
  }

  void CheckShard(int shard) {
    const auto seal = seals_.find(shard);
    if (seal != seals_.end()) {
      Try([&] {
        CompareWithSeal(store_, shard, seal->second,
                        [this](const std::string& text) { Problem(text); });
      });
    }
    std::optional<ShardDb> opened;
    try {
      opened.emplace(store_, shard, config_, ShardDb::Mode::kRead);
    } catch (const ShardMissing& e) {
      missing_.push_back(e.what());
      return;
    }
    const ShardDb& db = *opened;
    Try([&] { CheckStatus(db.db()->VerifyChecksum(), "verify blocks of", db.path()); });
    if (seal == seals_.end()) {
      Try([&] {
        CheckStatus(db.db()->VerifyFileChecksums(rocksdb::ReadOptions()),
                    "verify files of", db.path());
      });
    }
    for (const Family family : FamiliesOf(config_)) {
      Try([&] { CountRecords(db, family); });
    }
  }

  // Keys of this format only; how many there are is held against the marks later.
  void CountRecords(const ShardDb& db, Family family) {
    const std::unique_ptr<rocksdb::Iterator> it(
        db.db()->NewIterator(rocksdb::ReadOptions(), db.family(family)));
    for (it->SeekToFirst(); it->Valid(); it->Next()) {
      ThrowIfStopped("while verifying");
      RecordKind kind;
      uint64_t id = 0;
      if (!DecodeKey(it->key().ToStringView(), &kind, &id)) {
        Problem(db.path().string() + ": foreign key of " +
                std::to_string(it->key().size()) + " bytes");
      } else if (kind == RecordKind::kEncoder || kind == RecordKind::kDecoder) {
        ++records_;
      } else if (kind == RecordKind::kChunkMark) {
        CountMark(it->key().ToStringView(), it->value().ToStringView(), db);
      }
    }
    CheckStatus(it->status(), "read", db.path());
  }

  // Not by the reader, which may know the sequences from its cache.
  void CountMark(std::string_view key, std::string_view value, const ShardDb& db) {
    Try([&] {
      const ChunkMark mark = DecodeMark(key, value, db.path().string() + ": chunk mark");
      for (const SequenceInfo& info : mark.sequences) {
        const int stacks = (info.encoder_tokens > 0) + (info.decoder_tokens > 0);
        expected_records_ += static_cast<uint64_t>(stacks) *
                             (info.has_hidden ? FamiliesOf(config_).size() : 1);
      }
    });
  }

  void CheckRecords() {
    const TraceReader reader(store_, NeedTokens::kNo);
    reader_opened_ = true;
    report_.chunks = reader.completed_chunks();
    report_.left_out = reader.left_out().size();
    for (const SequenceInfo& info : reader.sequences()) {
      ThrowIfStopped("while verifying");
      Try([&] {
        reader.Read(info.sequence_id, WithHidden::kAttended);
        ++report_.sequences;
      });
    }
    report_.records = records_;
  }

  // Where the store cannot be opened as a whole: what `salvage` would keep.
  void CountSalvageable() {
    const Salvage salvage(store_);
    report_.chunks = config_.num_chunks - salvage.lost_chunks();
    for (const SequenceInfo& info : salvage.sequences()) {
      ThrowIfStopped("while verifying");
      if (info.left_out()) {
        ++report_.left_out;
      } else if (salvage.Read(info)) {
        ++report_.sequences;
      } else {
        Problem(store_.string() + ": sequence " + std::to_string(info.sequence_id) +
                " is lost");
      }
    }
  }

  void CheckRouters() {
    const MoeGeometry& g = config_.geometry;
    const fs::path path = RoutersPath(store_);
    if (const auto problem = RoutersProblem(store_)) Problem(*problem);
    if (!fs::exists(path)) return;  // traces of models without known routers
    const SafetensorsIndex index = ReadSafetensorsIndex(path);
    for (int l = 0; l < g.num_layers(); ++l) {
      const std::string name = "layer." + std::to_string(l) + ".weight";
      const TensorEntry* weight = index.Find(name);
      if (weight == nullptr || weight->dtype != "F32" ||
          weight->shape != std::vector<int64_t>{g.num_experts, g.d_model}) {
        Problem(path.string() + ": " + name + " is not fp32 [" +
                std::to_string(g.num_experts) + ", " + std::to_string(g.d_model) + "]");
      }
    }
  }

  fs::path store_;
  StoreConfig config_;
  VerifyReport report_;
  std::map<int, ShardSeal> seals_;
  std::vector<std::string> missing_;
  bool reader_opened_ = false;
  uint64_t records_ = 0, expected_records_ = 0;
};

}  // namespace

VerifyReport VerifyStore(const fs::path& store) { return Verifier(store).Run(); }

}  // namespace routecast
