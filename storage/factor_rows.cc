#include "storage/factor_rows.h"

#include <algorithm>
#include <unordered_map>

namespace routecast {

FactorRows::FactorRows(const StackTables& tables, size_t share, const std::string& where,
                       const char* what)
    : num_layers_(tables.marginal.size()) {
  const size_t experts = num_layers_ == 0 ? 0 : tables.marginal[0].size();
  std::unordered_map<uint32_t, const StackTables::Context*> alone;
  for (const auto& context : tables.contexts) {
    if (context.outer == kAnyContext) alone[context.inner] = &context;
  }
  for (size_t l = 0; l < num_layers_; ++l) Add({}, experts, share);
  uint64_t factors = 0;
  for (const auto& context : tables.contexts) {
    const auto inner = alone.find(context.inner);
    const bool pair = context.outer != kAnyContext && inner != alone.end();
    for (size_t l = 0; l < num_layers_; ++l) {
      const Row row =
          pair ? Compose(inner->second->rows[l], context.rows[l]) : context.rows[l];
      factors += row.size();
      RequireModelSize(factors <= kMaxFactors, where, what);
      Add(row, experts, share);
    }
  }
}

void FactorRows::Add(const Row& row, size_t num_experts, size_t share) {
  if (row.size() * share < Padded(num_experts)) {
    heads_.push_back(static_cast<uint32_t>(entries_.size()));
    entries_.push_back({static_cast<uint16_t>(row.size()), 0});
    entries_.insert(entries_.end(), row.begin(), row.end());
    return;
  }
  heads_.push_back(static_cast<uint32_t>(vectors_) | kDense);
  const size_t begin = vectors_ * kLanes, bytes = Padded(num_experts);
  vectors_ += bytes / kLanes;
  lines_.resize((begin + bytes + sizeof(Line) - 1) / sizeof(Line));
  int8_t* to = reinterpret_cast<int8_t*>(lines_.data()) + begin;
  std::fill(to, to + bytes, kAbsent);
  for (const RowEntry& e : row) to[e.expert] = static_cast<int8_t>(e.factor);
}

}  // namespace routecast
