#include "storage/statistics.h"

#include <algorithm>
#include <cmath>
#include <numeric>
#include <unordered_map>

#include "common/stop.h"
#include "storage/context_coder.h"
#include "storage/held_out_entropy.h"

namespace routecast {
namespace {

// Stored floats are bf16: counting their 65536 values gives exact percentiles.
class Bf16Histogram {
 public:
  void Add(float value) {
    if (counts_.empty()) counts_.resize(65536);
    ++counts_[FloatToBf16(value)];
    ++total_;
  }
  std::vector<double> Percentiles() const {
    std::vector<double> values;
    if (total_ == 0) return values;
    // Negative numbers first, from the largest bits down; then the others upwards.
    std::vector<uint16_t> order(65536);
    for (int i = 0; i < 32768; ++i) {
      order[i] = static_cast<uint16_t>(65535 - i);
      order[32768 + i] = static_cast<uint16_t>(i);
    }
    size_t at = 0;
    uint64_t seen = counts_[order[0]];
    for (const int p : kPercentiles) {
      const auto rank =
          static_cast<uint64_t>(p / 100.0 * static_cast<double>(total_ - 1));
      while (seen <= rank) seen += counts_[order[++at]];
      values.push_back(Bf16ToFloat(order[at]));
    }
    return values;
  }

 private:
  std::vector<uint64_t> counts_;
  uint64_t total_ = 0;
};

struct LayerCounters {
  std::vector<uint64_t> counts;
  std::unordered_map<uint32_t, uint64_t> pairs;     // previous expert << 16 | expert
  std::unordered_map<uint64_t, uint64_t> by_token;  // token id << 16 | expert
  std::vector<uint64_t> slots;
  uint64_t followers = 0, repeats = 0;  // experts of tokens with one before; used before
  uint64_t dropped = 0, drops_known = 0, tokens = 0;
  Bf16Histogram probs, margins;
};

double Entropy(const std::vector<uint64_t>& counts) {
  const double total =
      static_cast<double>(std::accumulate(counts.begin(), counts.end(), uint64_t{0}));
  double bits = 0;
  for (const uint64_t c : counts) {
    if (c > 0)
      bits -= static_cast<double>(c) / total * std::log2(static_cast<double>(c) / total);
  }
  return bits;
}

// The experts that each token uses: `each` of them begin at `ids + i * step`.
struct Slots {
  const uint16_t* ids;
  size_t step, each;
};
Slots SlotsOf(const RoutingSpan& s, int experts_per_token) {
  if (experts_per_token > 1 && s.top_k >= experts_per_token) {
    return {s.topk_ids.data(), static_cast<size_t>(s.top_k),
            static_cast<size_t>(experts_per_token)};
  }
  return {s.expert_ids.data(), 1, 1};
}

void CountSlots(const RoutingSpan& s, const Slots& slots, size_t layer,
                LayerCounters* c) {
  const auto tokens = static_cast<size_t>(s.num_tokens);
  if (slots.each > 1 && c->slots.empty()) c->slots.resize(c->counts.size());
  for (size_t i = layer * tokens; i < (layer + 1) * tokens; ++i) {
    const uint16_t* own = slots.ids + i * slots.step;
    for (size_t k = 0; k < slots.each; ++k) {
      if (slots.each > 1) ++c->slots[own[k]];
      if (i == layer * tokens) continue;
      const uint16_t* before = own - slots.step;
      c->repeats += std::find(before, before + slots.each, own[k]) != before + slots.each;
      ++c->followers;
    }
  }
}

void Count(const RoutingSpan& s, int experts_per_token,
           std::vector<LayerCounters>::iterator first) {
  const Slots slots = SlotsOf(s, experts_per_token);
  for (int l = 0; l < s.num_layers; ++l, ++first) {
    LayerCounters& c = *first;
    const size_t at = static_cast<size_t>(l) * s.num_tokens;
    c.tokens += static_cast<uint64_t>(s.num_tokens);
    CountSlots(s, slots, static_cast<size_t>(l), &c);
    for (size_t i = at; i < at + s.num_tokens; ++i) {
      ++c.counts[s.expert_ids[i]];
      if (l > 0) {
        ++c.pairs[static_cast<uint32_t>(s.expert_ids[i - s.num_tokens]) << 16 |
                  s.expert_ids[i]];
      }
      if (!s.token_ids.empty()) {
        ++c.by_token[uint64_t{s.token_ids[i - at]} << 16 | s.expert_ids[i]];
      }
      if (!s.dropped.empty()) c.dropped += s.dropped[i], ++c.drops_known;
      if (!s.gate_probs.empty()) c.probs.Add(s.gate_probs[i]);
      if (!s.margins.empty()) c.margins.Add(s.margins[i]);
    }
  }
}

// H(expert | token) = H(both) - H(token); sorted, so that equal stores give equal digits.
double TokenEntropy(const std::unordered_map<uint64_t, uint64_t>& by_token) {
  std::unordered_map<uint64_t, uint64_t> tokens;
  std::vector<uint64_t> joint, alone;
  for (const auto& [pair, count] : by_token) {
    joint.push_back(count);
    tokens[pair >> 16] += count;
  }
  for (const auto& [token, count] : tokens) alone.push_back(count);
  std::sort(joint.begin(), joint.end());
  std::sort(alone.begin(), alone.end());
  return std::max(0.0, Entropy(joint) - Entropy(alone));
}

LayerStatistics Finish(const LayerCounters& c, const LayerCounters* previous) {
  LayerStatistics s;
  s.tokens = c.tokens;
  s.counts = c.counts;
  s.slot_counts = c.slots;
  if (c.followers > 0) {
    s.previous_token_recall =
        static_cast<double>(c.repeats) / static_cast<double>(c.followers);
  }
  if (c.tokens > 0) s.entropy_bits = Entropy(c.counts);
  if (c.drops_known > 0) {
    s.dropped = static_cast<double>(c.dropped) / static_cast<double>(c.drops_known);
  }
  s.gate_probs = c.probs.Percentiles();
  s.margins = c.margins.Percentiles();
  if (!c.by_token.empty()) s.token_entropy_bits = TokenEntropy(c.by_token);
  if (previous != nullptr && c.tokens > 0) {
    std::vector<uint64_t> joint;
    for (const auto& [pair, count] : c.pairs) joint.push_back(count);
    // H(X | Y) = H(X, Y) - H(Y); sorted, so that equal stores give equal digits.
    std::sort(joint.begin(), joint.end());
    s.conditional_entropy_bits =
        std::max(0.0, Entropy(joint) - Entropy(previous->counts));
  }
  return s;
}

Json Percentiles(const std::vector<double>& values) {
  Json json = Json::object();
  for (size_t i = 0; i < values.size(); ++i) {
    json["p" + std::to_string(kPercentiles[i])] = values[i];
  }
  return json;
}

void AddCounts(int layer, const std::vector<uint64_t>& counts, std::string* csv) {
  for (size_t e = 0; e < counts.size(); ++e) {
    *csv += std::to_string(layer) + "," + std::to_string(e) + "," +
            std::to_string(counts[e]) + "\n";
  }
}

}  // namespace

StoreStatistics ComputeStatistics(const TraceReader& reader,
                                  const CountObserver& on_count,
                                  const WorkObserver& on_entropy) {
  const MoeGeometry& g = reader.config().geometry;
  std::vector<LayerCounters> counters(static_cast<size_t>(g.num_layers()));
  for (LayerCounters& c : counters) c.counts.resize(static_cast<size_t>(g.num_experts));
  StoreStatistics stats;
  stats.model = reader.config().model;
  stats.num_experts = g.num_experts;
  stats.experts_per_token = g.experts_per_token;
  std::vector<uint32_t> lengths;
  for (const SequenceInfo& info : reader.sequences()) {
    ++stats.sequences;
    ++stats.parts[static_cast<size_t>(SplitOf(info.group_id))];
    stats.encoder_tokens += info.encoder_tokens;
    stats.decoder_tokens += info.decoder_tokens;
    stats.hidden_sequences += info.has_hidden;
    lengths.push_back(info.encoder_tokens + info.decoder_tokens);
  }
  std::sort(lengths.begin(), lengths.end());
  for (const int p : kPercentiles) {
    if (!lengths.empty())
      stats.sequence_tokens.push_back(lengths[p * (lengths.size() - 1) / 100]);
  }
  const double share = TrainedShare(reader.sequences(), g);
  HeldOutEntropy held_out(g);
  uint64_t counted = 0;
  reader.Scan(
      [&](RoutingTrace&& trace) {
        ThrowIfStopped("while counting");
        if (InTrainedShare(trace.sequence_id, share)) held_out.Add(trace);
        Count(trace.encoder, g.experts_per_token, counters.begin());
        Count(trace.decoder, g.experts_per_token, counters.begin() + g.encoder_layers);
        if (on_count) on_count(++counted);
      },
      WithHidden::kNo);
  std::vector<double> held_out_bits(counters.size(), -1.0);
  if (g.num_experts <= kMaxCodedExperts) held_out_bits = held_out.Bits(on_entropy);
  for (int l = 0; l < g.num_layers(); ++l) {
    const bool first = g.LayerInStack(l) == 0;
    LayerStatistics s = Finish(counters[l], first ? nullptr : &counters[l - 1]);
    s.stack = g.StackOf(l);
    s.layer = g.LayerInStack(l);
    s.global_layer = l;
    s.held_out_entropy_bits = held_out_bits[static_cast<size_t>(l)];
    stats.layers.push_back(std::move(s));
  }
  return stats;
}

Json StoreStatistics::ToJson() const {
  Json json = {{"model", model},
               {"num_experts", num_experts},
               {"experts_per_token", experts_per_token},
               {"split", Json::object()},
               {"sequences", sequences},
               {"encoder_tokens", encoder_tokens},
               {"decoder_tokens", decoder_tokens},
               {"hidden_sequences", hidden_sequences}};
  for (const SplitPart part :
       {SplitPart::kTrain, SplitPart::kValidation, SplitPart::kTest}) {
    json["split"][SplitPartName(part)] = parts[static_cast<size_t>(part)];
  }
  json["sequence_tokens"] =
      Percentiles(std::vector<double>(sequence_tokens.begin(), sequence_tokens.end()));
  json["layers"] = Json::array();
  for (const LayerStatistics& s : layers) {
    Json layer = {{"phase", StackName(s.stack)},
                  {"layer", s.layer},
                  {"layer_id", s.global_layer},
                  {"tokens", s.tokens}};
    const auto known = [](double v) { return v < 0 ? Json(nullptr) : Json(v); };
    layer["entropy_bits"] = known(s.entropy_bits);
    layer["conditional_entropy_bits"] = known(s.conditional_entropy_bits);
    layer["token_entropy_bits"] = known(s.token_entropy_bits);
    layer["held_out_entropy_bits"] = known(s.held_out_entropy_bits);
    Json load = Json::array();
    for (const uint64_t c : s.counts) {
      load.push_back(s.tokens ? static_cast<double>(c) / static_cast<double>(s.tokens)
                              : 0.0);
    }
    layer["load"] = load;
    if (!s.slot_counts.empty()) {
      const auto uses =
          std::accumulate(s.slot_counts.begin(), s.slot_counts.end(), uint64_t{0});
      Json slot_load = Json::array();
      for (const uint64_t c : s.slot_counts) {
        slot_load.push_back(static_cast<double>(c) / static_cast<double>(uses));
      }
      layer["slots"] = uses;
      layer["slot_load"] = slot_load;
    }
    layer["previous_token_recall"] = known(s.previous_token_recall);
    layer["dropped"] = known(s.dropped);
    layer["percentiles"] = {{"gate_probs", Percentiles(s.gate_probs)},
                            {"margins", Percentiles(s.margins)}};
    json["layers"].push_back(layer);
  }
  return json;
}

void WriteLoads(const StoreStatistics& statistics, const fs::path& folder) {
  MakeFolder(folder);
  std::string load = "layer_id,expert_id,count\n", slots = load;
  bool several = false;
  for (const LayerStatistics& s : statistics.layers) {
    AddCounts(s.global_layer, s.counts, &load);
    AddCounts(s.global_layer, s.slot_counts, &slots);
    several = several || !s.slot_counts.empty();
  }
  WriteFileAtomic(folder / "load.csv", load);
  fs::remove(folder / "slot_load.csv");  // of another store
  if (several) WriteFileAtomic(folder / "slot_load.csv", slots);
}

void WriteStatistics(const StoreStatistics& statistics, const fs::path& folder) {
  WriteLoads(statistics, folder);
  WriteFileAtomic(folder / "stats.json", statistics.ToJson().dump(2) + "\n");
}

}  // namespace routecast
