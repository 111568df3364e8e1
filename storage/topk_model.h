// Which experts come behind a token's first: what a context coder knows of the top-k ids
// beside the first choices (context_model.h). The ids of a token are drawn one after the
// other, without those drawn before, each expert with the weight
//   base[l][the token's first expert][e] * row[context][l][e]
// (R. L. Plackett, "The Analysis of Permutations", 1975). Context: as of first choices,
// the pair (token id before, token id); where the store has no token ids (the layer's
// first expert of the token before, the token's first expert in the layer before).
// Integers only: every machine decodes the same.
// Thread rule: immutable once made; any number of threads.
// Shape letters: T tokens, L MoE layers of one stack, E experts, K ids a token.
#pragma once

#include <string>
#include <string_view>
#include <vector>

#include "common/routing.h"
#include "storage/factor_rows.h"

namespace routecast {

// Of the ids behind the first ones at (l, t).
ContextPair TopkContextOf(const RoutingSpan& span, int l, int t);
// The first of the top-k at `position` of [L*T].
inline uint16_t FirstOf(const RoutingSpan& span, size_t position) {
  return span.topk_ids[position * static_cast<size_t>(span.top_k)];
}

class TopkModel {
 public:
  // `tables`: rows `previous` are of the token's first expert, of layer 0 as well.
  // REQUIRES whole tables of E experts, at most kMaxCodedExperts. Throws DataError naming
  // `where` when they are too large to be used.
  TopkModel(int num_experts, StackTables encoder, StackTables decoder,
            const std::string& where);
  const StackTables& tables(Stack s) const { return tables_[static_cast<size_t>(s)]; }

  // Appends the coded plane of span.topk_ids; false (and nothing appended) where a token
  // has an expert twice. REQUIRES the model's E and L, ids < E and whole planes.
  bool EncodeIds(Stack s, const RoutingSpan& span, std::string* out) const;
  // Fills span->topk_ids from its dims, token ids and expert ids. False where the bytes
  // are not what EncodeIds writes for so many ids. REQUIRES the model's L.
  bool DecodeIds(Stack s, std::string_view bytes, RoutingSpan* span) const;
  // Least bytes of a plane: bounds what a small hostile record can claim.
  static uint64_t LeastBytes(const RoutingSpan& span);

 private:
  struct Coded {
    std::vector<std::vector<uint16_t>> base;  // [L][E][E to whole vectors]
    ContextIndex index;
    FactorRows rows;  // [contexts * L]; context 0 is empty
  };
  void Build(const StackTables& tables, const std::string& where, Coded* coded) const;
  template <typename Visit>
  void ForEachToken(Stack s, const RoutingSpan& span, const Visit& visit) const;

  int num_experts_;
  StackTables tables_[2];
  Coded coded_[2];
};

}  // namespace routecast
