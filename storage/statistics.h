// What a store's routing looks like: entropies, loads, drops, percentiles.
// Thread rule: one thread. Memory: E*E counters and one for each (token id, expert) seen
// a MoE layer; and kMaxTrainedIds ids for the held-out entropy.
#pragma once

#include <array>
#include <functional>
#include <string>
#include <vector>

#include "storage/context_trainer.h"
#include "storage/trace_reader.h"

namespace routecast {

inline constexpr std::array<int, 8> kPercentiles = {1, 5, 25, 50, 75, 90, 95, 99};

struct LayerStatistics {
  Stack stack = Stack::kEncoder;
  int layer = 0;         // in its stack
  int global_layer = 0;  // MoeGeometry
  uint64_t tokens = 0;
  std::vector<uint64_t> counts;  // [E] tokens that chose each expert
  // Of the experts' shares (plug-in estimate); negative for a layer without tokens.
  double entropy_bits = -1;
  // Of the expert given the same token's expert in the layer before; negative for the
  // first layer of a stack, which has none, and for a layer without tokens. A plug-in
  // estimate: low where tokens < E*E.
  double conditional_entropy_bits = -1;
  // Of the expert given the token id: plug-in. Negative where there are no token ids.
  double token_entropy_bits = -1;
  // Of the expert given token id (else the layer's expert of the token before) and the
  // layer before's expert, of documents that the estimate has not seen
  // (held_out_entropy.h). Negative where it was not asked for, where there are no other
  // documents, and where experts (kMaxCodedExperts) or contexts are too many.
  double held_out_entropy_bits = -1;
  double dropped = -1;  // share that capacity dropped; negative where not recorded
  // Of models that route to k experts a token, where the store has them all: [E] uses of
  // each expert in any of a token's k slots. Empty where k is 1 or only one is known.
  std::vector<uint64_t> slot_counts;
  // Share of a token's experts (all k, else its one) that the token before it in the
  // sequence used too; negative where no token has one before it.
  double previous_token_recall = -1;
  // At kPercentiles; empty where not recorded.
  std::vector<double> gate_probs, margins;
};

struct StoreStatistics {
  std::string model;  // its name in store.json
  int num_experts = 0, experts_per_token = 1;
  std::array<uint64_t, 3> parts = {};  // sequences, by SplitPart
  uint64_t sequences = 0, encoder_tokens = 0, decoder_tokens = 0, hidden_sequences = 0;
  std::vector<uint32_t> sequence_tokens;  // of both stacks, at kPercentiles
  std::vector<LayerStatistics> layers;    // by global layer
  Json ToJson() const;
};

// Told how many sequences are counted, after each.
using CountObserver = std::function<void(uint64_t sequences)>;
// Reads the whole store once; `on_entropy` is told how far the held-out entropy is, which
// comes after it and is slower.
StoreStatistics ComputeStatistics(const TraceReader& reader,
                                  const CountObserver& on_count = {},
                                  const WorkObserver& on_entropy = {});
// load.csv (`layer_id,expert_id,count`, of the first choice) and, where a token has
// several experts that are all stored, slot_load.csv, the same of all of them.
void WriteLoads(const StoreStatistics& statistics, const fs::path& folder);
// These, and then stats.json.
void WriteStatistics(const StoreStatistics& statistics, const fs::path& folder);

}  // namespace routecast
