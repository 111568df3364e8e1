// Marks: what a chunk holds, and what a shard was coded with.
#include "storage/byte_codec.h"
#include "storage/record_seal.h"
#include "storage/trace_format.h"

namespace routecast {

std::string EncodeMark(std::string_view key, const ChunkMark& mark) {
  std::string value;
  ByteWriter out(&value);
  out.U8(kRecordVersion);
  out.Varint(mark.chunk);
  out.Varint(mark.sequences.size());
  uint64_t previous = 0;
  for (const SequenceInfo& s : mark.sequences) {
    RequireSize(previous <= s.sequence_id, "mark: ids must ascend");
    out.Varint(s.sequence_id - previous);
    out.Varint(s.document_id);
    out.U64(s.group_id);
    out.Varint(s.encoder_tokens);
    out.Varint(uint64_t{s.decoder_tokens} * 2 + (s.has_hidden ? 1 : 0));
    previous = s.sequence_id;
  }
  SealRecord(key, &value);
  return value;
}

ChunkMark DecodeMark(std::string_view key, std::string_view value,
                     const std::string& where) {
  constexpr uint64_t kAny = ~uint64_t{0};
  ByteReader in(UnsealRecord(key, value, where), where);
  ChunkMark mark;
  mark.chunk = static_cast<uint32_t>(in.Varint("chunk", 0xFFFFFFFFu));
  // An entry has at least 12 bytes, so the count is bounded by what is there.
  const uint64_t count = in.Varint("sequence count", in.left() / 12);
  mark.sequences.reserve(count);
  uint64_t previous = 0;
  for (uint64_t i = 0; i < count; ++i) {
    SequenceInfo s;
    const uint64_t step = in.Varint("sequence id", kAny);
    if ((i > 0 && step == 0) || previous + step < previous) in.Fail("ids do not ascend");
    s.sequence_id = previous + step;
    s.document_id = in.Varint("document id", kAny);
    s.group_id = in.U64();
    s.encoder_tokens = static_cast<uint32_t>(in.Varint("token count", kMaxTokens));
    const uint64_t decoder = in.Varint("token count", 2 * kMaxTokens + 1);
    s.decoder_tokens = static_cast<uint32_t>(decoder / 2);
    s.has_hidden = decoder & 1;
    previous = s.sequence_id;
    mark.sequences.push_back(s);
  }
  if (in.left() != 0) in.Fail(std::to_string(in.left()) + " bytes too many");
  return mark;
}

std::string EncodeCoderMark(std::string_view key, const CoderMark& mark) {
  std::string value;
  ByteWriter out(&value);
  out.U8(kRecordVersion);
  out.U64(mark.fingerprint);
  out.Varint(mark.records);
  SealRecord(key, &value);
  return value;
}

CoderMark DecodeCoderMark(std::string_view key, std::string_view value,
                          const std::string& where) {
  ByteReader in(UnsealRecord(key, value, where), where);
  CoderMark mark;
  mark.fingerprint = in.U64();
  mark.records = in.Varint("record count", ~uint64_t{0});
  if (in.left() != 0) in.Fail(std::to_string(in.left()) + " bytes too many");
  return mark;
}

}  // namespace routecast
