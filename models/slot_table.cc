#include "models/slot_table.h"

#include <ATen/ATen.h>

#include <algorithm>

#include "models/host_copy.h"

namespace routecast {

SlotTable::SlotTable(const SwitchConfig& config, at::ScalarType dtype, at::Device device)
    : host_E3_(at::zeros({config.num_experts, 3}, at::kLong)) {
  table_.addresses_E3 = host_E3_.to(device, at::kLong, false, /*copy=*/true);
  table_.dtype = dtype;
  table_.d_model = config.d_model;
  table_.d_ff = config.d_ff;
  table_.gated = config.is_gated_act;
}

void SlotTable::Set(int expert, const ExpertWeights& weights) {
  const std::array<int64_t, 3> row = AddressesOf(weights, table_);
  int64_t* to = host_E3_.mutable_data_ptr<int64_t>() + int64_t{3} * expert;
  if (std::equal(row.begin(), row.end(), to)) return;
  std::ranges::copy(row, to);
  changed_ = true;
}

void SlotTable::Send() {
  if (!changed_) return;
  SendTo(table_.addresses_E3, host_E3_);
  changed_ = false;
  ++num_sent_;
}

}  // namespace routecast
