#include "storage/trace_store.h"

#include <algorithm>
#include <array>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <mutex>
#include <set>
#include <stdexcept>
#include <thread>

#include "common/errors.h"
#include "common/open_files.h"
#include "common/stop.h"
#include "common/temporary_file.h"
#include "rocksdb/sst_file_writer.h"
#include "storage/context_coder.h"
#include "storage/lost_chunks.h"
#include "storage/shard_db.h"

namespace routecast {
namespace {

// In a chunk's staging folder, by column family.
constexpr std::array<const char*, 3> kFiles = {"routing.sst", "hidden.sst",
                                               "attention.sst"};
constexpr std::array<const char*, 3> kWriteSteps = {
    "stage: write routing", "stage: write hidden", "stage: write attention"};

void WriteSst(const fs::path& path, const rocksdb::Options& options,
              const std::map<std::string, std::string>& records) {
  rocksdb::SstFileWriter writer(rocksdb::EnvOptions(), options);
  CheckStatus(writer.Open(path), "create", path);
  for (const auto& [key, value] : records)
    CheckStatus(writer.Put(key, value), "write", path);
  CheckStatus(writer.Finish(), "write", path);  // syncs
}

void ForEachMark(const ShardDb& shard,
                 const std::function<void(uint32_t, const std::string&)>& callback) {
  const std::unique_ptr<rocksdb::Iterator> it(
      shard.db()->NewIterator(rocksdb::ReadOptions(), shard.family(Family::kRouting)));
  for (it->Seek(EncodeKey(RecordKind::kChunkMark, 0)); it->Valid(); it->Next()) {
    RecordKind kind;
    uint64_t chunk = 0;
    if (DecodeKey(it->key().ToStringView(), &kind, &chunk)) {
      callback(static_cast<uint32_t>(chunk), it->value().ToString());
    }
  }
  CheckStatus(it->status(), "read", shard.path());
}

// Routing tables of a shard that are all open where it is read through: those of
// RocksDB's first level, which overlap. Of every other level one is open.
uint64_t OverlappingTables(const ShardDb& shard) {
  std::string tables;
  shard.db()->GetProperty(shard.family(Family::kRouting),
                          rocksdb::DB::Properties::kNumFilesAtLevelPrefix + "0", &tables);
  return std::stoull(tables);
}

// So that a scan of all shards takes a quarter of the files that this process may open.
uint64_t MostOverlapping(const StoreConfig& config) {
  constexpr uint64_t kLeast = 16;
  const auto shards = static_cast<uint64_t>(config.num_shards);
  return std::max(kLeast, OpenFileLimit() / (4 * shards));
}

// Sets a flag when a stop is requested, while RocksDB works for long.
class StopFlag {
 public:
  StopFlag()
      : set_(StopRequested()), watcher_([this](std::stop_token end) { Watch(end); }) {}
  std::atomic<bool>* get() { return &set_; }

 private:
  void Watch(const std::stop_token& end) {
    std::mutex mutex;
    std::unique_lock lock(mutex);
    std::condition_variable_any ended;
    while (!end.stop_requested() && !set_) {
      ended.wait_for(lock, end, std::chrono::milliseconds(50), [] { return false; });
      if (StopRequested()) set_ = true;
    }
  }
  std::atomic<bool> set_;
  std::jthread watcher_;
};

void StopIfAsked() {
  if (!StopRequested()) return;
  throw StoppedError(
      "stopped while the store was being finished; every record is readable\n"
      "  start the same command to go on");
}

std::string Join(const std::vector<std::string>& parts) {
  std::string text;
  for (const std::string& part : parts) text += (text.empty() ? "" : "; ") + part;
  return text;
}

// What a job leaves that was killed before the store had its store.json; and `corpus`, a
// cache that was given its place there.
bool IsOfAStart(const fs::directory_entry& entry) {
  static const std::set<std::string> kFiles = {"lock.json",    "lock.guard",
                                               "run.json",     "routers.safetensors",
                                               "routers.hash", "store.json"};
  const fs::path name = entry.path().filename(), whole = PathOfTemporary(name);
  if (entry.is_directory()) {
    return name == "corpus" || name == "staging" ||
           (name == "shards" && fs::is_empty(entry.path()));
  }
  return kFiles.contains(whole.empty() ? name : whole);
}

void RequireNothingElse(const fs::path& path) {
  if (!fs::is_directory(path)) return;
  for (const auto& entry : fs::directory_iterator(path)) {
    if (IsOfAStart(entry)) continue;
    throw UsageError(ErrorText(path.string() + " holds something else than a trace store",
                               "found " + entry.path().filename().string(),
                               "name an empty or new folder"));
  }
}

// Says what is there instead: a file, or what a run that failed has left.
[[noreturn]] void ThrowNoStore(const fs::path& path) {
  std::string why = "no store.json in it";
  std::string fix = "check --store, or make one with routecast-collect";
  const fs::path run = path / "run.json";
  if (fs::is_regular_file(path)) {
    why = "it is a file, a store is a folder";
    if (fs::exists(path.parent_path() / "store.json")) {
      const fs::path folder = path.has_parent_path() ? path.parent_path() : ".";
      fix = "give its folder: --store=" + folder.string();
    }
  } else if (fs::exists(run)) {
    const Json json = ReadJsonFile(run);
    const bool text =
        json.is_object() && json.contains("program") && json["program"].is_string();
    if (text) {
      why = "no store.json in it; " + json["program"].get<std::string>() +
            " wrote its run.json and made no store there";
      fix = "see what that run has said, mend it and start it again";
    }
  }
  throw UsageError(ErrorText(path.string() + " is not a trace store", why, fix));
}

// Of other documents under the same names; empty where these are the same.
std::string CauseOf(const StoreConfig& stored, const StoreConfig& wanted) {
  const std::vector<StoreIntake> had = stored.AllIntakes(), has = wanted.AllIntakes();
  for (size_t i = 0; i < std::min(had.size(), has.size()); ++i) {
    if (had[i].corpus_fingerprint == has[i].corpus_fingerprint) continue;
    return "; other documents: texts were changed, or a folder gives other files, which "
           "are taken by their names (docs/corpus.md)";
  }
  return "";
}

// merge, subset, salvage or import where one of them made the store; else empty.
std::string MakerOf(const fs::path& path) {
  if (!fs::exists(path / "run.json")) return "";
  const Json json = ReadJsonFile(path / "run.json");
  if (!json.is_object() || !json.contains("program") || !json["program"].is_string())
    return "";
  const auto program = json["program"].get<std::string>();
  constexpr std::string_view kTrace = "routecast-trace ";
  return program.starts_with(kTrace) ? program.substr(kTrace.size()) : "";
}

}  // namespace

StoreConfig TraceStore::Open(const fs::path& path) {
  const fs::path file = path / "store.json";
  if (!fs::exists(file)) ThrowNoStore(path);
  return StoreConfig::FromJson(ReadJsonFile(file), file.string());
}

void TraceStore::RequireGoesOn(const fs::path& path, const StoreConfig& stored,
                               const StoreConfig& wanted) {
  std::vector<StoreIntake> kept = wanted.AllIntakes();
  kept.resize(std::min(kept.size(), stored.AllIntakes().size()));
  StoreConfig before = wanted;  // without what it adds
  before.SetIntakes(kept);
  const std::vector<std::string> differences = Differences(stored, before);
  if (differences.empty()) return;
  if (const std::string maker = MakerOf(path); !maker.empty()) {
    throw UsageError(ErrorText(
        path.string() + " was made by `routecast-trace " + maker +
            "`: nothing can be collected into it",
        "its chunks are no part of a collection's plan (" + Join(differences) + ")",
        "collect into another --store, then `routecast-trace merge` the two into a third "
        "(with --renumber if their documents are others)"));
  }
  throw UsageError(ErrorText(path.string() + " was made with another configuration",
                             Join(differences) + CauseOf(stored, before),
                             "go on with the store's values, or name another --store"));
}

StoreConfig TraceStore::CreateOrOpen(const fs::path& path, const StoreConfig& wanted) {
  RequireCompression(wanted.compression, wanted.geometry);
  if (fs::exists(path / "store.json")) {
    StoreConfig stored = Open(path);
    RequireGoesOn(path, stored, wanted);
    if (wanted.AllIntakes().size() == stored.AllIntakes().size()) return stored;
    for (int shard = 0; shard < stored.num_shards; ++shard) RemoveShardSeal(path, shard);
    stored.SetIntakes(wanted.AllIntakes());
    WriteFileAtomic(path / "store.json", stored.ToJson().dump(2) + "\n");
    return stored;
  }
  RequireNothingElse(path);
  MakeFolder(path / "shards");
  MakeFolder(path / "staging");
  WriteFileAtomic(path / "store.json", wanted.ToJson().dump(2) + "\n");
  return wanted;
}

void TraceStore::CleanStaging(const fs::path& path) {
  if (!fs::exists(path / "staging")) return;
  for (const auto& entry : fs::directory_iterator(path / "staging")) {
    std::error_code error;
    fs::remove_all(entry.path(), error);
    if (error) ThrowErrno(error.value(), "remove", entry.path());
  }
}

fs::path TraceStore::StagingFolder(const fs::path& path, uint32_t chunk,
                                   const std::string& token) {
  return path / "staging" / ("chunk-" + std::to_string(chunk) + "-" + token);
}

ChunkWriter::ChunkWriter(fs::path store, const StoreConfig& config, uint32_t chunk,
                         std::string token, StepObserver on_step)
    : store_(std::move(store)),
      config_(config),
      token_(std::move(token)),
      on_step_(std::move(on_step)) {
  mark_.chunk = chunk;
}

void ChunkWriter::Step(const char* name) const {
  if (on_step_) on_step_(name);
}

void ChunkWriter::AddSpan(const RoutingTrace& trace, Stack stack) {
  const RoutingSpan& span = stack == Stack::kEncoder ? trace.encoder : trace.decoder;
  if (span.num_tokens == 0) return;
  if (span.num_layers != config_.geometry.layers(stack)) {
    throw std::logic_error(
        "ChunkWriter: layers of the span differ from the store's geometry");
  }
  if (span.token_ids.empty() == config_.token_ids) {
    throw std::logic_error("ChunkWriter: token ids are not as store.json says");
  }
  std::string key = EncodeKey(KindOf(stack), trace.sequence_id);
  const int heads = span.hidden_width > 0 ? config_.AttentionHeads(stack) : 0;
  if (span.attention_heads != heads) {
    throw std::logic_error("ChunkWriter: attention is not as store.json says");
  }
  if (span.hidden_width > 0) {
    std::string value = EncodeHidden(key, span);
    record_bytes_ += value.size();
    hidden_.emplace(key, std::move(value));
  }
  if (heads > 0) {
    std::string value = EncodeAttention(key, span);
    record_bytes_ += value.size();
    attention_.emplace(key, std::move(value));
  }
  std::string value = EncodeSpan(key, span, trace.task, config_.geometry.num_experts);
  record_bytes_ += value.size();
  if (!routing_.emplace(std::move(key), std::move(value)).second) {
    throw std::logic_error("ChunkWriter: sequence added twice");
  }
}

void ChunkWriter::Add(const RoutingTrace& trace) {
  const bool both = trace.encoder.num_tokens > 0 && trace.decoder.num_tokens > 0;
  if (both && (trace.encoder.hidden_width > 0) != (trace.decoder.hidden_width > 0)) {
    throw std::logic_error("ChunkWriter: router inputs in one stack only");
  }
  AddSpan(trace, Stack::kEncoder);
  AddSpan(trace, Stack::kDecoder);
  mark_.sequences.push_back(
      {trace.sequence_id, trace.document_id, trace.group_id,
       static_cast<uint32_t>(trace.encoder.num_tokens),
       static_cast<uint32_t>(trace.decoder.num_tokens),
       trace.encoder.hidden_width > 0 || trace.decoder.hidden_width > 0});
}

void ChunkWriter::Finish() {
  std::sort(mark_.sequences.begin(), mark_.sequences.end(),
            [](const auto& a, const auto& b) { return a.sequence_id < b.sequence_id; });
  const std::string key = EncodeKey(RecordKind::kChunkMark, mark_.chunk);
  routing_.emplace(key, EncodeMark(key, mark_));

  const fs::path folder = TraceStore::StagingFolder(store_, mark_.chunk, token_);
  Step("stage: make folder");
  SealedFolder staging(folder);
  const std::array records = {&routing_, &hidden_, &attention_};
  for (const Family family : FamiliesOf(config_)) {
    const auto f = static_cast<size_t>(family);
    if (records[f]->empty()) continue;
    Step(kWriteSteps[f]);
    WriteSst(staging.path() / kFiles[f], FamilyOptions(family, config_), *records[f]);
  }
  Step("stage: rename");
  // The tables are synced, and again where they are taken in. Their folder's name need
  // not be: the next job empties staging/.
  staging.Commit(SealedFolder::Durable::kNo);
  Step("stage: done");
}

ShardOwner::ShardOwner(fs::path store, const StoreConfig& config, int first, int step,
                       StepObserver on_step)
    : store_(std::move(store)), config_(config), on_step_(std::move(on_step)) {
  for (int shard = first; shard < config_.num_shards; shard += step) {
    Step("open shard");
    TakeSeal(shard);
    shards_[shard] =
        std::make_unique<ShardDb>(store_, shard, config_, ShardDb::Mode::kWrite);
    if (shards_[shard]->WentBack()) {
      seals_.erase(shard);  // names of lost files may be used again
      RemoveMarksOfLostChunks(shards_[shard].get(), config_, on_step_);
    }
    ForEachMark(*shards_[shard],
                [this](uint32_t chunk, const std::string&) { done_.insert(chunk); });
  }
}

ShardOwner::~ShardOwner() = default;

void ShardOwner::TakeSeal(int shard) {
  try {
    if (auto seal = ReadShardSeal(store_, shard)) seals_[shard] = std::move(*seal);
  } catch (const DataError&) {  // damaged: the next one is made from the files
  }
  RemoveShardSeal(store_, shard);
}

void ShardOwner::Step(const char* name) const {
  if (on_step_) on_step_(name);
}

bool ShardOwner::Owns(uint32_t chunk) const {
  return shards_.contains(TraceStore::ShardOf(config_, chunk));
}

bool ShardOwner::Ingest(uint32_t chunk, const std::string& token) {
  const ShardDb& shard = *shards_.at(TraceStore::ShardOf(config_, chunk));
  const fs::path folder = TraceStore::StagingFolder(store_, chunk, token);
  const bool is_new = !done_.contains(chunk);
  if (is_new) {
    rocksdb::IngestExternalFileOptions options;
    options.move_files = true;
    // Rewriting a number inside the file would break its checksum.
    options.write_global_seqno = false;
    options.verify_checksums_before_ingest = true;
    std::vector<rocksdb::IngestExternalFileArg> args;
    for (const Family family : FamiliesOf(config_)) {
      const fs::path file = folder / kFiles[static_cast<size_t>(family)];
      if (family != Family::kRouting && !fs::exists(file)) continue;
      args.emplace_back();
      args.back().column_family = shard.family(family);
      args.back().external_files = {file};
      args.back().options = options;
    }
    Step("ingest: ingest");
    CheckStatus(shard.db()->IngestExternalFiles(args), "ingest into", shard.path());
    done_.insert(chunk);
  }
  Step("ingest: remove staging");
  std::error_code error;
  fs::remove_all(folder, error);
  Step("ingest: done");
  if (is_new && OverlappingTables(shard) >= MostOverlapping(config_)) Merge(shard);
  return is_new;
}

void ShardOwner::Compact() {
  const std::unique_ptr<ContextModel> model = LoadContextModel(store_, config_);
  for (const auto& [shard, db] : shards_) {
    if (model) {
      const fs::path staging = store_ / "staging" / ("code-" + std::to_string(shard));
      CodeShard(*db, config_, *model, staging, on_step_);
    }
    rocksdb::ColumnFamilyMetaData files;
    db->db()->GetColumnFamilyMetaData(db->family(Family::kRouting), &files);
    if (files.file_count <= 1) continue;
    if (!Merge(*db)) StopIfAsked();
  }
}

bool ShardOwner::Merge(const ShardDb& shard) const {
  Step("compact");
  StopFlag stop;
  rocksdb::CompactRangeOptions options;
  options.canceled = stop.get();
  const rocksdb::Status status =
      shard.db()->CompactRange(options, shard.family(Family::kRouting), nullptr, nullptr);
  if (status.IsIncomplete() && StopRequested()) return false;
  CheckStatus(status, "compact", shard.path());
  return true;
}

void ShardOwner::Finish() {
  Compact();
  while (!shards_.empty()) {
    StopIfAsked();  // a seal reads every byte of new files
    const auto first = shards_.begin();
    const int shard = first->first;
    std::map<uint32_t, std::string> marks;
    ForEachMark(*first->second,
                [&](uint32_t chunk, const std::string& value) { marks[chunk] = value; });
    shards_.erase(first);  // closes: the manifest's bytes are final
    // Else a power loss could bring back files that were removed before the seal.
    SyncPath(ShardPath(store_, shard));
    Step("seal");
    const auto before = seals_.find(shard);
    WriteShardSeal(store_, shard, marks,
                   before == seals_.end() ? std::nullopt : std::optional(before->second),
                   [this] { Step(kHashStep); });
  }
}

}  // namespace routecast
