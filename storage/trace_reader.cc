#include "storage/trace_reader.h"

#include <algorithm>
#include <array>
#include <charconv>
#include <numeric>
#include <optional>

#include "common/errors.h"
#include "storage/context_coder.h"
#include "storage/index_cache.h"
#include "storage/shard_db.h"
#include "storage/trace_store.h"

namespace routecast {
namespace {

constexpr std::array<Stack, 2> kStacks = {Stack::kEncoder, Stack::kDecoder};

uint32_t TokensOf(const SequenceInfo& info, Stack stack) {
  return stack == Stack::kEncoder ? info.encoder_tokens : info.decoder_tokens;
}

RoutingSpan* SpanOf(RoutingTrace* trace, Stack stack) {
  return stack == Stack::kEncoder ? &trace->encoder : &trace->decoder;
}

// Decodes a routing record into `trace` and holds it against the index and the geometry.
void DecodeInto(std::string_view key, std::string_view value, const std::string& where,
                Stack stack, const SequenceInfo& info, const StoreConfig& config,
                const ContextModel* model, RoutingTrace* trace) {
  const MoeGeometry& geometry = config.geometry;
  const RoutingSpan& span = *SpanOf(trace, stack);
  const SpanHeader header = DecodeSpan(key, value, where, model, SpanOf(trace, stack));
  const bool fits = header.num_experts == geometry.num_experts &&
                    span.num_layers == geometry.layers(stack) &&
                    static_cast<uint32_t>(span.num_tokens) == TokensOf(info, stack);
  if (!fits) {
    throw DataError(ErrorText(
        where + ": record and store disagree",
        std::to_string(span.num_tokens) + " tokens, " + std::to_string(span.num_layers) +
            " layers, " + std::to_string(header.num_experts) +
            " experts; the store says " + std::to_string(TokensOf(info, stack)) + ", " +
            std::to_string(geometry.layers(stack)) + ", " +
            std::to_string(geometry.num_experts),
        "run routecast-trace verify"));
  }
  if (span.token_ids.empty() == config.token_ids) {
    throw DataError(ErrorText(where + ": record and store disagree",
                              std::string("the record has ") +
                                  (config.token_ids ? "no " : "") +
                                  "token ids; store.json says otherwise",
                              "run routecast-trace verify"));
  }
  // A record may lack the plane, as others; one of another shape is of another store.
  if (span.top_k != 0 && span.top_k != config.top_k) {
    throw DataError(ErrorText(where + ": record and store disagree",
                              "top-k of " + std::to_string(span.top_k) +
                                  "; store.json says " + std::to_string(config.top_k),
                              "run routecast-trace verify"));
  }
  trace->task = header.task;
}

void DecodeBeside(Family family, std::string_view key, std::string_view value,
                  const std::string& where, RoutingSpan* span) {
  if (family == Family::kHidden) return DecodeHidden(key, value, where, span);
  DecodeAttention(key, value, where, span);
}

// Of each record: no path is made of `where` but for an error.
void CheckRead(const rocksdb::Status& status, const std::string& where) {
  if (!status.ok()) CheckStatus(status, "read", where);
}

// What the shard's ids were coded with must be the model that is there.
void RequireModel(const ShardDb& db, int shard, const fs::path& store,
                  const StoreConfig& config, const ContextModel* model) {
  CoderMark coder;
  if (!config.ContextCoded() || !ReadCoderMark(db, &coder) ||
      (model != nullptr && model->fingerprint() == coder.fingerprint)) {
    return;
  }
  throw DataError(
      ErrorText(ContextModelPath(store).string() + " is not what shard " +
                    std::to_string(shard) + " was coded with",
                "the shard names " + Hex64(coder.fingerprint) + ", the model is " +
                    (model != nullptr ? Hex64(model->fingerprint()) : "missing"),
                "restore the store's own context.model"));
}

}  // namespace

TraceReader::TraceReader(fs::path store, NeedTokens tokens)
    : path_(std::move(store)), config_(TraceStore::Open(path_)) {
  if (tokens == NeedTokens::kYes && !config_.token_ids) {
    throw UsageError(ErrorText(path_.string() + " has no token ids",
                               "it was imported without them, and they are needed here",
                               "import it with token ids, or use another store"));
  }
  model_ = LoadContextModel(path_, config_);

  std::optional<ShardMissing> missing;
  for (int shard = 0; shard < config_.num_shards; ++shard) {
    try {
      shards_.push_back(
          std::make_unique<ShardDb>(path_, shard, config_, ShardDb::Mode::kRead));
    } catch (const ShardMissing& e) {
      missing = e;
      shards_.push_back(nullptr);
      continue;
    }
    RequireModel(*shards_.back(), shard, path_, config_, model_.get());
  }
  const uint64_t state = missing ? 0 : StateOf(config_, shards_);
  if (auto index = missing ? std::nullopt : LoadIndexCache(path_, state)) {
    sequences_ = std::move(index->sequences);
    places_.reserve(index->chunks.size());
    for (const uint32_t chunk : index->chunks) {
      places_.push_back({chunk, TraceStore::ShardOf(config_, chunk)});
    }
    completed_chunks_ = index->completed_chunks;
    SetAsideLeftOut();
    return;
  }
  for (int shard = 0; shard < config_.num_shards; ++shard) {
    if (shards_[static_cast<size_t>(shard)]) ReadMarks(shard);
  }
  // All shards are made before the first chunk: a store just created has none.
  if (missing && completed_chunks_ > 0) throw *missing;
  std::vector<size_t> order(sequences_.size());
  std::iota(order.begin(), order.end(), size_t{0});
  std::sort(order.begin(), order.end(), [this](size_t a, size_t b) {
    return sequences_[a].sequence_id < sequences_[b].sequence_id;
  });
  std::vector<SequenceInfo> sequences;
  std::vector<Place> places;
  sequences.reserve(order.size());
  places.reserve(order.size());
  for (const size_t i : order) {
    if (!sequences.empty() && sequences.back().sequence_id == sequences_[i].sequence_id) {
      throw DataError(ErrorText(path_.string() + ": sequence " +
                                    std::to_string(sequences_[i].sequence_id) +
                                    " is in the store twice",
                                "chunks " + std::to_string(places.back().chunk) +
                                    " and " + std::to_string(places_[i].chunk),
                                "collect into a new store"));
    }
    sequences.push_back(sequences_[i]);
    places.push_back(places_[i]);
  }
  sequences_.swap(sequences);
  places_.swap(places);
  if (complete() && sequences_.size() >= kMinCachedSequences) {
    StoreIndex index{std::move(sequences_), {}, completed_chunks_};
    index.chunks.reserve(places_.size());
    for (const Place& place : places_) index.chunks.push_back(place.chunk);
    SaveIndexCache(path_, state, index);
    sequences_ = std::move(index.sequences);
  }
  SetAsideLeftOut();
}

void TraceReader::SetAsideLeftOut() {
  size_t kept = 0;
  for (size_t i = 0; i < sequences_.size(); ++i) {
    if (sequences_[i].left_out()) {
      left_out_.push_back(sequences_[i]);
      continue;
    }
    sequences_[kept] = sequences_[i];
    places_[kept++] = places_[i];
  }
  sequences_.resize(kept);
  places_.resize(kept, {0, 0});
}

TraceReader::~TraceReader() = default;

void TraceReader::ReadMarks(int shard) {
  const ShardDb& db = *shards_[shard];
  const std::unique_ptr<rocksdb::Iterator> it(
      db.db()->NewIterator(rocksdb::ReadOptions(), db.family(Family::kRouting)));
  for (it->Seek(EncodeKey(RecordKind::kChunkMark, 0)); it->Valid(); it->Next()) {
    const std::string where = db.path().string() + ": chunk mark";
    const ChunkMark mark =
        DecodeMark(it->key().ToStringView(), it->value().ToStringView(), where);
    // Sources may have been added since store.json was read.
    if (mark.chunk >= config_.num_chunks) config_ = TraceStore::Open(path_);
    if (mark.chunk % config_.num_shards != static_cast<uint32_t>(shard) ||
        mark.chunk >= config_.num_chunks) {
      throw DataError(ErrorText(where + " of chunk " + std::to_string(mark.chunk),
                                "does not belong here: shard " + std::to_string(shard) +
                                    " of " + std::to_string(config_.num_shards) + ", " +
                                    std::to_string(config_.num_chunks) + " chunks",
                                "were folders of two stores mixed?"));
    }
    sequences_.insert(sequences_.end(), mark.sequences.begin(), mark.sequences.end());
    places_.insert(places_.end(), mark.sequences.size(), {mark.chunk, shard});
    ++completed_chunks_;
  }
  CheckStatus(it->status(), "read", db.path());
}

std::vector<uint64_t> TraceReader::sequence_ids() const {
  std::vector<uint64_t> ids;
  ids.reserve(sequences_.size());
  for (const SequenceInfo& s : sequences_) ids.push_back(s.sequence_id);
  return ids;
}

const SequenceInfo* TraceReader::Find(uint64_t sequence_id) const {
  const auto it = std::lower_bound(
      sequences_.begin(), sequences_.end(), sequence_id,
      [](const SequenceInfo& s, uint64_t id) { return s.sequence_id < id; });
  return it != sequences_.end() && it->sequence_id == sequence_id ? &*it : nullptr;
}

size_t TraceReader::IndexOf(uint64_t sequence_id) const {
  const SequenceInfo* info = Find(sequence_id);
  if (info == nullptr) {
    throw UsageError(ErrorText(
        path_.string() + " does not hold sequence " + std::to_string(sequence_id),
        std::to_string(sequences_.size()) + " sequences are in it",
        "use ids that sequences() lists"));
  }
  return static_cast<size_t>(info - sequences_.data());
}

void TraceReader::FillHeader(size_t index, RoutingTrace* trace) const {
  trace->sequence_id = sequences_[index].sequence_id;
  trace->document_id = sequences_[index].document_id;
  trace->group_id = sequences_[index].group_id;
  trace->task = config_.task;
}

void TraceReader::SayWhere(size_t index, Stack stack, std::string* where) const {
  char id[20];
  const char* end = std::to_chars(id, id + sizeof id, sequences_[index].sequence_id).ptr;
  where->assign(shards_[places_[index].shard]->path().native());
  where->append(": sequence ").append(static_cast<const char*>(id), end).append(" (");
  where->append(StackName(stack)).append(")");
}

// Routing first: the others are held against its dims.
std::vector<Family> TraceReader::Wanted(WithHidden with_hidden) const {
  std::vector<Family> families = FamiliesOf(config_);
  if (with_hidden == WithHidden::kNo) families.resize(1);
  if (with_hidden == WithHidden::kYes) families.resize(2);
  return families;
}

RoutingTrace TraceReader::Read(uint64_t sequence_id, WithHidden with_hidden) const {
  return std::move(ReadMany({&sequence_id, 1}, with_hidden)[0]);
}

std::vector<RoutingTrace> TraceReader::ReadMany(std::span<const uint64_t> sequence_ids,
                                                WithHidden with_hidden) const {
  struct Record {
    size_t index, slot;
    Stack stack;
  };
  std::vector<RoutingTrace> traces;
  traces.reserve(sequence_ids.size());
  std::vector<std::vector<Record>> by_shard(shards_.size());
  for (size_t slot = 0; slot < sequence_ids.size(); ++slot) {
    const size_t index = IndexOf(sequence_ids[slot]);
    FillHeader(index, &traces.emplace_back());
    for (const Stack stack : kStacks) {
      if (TokensOf(sequences_[index], stack) == 0) continue;
      by_shard[places_[index].shard].push_back({index, slot, stack});
    }
  }
  std::string where;
  for (const Family family : Wanted(with_hidden)) {
    for (size_t shard = 0; shard < by_shard.size(); ++shard) {
      std::vector<Record> wanted;
      for (const Record& w : by_shard[shard]) {
        if (family == Family::kRouting || sequences_[w.index].has_hidden)
          wanted.push_back(w);
      }
      if (wanted.empty()) continue;
      std::vector<std::string> keys;
      for (const Record& w : wanted) {
        keys.push_back(EncodeKey(KindOf(w.stack), sequences_[w.index].sequence_id));
      }
      const std::vector<rocksdb::Slice> slices(keys.begin(), keys.end());
      std::vector<rocksdb::PinnableSlice> values(keys.size());
      std::vector<rocksdb::Status> statuses(keys.size());
      const ShardDb& db = *shards_[shard];
      db.db()->MultiGet(rocksdb::ReadOptions(), db.family(family), keys.size(),
                        slices.data(), values.data(), statuses.data());
      for (size_t i = 0; i < keys.size(); ++i) {
        const Record& w = wanted[i];
        SayWhere(w.index, w.stack, &where);
        CheckRead(statuses[i], where);
        RoutingTrace& trace = traces[w.slot];
        if (family == Family::kRouting) {
          DecodeInto(keys[i], values[i].ToStringView(), where, w.stack,
                     sequences_[w.index], config_, model_.get(), &trace);
        } else {
          DecodeBeside(family, keys[i], values[i].ToStringView(), where,
                       SpanOf(&trace, w.stack));
        }
      }
    }
  }
  return traces;
}

void TraceReader::Scan(const std::function<void(RoutingTrace&&)>& callback,
                       WithHidden with_hidden) const {
  // RocksDB's own read-ahead, which grows: larger buffers are copied from, and their new
  // pages cost more than the records of a small shard.
  rocksdb::ReadOptions options;
  options.fill_cache = false;
  // One forward iterator a shard, stack and family: ids ascend in each, so none ever
  // seeks back.
  struct Cursor {
    std::unique_ptr<rocksdb::Iterator> it;
    void To(const std::string& key) {
      if (it->Valid() && it->key() == rocksdb::Slice(key)) return;
      it->Seek(key);
    }
  };
  std::vector<std::array<std::array<Cursor, 3>, 2>> cursors(shards_.size());
  const auto value_at = [&](size_t index, Stack stack, Family family,
                            const std::string& key, const std::string& where) {
    const int shard = places_[index].shard;
    Cursor& cursor =
        cursors[shard][static_cast<size_t>(stack)][static_cast<size_t>(family)];
    if (!cursor.it) {
      const ShardDb& db = *shards_[shard];
      cursor.it.reset(db.db()->NewIterator(options, db.family(family)));
    }
    cursor.To(key);
    CheckRead(cursor.it->status(), where);
    if (!cursor.it->Valid() || cursor.it->key() != rocksdb::Slice(key)) {
      CheckRead(rocksdb::Status::NotFound("record is missing"), where);
    }
    return &cursor;
  };
  const std::vector<Family> families = Wanted(with_hidden);
  // One for all: what the callback does not take of its memory, the next record uses.
  RoutingTrace trace;
  std::string where;
  for (size_t index = 0; index < sequences_.size(); ++index) {
    FillHeader(index, &trace);
    for (const Stack stack : kStacks) {
      if (TokensOf(sequences_[index], stack) == 0) {
        *SpanOf(&trace, stack) = {};
        continue;
      }
      const std::string key = EncodeKey(KindOf(stack), sequences_[index].sequence_id);
      SayWhere(index, stack, &where);
      Cursor* routing = value_at(index, stack, Family::kRouting, key, where);
      DecodeInto(key, routing->it->value().ToStringView(), where, stack,
                 sequences_[index], config_, model_.get(), &trace);
      routing->it->Next();
      if (!sequences_[index].has_hidden) continue;
      for (size_t f = 1; f < families.size(); ++f) {
        Cursor* beside = value_at(index, stack, families[f], key, where);
        DecodeBeside(families[f], key, beside->it->value().ToStringView(), where,
                     SpanOf(&trace, stack));
        beside->it->Next();
      }
    }
    callback(std::move(trace));
  }
}

void DeclareLeftOut(const fs::path& store) {
  StoreConfig config = TraceStore::Open(store);
  const bool left_out = !TraceReader(store, NeedTokens::kNo).left_out().empty();
  if (config.left_out == left_out) return;
  config.left_out = left_out;
  WriteFileAtomic(store / "store.json", config.ToJson().dump(2) + "\n");
}

}  // namespace routecast
