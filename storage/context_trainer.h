// Makes a context model from routing: layer by layer, first how experts follow the
// expert of the layer before, then what each token (and each pair) changes about that.
// An expert gets an entry in a row where its counts differ so much from what the model
// expected without it that the entry saves more bits than it costs.
// Thread rule: one thread. Memory: 2 bytes an added id, 4 bytes a token, and about 24
// bytes a token while training.
#pragma once

#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "storage/context_model.h"

namespace routecast {

struct TrainerOptions {
  ContextKind kind = ContextKind::kTokens;
  // Bits that an entry, and a context beside them, must save at least: what they take in
  // the model's file. 0 for an estimate where the model's size does not count.
  double entry_bits = 12, context_bits = 24;
  // Added to counts and expectations: how strongly few observations are distrusted.
  double prior = 0.4;
};

// Told the share of the work that is done, 0 to 1, again and again.
using WorkObserver = std::function<void(double share)>;

class ContextTrainer {
 public:
  ContextTrainer(const MoeGeometry& geometry, const TrainerOptions& options);
  // REQUIRES the geometry's layers, ids < E, and token ids in all spans or in none.
  // Spans without tokens are passed over.
  void Add(Stack s, const RoutingSpan& span);
  // The model is a function of the spans and their order.
  ContextModel Train(const std::string& where, const WorkObserver& on_work = {}) const;

 private:
  struct Sample {
    std::vector<uint32_t> tokens;            // all spans', one after the other
    std::vector<uint64_t> begins;            // where each span begins
    std::vector<std::vector<uint16_t>> ids;  // [L][tokens]
    bool has_tokens = false;
  };
  // `on_work` is told how many of the sample's ids are fitted.
  StackTables TrainStack(const Sample& sample,
                         const std::function<void(uint64_t)>& on_work) const;

  MoeGeometry geometry_;
  TrainerOptions options_;
  Sample samples_[2];
};

}  // namespace routecast
