#include "storage/trace_format.h"

#include <algorithm>
#include <bit>
#include <cstring>

#include "common/errors.h"
#include "storage/byte_codec.h"
#include "storage/context_model.h"
#include "storage/record_seal.h"

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

}  // namespace

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
  SealRecord(key, &value, is_coded ? model->fingerprint() : 0);
  return value;
}

DecodedSpan DecodeSpan(std::string_view key, std::string_view value,
                       const std::string& where, const ContextModel* model) {
  const bool is_coded = value.size() > 1 && (static_cast<uint8_t>(value[1]) & kCodedIds);
  if (is_coded && model == nullptr) {
    ByteReader(value, where).Fail("its ids are coded, and the context model is missing");
  }
  ByteReader in(UnsealRecord(key, value, where, is_coded ? model->fingerprint() : 0),
                where);
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

}  // namespace routecast
