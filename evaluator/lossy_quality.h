// What lossy rows change in the output, beside what they change in speed. B sequences, V
// vocabulary. Thread rule: one thread.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <vector>

namespace routecast {

// The decoder's steps over one segment: fp32 logits [B,V] and chosen ids [B] of each.
// What is added that is neither (an encoder's output) is passed over.
class OutputLog {
 public:
  explicit OutputLog(uint64_t most_bytes) : room_(most_bytes) {}
  // In the order in which OutputHash::Add is called: logits, then their ids.
  void Add(const at::Tensor& tensor);
  bool whole() const { return whole_; }  // false: there was no room for all
  struct Step {
    at::Tensor logits_BV, ids_B;
  };
  const std::vector<Step>& steps() const { return steps_; }
  uint64_t bytes() const { return bytes_; }

 private:
  uint64_t room_, bytes_ = 0;
  bool whole_ = true;
  at::Tensor last_;
  std::vector<Step> steps_;
};

// Sums over segments. Steps count as long as a sequence's chosen ids are those of the
// reference: later ones would compare two different texts.
class LossyQuality {
 public:
  void Compare(const OutputLog& reference, const OutputLog& lossy);
  int64_t sequences() const { return sequences_; }
  // Share of sequences whose chosen ids are all the reference's.
  double exact_match() const;
  // Mean over steps of KL(reference || lossy), nats.
  double logit_kl() const;
  // exp(mean -ln p_lossy(y)) / exp(mean -ln p(y)) - 1 with y the reference's choice.
  double perplexity_change() const;

 private:
  int64_t sequences_ = 0, equal_ = 0, steps_ = 0;
  double kl_ = 0, nll_ = 0, nll_lossy_ = 0;
};

}  // namespace routecast
