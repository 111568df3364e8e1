// The bytes of a trace store's records. docs/trace_format.md says the same in prose.
//
// Keys: u8 kind | u64be id. Byte order is logical order: all encoder records by sequence
// id, then all decoder records, then the chunk marks (written last).
// Values: described at each function; varints are LEB128, fixed-width numbers
// little-endian, and the last 8 bytes are XXH3-64 over the key followed by the value
// before them.
// Thread rule: pure functions.
// Shape letters: T tokens, L MoE layers of one stack, E experts, K stored top-k, D model
// width.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "common/routing.h"

namespace routecast {

class ContextModel;

enum class RecordKind : uint8_t {
  kEncoder = 0x01,
  kDecoder = 0x02,
  kCoderMark = 0xFE,
  kChunkMark = 0xFF
};
inline RecordKind KindOf(Stack s) {
  return s == Stack::kEncoder ? RecordKind::kEncoder : RecordKind::kDecoder;
}

inline constexpr uint8_t kRecordVersion = 1;
inline constexpr uint8_t kCodedTopkVersion = 2;  // of routing with coded top-k ids
inline constexpr size_t kKeyBytes = 9;
inline constexpr size_t kChecksumBytes = 8;
// Limits of a record: what is beyond them is damage, whatever its checksum says.
inline constexpr uint64_t kMaxTokens = uint64_t{1} << 24;
inline constexpr uint64_t kMaxLayers = 4096;
inline constexpr uint64_t kMaxExperts = 65536;
inline constexpr uint64_t kMaxTopK = 64;
inline constexpr uint64_t kMaxWidth = 65536;

std::string EncodeKey(RecordKind kind, uint64_t id);
// False when `key` is not a key of this format.
bool DecodeKey(std::string_view key, RecordKind* kind, uint64_t* id);

// Routing of one (sequence, stack), without router inputs:
//   u8 version | u8 flags | u8 task | varint T | varint L | varint E | varint K
//   token ids   u16 or u32 [T] (flag), absent where they are not known (flag)
//   expert ids  bit-packed, ceil(log2 E) bits each, layer-major [L*T], padded to a byte;
//               or, with a context model, varint size and coded bytes (flag)
//   gate probs  bf16 high bytes [L*T], then low bytes (flag)
//   dropped     bits [L*T], absent when no token was dropped (flag)
//   margins     bf16 high bytes, then low bytes (flag)
//   top-k       ids bit-packed [L*T*K], or, in version 2, varint size and coded bytes;
//               probs bf16 high bytes, low bytes (K > 0; probs absent where they are not
//               known: flag)
//   u64 checksum
// REQUIRES the planes of `span` to have their sizes (std::logic_error otherwise: our
// defect) and ids < num_experts. Floats are rounded to bf16. With a model of this
// geometry expert ids, and top-k ids, are coded by it where that is smaller; the model's
// fingerprint then seals the record beside its key.
std::string EncodeSpan(std::string_view key, const RoutingSpan& span, Task task,
                       int num_experts, const ContextModel* model = nullptr);
struct SpanHeader {
  Task task = Task::kDenoise;
  int num_experts = 0;
};
// Throws DataError naming `where` on any damage; sizes are checked before memory is
// taken. What `span` held is gone, but for its memory, which is used again; after an
// exception what is in it is not said.
SpanHeader DecodeSpan(std::string_view key, std::string_view value,
                      const std::string& where, const ContextModel* model,
                      RoutingSpan* span);
struct DecodedSpan : SpanHeader {
  RoutingSpan span;
};
DecodedSpan DecodeSpan(std::string_view key, std::string_view value,
                       const std::string& where, const ContextModel* model = nullptr);

// Router inputs of one (sequence, stack): u8 version | varint T | varint L | varint D |
// bf16 [L*T*D] | bf16 [T*D], the stack's output, or nothing | u64 checksum.
// Decode fills span.hidden, span.hidden_width and span.output and demands that T and L
// agree with `span`.
std::string EncodeHidden(std::string_view key, const RoutingSpan& span);
void DecodeHidden(std::string_view key, std::string_view value, const std::string& where,
                  RoutingSpan* span);

// Attention summaries of one (sequence, stack), A heads: u8 version | varint T | varint L
// | varint A | bf16 high bytes [L*T*A], then low bytes: entropies | u16 [L*T*A*4]: keys |
// u64 checksum. Decode fills the attention's fields and demands that T and L agree with
// `span` and that AttentionFits.
std::string EncodeAttention(std::string_view key, const RoutingSpan& span);
void DecodeAttention(std::string_view key, std::string_view value,
                     const std::string& where, RoutingSpan* span);
// Whether each key is kNoKey or a position of the sequence. Keys of cross-attention, the
// second half of the decoder's heads, are the encoder's, whose length a span does not
// know.
bool AttentionFits(const RoutingSpan& span, Stack stack);

// What a store knows of a sequence without reading its records.
struct SequenceInfo {
  uint64_t sequence_id = 0;
  uint64_t document_id = 0;
  uint64_t group_id = 0;
  uint32_t encoder_tokens = 0;
  uint32_t decoder_tokens = 0;  // 0 = that stack was not run
  bool has_hidden = false;
  // Was to be collected and has no records: no numbers came out of the model.
  bool left_out() const { return encoder_tokens == 0 && decoder_tokens == 0; }
  bool operator==(const SequenceInfo&) const = default;
};
// A chunk's completion mark and index, in the same file as its records:
//   u8 version | varint chunk | varint count | count entries of (varint id - previous id,
//   varint document, u64 group, varint encoder tokens, varint decoder tokens * 2 +
//   hidden) | u64 checksum. Ids ascend strictly.
struct ChunkMark {
  uint32_t chunk = 0;
  std::vector<SequenceInfo> sequences;
};
std::string EncodeMark(std::string_view key, const ChunkMark& mark);
ChunkMark DecodeMark(std::string_view key, std::string_view value,
                     const std::string& where);

// Says that a shard's records were coded again with the store's context model, in the
// same file: u8 version | u64 fingerprint of the model | varint records | u64 checksum.
struct CoderMark {
  uint64_t fingerprint = 0;
  uint64_t records = 0;
};
std::string EncodeCoderMark(std::string_view key, const CoderMark& mark);
CoderMark DecodeCoderMark(std::string_view key, std::string_view value,
                          const std::string& where);

}  // namespace routecast
