// What speculation models are made of: layers over plain tensors, and dropout as a
// function of a key. D model width.
#pragma once

#include <ATen/core/Generator.h>
#include <ATen/core/Tensor.h>

#include <string>
#include <vector>

#include "models/parameters.h"

namespace routecast {

// Adds seeded leaf parameters to a model, each from its own stream.
class ParameterMaker {
 public:
  ParameterMaker(Parameters* parameters, uint64_t seed)
      : parameters_(parameters), seed_(seed) {}
  at::Tensor Xavier(const std::string& name, std::vector<int64_t> shape);  // last two
  at::Tensor Normal(const std::string& name, std::vector<int64_t> shape,
                    double deviation);
  at::Tensor Constant(const std::string& name, std::vector<int64_t> shape, double value);

 private:
  at::Generator NextStream();
  at::Tensor Leaf(const std::string& name, at::Tensor tensor);
  Parameters* parameters_;
  uint64_t seed_;
  uint64_t count_ = 0;
};

struct LinearLayer {
  LinearLayer(ParameterMaker* make, const std::string& name, int64_t in, int64_t out);
  at::Tensor operator()(const at::Tensor& x) const;
  at::Tensor weight, bias;
};

struct NormLayer {
  NormLayer(ParameterMaker* make, const std::string& name, int64_t width);
  at::Tensor operator()(const at::Tensor& x) const;  // epsilon 1e-5
  at::Tensor weight, bias;
};

// Multi-head attention; mask is added to the scores, broadcastable to [B,A,Q,K], finite
// (kMasked), so that a row without keys gives a finite value instead of NaN.
inline constexpr double kMasked = -1e9;
struct AttentionLayer {
  AttentionLayer(ParameterMaker* make, const std::string& name, int64_t width, int heads);
  // query [B,Q,D], memory [B,K,D] (keys and values), mask undefined = none.
  at::Tensor operator()(const at::Tensor& query, const at::Tensor& memory,
                        const at::Tensor& mask) const;
  int heads;
  LinearLayer q, k, v, out;
};

// The i-th use in a forward pass draws from the stream (key, i); key 0 = identity.
class KeyedDropout {
 public:
  KeyedDropout(double probability, uint64_t key) : probability_(probability), key_(key) {}
  at::Tensor operator()(const at::Tensor& x);

 private:
  double probability_;
  uint64_t key_;
  uint64_t uses_ = 0;
};

}  // namespace routecast
