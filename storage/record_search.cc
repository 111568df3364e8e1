#include "storage/record_search.h"

#include <zstd.h>

#include <algorithm>
#include <cstring>
#include <limits>

#include "common/errors.h"
#include "common/stop.h"
#include "storage/record_seal.h"
#include "storage/trace_format.h"

namespace routecast {
namespace {

// RocksDB's table format (block_based): a block is a row of entries
//   varint shared | varint rest | varint value bytes | rest of the key | value
// where `shared` bytes are the previous key's; 0 at every 16th entry. A key is ours and
// 8 bytes (sequence number and type). Compressed blocks hold one zstd frame.
constexpr size_t kInternalKeyBytes = kKeyBytes + 8;
constexpr size_t kMostVarintBytes = 5;
constexpr size_t kMostHeadBytes = 3 * kMostVarintBytes + kInternalKeyBytes;
constexpr char kTypeValue = 1;
constexpr std::string_view kEntryBegins("\0\x11", 2);
static_assert(kInternalKeyBytes == 0x11);
constexpr std::string_view kFrameBegins("\x28\xB5\x2F\xFD", 4);
constexpr size_t kMostFrameHeadBytes = 18;
constexpr uint64_t kMaxFrameBytes = uint64_t{1} << 31;
constexpr uint64_t kMostRatio = 1000;
constexpr size_t kSearchedAtOnce = 4096;

bool ReadVarint(std::string_view bytes, size_t* at, uint64_t* value) {
  *value = 0;
  for (size_t n = 0; n < kMostVarintBytes && *at < bytes.size(); ++n) {
    const auto byte = static_cast<uint8_t>(bytes[(*at)++]);
    *value |= uint64_t{byte & 0x7Fu} << (7 * n);
    if (byte < 0x80) return true;
  }
  return false;
}

// `model`: fingerprint of the context model that coded records need; 0 = none.
bool IsSound(std::string_view key, ByteWindow* bytes, uint64_t at, uint64_t size,
             uint64_t model) {
  if (size <= kChecksumBytes) return false;
  RecordChecksum packed(key, 0), coded(key, model);
  for (uint64_t left = size - kChecksumBytes; left > 0;) {
    const std::string_view part = bytes->From(at, 1).substr(0, left);
    packed.Add(part);
    if (model != 0) coded.Add(part);
    at += part.size();
    left -= part.size();
  }
  uint64_t sum = 0;
  std::memcpy(&sum, bytes->From(at, kChecksumBytes).data(), sizeof sum);
  return sum == packed.Sum() || (model != 0 && sum == coded.Sum());
}

// Follows the entries that begin at `at` with a whole key; returns where they end, or
// `at` where no sound one begins.
template <typename Emit>
uint64_t FollowEntries(ByteWindow* bytes, uint64_t at, uint64_t model, const Emit& emit) {
  std::string key;
  for (;;) {
    const std::string_view head = bytes->From(at, kMostHeadBytes);
    size_t p = 0;
    uint64_t shared = 0, rest = 0, size = 0;
    if (!ReadVarint(head, &p, &shared) || !ReadVarint(head, &p, &rest) ||
        !ReadVarint(head, &p, &size)) {
      return at;
    }
    if (shared > key.size() || shared + rest != kInternalKeyBytes ||
        rest + size > bytes->size() - at - p ||
        size > std::numeric_limits<uint32_t>::max()) {  // RocksDB's limit, too
      return at;
    }
    key.resize(shared);
    key += head.substr(p, rest);
    const uint64_t value = at + p + rest;
    const std::string_view own = std::string_view(key).substr(0, kKeyBytes);
    RecordKind kind;
    uint64_t id = 0;
    if (key[kKeyBytes] != kTypeValue || !DecodeKey(own, &kind, &id) ||
        !IsSound(own, bytes, value, size, model)) {
      return at;
    }
    emit(own, value, static_cast<uint32_t>(size));
    at = value + size;
  }
}

// Bytes of the frame at `at`, as the headers of its blocks say (RFC 8878, 3.1.1); 0 where
// it does not end within `most` bytes.
uint64_t FrameBytes(ByteWindow* bytes, uint64_t at, uint64_t most) {
  const auto descriptor = static_cast<uint8_t>(bytes->From(at, 5)[4]);
  const int size_field = descriptor >> 6, dictionary_field = descriptor & 3;
  const bool single_segment = descriptor & 0x20, checksum = descriptor & 4;
  uint64_t end = at + 5 + (single_segment ? 0 : 1) +
                 (dictionary_field == 3 ? 4 : dictionary_field) +
                 (size_field == 0 ? (single_segment ? 1 : 0) : 1 << size_field);
  most = std::min(most, bytes->size() - at);
  for (bool last = false; !last;) {
    if (end - at + 3 > most) return 0;
    uint32_t header = 0;
    std::memcpy(&header, bytes->From(end, 3).data(), 3);
    last = header & 1;
    const uint32_t type = (header >> 1) & 3;  // raw, one byte repeated, compressed
    if (type == 3) return 0;
    end += 3 + (type == 1 ? 1 : header >> 3);
  }
  if (checksum) end += 4;
  return end - at > most ? 0 : end - at;
}

// The frame's bytes unpacked; empty where it is damaged.
std::string Unpack(std::string_view frame) {
  const unsigned long long size = ZSTD_getFrameContentSize(frame.data(), frame.size());
  if (size == ZSTD_CONTENTSIZE_ERROR || size == ZSTD_CONTENTSIZE_UNKNOWN ||
      size > kMaxFrameBytes || size / kMostRatio > frame.size()) {
    return "";
  }
  std::string out(size, '\0');
  const size_t n = ZSTD_decompress(out.data(), out.size(), frame.data(), frame.size());
  return ZSTD_isError(n) || n != out.size() ? "" : out;
}

// The frame at `at`; empty where none is.
std::string FrameAt(ByteWindow* bytes, uint64_t at) {
  const std::string_view head = bytes->From(at, kMostFrameHeadBytes);
  if (head.size() < kMostFrameHeadBytes) return "";
  const unsigned long long size = ZSTD_getFrameContentSize(head.data(), head.size());
  if (size == ZSTD_CONTENTSIZE_ERROR || size == ZSTD_CONTENTSIZE_UNKNOWN ||
      size > kMaxFrameBytes) {
    return "";
  }
  std::string frame;
  const uint64_t count = FrameBytes(bytes, at, ZSTD_compressBound(size));
  while (frame.size() < count) {
    frame += bytes->From(at + frame.size(), 1).substr(0, count - frame.size());
  }
  return frame;
}

// Where in `bytes` an entry may begin; npos where nowhere. By its second byte, which is
// rarer than the first.
size_t FindEntry(std::string_view bytes) {
  size_t at = bytes.find(kEntryBegins[1], 1);
  while (at != bytes.npos && bytes[at - 1] != kEntryBegins[0]) {
    at = bytes.find(kEntryBegins[1], at + 1);
  }
  return at == bytes.npos ? at : at - 1;
}

size_t FindEntryOrFrame(std::string_view bytes) {
  return std::min(FindEntry(bytes), bytes.find(kFrameBegins));
}

// Calls `visit` with each place at which something may begin, as `find` says of a stretch
// of bytes; it returns where to go on.
template <typename Find, typename Visit>
void Search(ByteWindow* bytes, const Find& find, const Visit& visit) {
  uint64_t at = 0;
  for (;;) {
    const std::string_view ahead =
        bytes->From(at, kMostHeadBytes).substr(0, kSearchedAtOnce);
    if (ahead.size() <= kInternalKeyBytes) return;  // no room for a record
    const size_t begin = find(ahead);
    if (begin == ahead.npos) {
      at += ahead.size() - (kFrameBegins.size() - 1);  // it may have begun
    } else {
      at = visit(at + begin);
    }
  }
}

}  // namespace

ByteWindow::ByteWindow(const ByteFile& file, size_t bytes)
    : file_(&file),
      size_(file.size()),
      buffer_(std::min<uint64_t>(bytes, file.size()), '\0') {}

std::string_view ByteWindow::From(uint64_t at, size_t least) {
  const bool held =
      at >= held_at_ && held_at_ + held_.size() >= std::min<uint64_t>(at + least, size_);
  if (!held) {
    ThrowIfStopped("while searching for records");
    const size_t count = std::min<uint64_t>(buffer_.size(), size_ - at);
    held_ = {};
    file_->Read(at, buffer_.data(), count);
    held_ = std::string_view(buffer_).substr(0, count);
    held_at_ = at;
  }
  return held_.substr(at - held_at_);
}

void FindRecords(
    ByteWindow* table, uint64_t model,
    const std::function<void(std::string_view key, const RecordPlace&)>& found) {
  // Entries of what is not compressed, and frames, in one walk over the file.
  Search(table, FindEntryOrFrame, [&](uint64_t at) {
    if (table->From(at, kEntryBegins.size()).starts_with(kEntryBegins)) {
      const uint64_t end = FollowEntries(
          table, at, model, [&](std::string_view key, uint64_t value, uint32_t bytes) {
            found(key, {value, bytes, 0, 0});
          });
      return std::max(end, at + 1);
    }
    const std::string frame = FrameAt(table, at);
    const std::string block = Unpack(frame);
    ByteWindow inside(block);
    Search(&inside, FindEntry, [&](uint64_t inner) {
      const uint64_t end = FollowEntries(
          &inside, inner, model,
          [&](std::string_view key, uint64_t value, uint32_t bytes) {
            found(key, {value, bytes, at, static_cast<uint32_t>(frame.size())});
          });
      return std::max(end, inner + 1);
    });
    return at + 1;
  });
}

std::string ReadRecord(const ByteFile& table, const RecordPlace& place) {
  if (place.frame_bytes == 0) return table.Read(place.at, place.bytes);
  const std::string block = Unpack(table.Read(place.frame, place.frame_bytes));
  if (place.at + place.bytes > block.size()) {
    throw DataError(ErrorText(table.path().string() + " is not as it was a moment ago",
                              "a block of it does not unpack any more",
                              "let nobody write to the store, start again"));
  }
  return block.substr(place.at, place.bytes);
}

}  // namespace routecast
