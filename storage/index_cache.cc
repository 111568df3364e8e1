#include "storage/index_cache.h"

#include <algorithm>
#include <cstring>

#include "common/byte_file.h"
#include "common/errors.h"
#include "storage/shard_db.h"

namespace routecast {
namespace {

constexpr char kMagic[8] = {'R', 'C', 'I', 'N', 'D', 'E', 'X', '1'};
constexpr uint64_t kBlockRows = 1 << 15;

// As it lies in the file, little-endian.
struct Header {
  char magic[8];
  uint64_t state, completed_chunks, rows;
  uint64_t hash;  // of the header before it, then of the rows, block by block
};
struct Row {
  uint64_t sequence, document, group;
  uint32_t encoder_tokens;
  uint32_t decoder_tokens;  // times 2, plus 1 with router inputs
  uint32_t chunk;
  uint32_t zero;
};
static_assert(sizeof(Header) == 40 && sizeof(Row) == 40);

uint64_t HashOf(const Header& header) { return Hash64(&header, offsetof(Header, hash)); }

Row ToRow(const SequenceInfo& s, uint32_t chunk) {
  return {s.sequence_id,
          s.document_id,
          s.group_id,
          s.encoder_tokens,
          s.decoder_tokens * 2 + (s.has_hidden ? 1 : 0),
          chunk,
          0};
}

SequenceInfo FromRow(const Row& r) {
  return {r.sequence,       r.document,           r.group,
          r.encoder_tokens, r.decoder_tokens / 2, (r.decoder_tokens & 1) != 0};
}

// Calls take(rows, count) for the rows that `header` names, with a hash of all of them.
template <typename Take>
uint64_t ReadRows(const ByteFile& file, const Header& header, const Take& take) {
  std::vector<Row> block(kBlockRows);
  uint64_t hash = HashOf(header);
  for (uint64_t at = 0; at < header.rows; at += kBlockRows) {
    const uint64_t count = std::min(kBlockRows, header.rows - at);
    file.Read(sizeof(Header) + at * sizeof(Row), block.data(), count * sizeof(Row));
    hash = Hash64(block.data(), count * sizeof(Row), hash);
    take(block.data(), count);
  }
  return hash;
}

}  // namespace

fs::path IndexCachePath(const fs::path& store) { return store / "index.cache"; }

uint64_t StateOf(const StoreConfig& config,
                 const std::vector<std::unique_ptr<ShardDb>>& shards) {
  std::string text = config.ToJson().dump();
  for (const auto& shard : shards) {
    std::string identity;
    CheckStatus(shard->db()->GetDbIdentity(identity), "read", shard->path());
    text +=
        "\n" + identity + " " + std::to_string(shard->db()->GetLatestSequenceNumber());
    std::vector<rocksdb::LiveFileMetaData> files;
    shard->db()->GetLiveFilesMetaData(&files);
    std::vector<std::string> names;
    for (const rocksdb::LiveFileMetaData& file : files) {
      names.push_back(file.name + " " + std::to_string(file.size) + " " +
                      file.file_checksum);
    }
    std::sort(names.begin(), names.end());
    for (const std::string& name : names) text += "\n" + name;
  }
  return Hash64(text);
}

std::optional<StoreIndex> LoadIndexCache(const fs::path& store, uint64_t state) {
  const fs::path path = IndexCachePath(store);
  if (!fs::is_regular_file(path)) return std::nullopt;
  try {
    const ByteFile file(path);
    Header header;
    if (file.size() < sizeof header) return std::nullopt;
    file.Read(0, &header, sizeof header);
    if (std::memcmp(header.magic, kMagic, sizeof kMagic) != 0 || header.state != state ||
        header.rows != (file.size() - sizeof header) / sizeof(Row) ||
        (file.size() - sizeof header) % sizeof(Row) != 0) {
      return std::nullopt;
    }
    StoreIndex index;
    index.completed_chunks = static_cast<int64_t>(header.completed_chunks);
    index.sequences.reserve(header.rows);
    index.chunks.reserve(header.rows);
    const uint64_t hash = ReadRows(file, header, [&](const Row* rows, uint64_t count) {
      for (uint64_t i = 0; i < count; ++i) {
        index.sequences.push_back(FromRow(rows[i]));
        index.chunks.push_back(rows[i].chunk);
      }
    });
    if (hash != header.hash) return std::nullopt;
    return index;
  } catch (const std::exception&) {  // it can be made again, whatever it is
    return std::nullopt;
  }
}

void SaveIndexCache(const fs::path& store, uint64_t state, const StoreIndex& index) {
  try {
    Header header{};
    std::memcpy(header.magic, kMagic, sizeof kMagic);
    header.state = state;
    header.completed_chunks = static_cast<uint64_t>(index.completed_chunks);
    header.rows = index.sequences.size();
    header.hash = HashOf(header);
    std::vector<Row> block;
    const auto for_each_block = [&](const auto& take) {
      for (size_t i = 0; i < index.sequences.size(); ++i) {
        block.push_back(ToRow(index.sequences[i], index.chunks[i]));
        if (block.size() < kBlockRows && i + 1 < index.sequences.size()) continue;
        take(block.data(), block.size() * sizeof(Row));
        block.clear();
      }
    };
    for_each_block([&](const Row* rows, size_t bytes) {
      header.hash = Hash64(rows, bytes, header.hash);
    });
    AtomicFileWriter out(IndexCachePath(store),
                         sizeof header + header.rows * sizeof(Row));
    out.Append(&header, sizeof header);
    for_each_block([&](const Row* rows, size_t bytes) { out.Append(rows, bytes); });
    out.Commit();
  } catch (const std::exception&) {  // a disk that is full or not to be written to
  }
}

}  // namespace routecast
