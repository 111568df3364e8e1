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

uint16_t LargestOf(const std::vector<uint16_t>& ids) {
  uint16_t largest = 0;
  for (const uint16_t id : ids) largest = std::max(largest, id);
  return largest;
}

bool AllBelow(const std::vector<uint16_t>& ids, int num_experts) {
  return ids.empty() || LargestOf(ids) < num_experts;
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
  RequireSize(AllBelow(span.expert_ids, num_experts), "an expert id");
  RequireSize(AllBelow(span.topk_ids, num_experts), "a top-k id");
}

void WriteTokens(const RoutingSpan& span, bool wide, ByteWriter* out) {
  if (wide) {
    out->Raw(span.token_ids.data(), span.token_ids.size() * 4);
    return;
  }
  const std::vector<uint16_t> narrow(span.token_ids.begin(), span.token_ids.end());
  out->Raw(narrow.data(), narrow.size() * 2);
}

void ReadTokens(ByteReader* in, bool wide, RoutingSpan* span) {
  if (wide) {
    std::memcpy(span->token_ids.data(), in->Raw(uint64_t{4} * span->num_tokens).data(),
                size_t{4} * span->num_tokens);
    return;
  }
  WidenTokens(in->Raw(uint64_t{2} * span->num_tokens), &span->token_ids);
}

void ReadIds(ByteReader* in, uint64_t count, uint64_t num_experts,
             std::vector<uint16_t>* ids) {
  const int bits = IdBits(num_experts);
  const std::string_view bytes = in->Raw(PackedBytes(count, bits));
  ids->resize(count);
  UnpackBits(bytes, bits, ids);
  if (num_experts == uint64_t{1} << bits) return;  // no bits mean another
  const uint16_t largest = LargestOf(*ids);
  if (count > 0 && largest >= num_experts) {
    in->Fail("expert id " + std::to_string(largest) + " of " +
             std::to_string(num_experts));
  }
}

Stack StackOf(std::string_view key) {
  const auto kind = static_cast<RecordKind>(static_cast<uint8_t>(key[0]));
  return kind == RecordKind::kEncoder ? Stack::kEncoder : Stack::kDecoder;
}

// A coded plane is a size and so many bytes.
std::string Sized(const std::string& coded) {
  std::string plane;
  ByteWriter out(&plane);
  out.Varint(coded.size());
  out.Raw(coded.data(), coded.size());
  return plane;
}

// The coded planes of a span; empty where a plane does not shrink, or cannot be coded.
struct CodedPlanes {
  std::string ids, topk;
};

CodedPlanes CodePlanes(std::string_view key, const RoutingSpan& span, int num_experts,
                       const ContextModel& model) {
  const Stack s = StackOf(key);
  RequireSize(model.num_layers(s) == span.num_layers, "the context model");
  const int bits = IdBits(num_experts);
  CodedPlanes planes;
  std::string coded;
  model.EncodeIds(s, span, &coded);
  planes.ids = Sized(coded);
  if (planes.ids.size() >= PackedBytes(span.expert_ids.size(), bits)) planes.ids.clear();
  coded.clear();
  if (span.top_k > 0 && model.topk() && model.topk()->EncodeIds(s, span, &coded)) {
    planes.topk = Sized(coded);
  }
  if (planes.topk.size() >= PackedBytes(span.topk_ids.size(), bits)) planes.topk.clear();
  return planes;
}

void RequireModelFits(const ByteReader& in, Stack s, const ContextModel& model,
                      int num_experts, const RoutingSpan& span) {
  if (num_experts == model.num_experts() && span.num_layers == model.num_layers(s))
    return;
  in.Fail(std::to_string(span.num_layers) + " layers of " + std::to_string(num_experts) +
          " experts, the context model has " + std::to_string(model.num_layers(s)) +
          " of " + std::to_string(model.num_experts()));
}

void ReadFloats(ByteReader* in, uint64_t count, std::vector<float>* values) {
  const std::string_view bytes = in->Raw(2 * count);
  values->resize(count);
  UnpackBf16Planes(bytes, values);
}

void ReadDropped(ByteReader* in, uint64_t count, bool any,
                 std::vector<uint8_t>* dropped) {
  dropped->resize(count);
  if (any) {
    UnpackFlags(in->Raw(PackedBytes(count, 1)), dropped);
  } else {
    std::fill(dropped->begin(), dropped->end(), uint8_t{0});
  }
}

// What a record of routing never has. Its own planes are resized, or emptied, where they
// are decoded: to empty them first would fill them with zeros again.
void DropOthers(RoutingSpan* span) {
  span->hidden_width = span->attention_heads = 0;
  span->hidden.clear();
  span->output.clear();
  span->attention_entropy.clear();
  span->attention_keys.clear();
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
  const CodedPlanes coded =
      model == nullptr ? CodedPlanes() : CodePlanes(key, span, num_experts, *model);
  const int flags = (wide ? kWideTokens : 0) | (span.gate_probs.empty() ? 0 : kProbs) |
                    (span.dropped.empty() ? 0 : kDroppedRecorded) |
                    (any_dropped ? kDroppedBits : 0) |
                    (span.margins.empty() ? 0 : kMargins) |
                    (span.num_tokens > 0 && span.token_ids.empty() ? kNoTokens : 0) |
                    (span.topk_ids.size() > span.topk_probs.size() ? kTopkIdsOnly : 0) |
                    (coded.ids.empty() ? 0 : kCodedIds);
  std::string value;
  value.reserve(64 + span.token_ids.size() * 4 +
                span.expert_ids.size() * (7 + 4 * span.top_k));
  ByteWriter out(&value);
  out.U8(coded.topk.empty() ? kRecordVersion : kCodedTopkVersion);
  out.U8(static_cast<uint8_t>(flags));
  out.U8(static_cast<uint8_t>(task));
  out.Varint(span.num_tokens);
  out.Varint(span.num_layers);
  out.Varint(num_experts);
  out.Varint(span.top_k);
  WriteTokens(span, wide, &out);
  if (coded.ids.empty()) {
    out.Packed(span.expert_ids, IdBits(num_experts));
  } else {
    out.Raw(coded.ids.data(), coded.ids.size());
  }
  out.Bf16Planes(span.gate_probs);
  if (any_dropped) out.Flags(span.dropped);
  out.Bf16Planes(span.margins);
  if (coded.topk.empty()) {
    out.Packed(span.topk_ids, IdBits(num_experts));
  } else {
    out.Raw(coded.topk.data(), coded.topk.size());
  }
  out.Bf16Planes(span.topk_probs);
  const bool is_coded = !coded.ids.empty() || !coded.topk.empty();
  SealRecord(key, &value, is_coded ? model->fingerprint() : 0);
  return value;
}

DecodedSpan DecodeSpan(std::string_view key, std::string_view value,
                       const std::string& where, const ContextModel* model) {
  DecodedSpan decoded;
  static_cast<SpanHeader&>(decoded) = DecodeSpan(key, value, where, model, &decoded.span);
  return decoded;
}

SpanHeader DecodeSpan(std::string_view key, std::string_view value,
                      const std::string& where, const ContextModel* model,
                      RoutingSpan* out) {
  const bool coded_ids = value.size() > 1 && (static_cast<uint8_t>(value[1]) & kCodedIds);
  const bool coded_topk =
      !value.empty() && static_cast<uint8_t>(value[0]) == kCodedTopkVersion;
  const bool is_coded = coded_ids || coded_topk;
  if (is_coded && model == nullptr) {
    ByteReader(value, where).Fail("its ids are coded, and the context model is missing");
  }
  ByteReader in(UnsealRecord(key, value, where, is_coded ? model->fingerprint() : 0,
                             kCodedTopkVersion),
                where);
  RoutingSpan& span = *out;
  DropOthers(out);
  SpanHeader header;
  const uint8_t flags = in.U8();
  const uint8_t task = in.U8();
  if (task > static_cast<uint8_t>(Task::kGenerate)) in.Fail("unknown task");
  header.task = static_cast<Task>(task);
  span.num_tokens = static_cast<int>(in.Varint("token count", kMaxTokens));
  span.num_layers = static_cast<int>(in.Varint("layer count", kMaxLayers));
  const uint64_t experts = in.Varint("expert count", kMaxExperts);
  if (experts == 0) in.Fail("expert count 0");
  header.num_experts = static_cast<int>(experts);
  span.top_k = static_cast<int>(in.Varint("top-k", kMaxTopK));
  const uint64_t n = static_cast<uint64_t>(span.num_tokens) * span.num_layers;
  const uint64_t k = n * span.top_k;
  // The exact size follows from the dims: checked before any plane takes memory.
  const uint64_t token_bytes = flags & kNoTokens ? 0 : flags & kWideTokens ? 4 : 2;
  const uint64_t tokens = token_bytes * static_cast<uint64_t>(span.num_tokens);
  const int bits = IdBits(experts);
  const uint64_t beside = (flags & kProbs ? 2 * n : 0) +
                          (flags & kDroppedBits ? PackedBytes(n, 1) : 0) +
                          (flags & kMargins ? 2 * n : 0);
  ByteReader ahead = in;
  ahead.Raw(tokens);
  const uint64_t ids = coded_ids ? ahead.Varint("coded ids", ahead.left()) : 0;
  if (coded_ids && n / kMaxIdsPerByte > ids) in.Fail("too few bytes of coded ids");
  ahead.Raw(coded_ids ? ids : PackedBytes(n, bits));
  ahead.Raw(beside);
  const uint64_t topk = coded_topk ? ahead.Varint("coded top-k ids", ahead.left()) : 0;
  if (coded_topk && topk < TopkModel::LeastBytes(span)) {
    in.Fail("too few bytes of coded top-k ids");
  }
  const uint64_t expected =
      (coded_topk ? topk : PackedBytes(k, bits)) + (flags & kTopkIdsOnly ? 0 : 2 * k);
  if (expected != ahead.left()) {
    in.Fail("the top-k planes need " + std::to_string(expected) + " bytes, record has " +
            std::to_string(ahead.left()));
  }
  const Stack s = StackOf(key);
  if (is_coded) RequireModelFits(in, s, *model, header.num_experts, span);
  span.token_ids.resize(flags & kNoTokens ? 0 : static_cast<size_t>(span.num_tokens));
  if (!(flags & kNoTokens)) ReadTokens(&in, flags & kWideTokens, &span);
  if (coded_ids) {
    in.Varint("coded ids", ids);
    if (!model->DecodeIds(s, in.Raw(ids), &span)) in.Fail("coded ids do not decode");
  } else {
    ReadIds(&in, n, experts, &span.expert_ids);
  }
  ReadFloats(&in, flags & kProbs ? n : 0, &span.gate_probs);
  ReadDropped(&in, flags & kDroppedRecorded ? n : 0, flags & kDroppedBits, &span.dropped);
  ReadFloats(&in, flags & kMargins ? n : 0, &span.margins);
  if (coded_topk) {
    in.Varint("coded top-k ids", topk);
    if (k == 0 || model->topk() == nullptr ||
        !model->topk()->DecodeIds(s, in.Raw(topk), &span)) {
      in.Fail("coded top-k ids do not decode");
    }
  } else {
    ReadIds(&in, k, experts, &span.topk_ids);
  }
  ReadFloats(&in, flags & kTopkIdsOnly ? 0 : k, &span.topk_probs);
  return header;
}

}  // namespace routecast
