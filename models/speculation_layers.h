// What speculation models are made of: layers over plain tensors, and dropout as a
// function of a key. D model width.
//
// M models of one shape may live in one set of layers. Each parameter then has a leading
// dimension M, activations hold the members one after another in their first dimension
// ([M * B, ..]), and every product is one batched product. What has no parameters needs
// not know: members never mix. M = 1 has no leading dimension.
#pragma once

#include <ATen/core/Generator.h>
#include <ATen/core/Tensor.h>

#include <string>
#include <vector>

#include "models/parameters.h"
#include "models/speculation_kinds.h"

namespace routecast {

class TokenMemory;

// Adds seeded leaf parameters to a model, each from its own stream. A member's values are
// those that a model of its own with the member's seed would have. Shared ones are the
// other model's own tensors: what is learnt in one is learnt in both.
class ParameterMaker {
 public:
  ParameterMaker(Parameters* parameters, const ModelSeeds& seeds)
      : parameters_(parameters), seeds_(seeds.each) {
    if (seeds.shared != nullptr) shared_ = *seeds.shared;
  }
  at::Tensor Xavier(const std::string& name, std::vector<int64_t> shape,
                    double gain = 1);  // fans: the last two dimensions
  at::Tensor Normal(const std::string& name, std::vector<int64_t> shape,
                    double deviation);
  at::Tensor Constant(const std::string& name, std::vector<int64_t> shape, double value);
  int64_t members() const { return static_cast<int64_t>(seeds_.size()); }

 private:
  template <typename Fill>
  at::Tensor Draw(const std::string& name, const std::vector<int64_t>& shape,
                  const Fill& fill);
  at::Tensor Leaf(const std::string& name, at::Tensor tensor);
  Parameters* parameters_;
  std::vector<uint64_t> seeds_;
  Parameters shared_;
  uint64_t count_ = 0;
};

// x + row, a parameter [D] (members: [M,D]) for every row of x [M * .., D].
at::Tensor AddRow(const at::Tensor& x, const at::Tensor& row);
// x + rows, parameters [R,D] (members: [M,R,D]) for x [M * .., R, D].
at::Tensor AddRows(const at::Tensor& x, const at::Tensor& rows);
// x [M * ..,in] times weight [out,in] (members: [M,out,in]) transposed.
at::Tensor Product(const at::Tensor& x, const at::Tensor& weight);

struct LinearLayer {
  LinearLayer(ParameterMaker* make, const std::string& name, int64_t in, int64_t out,
              double gain = 1);
  at::Tensor operator()(const at::Tensor& x) const;
  at::Tensor weight, bias;
};

struct NormLayer {
  NormLayer(ParameterMaker* make, const std::string& name, int64_t width);
  at::Tensor operator()(const at::Tensor& x) const;  // epsilon 1e-5
  at::Tensor weight, bias;
};

struct EmbeddingLayer {
  EmbeddingLayer(ParameterMaker* make, const std::string& name, int64_t rows,
                 int64_t width, double deviation)
      : weight(make->Normal(name, {rows, width}, deviation)) {}
  at::Tensor operator()(const at::Tensor& ids) const;   // [M * .., D]
  at::Tensor Row(int64_t row) const;                    // for AddRow
  at::Tensor Rows(int64_t first, int64_t count) const;  // for AddRows
  int64_t rows() const { return weight.size(-2); }
  at::Tensor weight;
};

// Multi-head attention; mask is added to the scores, broadcastable to [B,A,Q,K], finite
// (kMasked), so that a row without keys gives a finite value instead of NaN.
inline constexpr double kMasked = -1e9;
// Of a bool tensor: true = may attend, the one meaning of a mask here.
at::Tensor AdditiveMask(const at::Tensor& may_attend);
struct AttentionLayer {
  AttentionLayer(ParameterMaker* make, const std::string& name, int64_t width, int heads,
                 double gain = 1);
  // query [B,Q,D], memory [B,K,D] (keys and values), mask undefined = none. With `past`
  // its keys and values precede those of `memory`.
  at::Tensor operator()(const at::Tensor& query, const at::Tensor& memory,
                        const at::Tensor& mask, TokenMemory* past = nullptr) const;
  // How a query without a mask weighs the memory, the mean over heads [B,Q,K]; float32.
  at::Tensor Weights(const at::Tensor& query, const at::Tensor& memory) const;
  int heads;
  LinearLayer q, k, v, out;
};

// The i-th use in a forward pass draws from the stream (key, i); key 0 = identity. With
// several keys the first dimension holds as many members, each with a stream of its own.
// What is drawn is float32 whatever x is, and so is the result where something was drawn.
class KeyedDropout {
 public:
  KeyedDropout(double probability, uint64_t key)
      : KeyedDropout(probability, std::vector{key}) {}
  KeyedDropout(double probability, std::vector<uint64_t> keys)
      : probability_(probability), keys_(std::move(keys)) {}
  at::Tensor operator()(const at::Tensor& x);
  bool active() const { return keys_[0] != 0; }  // false: serving
  // x + normal noise of this deviation, from a stream of its own; identity when serving.
  at::Tensor AddNoise(const at::Tensor& x, double deviation);

 private:
  // Calls fill(part, generator) for each member's part of x's first dimension.
  template <typename Fill>
  at::Tensor Draw(const at::Tensor& x, const Fill& fill);
  double probability_;
  std::vector<uint64_t> keys_;
  uint64_t uses_ = 0;
};

// x + attention over itself (and what `past` holds), normed.
struct AttentionBlock {
  AttentionBlock(ParameterMaker* make, const std::string& name, int64_t width, int heads,
                 double gain = 1)
      : attention(make, name + ".attention", width, heads, gain),
        norm(make, name + ".attention_norm", width) {}
  at::Tensor operator()(const at::Tensor& x, const at::Tensor& mask,
                        KeyedDropout* dropout, TokenMemory* past = nullptr) const;
  AttentionLayer attention;
  NormLayer norm;
};

// A post-norm encoder layer: attention, then D -> F -> D with GELU (exact) or ReLU.
struct EncoderLayer {
  EncoderLayer(ParameterMaker* make, const std::string& name, int64_t width, int heads,
               int64_t ff, bool relu = false, double gain = 1)
      : attention(make, name, width, heads, gain),
        in(make, name + ".in", width, ff, gain),
        out(make, name + ".out", ff, width, gain),
        out_norm(make, name + ".out_norm", width),
        relu(relu) {}
  at::Tensor operator()(const at::Tensor& x, const at::Tensor& mask,
                        KeyedDropout* dropout, TokenMemory* past = nullptr) const;
  AttentionBlock attention;
  LinearLayer in, out;
  NormLayer out_norm;
  bool relu;
};

// One layer of a long short-term memory over the tokens, from the first on, or from where
// `past` ends.
struct LstmLayer {
  LstmLayer(ParameterMaker* make, const std::string& name, int64_t in, int64_t width)
      : input(make, name + ".input", in, 4 * width),
        state(make, name + ".state", width, 4 * width) {}
  // [B,T,width]
  at::Tensor operator()(const at::Tensor& x_BTI, TokenMemory* past = nullptr) const;
  LinearLayer input, state;
};

}  // namespace routecast
