// What serving keeps of a decoder's tokens so that a question costs its newest token
// alone: keys and values of every attention over tokens, and what else a kind takes from
// the tokens before. B sequences, T tokens, L MoE layers, D router input width.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstddef>
#include <vector>

#include "models/routing_window.h"

namespace routecast {

// Rows of fixed number a token, in stores by the order in which a pass asks for them: the
// i-th use in every pass is the same store. Thread rule: one thread at a time.
class TokenMemory {
 public:
  // A pass over `fresh` tokens after the first `known` ones; what is kept of others than
  // those is forgotten. REQUIRES that passes since known was 0 were over all of them.
  void Begin(int64_t known, int64_t fresh);
  int64_t known() const { return known_; }  // tokens before those of the pass
  // The pass' next store: what is kept of the tokens before, then `rows` of the pass' own
  // tokens, along `dim`; a view that lasts until the next pass.
  at::Tensor Append(const at::Tensor& rows, int64_t dim);
  // The next store's rows of the newest known token; undefined where none is known.
  at::Tensor Newest() const;
  int64_t bytes() const;

 private:
  struct Store {
    at::Tensor room;  // along `dim`: rows of tokens, then free ones
    int64_t dim = 0, rows_a_token = 0;
  };
  std::vector<Store> stores_;
  size_t next_ = 0;
  int64_t known_ = 0, fresh_ = 0;
};

// For passes with and without a memory: 0, and `rows` themselves, where `past` is null.
inline int64_t KnownTokens(const TokenMemory* past) { return past ? past->known() : 0; }
inline at::Tensor WithKnown(const at::Tensor& rows, int64_t dim, TokenMemory* past) {
  return past ? past->Append(rows, dim) : rows;
}

// All that a decoder's window says at its source, token by token: two windows agree on as
// many tokens as their bytes have in common. Empty where it is not of plain rows on the
// CPU, or holds attention summaries.
struct TokenRecord {
  std::vector<std::byte> bytes;
  size_t bytes_a_token = 0;
  int64_t sequences = 0;
};
TokenRecord RecordOf(const RoutingWindow& window);
// The number of first tokens on which two records agree.
int64_t CommonTokens(const TokenRecord& a, const TokenRecord& b);

}  // namespace routecast
