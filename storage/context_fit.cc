#include "storage/context_fit.h"

#include <algorithm>
#include <cmath>

namespace routecast {

Fitted FitRow(const std::vector<Observed>& observed, double total,
              const TrainerOptions& options) {
  Fitted fitted;
  std::vector<const Observed*> kept;
  double rest = total, expected_rest = total;
  for (const Observed& o : observed) {
    // Log likelihood ratio of Poisson counts, in bits.
    const double ratio = (o.count + options.prior) / (o.expected + options.prior);
    const double bits =
        o.count * std::log2(ratio) - (o.count - o.expected) * std::log2(std::exp(1.0));
    if (bits <= options.entry_bits) continue;
    kept.push_back(&o);
    fitted.saved_bits += bits - options.entry_bits;
    rest -= o.count;
    expected_rest -= o.expected;
  }
  const double others = (std::max(rest, 0.0) + options.prior) /
                        (std::max(expected_rest, 0.0) + options.prior);
  for (const Observed* o : kept) {
    const double ratio = (o->count + options.prior) / (o->expected + options.prior);
    const long factor = std::lround(kFactorSteps * std::log2(ratio / others));
    fitted.row.push_back({o->expert, static_cast<int16_t>(std::clamp<long>(
                                         factor, -kMaxFactor, kMaxFactor))});
  }
  return fitted;
}

std::vector<uint64_t> CountsOf(const std::vector<uint16_t>& ids, size_t experts) {
  std::vector<uint64_t> counts(experts, 0);
  for (const uint16_t id : ids) ++counts[id];
  return counts;
}

std::vector<uint32_t> MarginalWeights(const std::vector<uint64_t>& counts) {
  uint64_t sum = 0;
  for (const uint64_t count : counts) sum += count;
  const uint64_t spread = kBaseScale - counts.size();
  std::vector<uint32_t> weights;
  uint32_t given = 0;
  for (const uint64_t count : counts) {
    const uint64_t share = sum == 0 ? 0 : count * spread / sum;
    weights.push_back(1 + static_cast<uint32_t>(share));
    given += weights.back();
  }
  *std::max_element(weights.begin(), weights.end()) += kBaseScale - given;
  return weights;
}

void KeepContexts(Contexts contexts, const TrainerOptions& options, StackTables* tables) {
  for (auto& [key, context] : contexts) {
    if (context.saved_bits <= options.context_bits) continue;
    tables->contexts.push_back({static_cast<uint32_t>(key >> 32),
                                static_cast<uint32_t>(key), std::move(context.rows)});
  }
}

}  // namespace routecast
