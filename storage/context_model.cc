#include "storage/context_model.h"

#include <algorithm>
#include <array>
#include <cmath>

#include "common/files.h"
#include "storage/expert_frequencies.h"
#include "storage/range_coder.h"

namespace routecast {
namespace {

uint32_t BaseOf(const uint16_t* cumulative, uint16_t expert) {
  return static_cast<uint32_t>(cumulative[expert + 1]) - cumulative[expert];
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
    to.resize(to.size() + kLanes);  // ExpertFrequencies reads whole vectors
  }
  coded->index = ContextIndex(tables);
  coded->rows = FactorRows(tables, 4, where, "rows of contexts");
}

// What one id is coded with: first the experts of its row, and the others together; then,
// where it is one of those, the others.
struct ContextModel::Weights {
  bool dense = false;
  ExpertFrequencies experts;                      // of a dense row
  std::array<uint32_t, kMaxCodedExperts> listed;  // of a list, in its order
  uint32_t own = 0;                               // of the row's experts together
  uint32_t rest = kBaseScale;                     // of the others
  uint32_t total() const { return own + rest; }
};

// Factors are at most 2^15 and base weights sum to 2^15, so the total is below 2^31.
void ContextModel::Fill(const RowView& view, Weights* weights) const {
  weights->dense = view.row.dense != nullptr;
  if (weights->dense) {
    weights->rest =
        kBaseScale - weights->experts.FillOwn(
                         view.base, static_cast<size_t>(num_experts_), view.row.dense);
    weights->own = weights->experts.total();
    return;
  }
  uint32_t base = 0, own = 0;
  uint32_t* to = weights->listed.data();
  for (const RowEntry* e = view.row.first; e != view.row.last; ++e) {
    const uint32_t weight = BaseOf(view.base, e->expert);
    base += weight;
    const auto scaled =
        static_cast<uint32_t>((uint64_t{weight} * FactorTimes(e->factor)) >> 16);
    own += * to++ = std::max<uint32_t>(1, scaled);
  }
  weights->own = own;
  weights->rest = kBaseScale - base;
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

namespace {

constexpr size_t kAhead = 4;  // tokens

// From memory to caches, before the rows of the tokens behind `t` are needed.
inline void PrefetchRows(const FactorRows& rows, const std::vector<uint32_t>& places,
                         size_t t, size_t l) {
  if (t + 2 * kAhead < places.size()) {
    rows.PrefetchHead(rows.Index(places[t + 2 * kAhead], l));
  }
  if (t + kAhead < places.size()) rows.Prefetch(rows.Index(places[t + kAhead], l));
}

}  // namespace

// visit(layer, row).
template <typename Visit>
void ContextModel::ForEachId(Stack s, const RoutingSpan& span, const Visit& visit) const {
  const Coded& c = stack(s);
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
        PrefetchRows(c.rows, places, static_cast<size_t>(t), static_cast<size_t>(l));
        place = places[static_cast<size_t>(t)];
      } else {
        const ContextPair pair = ContextOf(kind_, span, l, t);
        place = c.index.Find(pair.outer, pair.inner);
      }
      visit(l, RowView{cumulative + (l == 0 ? 0 : width * (size_t{1} + before[t])),
                       c.rows.Get(c.rows.Index(place, static_cast<size_t>(l)))});
    }
  }
}

// Where an expert lies: among those of the row, or among the others.
struct ContextModel::Interval {
  bool own = false;
  uint32_t start = 0, size = 0;
};

ContextModel::Interval ContextModel::Find(const RowView& view, uint16_t expert,
                                          Weights* weights) const {
  const FactorRows::View& row = view.row;
  if (row.dense != nullptr) {
    const bool own = row.dense[expert] != FactorRows::kAbsent;
    if (!own) {
      weights->experts.FillRest(view.base, static_cast<size_t>(num_experts_), row.dense);
    }
    return {own, weights->experts.StartOf(expert), weights->experts.weight(expert)};
  }
  uint32_t start = 0, rest = view.base[expert];
  const uint32_t* weight = weights->listed.data();
  for (const RowEntry* e = row.first; e != row.last && e->expert <= expert; ++e) {
    if (e->expert == expert) return {true, start, *weight};
    start += *weight++;
    rest -= BaseOf(view.base, e->expert);
  }
  return {false, rest, BaseOf(view.base, expert)};
}

void ContextModel::EncodeIds(Stack s, const RoutingSpan& span, std::string* out) const {
  const size_t begin = out->size();
  RangeEncoder coder(out);
  Weights weights;
  const uint16_t* id = span.expert_ids.data();
  ForEachId(s, span, [&](int, const RowView& view) {
    const uint16_t expert = *id++;
    weights.rest = kBaseScale;
    if (!view.row.empty()) Fill(view, &weights);
    const Interval at = Find(view, expert, &weights);
    if (at.own) {
      coder.Encode(at.start, at.size, weights.total());
      return;
    }
    if (!view.row.empty()) coder.Encode(weights.own, weights.rest, weights.total());
    coder.Encode(at.start, at.size, weights.rest);
  });
  coder.Finish();
  const uint64_t least = (span.expert_ids.size() + kMaxIdsPerByte - 1) / kMaxIdsPerByte;
  if (out->size() - begin < least) out->resize(begin + least);
}

namespace {

// Of a list's experts the one that `at` falls on, and where it begins.
uint16_t LocateListed(const FactorRows::View& row, const uint32_t* weight, uint32_t at,
                      uint32_t* start, uint32_t* size) {
  const RowEntry* e = row.first;
  *start = 0;
  while (*start + *weight <= at) {
    *start += *weight++;
    ++e;
  }
  *size = *weight;
  return e->expert;
}

}  // namespace

bool ContextModel::DecodeIds(Stack s, std::string_view bytes, RoutingSpan* span) const {
  const uint64_t count = static_cast<uint64_t>(span->num_tokens) * span->num_layers;
  const uint64_t least = (count + kMaxIdsPerByte - 1) / kMaxIdsPerByte;
  if (bytes.size() < least) return false;
  span->expert_ids.resize(count);
  RangeDecoder coder(bytes);
  Weights weights;
  uint16_t* id = span->expert_ids.data();
  const auto width = static_cast<size_t>(num_experts_) + 1;
  ForEachId(s, *span, [&](int, const RowView& view) {
    const FactorRows::View& row = view.row;
    uint32_t start = 0, size = 0;
    weights.rest = kBaseScale;
    if (!row.empty()) {
      Fill(view, &weights);
      const uint32_t at = coder.Peek(weights.total());
      if (at < weights.own) {
        if (weights.dense) {
          *id = weights.experts.Locate(at);
          start = weights.experts.StartOf(*id);
          size = weights.experts.weight(*id);
        } else {
          *id = LocateListed(row, weights.listed.data(), at, &start, &size);
        }
        ++id;
        coder.Take(start, size);
        return;
      }
      coder.Take(weights.own, weights.rest);
    }
    const uint32_t at = coder.Peek(weights.rest);
    if (row.dense != nullptr) {
      weights.experts.FillRest(view.base, width - 1, row.dense);
      *id = weights.experts.Locate(at);
      coder.Take(weights.experts.StartOf(*id), weights.experts.weight(*id));
      ++id;
      return;
    }
    const uint16_t* base = view.base;
    uint32_t full = at;  // as if the experts of the row were still there
    for (const RowEntry* e = row.first; e != row.last && base[e->expert] <= full; ++e) {
      full += BaseOf(base, e->expert);
    }
    const auto expert =
        static_cast<uint16_t>(std::upper_bound(base, base + width, full) - base - 1);
    coder.Take(base[expert] - (full - at), BaseOf(base, expert));
    *id++ = expert;
  });
  return bytes.size() <= std::max<uint64_t>(coder.read(), least);
}

void ContextModel::CountBits(Stack s, const RoutingSpan& span,
                             std::vector<double>* bits) const {
  Weights weights;
  const uint16_t* id = span.expert_ids.data();
  ForEachId(s, span, [&](int l, const RowView& view) {
    const uint16_t expert = *id++;
    double& sum = (*bits)[static_cast<size_t>(l)];
    weights.rest = kBaseScale;
    if (!view.row.empty()) Fill(view, &weights);
    const Interval at = Find(view, expert, &weights);
    if (at.own) {
      sum -= std::log2(static_cast<double>(at.size) / weights.total());
      return;
    }
    if (!view.row.empty()) {
      sum -= std::log2(static_cast<double>(weights.rest) / weights.total());
    }
    sum -= std::log2(static_cast<double>(at.size) / weights.rest);
  });
}

}  // namespace routecast
