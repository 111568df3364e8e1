#include "storage/topk_model.h"

#include <algorithm>

#include "storage/byte_codec.h"
#include "storage/expert_frequencies.h"
#include "storage/range_coder.h"

namespace routecast {
namespace {

constexpr size_t kAhead = 4;  // tokens

// A number of LEB128; false past the end or above 32 bits.
bool TakeNumber(std::string_view* bytes, uint64_t* number) {
  *number = 0;
  for (int shift = 0; shift < 35 && !bytes->empty(); shift += 7) {
    const auto byte = static_cast<uint8_t>(bytes->front());
    bytes->remove_prefix(1);
    *number |= uint64_t{byte & 0x7Fu} << shift;
    if (byte < 0x80) return true;
  }
  return false;
}

}  // namespace

ContextPair TopkContextOf(const RoutingSpan& span, int l, int t) {
  ContextPair c{kNoContext, kNoContext};
  if (!span.token_ids.empty()) {
    c.inner = span.token_ids[static_cast<size_t>(t)];
    if (t > 0) c.outer = span.token_ids[static_cast<size_t>(t) - 1];
    return c;
  }
  const uint16_t* ids = span.expert_ids.data() + static_cast<size_t>(l) * span.num_tokens;
  if (l > 0) c.inner = ids[t - span.num_tokens];
  if (t > 0) c.outer = ids[t - 1];
  return c;
}

TopkModel::TopkModel(int num_experts, StackTables encoder, StackTables decoder,
                     const std::string& where)
    : num_experts_(num_experts), tables_{std::move(encoder), std::move(decoder)} {
  for (size_t s = 0; s < 2; ++s) Build(tables_[s], where, &coded_[s]);
}

void TopkModel::Build(const StackTables& tables, const std::string& where,
                      Coded* coded) const {
  const auto experts = static_cast<size_t>(num_experts_);
  const size_t layers = tables.marginal.size(), padded = Padded(experts);
  RequireModelSize(layers * experts * padded <= kMaxBaseCells, where, "top-k weights");
  for (size_t l = 0; l < layers; ++l) {
    std::vector<uint16_t>& to = coded->base.emplace_back(experts * padded, uint16_t{0});
    for (size_t first = 0; first < experts; ++first) {
      const std::vector<uint32_t> weights =
          BaseWeights(tables.marginal[l], tables.previous[l][first]);
      std::copy(weights.begin(), weights.end(),
                to.begin() + static_cast<std::ptrdiff_t>(first * padded));
    }
  }
  coded->index = ContextIndex(tables);
  coded->rows = FactorRows(tables, 8, where, "rows of top-k");
}

// visit(position, urn) for each token of each layer, with the urn of its weights before
// the first expert is taken out; false ends it.
template <typename Visit>
void TopkModel::ForEachToken(Stack s, const RoutingSpan& span, const Visit& visit) const {
  const Coded& c = coded_[static_cast<size_t>(s)];
  const size_t layers = c.base.size(), padded = Padded(static_cast<size_t>(num_experts_));
  const auto num_tokens = static_cast<size_t>(span.num_tokens);
  std::vector<uint32_t> places(num_tokens);
  ExpertFrequencies urn;
  for (size_t l = 0; l < layers; ++l) {
    // Found ahead, so that rows are on their way from memory before they are needed.
    for (size_t t = 0; t < num_tokens && (l == 0 || span.token_ids.empty()); ++t) {
      const ContextPair pair =
          TopkContextOf(span, static_cast<int>(l), static_cast<int>(t));
      places[t] = c.index.Find(pair.outer, pair.inner);
    }
    for (size_t t = 0; t < num_tokens; ++t) {
      if (t + 2 * kAhead < num_tokens) {
        c.rows.PrefetchHead(c.rows.Index(places[t + 2 * kAhead], l));
      }
      if (t + kAhead < num_tokens) c.rows.Prefetch(c.rows.Index(places[t + kAhead], l));
      const size_t position = l * num_tokens + t;
      const uint16_t first = FirstOf(span, position);
      urn.FillAll(c.base[l].data() + first * padded, padded,
                  c.rows.Get(c.rows.Index(places[t], l)));
      urn.Remove(first);
      if (!visit(position, &urn)) return;
    }
  }
}

uint64_t TopkModel::LeastBytes(const RoutingSpan& span) {
  const uint64_t n = static_cast<uint64_t>(span.num_tokens) * span.num_layers;
  const auto behind = static_cast<uint64_t>(std::max(0, span.top_k - 1));
  return 1 + (n * behind + kMaxIdsPerByte - 1) / kMaxIdsPerByte;
}

bool TopkModel::EncodeIds(Stack s, const RoutingSpan& span, std::string* out) const {
  const size_t begin = out->size(), n = span.expert_ids.size();
  const auto k = static_cast<size_t>(span.top_k);
  if (k > static_cast<size_t>(num_experts_)) return false;
  // Where probabilities tie, the first of the top-k may be another than the choice.
  std::vector<size_t> others;
  for (size_t i = 0; i < n; ++i) {
    if (FirstOf(span, i) != span.expert_ids[i]) others.push_back(i);
  }
  ByteWriter header(out);
  header.Varint(others.size());
  size_t previous = 0;
  for (const size_t i : others) {
    header.Varint(i - previous);
    header.Varint(FirstOf(span, i));
    previous = i;
  }
  RangeEncoder coder(out);
  bool distinct = true;
  ForEachToken(s, span, [&](size_t position, ExpertFrequencies* urn) {
    for (size_t r = 1; r < k; ++r) {
      const uint16_t expert = span.topk_ids[position * k + r];
      distinct = distinct && urn->weight(expert) > 0;
      if (!distinct) return false;
      coder.Encode(urn->StartOf(expert), urn->weight(expert), urn->total());
      urn->Remove(expert);
    }
    return true;
  });
  if (!distinct) {
    out->resize(begin);
    return false;
  }
  coder.Finish();
  if (out->size() - begin < LeastBytes(span)) out->resize(begin + LeastBytes(span));
  return true;
}

bool TopkModel::DecodeIds(Stack s, std::string_view bytes, RoutingSpan* span) const {
  const auto k = static_cast<size_t>(span->top_k);
  const size_t n = span->expert_ids.size(), size = bytes.size();
  if (size < LeastBytes(*span) || k > static_cast<size_t>(num_experts_)) return false;
  span->topk_ids.assign(n * k, 0);
  for (size_t i = 0; i < n; ++i) span->topk_ids[i * k] = span->expert_ids[i];
  uint64_t others = 0, at = 0;
  if (!TakeNumber(&bytes, &others)) return false;
  for (uint64_t i = 0; i < others; ++i) {
    uint64_t step = 0, id = 0;
    if (!TakeNumber(&bytes, &step) || !TakeNumber(&bytes, &id)) return false;
    at += step;
    if ((i > 0 && step == 0) || at >= n || id >= static_cast<uint64_t>(num_experts_) ||
        id == span->expert_ids[at]) {
      return false;
    }
    span->topk_ids[at * k] = static_cast<uint16_t>(id);
  }
  const size_t header = size - bytes.size();
  RangeDecoder coder(bytes);
  uint16_t* ids = span->topk_ids.data();
  ForEachToken(s, *span, [&](size_t position, ExpertFrequencies* urn) {
    for (size_t r = 1; r < k; ++r) {
      const uint16_t expert = urn->Locate(coder.Peek(urn->total()));
      coder.Take(urn->StartOf(expert), urn->weight(expert));
      urn->Remove(expert);
      ids[position * k + r] = expert;
    }
    return true;
  });
  return size <= std::max<uint64_t>(header + coder.read(), LeastBytes(*span));
}

}  // namespace routecast
