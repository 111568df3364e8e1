// The loops of expert_gemv.h, once for both devices: a group of lanes (lane_group.h) a
// number of the result. Internal to expert_gemv*.
#pragma once

#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include <cmath>
#include <limits>

#include "models/activation.h"
#include "models/lane_group.h"

namespace routecast {

struct GemvArgs {
  const int64_t* addresses;  // [experts, 3]
  const int64_t* ids;        // [tokens]; below 0: the token's numbers stay as they are
  const void* x;             // [tokens, depth]
  void* out;                 // [tokens, columns]
  int64_t tokens, depth, columns;
  int matrix;  // 0: wi, with activation and gate; 1: wo, plain
  bool gated;
  Activation activation;
  bool wide;  // rows are whole 16-byte words, and begin at one
};

template <class T>
ROUTECAST_LANES T Rounded(float v) {
  return static_cast<T>(v);
}

// As Activate (activation.h): gelu_new is rounded at every step.
template <class T>
ROUTECAST_LANES T Activated(Activation activation, T value) {
  const float x = static_cast<float>(value);
  if (activation == Activation::kRelu) return x < 0 ? T(0.0f) : value;
  if (activation == Activation::kGelu) {
    return Rounded<T>(0.5f * x * (1 + std::erf(x * 0.70710678118654752f)));
  }
  if (activation == Activation::kSilu) return Rounded<T>(x / (1 + std::exp(-x)));
  const auto at = [](T v) { return static_cast<float>(v); };
  const T cube = Rounded<T>(0.044715f * at(Rounded<T>(x * x * x)));
  const T inner = Rounded<T>(0.79788456080286536f * at(Rounded<T>(x + at(cube))));
  const T outer = Rounded<T>(1 + at(Rounded<T>(std::tanh(at(inner)))));
  return Rounded<T>(at(Rounded<T>(0.5f * x)) * at(outer));
}

template <class T>
struct alignas(16) Pack {
  static constexpr int kSize = 16 / static_cast<int>(sizeof(T));
  T v[kSize];
};

template <class T, class Group>
ROUTECAST_LANES float Dot(const Group& g, const T* a, const T* b, int64_t depth,
                          bool wide) {
  float sum = 0;
  if (wide) {
    using P = Pack<T>;
    const P* pa = reinterpret_cast<const P*>(a);
    const P* pb = reinterpret_cast<const P*>(b);
    for (int64_t k = g.lane(); k < depth / P::kSize; k += g.size()) {
      const P x = pa[k], y = pb[k];
      for (int i = 0; i < P::kSize; ++i) {
        sum = std::fma(static_cast<float>(x.v[i]), static_cast<float>(y.v[i]), sum);
      }
    }
  } else {
    for (int64_t k = g.lane(); k < depth; k += g.size()) {
      sum = std::fma(static_cast<float>(a[k]), static_cast<float>(b[k]), sum);
    }
  }
  return g.Sum(sum);
}

// Number `index` of the result: token index / columns, column index % columns.
template <class T, class Group>
ROUTECAST_LANES void GemvNumber(const Group& g, const GemvArgs& a, int64_t index) {
  const int64_t token = index / a.columns, column = index % a.columns;
  if (a.ids[token] < 0) return;
  const int64_t* entry = a.addresses + 3 * a.ids[token];
  const T* x = static_cast<const T*>(a.x) + token * a.depth;
  T* out = static_cast<T*>(a.out) + index;
  if (entry[a.matrix] == 0 || (a.gated && a.matrix == 0 && entry[2] == 0)) {
    if (g.lane() == 0) *out = T(std::numeric_limits<float>::quiet_NaN());
    return;
  }
  const T* w = reinterpret_cast<const T*>(entry[a.matrix]) + column * a.depth;
  T value = Rounded<T>(Dot(g, w, x, a.depth, a.wide));
  if (a.matrix == 0) {
    value = Activated(a.activation, value);
    if (a.gated) {
      const T* gate = reinterpret_cast<const T*>(entry[2]) + column * a.depth;
      const T factor = Rounded<T>(Dot(g, gate, x, a.depth, a.wide));
      value = Rounded<T>(static_cast<float>(value) * static_cast<float>(factor));
    }
  }
  if (g.lane() == 0) *out = value;
}

// `type` counts fp32, bf16, fp16.
void GemvCpu(const GemvArgs& args, int type);
void GemvCuda(const GemvArgs& args, int type);

}  // namespace routecast
