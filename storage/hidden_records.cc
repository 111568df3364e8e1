// Records beside the routing: router inputs and attention summaries.
#include <cstring>

#include "storage/byte_codec.h"
#include "storage/record_seal.h"
#include "storage/store_config.h"
#include "storage/trace_format.h"

namespace routecast {
namespace {

Stack StackOf(std::string_view key) {
  const auto kind = static_cast<RecordKind>(static_cast<uint8_t>(key[0]));
  return kind == RecordKind::kEncoder ? Stack::kEncoder : Stack::kDecoder;
}

// The record's dims must be those of the routing it lies beside.
void ReadDims(ByteReader* in, const char* what, const RoutingSpan& span) {
  const uint64_t tokens = in->Varint("token count", kMaxTokens);
  const uint64_t layers = in->Varint("layer count", kMaxLayers);
  if (tokens == static_cast<uint64_t>(span.num_tokens) &&
      layers == static_cast<uint64_t>(span.num_layers)) {
    return;
  }
  in->Fail(std::string(what) + " of " + std::to_string(tokens) + " tokens x " +
           std::to_string(layers) + " layers, routing has " +
           std::to_string(span.num_tokens) + " x " + std::to_string(span.num_layers));
}

}  // namespace

std::string EncodeHidden(std::string_view key, const RoutingSpan& span) {
  const size_t n =
      static_cast<size_t>(span.num_tokens) * span.num_layers * span.hidden_width;
  RequireSize(span.hidden.size() == n, "hidden");
  const size_t state = static_cast<size_t>(span.num_tokens) * span.hidden_width;
  RequireSize(span.output.empty() || span.output.size() == state, "output");
  std::string value;
  value.reserve((n + span.output.size()) * 2 + 32);
  ByteWriter out(&value);
  out.U8(kRecordVersion);
  out.Varint(span.num_tokens);
  out.Varint(span.num_layers);
  out.Varint(span.hidden_width);
  out.Raw(span.hidden.data(), n * 2);
  out.Raw(span.output.data(), span.output.size() * 2);
  SealRecord(key, &value);
  return value;
}

void DecodeHidden(std::string_view key, std::string_view value, const std::string& where,
                  RoutingSpan* span) {
  ByteReader in(UnsealRecord(key, value, where), where);
  ReadDims(&in, "router inputs", *span);
  const uint64_t width = in.Varint("router input width", kMaxWidth);
  const uint64_t state = static_cast<uint64_t>(span->num_tokens) * width;
  const uint64_t n = state * static_cast<uint64_t>(span->num_layers);
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

std::string EncodeAttention(std::string_view key, const RoutingSpan& span) {
  const size_t rows =
      static_cast<size_t>(span.num_tokens) * span.num_layers * span.attention_heads;
  RequireSize(span.attention_entropy.size() == rows, "attention_entropy");
  RequireSize(span.attention_keys.size() == rows * kStrongestKeys, "attention_keys");
  std::string value;
  value.reserve(rows * kAttentionBytesPerHead + 32);
  ByteWriter out(&value);
  out.U8(kRecordVersion);
  out.Varint(span.num_tokens);
  out.Varint(span.num_layers);
  out.Varint(span.attention_heads);
  out.Bf16Planes(span.attention_entropy);
  out.Raw(span.attention_keys.data(), span.attention_keys.size() * 2);
  SealRecord(key, &value);
  return value;
}

void DecodeAttention(std::string_view key, std::string_view value,
                     const std::string& where, RoutingSpan* span) {
  ByteReader in(UnsealRecord(key, value, where), where);
  ReadDims(&in, "attention", *span);
  const uint64_t heads = in.Varint("attention heads", 2 * kMaxAttentionHeads);
  if (heads == 0 || (StackOf(key) == Stack::kDecoder && heads % 2 != 0)) {
    in.Fail(std::to_string(heads) + " attention heads");
  }
  const uint64_t rows = static_cast<uint64_t>(span->num_tokens) *
                        static_cast<uint64_t>(span->num_layers) * heads;
  if (rows * kAttentionBytesPerHead != in.left()) {
    in.Fail("needs " + std::to_string(rows * kAttentionBytesPerHead) + " bytes, has " +
            std::to_string(in.left()));
  }
  span->attention_heads = static_cast<int>(heads);
  span->attention_entropy.resize(rows);
  UnpackBf16Planes(in.Raw(2 * rows), &span->attention_entropy);
  span->attention_keys.resize(rows * kStrongestKeys);
  const std::string_view keys = in.Raw(rows * kStrongestKeys * 2);
  if (rows > 0) std::memcpy(span->attention_keys.data(), keys.data(), keys.size());
  if (!AttentionFits(*span, StackOf(key))) {
    in.Fail("an attended position beyond the sequence");
  }
}

}  // namespace routecast
