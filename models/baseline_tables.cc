// Counting and the files of counts; the predictors are in baseline_predictors.cc.
#include <ATen/ATen.h>

#include <algorithm>
#include <functional>

#include "common/errors.h"
#include "models/baseline_predictors.h"

namespace routecast {
namespace {

constexpr double kAdd = 0.1, kBackoff = 2;
// Keys of order 2 at all leads, up to which those beyond lead 1 are counted: some hundred
// bytes each and more where several experts a token follow.
constexpr uint64_t kMostKeys = uint64_t{1} << 22;

constexpr const char* kRowNames[] = {"token", "markov1", "markov2", "previous"};

[[noreturn]] void Bad(const std::string& what, const std::string& values) {
  throw DataError(ErrorText(what, values, "are the store and the model of one make?"));
}

}  // namespace

BaselineTables::BaselineTables(const MoeGeometry& geometry, int vocab_size)
    : geometry_(geometry),
      vocab_size_(vocab_size),
      frequency_(static_cast<size_t>(geometry.num_keys()), 0) {}

// Layers of the source, leads and experts in one key; experts come last.
uint64_t BaselineTables::MarkovKey(int source, int lead, int expert) const {
  const uint64_t leads = std::max(geometry_.encoder_layers, geometry_.decoder_layers) + 1;
  return (static_cast<uint64_t>(source) * leads + lead) * geometry_.num_experts + expert;
}

uint64_t BaselineTables::Markov2Key(int source, int lead, int before, int expert) const {
  return MarkovKey(source, lead, before) * geometry_.num_experts + expert;
}

void BaselineTables::Fit(const RoutingTrace& trace) {
  FitSpan(trace.encoder, Stack::kEncoder);
  FitSpan(trace.decoder, Stack::kDecoder);
}

namespace {

// The experts that a token chose: one, or all K of a model that takes several.
class Choices {
 public:
  Choices(const RoutingSpan& span, int experts_per_token)
      : span_(span), k_(experts_per_token) {}
  int count() const { return k_; }
  uint16_t At(int t, int l, int i) const {
    const size_t at = Place(t, l);
    return k_ == 1 ? span_.expert_ids[at]
                   : span_.topk_ids[at * static_cast<size_t>(k_) + size_t(i)];
  }
  // As labels: a token that capacity dropped has none.
  bool Counts(int t, int l) const {
    return span_.dropped.empty() || span_.dropped[Place(t, l)] == 0;
  }
  void Count(int t, int l, CountRows::Row* row) const {
    for (int i = 0; i < k_; ++i) row->Add(At(t, l, i));
  }

 private:
  size_t Place(int t, int l) const {
    return static_cast<size_t>(l) * static_cast<size_t>(span_.num_tokens) +
           static_cast<size_t>(t);
  }
  const RoutingSpan& span_;
  int k_;
};

}  // namespace

void BaselineTables::CheckSpan(const RoutingSpan& span, int layers) const {
  if (span.num_layers != layers) {
    Bad("a trace has another number of layers than the store",
        std::to_string(span.num_layers) + " and " + std::to_string(layers));
  }
  const int K = geometry_.experts_per_token;
  if (K > 1 && (span.top_k != K || span.topk_ids.empty())) {
    Bad("a trace does not hold every expert of a token",
        std::to_string(span.top_k) + " of " + std::to_string(K));
  }
  for (const auto* ids : {&span.expert_ids, &span.topk_ids}) {
    for (uint16_t e : *ids) {
      if (e >= geometry_.num_experts) {
        Bad("a trace names an expert that is not there", std::to_string(e));
      }
    }
  }
  for (uint32_t id : span.token_ids) {
    if (id >= static_cast<uint32_t>(vocab_size_)) {
      Bad("a trace has a token outside the vocabulary", std::to_string(id));
    }
  }
}

void BaselineTables::FitSpan(const RoutingSpan& span, Stack stack) {
  if (span.num_tokens == 0 || span.expert_ids.empty()) return;
  const int L = geometry_.layers(stack), T = span.num_tokens, E = geometry_.num_experts;
  CheckSpan(span, L);
  const Choices chosen(span, geometry_.experts_per_token);
  const int base = geometry_.GlobalLayer(stack, 0), K = chosen.count();
  const uint64_t keys = uint64_t(L) * L * E * E;
  const bool far = keys <= kMostKeys;
  const bool chain = stack == Stack::kDecoder;  // layers go on in the next token
  for (int t = 0; t < T; ++t) {
    for (int l = 0; l < L; ++l) {
      const int layer = base + l;
      if (chosen.Counts(t, l)) {
        for (int i = 0; i < K; ++i) ++frequency_[size_t(layer) * E + chosen.At(t, l, i)];
        if (!span.token_ids.empty()) {
          chosen.Count(t, l,
                       token_.Make(uint64_t(layer) * vocab_size_ + span.token_ids[t]));
        }
        for (int i = 0; i < K && t > 0; ++i) {
          chosen.Count(t, l,
                       previous_.Make(uint64_t(layer) * E + chosen.At(t - 1, l, i)));
        }
      }
      // The choice before the newest: none at the start of a chain.
      const bool has_before = l > 0 || (chain && t > 0);
      const int before = !has_before ? -1
                         : l > 0     ? chosen.At(t, l - 1, 0)
                                     : chosen.At(t - 1, L - 1, 0);
      for (int lead = 1; lead <= L; ++lead) {
        const bool wraps = l + lead >= L;
        if (wraps && (!chain || t + 1 >= T)) break;
        const int to = t + wraps, next = l + lead - (wraps ? L : 0);
        if (!chosen.Counts(to, next)) continue;
        for (int i = 0; i < K; ++i) {
          const int expert = chosen.At(t, l, i);
          chosen.Count(to, next, markov1_.Make(MarkovKey(layer, lead, expert)));
          if (!has_before || (lead > 1 && !far)) continue;
          chosen.Count(to, next, markov2_.Make(Markov2Key(layer, lead, before, expert)));
        }
      }
    }
  }
}

void BaselineTables::Merge(const BaselineTables& other) {
  if (!(geometry_ == other.geometry_) || vocab_size_ != other.vocab_size_) {
    throw std::logic_error("baselines of different models cannot be added");
  }
  for (size_t i = 0; i < frequency_.size(); ++i) frequency_[i] += other.frequency_[i];
  token_.Merge(other.token_);
  markov1_.Merge(other.markov1_);
  markov2_.Merge(other.markov2_);
  previous_.Merge(other.previous_);
}

void BaselineTables::Frequency(int layer, float* probs) const {
  const int E = geometry_.num_experts;
  const double* counts = frequency_.data() + size_t(layer) * E;
  double n = 0;
  for (int e = 0; e < E; ++e) n += counts[e];
  for (int e = 0; e < E; ++e) {
    probs[e] = static_cast<float>((counts[e] + kAdd) / (n + kAdd * E));
  }
}

void BaselineTables::Token(int layer, int64_t token, float* probs) const {
  Frequency(layer, probs);
  if (token < 0 || token >= vocab_size_) return;
  const int E = geometry_.num_experts;
  token_.Mix(uint64_t(layer) * vocab_size_ + token, kAdd * E, E, probs);
}

void BaselineTables::Markov1(int source, int lead, int target, int expert,
                             float* probs) const {
  Frequency(target, probs);
  markov1_.Mix(MarkovKey(source, lead, expert), kBackoff, geometry_.num_experts, probs);
}

void BaselineTables::Markov2(int source, int lead, int target, int before, int expert,
                             float* probs) const {
  Markov1(source, lead, target, expert, probs);
  markov2_.Mix(Markov2Key(source, lead, before, expert), kBackoff, geometry_.num_experts,
               probs);
}

void BaselineTables::PreviousToken(int layer, int expert, float* probs) const {
  Frequency(layer, probs);
  const int E = geometry_.num_experts;
  previous_.Mix(uint64_t(layer) * E + expert, kBackoff, E, probs);
}

double BaselineTables::Markov1Count(int source, int lead, int expert) const {
  const CountRows::Row* row = markov1_.Find(MarkovKey(source, lead, expert));
  return row == nullptr ? 0 : static_cast<double>(row->total());
}

namespace {

constexpr double kExactFloats = 1 << 24;  // whole numbers up to here are floats

// Counts as floats where those hold them, else as doubles.
at::Tensor Narrowest(const at::Tensor& counts) {
  const bool fits = counts.numel() == 0 || counts.max().item<double>() <= kExactFloats;
  return fits ? counts.to(at::kFloat) : counts;
}

}  // namespace

void BaselineTables::Save(const fs::path& file) const {
  const int64_t E = geometry_.num_experts;
  Parameters tensors;
  tensors.Add("geometry", at::tensor({int64_t{geometry_.encoder_layers},
                                      int64_t{geometry_.decoder_layers}, E,
                                      int64_t{geometry_.experts_per_token},
                                      int64_t{geometry_.d_model}, int64_t{vocab_size_}}));
  auto frequency = at::empty({geometry_.num_layers(), E}, at::kDouble);
  std::copy(frequency_.begin(), frequency_.end(), frequency.data_ptr<double>());
  tensors.Add("frequency", Narrowest(frequency));
  const CountRows* all[] = {&token_, &markov1_, &markov2_, &previous_};
  for (int i = 0; i < 4; ++i) all[i]->Save(kRowNames[i], &tensors);
  WriteParameters(file, tensors, at::ScalarType::Undefined,
                  {{"format", "routecast-baselines"}, {"version", "2"}});
}

BaselineTables BaselineTables::Load(const fs::path& file) {
  const Parameters tensors = ReadParameters(file, at::ScalarType::Undefined);
  const std::string what = file.string() + " does not hold baselines";
  const auto counts_of = [&](const std::string& name, int64_t rows, int64_t experts) {
    const at::Tensor& counts = tensors.Get(name);
    const auto type = counts.scalar_type();
    if ((type != at::kFloat && type != at::kDouble) || counts.dim() != 2 ||
        counts.size(0) != rows || counts.size(1) != experts ||
        !at::isfinite(counts).all().item<bool>() || counts.lt(0).any().item<bool>()) {
      Bad(what, "tensor " + name);
    }
    return counts.to(at::kDouble).contiguous();
  };
  const at::Tensor& sizes = tensors.Get("geometry");
  if (sizes.scalar_type() != at::kLong || sizes.numel() != 6) Bad(what, "geometry");
  const int64_t* size = sizes.data_ptr<int64_t>();
  const int64_t most[] = {1024, 1024, 65535, 64, 1 << 20, 1 << 24};
  for (int i = 0; i < 6; ++i) {
    if (size[i] < 0 || size[i] > most[i]) {
      Bad(what, "geometry[" + std::to_string(i) + "]=" + std::to_string(size[i]));
    }
  }
  const MoeGeometry g{int(size[0]), int(size[1]), int(size[2]), int(size[3]),
                      int(size[4])};
  if (g.num_experts == 0) Bad(what, "no experts");
  const auto frequency = counts_of("frequency", g.num_layers(), g.num_experts);
  BaselineTables tables(g, static_cast<int>(size[5]));
  std::copy_n(frequency.data_ptr<double>(), frequency.numel(), tables.frequency_.begin());
  // Version 1 counted order 2 at lead 1 alone, without the lead in its keys.
  const auto E = static_cast<uint64_t>(g.num_experts);
  const auto same = [](uint64_t key) { return key; };
  const auto with_lead = [&](uint64_t key) {
    return tables.Markov2Key(static_cast<int>(key / (E * E)), 1,
                             static_cast<int>(key / E % E), static_cast<int>(key % E));
  };
  const auto load = [&](int i, const std::function<uint64_t(uint64_t)>& old_key) {
    return CountRows::Load(kRowNames[i], tensors, g.num_experts, what, old_key);
  };
  tables.token_ = load(0, same);
  tables.markov1_ = load(1, same);
  tables.markov2_ = load(2, with_lead);
  tables.previous_ = load(3, same);
  return tables;
}

}  // namespace routecast
