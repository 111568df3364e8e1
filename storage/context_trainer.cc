#include "storage/context_trainer.h"

#include <algorithm>
#include <stdexcept>

#include "common/stop.h"
#include "storage/context_fit.h"

namespace routecast {
namespace {

using Dense = std::vector<std::vector<float>>;  // [rows][E] probabilities

// One layer's probabilities given the expert before; row 0 where there is none.
class BaseOfLayer {
 public:
  BaseOfLayer(const std::vector<uint16_t>* before, const std::vector<uint16_t>& ids,
              size_t experts, const TrainerOptions& options)
      : before_(before), marginal_(MarginalWeights(CountsOf(ids, experts))) {
    Append({});
    if (before == nullptr) return;
    std::vector<std::vector<uint32_t>> counts(experts, std::vector<uint32_t>(experts));
    for (size_t i = 0; i < ids.size(); ++i) ++counts[(*before)[i]][ids[i]];
    for (const auto& row : counts) {
      double total = 0;
      for (const uint32_t c : row) total += c;
      std::vector<Observed> observed;
      for (size_t e = 0; e < experts; ++e) {
        observed.push_back(
            {static_cast<uint16_t>(e), double(row[e]), total * dense_[0][e]});
      }
      rows_.push_back(FitRow(observed, total, options).row);
      Append(rows_.back());
    }
  }
  const float* At(size_t position) const {
    return dense_[before_ ? size_t{1} + (*before_)[position] : 0].data();
  }
  std::vector<uint32_t>& marginal() { return marginal_; }
  std::vector<Row>& rows() { return rows_; }

 private:
  void Append(const Row& row) {
    std::vector<float>& dense = dense_.emplace_back();
    for (const uint32_t w : BaseWeights(marginal_, row)) {
      dense.push_back(static_cast<float>(w) / kBaseScale);
    }
  }

  const std::vector<uint16_t>* before_;
  std::vector<uint32_t> marginal_;
  std::vector<Row> rows_;
  Dense dense_;
};

// Fits one layer's rows of contexts, given where each context is.
class LayerFit {
 public:
  LayerFit(const BaseOfLayer& base, const std::vector<uint16_t>& ids, size_t experts,
           size_t layers, const TrainerOptions& options, Contexts* contexts)
      : base_(base),
        ids_(ids),
        options_(options),
        layers_(layers),
        contexts_(contexts),
        counts_(experts),
        expected_(experts) {}

  // All places of one inner context, sorted.
  void FitInner(size_t layer, const Place* begin, const Place* end) {
    std::fill(counts_.begin(), counts_.end(), 0.0);
    std::fill(expected_.begin(), expected_.end(), 0.0f);
    for (const Place* p = begin; p != end; ++p) {
      ++counts_[ids_[p->position]];
      const float* base = base_.At(p->position);
      for (size_t e = 0; e < expected_.size(); ++e) expected_[e] += base[e];
    }
    observed_.clear();
    for (size_t e = 0; e < counts_.size(); ++e) {
      observed_.push_back({static_cast<uint16_t>(e), counts_[e], expected_[e]});
    }
    const Fitted inner = FitRow(observed_, static_cast<double>(end - begin), options_);
    Keep(layer, uint64_t{kAnyContext} << 32 | begin->key >> 32, inner);
    for (const Place* p = begin; p != end;) {
      const Place* next = p;
      while (next != end && next->key == p->key) ++next;
      if (next - p > 1) FitPair(layer, inner.row, p, next);
      p = next;
    }
  }

 private:
  void FitPair(size_t layer, const Row& inner, const Place* begin, const Place* end) {
    observed_.clear();
    for (const Place* p = begin; p != end; ++p) {
      const uint16_t id = ids_[p->position];
      const auto same = std::find_if(observed_.begin(), observed_.end(),
                                     [id](const Observed& o) { return o.expert == id; });
      if (same == observed_.end()) {
        observed_.push_back({id, 1, 0});
      } else {
        ++same->count;
      }
    }
    std::sort(observed_.begin(), observed_.end(),
              [](const Observed& a, const Observed& b) { return a.expert < b.expert; });
    std::vector<double> times(observed_.size(), 1.0);
    for (const RowEntry& entry : inner) {
      for (size_t i = 0; i < observed_.size(); ++i) {
        if (observed_[i].expert == entry.expert) times[i] = Times(entry);
      }
    }
    for (const Place* p = begin; p != end; ++p) {
      const float* base = base_.At(p->position);
      double sum = 1;
      for (const RowEntry& entry : inner) sum += base[entry.expert] * (Times(entry) - 1);
      for (size_t i = 0; i < observed_.size(); ++i) {
        observed_[i].expected += base[observed_[i].expert] * times[i] / sum;
      }
    }
    const Fitted pair = FitRow(observed_, static_cast<double>(end - begin), options_);
    Keep(layer, begin->key << 32 | begin->key >> 32, pair);
  }
  static double Times(const RowEntry& entry) {
    return FactorTimes(entry.factor) / 65536.0;
  }
  void Keep(size_t layer, uint64_t key, const Fitted& fitted) {
    if (fitted.row.empty()) return;
    ContextRows& context = (*contexts_)[key];
    context.rows.resize(layers_);
    context.rows[layer] = fitted.row;
    context.saved_bits += fitted.saved_bits;
  }

  const BaseOfLayer& base_;
  const std::vector<uint16_t>& ids_;
  const TrainerOptions& options_;
  size_t layers_;
  Contexts* contexts_;
  std::vector<double> counts_;
  std::vector<float> expected_;
  std::vector<Observed> observed_;
};

}  // namespace

ContextTrainer::ContextTrainer(const MoeGeometry& geometry, const TrainerOptions& options)
    : geometry_(geometry), options_(options) {
  for (const Stack s : {Stack::kEncoder, Stack::kDecoder}) {
    samples_[static_cast<size_t>(s)].ids.resize(static_cast<size_t>(geometry.layers(s)));
  }
}

void ContextTrainer::Add(Stack s, const RoutingSpan& span) {
  if (span.num_tokens == 0) return;
  Sample& sample = samples_[static_cast<size_t>(s)];
  if (static_cast<size_t>(span.num_layers) != sample.ids.size()) {
    throw std::logic_error("ContextTrainer: layers differ from the geometry");
  }
  sample.has_tokens = !span.token_ids.empty();
  sample.begins.push_back(sample.tokens.size());
  sample.tokens.insert(sample.tokens.end(), span.token_ids.begin(), span.token_ids.end());
  if (!sample.has_tokens) sample.tokens.resize(sample.tokens.size() + span.num_tokens);
  for (size_t l = 0; l < sample.ids.size(); ++l) {
    const auto from = span.expert_ids.begin() + static_cast<int64_t>(l) * span.num_tokens;
    sample.ids[l].insert(sample.ids[l].end(), from, from + span.num_tokens);
  }
}

StackTables ContextTrainer::TrainStack(
    const Sample& sample, const std::function<void(uint64_t)>& on_work) const {
  const auto experts = static_cast<size_t>(geometry_.num_experts);
  const size_t layers = sample.ids.size(), n = sample.tokens.size();
  StackTables tables;
  Contexts contexts;
  std::vector<Place> places(n);
  const bool same_in_all = sample.has_tokens && options_.kind == ContextKind::kTokens;
  for (size_t l = 0; l < layers; ++l) {
    const std::vector<uint16_t>& ids = sample.ids[l];
    const std::vector<uint16_t>* before = l > 0 ? &sample.ids[l - 1] : nullptr;
    BaseOfLayer base(before, ids, experts, options_);
    if (l == 0 || !same_in_all) {
      size_t span = 0;
      for (size_t i = 0; i < n; ++i) {
        while (span + 1 < sample.begins.size() && sample.begins[span + 1] <= i) ++span;
        const size_t t = i - sample.begins[span];
        const auto at = [&](size_t back) -> uint32_t {
          if (t < back) return kNoContext;
          return sample.has_tokens ? sample.tokens[i - back] : ids[i - back];
        };
        // The layer's own id is what is coded: without tokens contexts lie one back.
        const size_t here = sample.has_tokens ? 0 : 1;
        uint32_t outer = at(here + 1);
        if (options_.kind == ContextKind::kPair)
          outer = before ? (*before)[i] : kNoContext;
        places[i] = {uint64_t{at(here)} << 32 | outer, static_cast<uint32_t>(i)};
      }
      std::sort(places.begin(), places.end(), [](const Place& a, const Place& b) {
        return a.key != b.key ? a.key < b.key : a.position < b.position;
      });
    }
    LayerFit fit(base, ids, experts, layers, options_, &contexts);
    for (size_t i = 0; i < n;) {
      ThrowIfStopped("while counting the context model");
      size_t next = i;
      while (next < n && places[next].key >> 32 == places[i].key >> 32) ++next;
      fit.FitInner(l, &places[i], places.data() + next);
      i = next;
      on_work(l * n + i);
    }
    tables.marginal.push_back(std::move(base.marginal()));
    tables.previous.push_back(std::move(base.rows()));
  }
  KeepContexts(std::move(contexts), options_, &tables);
  return tables;
}

ContextModel ContextTrainer::Train(const std::string& where,
                                   const WorkObserver& on_work) const {
  uint64_t all = 0, before = 0;
  for (const Sample& s : samples_) all += s.ids.size() * s.tokens.size();
  const auto train = [&](const Sample& sample) {
    StackTables tables = TrainStack(sample, [&](uint64_t ids) {
      if (on_work) on_work(static_cast<double>(before + ids) / static_cast<double>(all));
    });
    before += sample.ids.size() * sample.tokens.size();
    return tables;
  };
  StackTables encoder = train(samples_[0]);
  return ContextModel(geometry_.num_experts, options_.kind, std::move(encoder),
                      train(samples_[1]), where);
}

}  // namespace routecast
