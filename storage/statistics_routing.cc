#include "storage/statistics_routing.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <numeric>
#include <unordered_map>

#include "common/stop.h"

namespace routecast {
namespace {

constexpr int kDenseExperts = 256;

// Counts of pairs (x, y) with y < E.
class PairCounts {
 public:
  PairCounts() = default;
  explicit PairCounts(int dense_experts)
      : dense_(static_cast<size_t>(dense_experts) * dense_experts),
        experts_(static_cast<size_t>(dense_experts)) {}
  void Add(uint64_t x, uint16_t y) {
    if (dense_.empty()) {
      ++sparse_[x << 16 | y];
    } else {
      ++dense_[x * experts_ + y];
    }
  }
  // Ascending, so that equal stores give equal digits.
  std::vector<uint64_t> Sorted() const {
    std::vector<uint64_t> counts;
    for (const uint64_t c : dense_) {
      if (c > 0) counts.push_back(c);
    }
    for (const auto& [pair, c] : sparse_) counts.push_back(c);
    std::sort(counts.begin(), counts.end());
    return counts;
  }
  std::vector<uint64_t> SortedFirsts() const {
    std::unordered_map<uint64_t, uint64_t> firsts;
    for (const auto& [pair, c] : sparse_) firsts[pair >> 16] += c;
    std::vector<uint64_t> counts;
    for (const auto& [x, c] : firsts) counts.push_back(c);
    std::sort(counts.begin(), counts.end());
    return counts;
  }
  bool empty() const { return dense_.empty() && sparse_.empty(); }
  const std::vector<uint64_t>& dense() const { return dense_; }

 private:
  std::vector<uint64_t> dense_;
  size_t experts_ = 0;
  std::unordered_map<uint64_t, uint64_t> sparse_;
};

double EntropyBits(const std::vector<uint64_t>& counts) {
  const auto total =
      static_cast<double>(std::accumulate(counts.begin(), counts.end(), uint64_t{0}));
  double bits = 0;
  for (const uint64_t c : counts) {
    const double share = static_cast<double>(c) / total;
    if (c > 0) bits -= share * std::log2(share);
  }
  return bits;
}

// 2 (H(X) + H(Y) - H(X, Y)) / (H(X) + H(Y)); 0 where both are constant.
double Normalised(double x_bits, double y_bits, double joint_bits) {
  if (x_bits + y_bits <= 0) return 0;
  return std::clamp(2 * (x_bits + y_bits - joint_bits) / (x_bits + y_bits), 0.0, 1.0);
}

struct LayerCounts {
  std::vector<uint64_t> counts;
  std::vector<PairCounts> previous;  // with the layer 1, 2, .. before
  PairCounts token;
};

// The value at share p of ascending values, between neighbours in proportion.
double Quantile(const std::vector<uint64_t>& sorted, double p) {
  const double at = p * static_cast<double>(sorted.size() - 1);
  const auto low = static_cast<size_t>(at);
  const size_t high = std::min(low + 1, sorted.size() - 1);
  const double part = at - static_cast<double>(low);
  return static_cast<double>(sorted[low]) * (1 - part) +
         static_cast<double>(sorted[high]) * part;
}

// Counts the paths of one stack.
class PathCounter {
 public:
  void Add(const RoutingSpan& s) {
    std::string path(2 * static_cast<size_t>(s.num_layers), '\0');
    for (int t = 0; t < s.num_tokens; ++t) {
      for (int l = 0; l < s.num_layers; ++l) {
        const uint16_t e = s.expert_ids[static_cast<size_t>(l) * s.num_tokens + t];
        path[2 * l] = static_cast<char>(e >> 8);
        path[2 * l + 1] = static_cast<char>(e & 0xFF);
      }
      ++tokens_;
      const auto found = counts_.find(path);
      if (found != counts_.end()) {
        ++found->second;
      } else if (counts_.size() < kMaxPaths) {
        counts_.emplace(path, 1);
      } else {
        ++uncounted_;
      }
    }
  }
  Journeys Finish() const {
    std::vector<std::pair<uint64_t, std::string>> order;
    for (const auto& [path, count] : counts_) order.emplace_back(count, path);
    const size_t listed = std::min(kListedPaths, order.size());
    std::partial_sort(order.begin(), order.begin() + static_cast<ptrdiff_t>(listed),
                      order.end(), [](const auto& a, const auto& b) {
                        return a.first != b.first ? a.first > b.first
                                                  : a.second < b.second;
                      });
    Journeys j{tokens_, counts_.size(), uncounted_, {}};
    for (size_t i = 0; i < listed; ++i) {
      Journeys::Path path{{}, order[i].first};
      const std::string& bytes = order[i].second;
      for (size_t b = 0; b + 1 < bytes.size(); b += 2) {
        path.experts.push_back(static_cast<uint16_t>(static_cast<uint8_t>(bytes[b]) << 8 |
                                                     static_cast<uint8_t>(bytes[b + 1])));
      }
      j.paths.push_back(std::move(path));
    }
    return j;
  }

 private:
  std::unordered_map<std::string, uint64_t> counts_;
  uint64_t tokens_ = 0, uncounted_ = 0;
};

void CountSpan(const RoutingSpan& s, std::vector<LayerCounts>::iterator first) {
  const auto tokens = static_cast<size_t>(s.num_tokens);
  for (size_t l = 0; l < static_cast<size_t>(s.num_layers); ++l) {
    LayerCounts& c = first[static_cast<ptrdiff_t>(l)];
    const uint16_t* own = s.expert_ids.data() + l * tokens;
    for (size_t t = 0; t < tokens; ++t) {
      ++c.counts[own[t]];
      if (!s.token_ids.empty()) c.token.Add(s.token_ids[t], own[t]);
    }
    for (size_t back = 1; back <= c.previous.size(); ++back) {
      const uint16_t* before = own - back * tokens;
      PairCounts& pairs = c.previous[back - 1];
      for (size_t t = 0; t < tokens; ++t) pairs.Add(before[t], own[t]);
    }
  }
}

RoutingLayer FinishLayer(const std::vector<LayerCounts>& all, size_t l) {
  const LayerCounts& c = all[l];
  RoutingLayer layer;
  layer.spread = SpreadOf(c.counts);
  const double own = EntropyBits(c.counts);
  const size_t earlier = layer.spread.total > 0 ? c.previous.size() : 0;
  for (size_t back = 1; back <= earlier; ++back) {
    layer.nmi_previous.push_back(Normalised(EntropyBits(all[l - back].counts), own,
                                            EntropyBits(c.previous[back - 1].Sorted())));
  }
  if (!c.token.empty()) {
    layer.nmi_token = Normalised(EntropyBits(c.token.SortedFirsts()), own,
                                 EntropyBits(c.token.Sorted()));
  }
  if (!c.previous.empty()) layer.transitions = c.previous[0].dense();
  return layer;
}

// One token of the stack, the same for everybody who reads the same store.
SampledPath SampleOf(const RoutingTrace& trace, Stack stack) {
  const RoutingSpan& s = stack == Stack::kEncoder ? trace.encoder : trace.decoder;
  SampledPath path{trace.sequence_id, stack, s.num_tokens / 2, -1, {}};
  const auto t = static_cast<size_t>(path.position);
  if (!s.token_ids.empty()) path.token_id = s.token_ids[t];
  for (int l = 0; l < s.num_layers; ++l) {
    path.experts.push_back(s.expert_ids[static_cast<size_t>(l) * s.num_tokens + t]);
  }
  return path;
}

Json ToJson(const LoadSpread& s) {
  return {{"total", s.total},
          {"mean", s.mean},
          {"deviation", s.deviation},
          {"cv", s.cv},
          {"utilisation", s.total > 0 ? 1 - s.cv : 0},
          {"skewness", s.skewness},
          {"kurtosis", s.kurtosis},
          {"min", s.min},
          {"q1", s.q1},
          {"median", s.median},
          {"q3", s.q3},
          {"iqr", s.iqr},
          {"max", s.max},
          {"active", s.active},
          {"zero", s.zero},
          {"diversity", s.diversity}};
}

Json ToJson(const Journeys& j) {
  Json paths = Json::array();
  for (const Journeys::Path& p : j.paths) {
    paths.push_back(
        {{"experts", p.experts},
         {"count", p.count},
         {"share", static_cast<double>(p.count) / static_cast<double>(j.tokens)}});
  }
  return {{"tokens", j.tokens},
          {"distinct", j.distinct},
          {"uncounted", j.uncounted},
          {"paths", paths}};
}

}  // namespace

LoadSpread SpreadOf(const std::vector<uint64_t>& counts) {
  LoadSpread s;
  std::vector<uint64_t> sorted = counts;
  if (sorted.empty()) return s;
  std::sort(sorted.begin(), sorted.end());
  s.total = std::accumulate(sorted.begin(), sorted.end(), uint64_t{0});
  const auto n = static_cast<double>(sorted.size());
  s.mean = static_cast<double>(s.total) / n;
  double second = 0, third = 0, fourth = 0;
  for (const uint64_t c : sorted) {
    const double d = static_cast<double>(c) - s.mean;
    second += d * d / n;
    third += d * d * d / n;
    fourth += d * d * d * d / n;
    ++(c > 0 ? s.active : s.zero);
  }
  s.deviation = std::sqrt(second);
  if (s.mean > 0) s.cv = s.deviation / s.mean;
  if (second > 0) {
    s.skewness = third / (second * s.deviation);
    s.kurtosis = fourth / (second * second);
  }
  s.min = static_cast<double>(sorted.front());
  s.max = static_cast<double>(sorted.back());
  s.q1 = Quantile(sorted, 0.25);
  s.median = Quantile(sorted, 0.5);
  s.q3 = Quantile(sorted, 0.75);
  s.iqr = s.q3 - s.q1;
  if (s.total > 0) s.diversity = std::exp2(EntropyBits(counts)) / n;
  return s;
}

RoutingStatistics ComputeRoutingStatistics(const TraceReader& reader,
                                           const CountObserver& on_count) {
  const MoeGeometry& g = reader.config().geometry;
  std::vector<LayerCounts> counts(static_cast<size_t>(g.num_layers()));
  for (int l = 0; l < g.num_layers(); ++l) {
    LayerCounts& c = counts[static_cast<size_t>(l)];
    c.counts.resize(static_cast<size_t>(g.num_experts));
    const int dense = g.num_experts <= kDenseExperts ? g.num_experts : 0;
    const int back = std::min(g.LayerInStack(l), kMostPrevious);
    c.previous.assign(static_cast<size_t>(back), PairCounts(dense));
  }
  RoutingStatistics stats;
  stats.num_experts = g.num_experts;
  PathCounter encoder, decoder;
  const size_t every = std::max<size_t>(
      1, (reader.sequences().size() + kSampledPaths - 1) / kSampledPaths);
  size_t index = 0;
  reader.Scan(
      [&](RoutingTrace&& trace) {
        ThrowIfStopped("while counting");
        CountSpan(trace.encoder, counts.begin());
        CountSpan(trace.decoder, counts.begin() + g.encoder_layers);
        encoder.Add(trace.encoder);
        decoder.Add(trace.decoder);
        if (on_count) on_count(index + 1);
        if (index++ % every != 0) return;
        for (const Stack stack : {Stack::kEncoder, Stack::kDecoder}) {
          const bool is_encoder = stack == Stack::kEncoder;
          if ((is_encoder ? trace.encoder : trace.decoder).num_tokens == 0) continue;
          if (g.layers(stack) > 0) stats.samples.push_back(SampleOf(trace, stack));
        }
      },
      WithHidden::kNo);
  for (size_t l = 0; l < counts.size(); ++l) {
    stats.layers.push_back(FinishLayer(counts, l));
  }
  if (g.encoder_layers > 0) stats.encoder = encoder.Finish();
  if (g.decoder_layers > 0) stats.decoder = decoder.Finish();
  return stats;
}

Json RoutingStatistics::ToJson() const {
  Json json = {{"journeys",
                {{"encoder", routecast::ToJson(encoder)},
                 {"decoder", routecast::ToJson(decoder)}}}};
  json["sample_paths"] = Json::array();
  for (const SampledPath& p : samples) {
    json["sample_paths"].push_back(
        {{"sequence_id", p.sequence_id},
         {"phase", StackName(p.stack)},
         {"position", p.position},
         {"token_id", p.token_id < 0 ? Json(nullptr) : Json(p.token_id)},
         {"experts", p.experts}});
  }
  json["layers"] = Json::array();
  for (const RoutingLayer& l : layers) {
    json["layers"].push_back(
        {{"spread", routecast::ToJson(l.spread)},
         {"nmi_previous", l.nmi_previous},
         {"nmi_token", l.nmi_token < 0 ? Json(nullptr) : Json(l.nmi_token)}});
  }
  return json;
}

Json AllStatistics(Json stats, const RoutingStatistics& routing) {
  Json more = routing.ToJson();
  for (size_t l = 0; l < routing.layers.size(); ++l) {
    stats["layers"][l].update(more["layers"][l]);
  }
  more.erase("layers");
  stats.update(more);
  return stats;
}

void WriteAllStatistics(const StoreStatistics& stats, const RoutingStatistics& routing,
                        const fs::path& folder) {
  WriteLoads(stats, folder);
  std::string csv = "layer_id,previous_expert_id,expert_id,count\n";
  const auto experts = static_cast<size_t>(routing.num_experts);
  for (size_t l = 0; l < routing.layers.size(); ++l) {
    const std::vector<uint64_t>& t = routing.layers[l].transitions;
    for (size_t i = 0; i < t.size(); ++i) {
      if (t[i] == 0) continue;
      csv += std::to_string(l) + "," + std::to_string(i / experts) + "," +
             std::to_string(i % experts) + "," + std::to_string(t[i]) + "\n";
    }
  }
  WriteFileAtomic(folder / "transitions.csv", csv);
  WriteFileAtomic(folder / "stats.json",
                  AllStatistics(stats.ToJson(), routing).dump(2) + "\n");
}

}  // namespace routecast
