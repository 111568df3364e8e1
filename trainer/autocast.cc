#include "trainer/autocast.h"

#include <ATen/ATen.h>
#include <ATen/autocast_mode.h>

namespace routecast {

AutocastScope::AutocastScope(at::Device device, at::ScalarType dtype)
    : device_(device.type()), active_(dtype != at::kFloat) {
  if (!active_) return;
  enabled_before_ = at::autocast::is_autocast_enabled(device_);
  dtype_before_ = at::autocast::get_autocast_dtype(device_);
  at::autocast::set_autocast_enabled(device_, true);
  at::autocast::set_autocast_dtype(device_, dtype);
  at::autocast::increment_nesting();
}

AutocastScope::~AutocastScope() {
  if (!active_) return;
  // Copies of the parameters are kept for one pass: the optimizer changes them next.
  if (at::autocast::decrement_nesting() == 0) at::autocast::clear_cache();
  at::autocast::set_autocast_dtype(device_, dtype_before_);
  at::autocast::set_autocast_enabled(device_, enabled_before_);
}

std::vector<SpeculationOutput> ForwardMembersAs(at::ScalarType dtype,
                                                SpeculationModel* model,
                                                const RoutingWindow& window,
                                                uint64_t dropout_key) {
  std::vector<SpeculationOutput> outputs;
  {
    const AutocastScope scope(window.token_ids_BT.device(), dtype);
    outputs = model->ForwardMembers(window, dropout_key);
  }
  for (SpeculationOutput& o : outputs) {
    for (at::Tensor* x :
         {&o.logits_BTHE, &o.confidence_BTH, &o.next_token_BTV, &o.own_loss,
          &o.features_BTHD, &o.expert_keys_ED, &o.later_BTLE, &o.backups_BTHKE}) {
      if (x->defined()) *x = x->to(at::kFloat);
    }
  }
  return outputs;
}

}  // namespace routecast
