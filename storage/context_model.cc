#include "storage/context_model.h"

#include <algorithm>
#include <array>
#include <cmath>

#include "common/files.h"
#include "common/wide_loops.h"
#include "storage/range_coder.h"

namespace routecast {
namespace {

constexpr size_t kLanes = 16;

// A long row's numbers fill whole vectors: zeros behind the last expert. What `base`
// holds there does not matter, but it must be there.
size_t Padded(size_t num_experts) { return (num_experts + kLanes - 1) / kLanes * kLanes; }

// The weights that a long row makes: of experts that it lacks 0. Returns the base weights
// of those that it has. `sums`: of each kLanes weights.
ROUTECAST_WIDE uint32_t FillLongRow(const uint16_t* base, const uint32_t* times,
                                    size_t num_experts, uint32_t* weights,
                                    uint32_t* sums) {
  uint32_t own = 0;
  for (size_t e = 0; e < num_experts; e += kLanes) {
    uint32_t sum = 0;
    for (size_t j = 0; j < kLanes; ++j) {
      const uint32_t weight = static_cast<uint32_t>(base[e + j + 1]) - base[e + j];
      const uint32_t factor = times[e + j];
      // weight * factor / 2^16 without a product of more than 32 bits.
      const uint32_t scaled =
          weight * (factor >> 16) + ((weight * (factor & 0xFFFF)) >> 16);
      const uint32_t least = factor != 0 ? 1 : 0;
      weights[e + j] = scaled > least ? scaled : least;
      own += factor != 0 ? weight : 0;
      sum += weights[e + j];
    }
    sums[e / kLanes] = sum;
  }
  return own;
}

}  // namespace

ContextModel::ContextModel(int num_experts, ContextKind kind, StackTables encoder,
                           StackTables decoder, const std::string& where)
    : num_experts_(num_experts),
      kind_(kind),
      tables_{std::move(encoder), std::move(decoder)} {
  for (size_t s = 0; s < 2; ++s) Build(tables_[s], where, &coded_[s]);
  fingerprint_ = Hash64(Serialize());
}

void ContextModel::Attach(TopkModel topk) {
  topk_ = std::move(topk);
  fingerprint_ = Hash64(Serialize());
}

void ContextModel::AddLongRow(const Row& row, size_t experts, Coded* coded) {
  const bool is_long = row.size() >= std::max<size_t>(kLanes, experts / 4) &&
                       coded->times.size() + Padded(experts) <= kMaxFactors;
  const size_t before = coded->times.size();
  coded->long_rows.push_back(is_long ? static_cast<uint32_t>(before / Padded(experts)) + 1
                                     : 0);
  if (!is_long) return;
  coded->times.resize(before + Padded(experts), 0);
  uint32_t* times = coded->times.data() + before;
  for (const RowEntry& e : row) times[e.expert] = FactorTimes(e.factor);
}

void ContextModel::Build(const StackTables& tables, const std::string& where,
                         Coded* coded) const {
  const auto experts = static_cast<size_t>(num_experts_);
  const size_t layers = tables.marginal.size();
  RequireModelSize(layers * (experts + 1) * (experts + 1) <= kMaxBaseCells, where,
                   "base weights");
  for (size_t l = 0; l < layers; ++l) {
    std::vector<uint16_t>& to = coded->layers.emplace_back();
    const size_t rows = l == 0 ? 1 : experts + 1;
    to.reserve(rows * (experts + 1) + kLanes);
    for (size_t r = 0; r < rows; ++r) {
      uint32_t sum = 0;
      const Row none;
      to.push_back(0);
      for (const uint32_t w :
           BaseWeights(tables.marginal[l], r == 0 ? none : tables.previous[l][r - 1])) {
        to.push_back(static_cast<uint16_t>(sum += w));
      }
    }
    to.resize(to.size() + kLanes);  // FillLongRow reads whole vectors
  }
  coded->index = ContextIndex(tables);
  coded->begins.assign(layers + 1, 0);
  coded->long_rows.assign(layers, 0);
  ForEachRow(tables, [&](const Row& row) {
    for (const RowEntry& e : row) {
      coded->factors.push_back({e.expert, FactorTimes(e.factor)});
    }
    coded->begins.push_back(static_cast<uint32_t>(coded->factors.size()));
    RequireModelSize(coded->factors.size() <= kMaxFactors, where, "rows of contexts");
    AddLongRow(row, experts, coded);
  });
}

// The weights of one id: `count` experts of their own (in their row's order; of a long
// row all experts), and the others together.
struct ContextModel::Slots {
  std::array<uint32_t, kMaxCodedExperts> weight;
  std::array<uint32_t, kMaxCodedExperts / kLanes> sums;  // of a long row's weights
  size_t count = 0;
  bool is_long = false;
  uint32_t rest = kBaseScale;  // weight of the others
  uint32_t total = kBaseScale;

  // The slot that `at` falls into, and where it begins; count where it is the rest.
  size_t Locate(uint32_t at, uint32_t* start) const {
    size_t i = 0;
    *start = 0;
    if (is_long) {
      while (i < count && *start + sums[i / kLanes] <= at) {
        *start += sums[i / kLanes];
        i += kLanes;
      }
    }
    while (i < count && *start + weight[i] <= at) *start += weight[i++];
    return std::min(i, count);
  }
};

// Factors are at most 2^15 and base weights sum to 2^15, so the total is below 2^31.
void ContextModel::FillSlots(const RowView& row, Slots* slots) const {
  uint32_t own = 0, total = 0;
  slots->is_long = row.times != nullptr;
  if (slots->is_long) {
    slots->count = static_cast<size_t>(num_experts_);
    own = FillLongRow(row.base, row.times, slots->count, slots->weight.data(),
                      slots->sums.data());
    for (size_t i = 0; i < slots->count; i += kLanes) total += slots->sums[i / kLanes];
  } else {
    slots->count = static_cast<size_t>(row.last - row.first);
    uint32_t* to = slots->weight.data();
    for (const Factor* f = row.first; f != row.last; ++f) {
      const uint16_t* at = row.base + f->expert;
      const uint32_t weight = static_cast<uint32_t>(at[1]) - at[0];
      own += weight;
      const auto scaled = static_cast<uint32_t>((uint64_t{weight} * f->times) >> 16);
      total += * to++ = std::max<uint32_t>(1, scaled);
    }
  }
  slots->rest = kBaseScale - own;
  slots->total = total + slots->rest;
}

// Where `expert` begins among the experts without a slot.
uint32_t ContextModel::RestStart(const RowView& row, uint16_t expert) {
  uint32_t start = row.base[expert];
  for (const Factor* f = row.first; f != row.last && f->expert < expert; ++f) {
    start -= static_cast<uint32_t>(row.base[f->expert + 1]) - row.base[f->expert];
  }
  return start;
}

// Of an id's expert: its slot; count where it has none.
size_t ContextModel::SlotOf(const RowView& row, const Slots& slots, uint16_t expert) {
  if (slots.is_long) return row.times[expert] != 0 ? expert : slots.count;
  size_t i = 0;
  while (i < slots.count && row.first[i].expert != expert) ++i;
  return i;
}

ContextPair ContextOf(ContextKind kind, const RoutingSpan& span, int l, int t) {
  const uint16_t* ids = span.expert_ids.data() + static_cast<size_t>(l) * span.num_tokens;
  const bool tokens = !span.token_ids.empty();
  ContextPair c{kNoContext, kNoContext};
  if (tokens) {
    c.inner = span.token_ids[t];
  } else if (t > 0) {
    c.inner = ids[t - 1];
  }
  if (kind == ContextKind::kPair) {
    if (l > 0) c.outer = ids[t - span.num_tokens];
  } else if (tokens) {
    if (t > 0) c.outer = span.token_ids[t - 1];
  } else if (t > 1) {
    c.outer = ids[t - 2];
  }
  return c;
}

// visit(layer, row).
template <typename Visit>
void ContextModel::ForEachId(Stack s, const RoutingSpan& span, const Visit& visit) const {
  const Coded& c = stack(s);
  const size_t layers = c.layers.size();
  const size_t width = static_cast<size_t>(num_experts_) + 1;
  const bool by_position = kind_ == ContextKind::kTokens && !span.token_ids.empty();
  std::vector<uint32_t> places(by_position ? span.token_ids.size() : 0);
  for (size_t t = 0; t < places.size(); ++t) {
    const ContextPair pair = ContextOf(kind_, span, 0, static_cast<int>(t));
    places[t] = c.index.Find(pair.outer, pair.inner);
  }
  for (int l = 0; l < span.num_layers; ++l) {
    const uint16_t* cumulative = c.layers[static_cast<size_t>(l)].data();
    const uint16_t* before =
        l == 0 ? nullptr
               : span.expert_ids.data() + static_cast<size_t>(l - 1) * span.num_tokens;
    for (int t = 0; t < span.num_tokens; ++t) {
      uint32_t place;
      if (by_position) {
        place = places[static_cast<size_t>(t)];
      } else {
        const ContextPair pair = ContextOf(kind_, span, l, t);
        place = c.index.Find(pair.outer, pair.inner);
      }
      const size_t row = place * layers + static_cast<size_t>(l);
      const uint32_t numbers = c.long_rows[row];
      visit(l, RowView{cumulative + (l == 0 ? 0 : width * (size_t{1} + before[t])),
                       c.factors.data() + c.begins[row],
                       c.factors.data() + c.begins[row + 1],
                       numbers == 0
                           ? nullptr
                           : c.times.data() + size_t{numbers - 1} * Padded(width - 1)});
    }
  }
}

void ContextModel::EncodeIds(Stack s, const RoutingSpan& span, std::string* out) const {
  const size_t begin = out->size();
  RangeEncoder coder(out);
  Slots slots;
  const uint16_t* id = span.expert_ids.data();
  ForEachId(s, span, [&](int, const RowView& row) {
    const uint16_t expert = *id++;
    slots.rest = kBaseScale;
    if (row.first != row.last) {
      FillSlots(row, &slots);
      const size_t slot = SlotOf(row, slots, expert);
      const bool own = slot < slots.count;
      uint32_t start = 0;
      for (size_t i = 0; i < slot; ++i) start += slots.weight[i];
      coder.Encode(start, own ? slots.weight[slot] : slots.rest, slots.total);
      if (own) return;
    }
    coder.Encode(RestStart(row, expert),
                 static_cast<uint32_t>(row.base[expert + 1]) - row.base[expert],
                 slots.rest);
  });
  coder.Finish();
  const uint64_t least = (span.expert_ids.size() + kMaxIdsPerByte - 1) / kMaxIdsPerByte;
  if (out->size() - begin < least) out->resize(begin + least);
}

bool ContextModel::DecodeIds(Stack s, std::string_view bytes, RoutingSpan* span) const {
  const uint64_t count = static_cast<uint64_t>(span->num_tokens) * span->num_layers;
  const uint64_t least = (count + kMaxIdsPerByte - 1) / kMaxIdsPerByte;
  if (bytes.size() < least) return false;
  span->expert_ids.resize(count);
  RangeDecoder coder(bytes);
  Slots slots;
  uint16_t* id = span->expert_ids.data();
  const auto width = static_cast<size_t>(num_experts_) + 1;
  ForEachId(s, *span, [&](int, const RowView& row) {
    slots.rest = kBaseScale;
    if (row.first != row.last) {
      FillSlots(row, &slots);
      uint32_t start = 0;
      const size_t slot = slots.Locate(coder.Peek(slots.total), &start);
      if (slot < slots.count) {
        coder.Take(start, slots.weight[slot]);
        *id++ = slots.is_long ? static_cast<uint16_t>(slot) : row.first[slot].expert;
        return;
      }
      coder.Take(start, slots.rest);
    }
    const uint16_t* base = row.base;
    const uint32_t at = coder.Peek(slots.rest);
    uint32_t full = at;  // as if the experts with slots were still there
    for (const Factor* f = row.first; f != row.last && base[f->expert] <= full; ++f) {
      full += static_cast<uint32_t>(base[f->expert + 1]) - base[f->expert];
    }
    const auto expert =
        static_cast<uint16_t>(std::upper_bound(base, base + width, full) - base - 1);
    coder.Take(base[expert] - (full - at),
               static_cast<uint32_t>(base[expert + 1]) - base[expert]);
    *id++ = expert;
  });
  return bytes.size() <= std::max<uint64_t>(coder.read(), least);
}

void ContextModel::CountBits(Stack s, const RoutingSpan& span,
                             std::vector<double>* bits) const {
  Slots slots;
  const uint16_t* id = span.expert_ids.data();
  ForEachId(s, span, [&](int l, const RowView& row) {
    const uint16_t expert = *id++;
    double& sum = (*bits)[static_cast<size_t>(l)];
    slots.rest = kBaseScale;
    if (row.first != row.last) {
      FillSlots(row, &slots);
      const size_t slot = SlotOf(row, slots, expert);
      const bool own = slot < slots.count;
      sum -= std::log2(static_cast<double>(own ? slots.weight[slot] : slots.rest) /
                       slots.total);
      if (own) return;
    }
    sum -= std::log2(static_cast<double>(row.base[expert + 1] - row.base[expert]) /
                     slots.rest);
  });
}

}  // namespace routecast
