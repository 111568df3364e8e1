#include "storage/salvage.h"

#include <algorithm>

#include "common/byte_file.h"
#include "common/errors.h"
#include "common/stop.h"
#include "storage/context_coder.h"
#include "storage/shard_db.h"
#include "storage/shard_seal.h"
#include "storage/store_builder.h"
#include "storage/store_routers.h"

namespace routecast {
namespace {

constexpr size_t kMaxListed = 100;

}  // namespace

Salvage::~Salvage() = default;

Salvage::Salvage(fs::path store, size_t window_bytes) : store_(std::move(store)) {
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
  const fs::path routers = RoutersPath(store_);
  if (fs::exists(routers) && !RoutersProblem(store_)) {
    const auto sealed = [&](const ShardSeal& seal) {
      const auto file = seal.files.find("routers.safetensors");
      return file == seal.files.end() || file->second.hash == HashFile(routers);
    };
    if (std::all_of(seals.begin(), seals.end(), sealed)) routers_ = routers;
  }
  for (int shard = 0; shard < config_.num_shards; ++shard) {
    if (!fs::is_directory(ShardPath(store_, shard))) continue;
    for (const auto& entry : fs::directory_iterator(ShardPath(store_, shard))) {
      if (entry.path().extension() == ".sst") Search(entry.path(), window_bytes);
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
  // Marks of two stores whose files were mixed may name one sequence twice.
  const auto same = [](const auto& a, const auto& b) {
    return a.sequence_id == b.sequence_id;
  };
  sequences_.erase(std::unique(sequences_.begin(), sequences_.end(), same),
                   sequences_.end());
}

void Salvage::Search(const fs::path& table, size_t window_bytes) {
  const ByteFile opened(table);
  ByteWindow bytes(opened, window_bytes);
  const size_t file = files_.size();
  files_.push_back(table);
  FindRecords(
      &bytes, model_ ? model_->fingerprint() : 0,
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
  return ReadRecord(ByteFile(files_[found.file]), found.place);
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
          (decoded.span.top_k != 0 && decoded.span.top_k != config_.top_k) ||
          decoded.span.token_ids.empty() == config_.token_ids ||
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
    if (info.left_out()) {
      builder.LeaveOut(info);
      continue;
    }
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
