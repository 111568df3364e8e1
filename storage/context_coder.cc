#include "storage/context_coder.h"

#include <algorithm>

#include "common/errors.h"
#include "common/random.h"
#include "common/stop.h"
#include "rocksdb/sst_file_writer.h"
#include "storage/context_trainer.h"
#include "storage/shard_db.h"
#include "storage/topk_trainer.h"
#include "storage/trace_reader.h"

namespace routecast {
namespace {

constexpr uint64_t kSalt = 0x636f646572000001;
constexpr uint64_t kMaxModelBytes = uint64_t{1} << 30;

void Step(const StepObserver& on_step, const char* name) {
  if (on_step) on_step(name);
}

void StopIfAsked() {
  if (!StopRequested()) return;
  throw StoppedError(
      "stopped while ids were being coded; every record is readable\n"
      "  start the same command to go on");
}

// As the chunk marks say.
uint64_t RecordsIn(const ShardDb& shard) {
  const std::unique_ptr<rocksdb::Iterator> it(
      shard.db()->NewIterator(rocksdb::ReadOptions(), shard.family(Family::kRouting)));
  uint64_t records = 0;
  for (it->Seek(EncodeKey(RecordKind::kChunkMark, 0)); it->Valid(); it->Next()) {
    const ChunkMark mark =
        DecodeMark(it->key().ToStringView(), it->value().ToStringView(),
                   shard.path().string() + ": chunk mark");
    for (const SequenceInfo& s : mark.sequences) {
      records += (s.encoder_tokens > 0) + (s.decoder_tokens > 0);
    }
  }
  CheckStatus(it->status(), "read", shard.path());
  return records;
}

// One shard's records in key order, coded, and the mark that says so.
void WriteCoded(const ShardDb& shard, const StoreConfig& config,
                const ContextModel& model, const fs::path& file) {
  rocksdb::SstFileWriter writer(rocksdb::EnvOptions(),
                                FamilyOptions(Family::kRouting, config));
  CheckStatus(writer.Open(file), "create", file);
  const auto put = [&](std::string_view key, std::string_view value) {
    CheckStatus(writer.Put(rocksdb::Slice(key), rocksdb::Slice(value)), "write", file);
  };
  rocksdb::ReadOptions options;
  options.readahead_size = 2 << 20;
  options.fill_cache = false;
  const std::unique_ptr<rocksdb::Iterator> it(
      shard.db()->NewIterator(options, shard.family(Family::kRouting)));
  CoderMark mark{model.fingerprint(), 0};
  for (it->SeekToFirst(); it->Valid(); it->Next()) {
    StopIfAsked();
    const std::string_view key = it->key().ToStringView();
    RecordKind kind;
    uint64_t id = 0;
    // Chunk marks stay where they are; they sort behind all records.
    if (!DecodeKey(key, &kind, &id) || kind >= RecordKind::kCoderMark) break;
    const std::string where = shard.path().string() + ": sequence " + std::to_string(id);
    const DecodedSpan record = DecodeSpan(key, it->value().ToStringView(), where, &model);
    put(key, EncodeSpan(key, record.span, record.task, record.num_experts, &model));
    ++mark.records;
  }
  CheckStatus(it->status(), "read", shard.path());
  const std::string key = EncodeKey(RecordKind::kCoderMark, 0);
  put(key, EncodeCoderMark(key, mark));
  CheckStatus(writer.Finish(), "write", file);  // syncs
}

}  // namespace

fs::path ContextModelPath(const fs::path& store) { return store / "context.model"; }

std::unique_ptr<ContextModel> LoadContextModel(const fs::path& store,
                                               const StoreConfig& config) {
  const fs::path path = ContextModelPath(store);
  if (!config.ContextCoded() || !fs::exists(path)) return nullptr;
  auto model = std::make_unique<ContextModel>(
      ContextModel::Parse(ReadFile(path, kMaxModelBytes), path.string()));
  const MoeGeometry& g = config.geometry;
  if (model->num_experts() != g.num_experts ||
      model->num_layers(Stack::kEncoder) != g.encoder_layers ||
      model->num_layers(Stack::kDecoder) != g.decoder_layers) {
    throw DataError(ErrorText(path.string() + " is of another geometry",
                              std::to_string(model->num_experts()) +
                                  " experts, store.json says " +
                                  std::to_string(g.num_experts),
                              "were files of two stores mixed?"));
  }
  return model;
}

bool InTrainedShare(uint64_t sequence_id, double share) {
  return ToUnit(Mix(kSalt, sequence_id)) < share;
}

double TrainedShare(const std::vector<SequenceInfo>& sequences,
                    const MoeGeometry& geometry, int ids_a_token) {
  uint64_t ids = 0;
  for (const SequenceInfo& s : sequences) {
    ids += uint64_t{s.encoder_tokens} * static_cast<uint64_t>(geometry.encoder_layers) +
           uint64_t{s.decoder_tokens} * static_cast<uint64_t>(geometry.decoder_layers);
  }
  ids *= static_cast<uint64_t>(ids_a_token);
  if (ids <= kMaxTrainedIds) return 1;
  return static_cast<double>(kMaxTrainedIds) / static_cast<double>(ids);
}

namespace {

// Of the store's sequences those in `share`, in their order, to a trainer.
template <typename Trainer>
void Count(const TraceReader& reader, double share, Trainer* trainer) {
  const auto add = [&](const RoutingTrace& trace) {
    StopIfAsked();
    trainer->Add(Stack::kEncoder, trace.encoder);
    trainer->Add(Stack::kDecoder, trace.decoder);
  };
  if (share == 1) {
    reader.Scan([&](RoutingTrace&& trace) { add(trace); }, WithHidden::kNo);
    return;
  }
  for (const SequenceInfo& s : reader.sequences()) {
    if (!InTrainedShare(s.sequence_id, share)) continue;
    add(reader.Read(s.sequence_id, WithHidden::kNo));
  }
}

ContextModel Train(const fs::path& store, const StoreConfig& config,
                   const std::string& where) {
  const TraceReader reader(store, NeedTokens::kNo);
  const MoeGeometry& g = config.geometry;
  ContextModel model = [&] {
    ContextTrainer trainer(g, {});
    Count(reader, TrainedShare(reader.sequences(), g, 1), &trainer);
    return trainer.Train(where);
  }();
  if (config.CodesTopk()) {
    TopkTrainer trainer(g, {});
    Count(reader, TrainedShare(reader.sequences(), g, config.top_k), &trainer);
    model.Attach(trainer.Train(where));
  }
  return model;
}

}  // namespace

void MakeContextModel(const fs::path& store, const StoreConfig& config,
                      const StepObserver& on_step) {
  if (!config.ContextCoded() || fs::exists(ContextModelPath(store))) return;
  Step(on_step, "code: count");
  const fs::path path = ContextModelPath(store);
  const std::string bytes = Train(store, config, path.string()).Serialize();
  Step(on_step, "code: seal model");
  WriteFileAtomic(path, bytes);
}

bool ReadCoderMark(const ShardDb& shard, CoderMark* mark) {
  const std::string key = EncodeKey(RecordKind::kCoderMark, 0);
  std::string value;
  const rocksdb::Status status = shard.db()->Get(
      rocksdb::ReadOptions(), shard.family(Family::kRouting), key, &value);
  if (status.IsNotFound()) return false;
  CheckStatus(status, "read", shard.path());
  *mark = DecodeCoderMark(key, value, shard.path().string() + ": coder mark");
  return true;
}

void CodeShard(const ShardDb& shard, const StoreConfig& config, const ContextModel& model,
               const fs::path& staging, const StepObserver& on_step) {
  CoderMark mark;
  if (ReadCoderMark(shard, &mark) && mark.records == RecordsIn(shard)) return;
  fs::remove_all(staging);
  Step(on_step, "code: write");
  MakeFolder(staging);
  const fs::path file = staging / "routing.sst";
  WriteCoded(shard, config, model, file);
  Step(on_step, "code: ingest");
  rocksdb::IngestExternalFileOptions options;
  options.move_files = true;
  options.write_global_seqno = false;
  options.verify_checksums_before_ingest = true;
  CheckStatus(shard.db()->IngestExternalFile(shard.family(Family::kRouting),
                                             {file.string()}, options),
              "ingest into", shard.path());
  Step(on_step, "code: remove staging");
  std::error_code ignored;
  fs::remove_all(staging, ignored);
}

}  // namespace routecast
