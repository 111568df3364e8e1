// Token ids that a model has no row for.
#pragma once

#include <ATen/ATen.h>

#include <algorithm>

#include "models/routing_window.h"

namespace routecast {

// The window with ids of `vocab_size` and above read as padding is: what is served, and
// another store, may have ids that training never saw. 0 = the model reads none.
inline RoutingWindow WithKnownIds(RoutingWindow window, int vocab_size) {
  at::Tensor& ids = window.token_ids_BT;
  if (vocab_size == 0 || ids.numel() == 0) return window;
  if (ids.is_cpu() && ids.is_contiguous() && ids.scalar_type() == at::kLong) {
    // Between layers a tensor call costs more than a look at the numbers.
    const int64_t* id = ids.const_data_ptr<int64_t>();
    if (*std::max_element(id, id + ids.numel()) < vocab_size) return window;
  }
  ids = ids.masked_fill(ids.ge(vocab_size), 0);
  return window;
}

}  // namespace routecast
