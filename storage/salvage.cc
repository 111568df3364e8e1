#include "storage/salvage.h"

#include <zstd.h>

#include <algorithm>
#include <cstring>

#include "common/byte_file.h"
#include "common/errors.h"
#include "common/stop.h"
#include "storage/context_coder.h"
#include "storage/shard_db.h"
#include "storage/shard_seal.h"
#include "storage/store_builder.h"

namespace routecast {
namespace {

// RocksDB's table format (block_based): a block is a row of entries
//   varint shared | varint rest | varint value bytes | rest of the key | value
// where `shared` bytes are the previous key's; 0 at every 16th entry. A key is ours and
// 8 bytes (sequence number and type). Compressed blocks hold one zstd frame.
constexpr size_t kInternalKeyBytes = kKeyBytes + 8;
constexpr char kTypeValue = 1;
constexpr uint32_t kFrameMagic = 0xFD2FB528;
constexpr uint64_t kMaxFrameBytes = uint64_t{1} << 31;
constexpr uint64_t kMaxTableBytes = uint64_t{1} << 36;
constexpr size_t kMaxListed = 100;

bool ReadVarint(std::string_view bytes, size_t* at, uint64_t* value) {
  *value = 0;
  for (int shift = 0; shift < 35 && *at < bytes.size(); shift += 7) {
    const auto byte = static_cast<uint8_t>(bytes[(*at)++]);
    *value |= uint64_t{byte & 0x7Fu} << shift;
    if (byte < 0x80) return true;
  }
  return false;
}

// `model`: fingerprint of the context model that coded records need; 0 = none.
bool IsSound(std::string_view key, std::string_view value, uint64_t model) {
  return ChecksumHolds(key, value) || (model != 0 && ChecksumHolds(key, value, model));
}

// Follows the entries that begin at `at` with a whole key; returns where they end, or
// `at` where no sound one begins.
template <typename Emit>
size_t FollowEntries(std::string_view bytes, size_t at, uint64_t model,
                     const Emit& emit) {
  std::string key;
  for (;;) {
    size_t p = at;
    uint64_t shared = 0, rest = 0, size = 0;
    if (!ReadVarint(bytes, &p, &shared) || !ReadVarint(bytes, &p, &rest) ||
        !ReadVarint(bytes, &p, &size)) {
      return at;
    }
    if (shared > key.size() || shared + rest != kInternalKeyBytes ||
        rest + size > bytes.size() - p) {
      return at;
    }
    key.resize(shared);
    key += bytes.substr(p, rest);
    p += rest;
    const std::string_view own = std::string_view(key).substr(0, kKeyBytes);
    RecordKind kind;
    uint64_t id = 0;
    if (key[kKeyBytes] != kTypeValue || !DecodeKey(own, &kind, &id) ||
        !IsSound(own, bytes.substr(p, size), model)) {
      return at;
    }
    emit(own, p, static_cast<uint32_t>(size));
    at = p + size;
  }
}

template <typename Emit>
void FindPlain(std::string_view bytes, uint64_t model, const Emit& emit) {
  for (size_t at = 0; at + kInternalKeyBytes < bytes.size();) {
    const bool may_begin = bytes[at] == 0 && bytes[at + 1] == kInternalKeyBytes;
    const size_t end = may_begin ? FollowEntries(bytes, at, model, emit) : at;
    at = end > at ? end : at + 1;
  }
}

// The frame at `at`, unpacked; empty where none is.
std::string Unpack(std::string_view bytes, size_t at, size_t* frame_bytes) {
  const char* from = bytes.data() + at;
  const size_t left = bytes.size() - at;
  const size_t packed = ZSTD_findFrameCompressedSize(from, left);
  if (ZSTD_isError(packed)) return "";
  const unsigned long long size = ZSTD_getFrameContentSize(from, left);
  if (size == ZSTD_CONTENTSIZE_ERROR || size == ZSTD_CONTENTSIZE_UNKNOWN ||
      size > kMaxFrameBytes || size / 1000 > packed) {
    return "";
  }
  std::string out(size, '\0');
  const size_t n = ZSTD_decompress(out.data(), out.size(), from, packed);
  if (ZSTD_isError(n) || n != out.size()) return "";
  *frame_bytes = packed;
  return out;
}

}  // namespace

void FindRecords(
    std::string_view table, uint64_t model,
    const std::function<void(std::string_view key, const RecordPlace&)>& found) {
  FindPlain(table, model, [&](std::string_view key, size_t at, uint32_t bytes) {
    found(key, {at, bytes, 0, 0});
  });
  const std::string_view magic(reinterpret_cast<const char*>(&kFrameMagic), 4);
  for (size_t at = table.find(magic); at != std::string_view::npos;
       at = table.find(magic, at + 1)) {
    size_t packed = 0;
    const std::string block = Unpack(table, at, &packed);
    FindPlain(block, model, [&](std::string_view key, size_t inner, uint32_t bytes) {
      found(key, {inner, bytes, at, static_cast<uint32_t>(packed)});
    });
  }
}

Salvage::~Salvage() = default;

Salvage::Salvage(fs::path store) : store_(std::move(store)) {
  std::vector<ShardSeal> seals;
  for (const int shard : SealedShards(store_)) {
    try {
      if (auto seal = ReadShardSeal(store_, shard)) seals.push_back(std::move(*seal));
    } catch (const DataError&) {  // then without it
    }
  }
  config_ = seals.empty()
                ? StoreConfig::FromJson(ReadJsonFile(store_ / "store.json"),
                                        (store_ / "store.json").string())
                : StoreConfig::FromJson(ParseJson(seals[0].config, "a seal"), "a seal");
  try {
    model_ = LoadContextModel(store_, config_);
  } catch (const DataError&) {  // coded records are lost, packed ones are not
  }
  const fs::path routers = store_ / "routers.safetensors";
  if (fs::exists(routers)) {
    const auto sealed = [&](const ShardSeal& seal) {
      const auto file = seal.files.find("routers.safetensors");
      return file == seal.files.end() || file->second.hash == HashFile(routers);
    };
    if (std::all_of(seals.begin(), seals.end(), sealed)) routers_ = routers;
  }
  for (int shard = 0; shard < config_.num_shards; ++shard) {
    if (!fs::is_directory(ShardPath(store_, shard))) continue;
    for (const auto& entry : fs::directory_iterator(ShardPath(store_, shard))) {
      if (entry.path().extension() == ".sst") Search(entry.path());
    }
  }
  for (const ShardSeal& seal : seals) {
    for (const auto& [chunk, value] : seal.marks) {
      if (marks_.contains(chunk)) continue;
      marks_[chunk] =
          DecodeMark(EncodeKey(RecordKind::kChunkMark, chunk), value, "a seal");
    }
  }
  found_chunks_ = static_cast<int64_t>(marks_.size());
  for (const auto& [chunk, mark] : marks_) {
    sequences_.insert(sequences_.end(), mark.sequences.begin(), mark.sequences.end());
  }
  std::sort(sequences_.begin(), sequences_.end(),
            [](const auto& a, const auto& b) { return a.sequence_id < b.sequence_id; });
}

void Salvage::Search(const fs::path& table) {
  ThrowIfStopped("while searching for records");
  const std::string bytes = ReadFile(table, kMaxTableBytes);
  const size_t file = files_.size();
  files_.push_back(table);
  FindRecords(
      bytes, model_ ? model_->fingerprint() : 0,
      [&](std::string_view key, const RecordPlace& place) {
        RecordKind kind;
        uint64_t id = 0;
        DecodeKey(key, &kind, &id);
        if (kind == RecordKind::kCoderMark) return;  // the new store gets its own
        if (kind != RecordKind::kChunkMark) {
          records_[std::string(key)].push_back({file, place});
          return;
        }
        const ChunkMark mark = DecodeMark(key, Load({file, place}), table.string());
        if (mark.chunk < config_.num_chunks) marks_[mark.chunk] = mark;
      });
}

std::string Salvage::Load(const Found& found) const {
  const ByteFile file(files_[found.file]);
  const RecordPlace& place = found.place;
  if (place.frame_bytes == 0) return file.Read(place.at, place.bytes);
  size_t packed = 0;
  const std::string frame = file.Read(place.frame, place.frame_bytes);
  return Unpack(frame, 0, &packed).substr(place.at, place.bytes);
}

bool Salvage::ReadStack(const SequenceInfo& info, Stack stack,
                        RoutingTrace* trace) const {
  const bool encoder = stack == Stack::kEncoder;
  const uint32_t tokens = encoder ? info.encoder_tokens : info.decoder_tokens;
  if (tokens == 0) return true;
  const std::string key = EncodeKey(KindOf(stack), info.sequence_id);
  const auto found = records_.find(key);
  if (found == records_.end()) return false;
  RoutingSpan& span = encoder ? trace->encoder : trace->decoder;
  // Routing and what lies beside it have one key, in different files.
  std::vector<std::string> others;
  for (const Found& place : found->second) {
    std::string value = Load(place);
    try {
      DecodedSpan decoded =
          DecodeSpan(key, value, files_[place.file].string(), model_.get());
      if (decoded.num_experts != config_.geometry.num_experts ||
          decoded.span.num_layers != config_.geometry.layers(stack) ||
          static_cast<uint32_t>(decoded.span.num_tokens) != tokens) {
        continue;
      }
      span = std::move(decoded.span);
      trace->task = decoded.task;
    } catch (const DataError&) {
      others.push_back(std::move(value));
    }
  }
  if (static_cast<uint32_t>(span.num_tokens) != tokens) return false;
  if (!info.has_hidden) return true;
  const int heads = config_.AttentionHeads(stack);
  for (const std::string& other : others) {
    try {
      if (span.hidden_width == 0) {
        DecodeHidden(key, other, store_.string(), &span);
        continue;
      }
    } catch (const DataError&) {  // not router inputs
    }
    try {
      if (heads > 0) DecodeAttention(key, other, store_.string(), &span);
    } catch (const DataError&) {  // nor attention
    }
  }
  return span.hidden_width > 0 && span.attention_heads == heads;
}

std::optional<RoutingTrace> Salvage::Read(const SequenceInfo& info) const {
  RoutingTrace trace;
  trace.sequence_id = info.sequence_id;
  trace.document_id = info.document_id;
  trace.group_id = info.group_id;
  trace.task = config_.task;
  if (!ReadStack(info, Stack::kEncoder, &trace)) return std::nullopt;
  if (!ReadStack(info, Stack::kDecoder, &trace)) return std::nullopt;
  return trace;
}

SalvageReport SalvageStore(const fs::path& store, const fs::path& out) {
  RequireNewStore(out);
  RequireApart(out, store);
  const Salvage salvage(store);
  SalvageReport report;
  report.lost_chunks = salvage.lost_chunks();
  StoreBuilder builder(out, salvage.config());
  for (const SequenceInfo& info : salvage.sequences()) {
    ThrowIfStopped("while salvaging");
    if (const auto trace = salvage.Read(info)) {
      builder.Add(*trace);
    } else {
      if (report.lost_ids.size() < kMaxListed)
        report.lost_ids.push_back(info.sequence_id);
      ++report.lost;
    }
  }
  if (!salvage.routers().empty()) builder.CopyRouters(salvage.routers());
  builder.Finish();
  report.sequences = builder.num_sequences();
  return report;
}

}  // namespace routecast
