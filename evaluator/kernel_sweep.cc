#include "evaluator/kernel_sweep.h"

#include <ATen/ATen.h>
#include <c10/core/GradMode.h>

#include <algorithm>

#include "common/stop.h"
#include "evaluator/clock.h"
#include "models/device_choice.h"

namespace routecast {

double MeasureProducts(at::Device device, at::ScalarType dtype, int64_t size,
                       double seconds) {
  constexpr int kFewest = 4;  // the first warms up
  const c10::NoGradGuard no_grad;
  const auto options = at::TensorOptions().device(device).dtype(dtype);
  const at::Tensor a = at::ones({size, size}, options),
                   b = at::ones({size, size}, options);
  at::Tensor product = at::empty({size, size}, options);
  const SteadyClock clock;
  const double begin = clock.Now(), operations = 2.0 * static_cast<double>(size) *
                                                 static_cast<double>(size) *
                                                 static_cast<double>(size);
  double best = 0;
  for (int i = 0; i < kFewest || clock.Now() - begin < seconds; ++i) {
    ThrowIfStopped("while multiplying matrices");
    Synchronize(device);
    const double from = clock.Now();
    at::mm_out(product, a, b);
    Synchronize(device);
    if (i > 0) best = std::max(best, operations / (clock.Now() - from));
  }
  return best;
}

}  // namespace routecast
