// The table of a layer whose experts come and go: written on the host as leases are
// taken, sent to the device where it changed. Thread rule: one thread at a time.
#pragma once

#include <vector>

#include "models/expert_gemv.h"
#include "models/switch_config.h"

namespace routecast {

class SlotTable {
 public:
  // Of a layer of the model that `config` describes, with nothing in it.
  SlotTable(const SwitchConfig& config, at::ScalarType dtype, at::Device device);
  // From the next Send on `expert` is read where `weights` lie. What others' rows say
  // stays: it is right for as long as their leases are held, and must not be read
  // afterwards. Throws what AddressesOf throws.
  void Set(int expert, const ExpertWeights& weights);
  // Queued on the current stream, where a row has changed since the last time.
  void Send();
  const ExpertTable& table() const { return table_; }
  int64_t num_sent() const { return num_sent_; }

 private:
  ExpertTable table_;
  at::Tensor host_E3_;
  bool changed_ = false;
  int64_t num_sent_ = 0;
};

}  // namespace routecast
