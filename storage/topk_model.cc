#include "storage/topk_model.h"

#include <algorithm>
#include <array>

#include "common/wide_loops.h"
#include "storage/byte_codec.h"
#include "storage/range_coder.h"

namespace routecast {
namespace {

constexpr size_t kLanes = 16;
constexpr size_t kAhead = 4;  // tokens

size_t Padded(size_t num_experts) { return (num_experts + kLanes - 1) / kLanes * kLanes; }

ROUTECAST_WIDE void Widen(const uint16_t* base, size_t padded, uint32_t* weights) {
  for (size_t e = 0; e < padded; ++e) weights[e] = base[e];
}

// Sums of each kLanes weights; returns that of all.
ROUTECAST_WIDE uint32_t SumBlocks(const uint32_t* weights, size_t padded,
                                  uint32_t* sums) {
  uint32_t total = 0;
  for (size_t e = 0; e < padded; e += kLanes) {
    uint32_t sum = 0;
    for (size_t j = 0; j < kLanes; ++j) sum += weights[e + j];
    sums[e / kLanes] = sum;
    total += sum;
  }
  return total;
}

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

// The weights of the experts that a token has not drawn yet.
class TopkModel::Urn {
 public:
  void Fill(const uint16_t* base, size_t padded, const Factor* first,
            const Factor* last) {
    Widen(base, padded, weights_.data());
    for (const Factor* f = first; f != last; ++f) {
      const auto scaled =
          static_cast<uint32_t>((uint64_t{base[f->expert]} * f->times) >> 16);
      weights_[f->expert] = std::max<uint32_t>(1, scaled);
    }
    total_ = SumBlocks(weights_.data(), padded, sums_.data());
  }
  void Remove(uint16_t expert) {
    sums_[expert / kLanes] -= weights_[expert];
    total_ -= weights_[expert];
    weights_[expert] = 0;
  }
  uint32_t total() const { return total_; }
  uint32_t weight(uint16_t expert) const { return weights_[expert]; }
  uint32_t StartOf(uint16_t expert) const {
    uint32_t start = 0;
    for (size_t e = 0; e < expert; ++e) start += weights_[e];
    return start;
  }
  // The expert that `at` < total() falls on, and where it begins.
  uint16_t Locate(uint32_t at, uint32_t* start) const {
    uint32_t before = 0;
    size_t block = 0;
    while (before + sums_[block] <= at) before += sums_[block++];
    size_t e = block * kLanes;
    while (before + weights_[e] <= at) before += weights_[e++];
    *start = before;
    return static_cast<uint16_t>(e);
  }

 private:
  std::array<uint32_t, kMaxCodedExperts> weights_;
  std::array<uint32_t, kMaxCodedExperts / kLanes> sums_;
  uint32_t total_ = 0;
};

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
  coded->begins.assign(layers + 1, 0);
  ForEachRow(tables, [&](const Row& row) {
    for (const RowEntry& e : row) {
      coded->factors.push_back({e.expert, FactorTimes(e.factor)});
    }
    RequireModelSize(coded->factors.size() <= kMaxFactors, where, "rows of top-k");
    coded->begins.push_back(static_cast<uint32_t>(coded->factors.size()));
  });
}

// visit(position, urn) for each token of each layer, with the urn of its weights before
// the first expert is taken out; false ends it.
template <typename Visit>
void TopkModel::ForEachToken(Stack s, const RoutingSpan& span, const Visit& visit) const {
  const Coded& c = coded_[static_cast<size_t>(s)];
  const size_t layers = c.base.size(), padded = Padded(static_cast<size_t>(num_experts_));
  const auto num_tokens = static_cast<size_t>(span.num_tokens);
  std::vector<uint32_t> places(num_tokens);
  Urn urn;
  for (size_t l = 0; l < layers; ++l) {
    // Found ahead, so that rows are on their way from memory before they are needed.
    for (size_t t = 0; t < num_tokens && (l == 0 || span.token_ids.empty()); ++t) {
      const ContextPair pair =
          TopkContextOf(span, static_cast<int>(l), static_cast<int>(t));
      places[t] = c.index.Find(pair.outer, pair.inner);
    }
    for (size_t t = 0; t < num_tokens; ++t) {
      if (t + kAhead < num_tokens) {
        __builtin_prefetch(c.factors.data() + c.begins[places[t + kAhead] * layers + l]);
      }
      const size_t position = l * num_tokens + t;
      const size_t row = places[t] * layers + l;
      const uint16_t first = FirstOf(span, position);
      urn.Fill(c.base[l].data() + first * padded, padded,
               c.factors.data() + c.begins[row], c.factors.data() + c.begins[row + 1]);
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
  ForEachToken(s, span, [&](size_t position, Urn* urn) {
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
  ForEachToken(s, *span, [&](size_t position, Urn* urn) {
    for (size_t r = 1; r < k; ++r) {
      uint32_t start = 0;
      const uint16_t expert = urn->Locate(coder.Peek(urn->total()), &start);
      coder.Take(start, urn->weight(expert));
      urn->Remove(expert);
      ids[position * k + r] = expert;
    }
    return true;
  });
  return size <= std::max<uint64_t>(header + coder.read(), LeastBytes(*span));
}

}  // namespace routecast
