// The loop of rms_norm.h over a group of lanes (lane_group.h), a group a row. Internal to
// rms_norm*.
#pragma once

#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include <cmath>

#include "models/lane_group.h"

namespace routecast {

struct NormArgs {
  const void *x, *gain;  // [rows, width] and [width], of one type
  void* y;
  int64_t rows, width;
  float epsilon;
};

template <class T, class Group>
ROUTECAST_LANES void NormOneRow(const Group& g, const NormArgs& a, int64_t row) {
  const T* x = static_cast<const T*>(a.x) + row * a.width;
  const T* gain = static_cast<const T*>(a.gain);
  T* y = static_cast<T*>(a.y) + row * a.width;
  float sum = 0;
  for (int64_t i = g.lane(); i < a.width; i += g.size()) {
    const float v = static_cast<float>(x[i]);
    sum += v * v;
  }
  const float mean = g.Sum(sum) / static_cast<float>(a.width);
  const float scale = 1 / std::sqrt(mean + a.epsilon);
  for (int64_t i = g.lane(); i < a.width; i += g.size()) {
    const T quotient = static_cast<T>(static_cast<float>(x[i]) * scale);
    y[i] = static_cast<T>(static_cast<float>(gain[i]) * static_cast<float>(quotient));
  }
}

// `type` counts fp32, bf16, fp16.
void NormRowsCuda(const NormArgs& args, int type);

}  // namespace routecast
