#include "storage/topk_trainer.h"

#include <algorithm>
#include <stdexcept>

#include "common/stop.h"
#include "storage/context_fit.h"

namespace routecast {
namespace {

constexpr int kMarginalSteps = 2;
constexpr const char* kDoing = "while counting the top-k model";
constexpr uint64_t kMarginalScale = uint64_t{1} << 32;

using Weights = std::vector<double>;  // [E]

// Draws of one layer: the ids of all tokens, one after the other.
struct Draws {
  std::vector<uint16_t> ids;  // [n*K], the first of each token was given
  size_t k, experts;
  size_t size() const { return k == 0 ? 0 : ids.size() / k; }
  const uint16_t* At(size_t position) const { return ids.data() + position * k; }
};

// Counts of experts that were drawn, and what `weights` expected of the same draws.
class Tally {
 public:
  explicit Tally(size_t experts) : counts_(experts), expected_(experts) {}
  void Add(const Draws& draws, size_t position, const Weights& weights) {
    const uint16_t* ids = draws.At(position);
    left_ = weights;
    left_[ids[0]] = 0;
    for (size_t r = 1; r < draws.k && left_[ids[r]] > 0; ++r) {
      double total = 0;
      for (const double w : left_) total += w;
      const double scale = 1 / total;
      for (size_t e = 0; e < left_.size(); ++e) expected_[e] += left_[e] * scale;
      ++counts_[ids[r]];
      ++drawn_;
      left_[ids[r]] = 0;
    }
  }
  double count(size_t e) const { return counts_[e]; }
  double expected(size_t e) const { return expected_[e]; }
  Fitted Fit(const TrainerOptions& options) const {
    std::vector<Observed> observed;
    for (size_t e = 0; e < counts_.size(); ++e) {
      observed.push_back({static_cast<uint16_t>(e), counts_[e], expected_[e]});
    }
    return FitRow(observed, drawn_, options);
  }

 private:
  Weights counts_, expected_, left_;
  double drawn_ = 0;
};

Weights Times(Weights weights, const Row& row) {
  for (const RowEntry& entry : row) {
    weights[entry.expert] *= FactorTimes(entry.factor) / 65536.0;
  }
  return weights;
}

std::vector<uint32_t> FitMarginal(const Draws& draws, const TrainerOptions& options) {
  Weights weights(draws.experts, 1);
  for (int step = 0; step < kMarginalSteps; ++step) {
    Tally tally(draws.experts);
    for (size_t i = 0; i < draws.size(); ++i) {
      ThrowIfStopped(kDoing);
      tally.Add(draws, i, weights);
    }
    for (size_t e = 0; e < draws.experts; ++e) {
      weights[e] *=
          (tally.count(e) + options.prior) / (tally.expected(e) + options.prior);
    }
  }
  double sum = 0;
  for (const double w : weights) sum += w;
  std::vector<uint64_t> shares;
  for (const double w : weights) {
    shares.push_back(static_cast<uint64_t>(w / sum * kMarginalScale));
  }
  return MarginalWeights(shares);
}

// Rows of a layer, by the token's first expert.
class BaseOfFirst {
 public:
  BaseOfFirst(const Draws& draws, const TrainerOptions& options)
      : marginal_(FitMarginal(draws, options)) {
    const Weights alone(marginal_.begin(), marginal_.end());
    std::vector<Tally> tallies(draws.experts, Tally(draws.experts));
    for (size_t i = 0; i < draws.size(); ++i) {
      ThrowIfStopped(kDoing);
      tallies[draws.At(i)[0]].Add(draws, i, alone);
    }
    for (const Tally& tally : tallies) {
      rows_.push_back(tally.Fit(options).row);
      const std::vector<uint32_t> base = BaseWeights(marginal_, rows_.back());
      weights_.emplace_back(base.begin(), base.end());
    }
  }
  const Weights& At(uint16_t first) const { return weights_[first]; }
  std::vector<uint32_t>& marginal() { return marginal_; }
  std::vector<Row>& rows() { return rows_; }

 private:
  std::vector<uint32_t> marginal_;
  std::vector<Row> rows_;
  std::vector<Weights> weights_;
};

void Keep(const Fitted& fitted, uint64_t key, size_t layer, size_t layers,
          Contexts* contexts) {
  if (fitted.row.empty()) return;
  ContextRows& context = (*contexts)[key];
  context.rows.resize(layers);
  context.rows[layer] = fitted.row;
  context.saved_bits += fitted.saved_bits;
}

// All places of one inner context, sorted: a row for it, then one for each pair.
void FitInner(const Draws& draws, const BaseOfFirst& base, const TrainerOptions& options,
              size_t layer, size_t layers, const Place* begin, const Place* end,
              Contexts* contexts) {
  Tally all(draws.experts);
  for (const Place* p = begin; p != end; ++p) {
    all.Add(draws, p->position, base.At(draws.At(p->position)[0]));
  }
  const Fitted inner = all.Fit(options);
  Keep(inner, uint64_t{kAnyContext} << 32 | begin->key >> 32, layer, layers, contexts);
  for (const Place* p = begin; p != end;) {
    const Place* next = p;
    while (next != end && next->key == p->key) ++next;
    if (next - p > 1) {
      Tally pair(draws.experts);
      for (const Place* q = p; q != next; ++q) {
        pair.Add(draws, q->position, Times(base.At(draws.At(q->position)[0]), inner.row));
      }
      Keep(pair.Fit(options), p->key << 32 | p->key >> 32, layer, layers, contexts);
    }
    p = next;
  }
}

std::vector<Place> PlacesOf(const std::vector<RoutingSpan>& spans, int layer) {
  std::vector<Place> places;
  for (const RoutingSpan& span : spans) {
    for (int t = 0; t < span.num_tokens; ++t) {
      const ContextPair pair = TopkContextOf(span, layer, t);
      places.push_back({uint64_t{pair.inner} << 32 | pair.outer,
                        static_cast<uint32_t>(places.size())});
    }
  }
  std::sort(places.begin(), places.end(), [](const Place& a, const Place& b) {
    return a.key != b.key ? a.key < b.key : a.position < b.position;
  });
  return places;
}

}  // namespace

TopkTrainer::TopkTrainer(const MoeGeometry& geometry, const TrainerOptions& options)
    : geometry_(geometry), options_(options) {}

void TopkTrainer::Add(Stack s, const RoutingSpan& span) {
  if (span.num_tokens == 0) return;
  std::vector<RoutingSpan>& spans = spans_[static_cast<size_t>(s)];
  if (span.num_layers != geometry_.layers(s) ||
      (!spans.empty() && spans[0].top_k != span.top_k)) {
    throw std::logic_error("TopkTrainer: layers or K differ");
  }
  RoutingSpan& kept = spans.emplace_back();
  kept.num_tokens = span.num_tokens;
  kept.num_layers = span.num_layers;
  kept.token_ids = span.token_ids;
  if (span.token_ids.empty()) kept.expert_ids = span.expert_ids;  // contexts
  kept.top_k = span.top_k;
  kept.topk_ids = span.topk_ids;
}

StackTables TopkTrainer::TrainStack(Stack s) const {
  const std::vector<RoutingSpan>& spans = spans_[static_cast<size_t>(s)];
  const auto layers = static_cast<size_t>(geometry_.layers(s));
  const bool has_tokens = !spans.empty() && !spans[0].token_ids.empty();
  StackTables tables;
  Contexts contexts;
  std::vector<Place> places;
  for (size_t l = 0; l < layers; ++l) {
    Draws draws{{},
                spans.empty() ? 0 : static_cast<size_t>(spans[0].top_k),
                static_cast<size_t>(geometry_.num_experts)};
    for (const RoutingSpan& span : spans) {
      const size_t n = static_cast<size_t>(span.num_tokens) * draws.k;
      const auto from = span.topk_ids.begin() + static_cast<std::ptrdiff_t>(l * n);
      draws.ids.insert(draws.ids.end(), from, from + static_cast<std::ptrdiff_t>(n));
    }
    BaseOfFirst base(draws, options_);
    if (l == 0 || !has_tokens) places = PlacesOf(spans, static_cast<int>(l));
    for (size_t i = 0; i < places.size();) {
      ThrowIfStopped(kDoing);
      size_t next = i;
      while (next < places.size() && places[next].key >> 32 == places[i].key >> 32)
        ++next;
      FitInner(draws, base, options_, l, layers, &places[i], places.data() + next,
               &contexts);
      i = next;
    }
    tables.marginal.push_back(std::move(base.marginal()));
    tables.previous.push_back(std::move(base.rows()));
  }
  KeepContexts(std::move(contexts), options_, &tables);
  return tables;
}

TopkModel TopkTrainer::Train(const std::string& where) const {
  return TopkModel(geometry_.num_experts, TrainStack(Stack::kEncoder),
                   TrainStack(Stack::kDecoder), where);
}

}  // namespace routecast
