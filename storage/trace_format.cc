#include "storage/trace_format.h"

#include <algorithm>
#include <bit>
#include <cstring>
#include <stdexcept>

#include "common/errors.h"
#include "storage/byte_codec.h"
#include "storage/context_model.h"
#include "storage/store_config.h"
#include "xxhash.h"

namespace routecast {
namespace {

enum Flag : uint8_t {
  kWideTokens = 1,
  kProbs = 2,
  kDroppedRecorded = 4,
  kDroppedBits = 8,
  kMargins = 16,
  kNoTokens = 32,
  kTopkIdsOnly = 64,
  kCodedIds = 128,
};

int IdBits(uint64_t num_experts) {
  return std::max(1, static_cast<int>(std::bit_width(num_experts - 1)));
}

// `model`: fingerprint of the context model that the value needs; 0 = none.
uint64_t Checksum(std::string_view key, std::string_view value, uint64_t model) {
  return XXH3_64bits_withSeed(value.data(), value.size(),
                              XXH3_64bits(key.data(), key.size()) + model);
}

void Seal(std::string_view key, std::string* value, uint64_t model = 0) {
  const uint64_t sum = Checksum(key, *value, model);
  ByteWriter(value).U64(sum);
}

// The value without version and checksum; throws where the checksum does not hold.
// `attended`: version 2 is taken as well, and said.
std::string_view Unseal(std::string_view key, std::string_view value,
                        const std::string& where, uint64_t model = 0,
                        bool* attended = nullptr) {
  if (value.size() <= kChecksumBytes)
    ByteReader(value, where).Fail("shorter than a checksum");
  const std::string_view body = value.substr(0, value.size() - kChecksumBytes);
  uint64_t sum;
  std::memcpy(&sum, value.data() + body.size(), sizeof sum);
  if (sum != Checksum(key, body, model)) {
    ByteReader(value, where)
        .Fail("checksum " + std::to_string(sum) + ", bytes give " +
              std::to_string(Checksum(key, body, model)));
  }
  const auto version = static_cast<uint8_t>(body[0]);
  if (attended != nullptr) *attended = version == kAttendedVersion;
  if (version != kRecordVersion && (attended == nullptr || !*attended)) {
    ByteReader(value, where)
        .Fail("record version " + std::to_string(version) + ", this program reads " +
              std::to_string(kRecordVersion));
  }
  return body.substr(1);
}

void RequireSize(bool fits, const char* plane) {
  if (!fits) throw std::logic_error(std::string("RoutingSpan: wrong size of ") + plane);
}

void CheckSpan(const RoutingSpan& span, int num_experts) {
  const size_t n = static_cast<size_t>(span.num_tokens) * span.num_layers;
  const size_t k = n * span.top_k;
  RequireSize(span.token_ids.empty() ||
                  span.token_ids.size() == static_cast<size_t>(span.num_tokens),
              "token_ids");
  RequireSize(span.expert_ids.size() == n, "expert_ids");
  RequireSize(span.gate_probs.empty() || span.gate_probs.size() == n, "gate_probs");
  RequireSize(span.dropped.empty() || span.dropped.size() == n, "dropped");
  RequireSize(span.margins.empty() || span.margins.size() == n, "margins");
  RequireSize(span.topk_ids.size() == k, "topk_ids");
  RequireSize(span.topk_probs.empty() || span.topk_probs.size() == k, "topk_probs");
  RequireSize(num_experts >= 1 && static_cast<uint64_t>(num_experts) <= kMaxExperts, "E");
  for (const uint16_t id : span.expert_ids) RequireSize(id < num_experts, "an expert id");
  for (const uint16_t id : span.topk_ids) RequireSize(id < num_experts, "a top-k id");
}

void WriteTokens(const RoutingSpan& span, bool wide, ByteWriter* out) {
  if (wide) {
    out->Raw(span.token_ids.data(), span.token_ids.size() * 4);
    return;
  }
  const std::vector<uint16_t> narrow(span.token_ids.begin(), span.token_ids.end());
  out->Raw(narrow.data(), narrow.size() * 2);
}

void WriteBits(const std::vector<uint8_t>& flags, ByteWriter* out) {
  out->Packed(std::vector<uint16_t>(flags.begin(), flags.end()), 1);
}

void ReadTokens(ByteReader* in, bool wide, RoutingSpan* span) {
  span->token_ids.resize(span->num_tokens);
  if (wide) {
    std::memcpy(span->token_ids.data(), in->Raw(uint64_t{4} * span->num_tokens).data(),
                size_t{4} * span->num_tokens);
    return;
  }
  const char* from = in->Raw(uint64_t{2} * span->num_tokens).data();
  for (int t = 0; t < span->num_tokens; ++t) {
    uint16_t id;
    std::memcpy(&id, from + 2 * t, 2);
    span->token_ids[t] = id;
  }
}

void ReadIds(ByteReader* in, uint64_t count, uint64_t num_experts,
             std::vector<uint16_t>* ids) {
  const int bits = IdBits(num_experts);
  const std::string_view bytes = in->Raw(PackedBytes(count, bits));
  ids->resize(count);
  UnpackBits(bytes, bits, ids);
  uint16_t largest = 0;
  for (const uint16_t id : *ids) largest = std::max(largest, id);
  if (count > 0 && largest >= num_experts) {
    in->Fail("expert id " + std::to_string(largest) + " of " +
             std::to_string(num_experts));
  }
}

// The coded plane is a size and so many bytes.
std::string CodeIds(std::string_view key, const RoutingSpan& span,
                    const ContextModel& model) {
  std::string coded, plane;
  const auto kind = static_cast<RecordKind>(static_cast<uint8_t>(key[0]));
  const Stack s = kind == RecordKind::kEncoder ? Stack::kEncoder : Stack::kDecoder;
  RequireSize(model.num_layers(s) == span.num_layers, "the context model");
  model.EncodeIds(s, span, &coded);
  ByteWriter out(&plane);
  out.Varint(coded.size());
  out.Raw(coded.data(), coded.size());
  return plane;
}

void ReadCodedIds(ByteReader* in, std::string_view key, uint64_t size,
                  const ContextModel& model, int num_experts, RoutingSpan* span) {
  const auto kind = static_cast<RecordKind>(static_cast<uint8_t>(key[0]));
  const Stack s = kind == RecordKind::kEncoder ? Stack::kEncoder : Stack::kDecoder;
  if (num_experts != model.num_experts() || span->num_layers != model.num_layers(s)) {
    in->Fail(std::to_string(span->num_layers) + " layers of " +
             std::to_string(num_experts) + " experts, the context model has " +
             std::to_string(model.num_layers(s)) + " of " +
             std::to_string(model.num_experts()));
  }
  if (!model.DecodeIds(s, in->Raw(size), span)) in->Fail("coded ids do not decode");
}

void ReadFloats(ByteReader* in, uint64_t count, std::vector<float>* values) {
  const std::string_view bytes = in->Raw(2 * count);
  values->resize(count);
  UnpackBf16Planes(bytes, values);
}

void ReadDropped(ByteReader* in, uint64_t count, bool any,
                 std::vector<uint8_t>* dropped) {
  dropped->assign(count, 0);
  if (!any) return;
  std::vector<uint16_t> bits(count);
  UnpackBits(in->Raw(PackedBytes(count, 1)), 1, &bits);
  std::copy(bits.begin(), bits.end(), dropped->begin());
}

// Of as many tokens and layers as `span` has.
void ReadAttention(ByteReader* in, std::string_view key, RoutingSpan* span) {
  const uint64_t heads = in->Varint("attention heads", 2 * kMaxAttentionHeads);
  const auto kind = static_cast<RecordKind>(static_cast<uint8_t>(key[0]));
  const Stack stack = kind == RecordKind::kEncoder ? Stack::kEncoder : Stack::kDecoder;
  if (heads == 0 || (stack == Stack::kDecoder && heads % 2 != 0)) {
    in->Fail(std::to_string(heads) + " attention heads");
  }
  const uint64_t rows = static_cast<uint64_t>(span->num_tokens) *
                        static_cast<uint64_t>(span->num_layers) * heads;
  span->attention_heads = static_cast<int>(heads);
  ReadFloats(in, rows, &span->attention_entropy);
  const std::string_view bytes = in->Raw(rows * kStrongestKeys * 2);
  span->attention_keys.resize(rows * kStrongestKeys);
  if (rows > 0) std::memcpy(span->attention_keys.data(), bytes.data(), bytes.size());
  if (!AttentionFits(*span, stack)) in->Fail("an attended position beyond the sequence");
}

}  // namespace

bool ChecksumHolds(std::string_view key, std::string_view value, uint64_t model) {
  if (value.size() <= kChecksumBytes) return false;
  const std::string_view body = value.substr(0, value.size() - kChecksumBytes);
  uint64_t sum = 0;
  std::memcpy(&sum, value.data() + body.size(), sizeof sum);
  return sum == Checksum(key, body, model);
}

std::string EncodeKey(RecordKind kind, uint64_t id) {
  std::string key(kKeyBytes, '\0');
  key[0] = static_cast<char>(kind);
  const uint64_t big = __builtin_bswap64(id);
  std::memcpy(key.data() + 1, &big, 8);
  return key;
}

bool DecodeKey(std::string_view key, RecordKind* kind, uint64_t* id) {
  if (key.size() != kKeyBytes) return false;
  const auto k = static_cast<RecordKind>(static_cast<uint8_t>(key[0]));
  if (k != RecordKind::kEncoder && k != RecordKind::kDecoder &&
      k != RecordKind::kCoderMark && k != RecordKind::kChunkMark) {
    return false;
  }
  uint64_t big;
  std::memcpy(&big, key.data() + 1, 8);
  *kind = k;
  *id = __builtin_bswap64(big);
  return true;
}

std::string EncodeSpan(std::string_view key, const RoutingSpan& span, Task task,
                       int num_experts, const ContextModel* model) {
  CheckSpan(span, num_experts);
  const bool wide = std::any_of(span.token_ids.begin(), span.token_ids.end(),
                                [](uint32_t id) { return id > 0xFFFF; });
  const bool any_dropped = std::any_of(span.dropped.begin(), span.dropped.end(),
                                       [](uint8_t d) { return d != 0; });
  const std::string coded = model == nullptr ? "" : CodeIds(key, span, *model);
  const bool is_coded =
      model != nullptr &&
      coded.size() < PackedBytes(span.expert_ids.size(), IdBits(num_experts));
  const int flags = (wide ? kWideTokens : 0) | (span.gate_probs.empty() ? 0 : kProbs) |
                    (span.dropped.empty() ? 0 : kDroppedRecorded) |
                    (any_dropped ? kDroppedBits : 0) |
                    (span.margins.empty() ? 0 : kMargins) |
                    (span.num_tokens > 0 && span.token_ids.empty() ? kNoTokens : 0) |
                    (span.topk_ids.size() > span.topk_probs.size() ? kTopkIdsOnly : 0) |
                    (is_coded ? kCodedIds : 0);
  std::string value;
  value.reserve(64 + span.token_ids.size() * 4 +
                span.expert_ids.size() * (7 + 4 * span.top_k));
  ByteWriter out(&value);
  out.U8(kRecordVersion);
  out.U8(static_cast<uint8_t>(flags));
  out.U8(static_cast<uint8_t>(task));
  out.Varint(span.num_tokens);
  out.Varint(span.num_layers);
  out.Varint(num_experts);
  out.Varint(span.top_k);
  WriteTokens(span, wide, &out);
  if (is_coded) {
    out.Raw(coded.data(), coded.size());
  } else {
    out.Packed(span.expert_ids, IdBits(num_experts));
  }
  out.Bf16Planes(span.gate_probs);
  if (any_dropped) WriteBits(span.dropped, &out);
  out.Bf16Planes(span.margins);
  if (span.top_k > 0) {
    out.Packed(span.topk_ids, IdBits(num_experts));
    out.Bf16Planes(span.topk_probs);
  }
  Seal(key, &value, is_coded ? model->fingerprint() : 0);
  return value;
}

DecodedSpan DecodeSpan(std::string_view key, std::string_view value,
                       const std::string& where, const ContextModel* model) {
  const bool is_coded = value.size() > 1 && (static_cast<uint8_t>(value[1]) & kCodedIds);
  if (is_coded && model == nullptr) {
    ByteReader(value, where).Fail("its ids are coded, and the context model is missing");
  }
  ByteReader in(Unseal(key, value, where, is_coded ? model->fingerprint() : 0), where);
  DecodedSpan decoded;
  RoutingSpan& span = decoded.span;
  const uint8_t flags = in.U8();
  const uint8_t task = in.U8();
  if (task > static_cast<uint8_t>(Task::kGenerate)) in.Fail("unknown task");
  decoded.task = static_cast<Task>(task);
  span.num_tokens = static_cast<int>(in.Varint("token count", kMaxTokens));
  span.num_layers = static_cast<int>(in.Varint("layer count", kMaxLayers));
  const uint64_t experts = in.Varint("expert count", kMaxExperts);
  if (experts == 0) in.Fail("expert count 0");
  decoded.num_experts = static_cast<int>(experts);
  span.top_k = static_cast<int>(in.Varint("top-k", kMaxTopK));
  const uint64_t n = static_cast<uint64_t>(span.num_tokens) * span.num_layers;
  const uint64_t k = n * span.top_k;
  // The exact size follows from the dims: checked before any plane takes memory.
  const uint64_t token_bytes = flags & kNoTokens ? 0 : flags & kWideTokens ? 4 : 2;
  const uint64_t tokens = token_bytes * static_cast<uint64_t>(span.num_tokens);
  // Coded ids say their size behind the token ids.
  if (is_coded && tokens > in.left()) in.Fail("ends in its token ids");
  ByteReader behind = in;
  if (is_coded) behind.Raw(tokens);
  const uint64_t coded = is_coded ? behind.Varint("coded ids", behind.left()) : 0;
  if (is_coded && n / kMaxIdsPerByte > coded) in.Fail("too few bytes of coded ids");
  const uint64_t id_bytes = is_coded ? in.left() - tokens - behind.left() + coded
                                     : PackedBytes(n, IdBits(experts));
  const uint64_t expected =
      tokens + id_bytes + (flags & kProbs ? 2 * n : 0) +
      (flags & kDroppedBits ? PackedBytes(n, 1) : 0) + (flags & kMargins ? 2 * n : 0) +
      (k > 0 ? PackedBytes(k, IdBits(experts)) : 0) + (flags & kTopkIdsOnly ? 0 : 2 * k);
  if (expected != in.left()) {
    in.Fail("planes need " + std::to_string(expected) + " bytes, record has " +
            std::to_string(in.left()));
  }
  if (!(flags & kNoTokens)) ReadTokens(&in, flags & kWideTokens, &span);
  if (is_coded) {
    in.Varint("coded ids", coded);
    ReadCodedIds(&in, key, coded, *model, decoded.num_experts, &span);
  } else {
    ReadIds(&in, n, experts, &span.expert_ids);
  }
  if (flags & kProbs) ReadFloats(&in, n, &span.gate_probs);
  if (flags & kDroppedRecorded) ReadDropped(&in, n, flags & kDroppedBits, &span.dropped);
  if (flags & kMargins) ReadFloats(&in, n, &span.margins);
  if (k > 0) {
    ReadIds(&in, k, experts, &span.topk_ids);
    if (!(flags & kTopkIdsOnly)) ReadFloats(&in, k, &span.topk_probs);
  }
  return decoded;
}

bool AttentionFits(const RoutingSpan& span, Stack stack) {
  const auto heads = static_cast<size_t>(span.attention_heads);
  const size_t own = stack == Stack::kDecoder ? heads / 2 : heads;
  for (size_t i = 0; i < span.attention_keys.size(); ++i) {
    const uint16_t at = span.attention_keys[i];
    if (i / kStrongestKeys % heads < own && at != kNoKey && at >= span.num_tokens) {
      return false;
    }
  }
  return true;
}

std::string EncodeHidden(std::string_view key, const RoutingSpan& span) {
  const size_t n =
      static_cast<size_t>(span.num_tokens) * span.num_layers * span.hidden_width;
  RequireSize(span.hidden.size() == n, "hidden");
  const size_t state = static_cast<size_t>(span.num_tokens) * span.hidden_width;
  RequireSize(span.output.empty() || span.output.size() == state, "output");
  const size_t heads =
      static_cast<size_t>(span.num_tokens) * span.num_layers * span.attention_heads;
  RequireSize(span.attention_entropy.size() == heads, "attention_entropy");
  RequireSize(span.attention_keys.size() == heads * kStrongestKeys, "attention_keys");
  std::string value;
  value.reserve((n + span.output.size() + heads * (1 + kStrongestKeys)) * 2 + 32);
  ByteWriter out(&value);
  out.U8(span.attention_heads > 0 ? kAttendedVersion : kRecordVersion);
  out.Varint(span.num_tokens);
  out.Varint(span.num_layers);
  out.Varint(span.hidden_width);
  if (span.attention_heads > 0) {
    out.Varint(span.attention_heads);
    out.Bf16Planes(span.attention_entropy);
    out.Raw(span.attention_keys.data(), span.attention_keys.size() * 2);
  }
  out.Raw(span.hidden.data(), n * 2);
  out.Raw(span.output.data(), span.output.size() * 2);
  Seal(key, &value);
  return value;
}

void DecodeHidden(std::string_view key, std::string_view value, const std::string& where,
                  RoutingSpan* span) {
  bool attended = false;
  ByteReader in(Unseal(key, value, where, 0, &attended), where);
  const uint64_t tokens = in.Varint("token count", kMaxTokens);
  const uint64_t layers = in.Varint("layer count", kMaxLayers);
  const uint64_t width = in.Varint("router input width", kMaxWidth);
  if (tokens != static_cast<uint64_t>(span->num_tokens) ||
      layers != static_cast<uint64_t>(span->num_layers)) {
    in.Fail("router inputs of " + std::to_string(tokens) + " tokens x " +
            std::to_string(layers) + " layers, routing has " +
            std::to_string(span->num_tokens) + " x " + std::to_string(span->num_layers));
  }
  if (attended) ReadAttention(&in, key, span);
  const uint64_t n = tokens * layers * width;
  const uint64_t state = tokens * width;  // the output's, where it is recorded
  if (2 * n != in.left() && 2 * (n + state) != in.left()) {
    in.Fail("needs " + std::to_string(2 * n) + " bytes, or " +
            std::to_string(2 * (n + state)) + " with the output, has " +
            std::to_string(in.left()));
  }
  const bool has_output = 2 * n != in.left();
  span->hidden_width = static_cast<int>(width);
  span->hidden.resize(n);
  if (n > 0) std::memcpy(span->hidden.data(), in.Raw(2 * n).data(), 2 * n);
  span->output.resize(has_output ? state : 0);
  if (has_output) std::memcpy(span->output.data(), in.Raw(2 * state).data(), 2 * state);
}

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
  Seal(key, &value);
  return value;
}

ChunkMark DecodeMark(std::string_view key, std::string_view value,
                     const std::string& where) {
  constexpr uint64_t kAny = ~uint64_t{0};
  ByteReader in(Unseal(key, value, where), where);
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
  Seal(key, &value);
  return value;
}

CoderMark DecodeCoderMark(std::string_view key, std::string_view value,
                          const std::string& where) {
  ByteReader in(Unseal(key, value, where), where);
  CoderMark mark;
  mark.fingerprint = in.U64();
  mark.records = in.Varint("record count", ~uint64_t{0});
  if (in.left() != 0) in.Fail(std::to_string(in.left()) + " bytes too many");
  return mark;
}

}  // namespace routecast
