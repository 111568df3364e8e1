// What a store's context coder knows: how often each expert follows which context. The
// model is made once (context_trainer.h), kept beside the shards, and never changes; a
// record decodes alone, given the model.
//
// The weight of expert e at MoE layer l of a stack is
//   base[l][expert of the same token in the layer before][e] * row[context][l][e]
// where a row lists a few experts and multiplies the others by 1. The context is the
// pair (outer, inner) if the model has a row for it, else inner alone, else nothing:
//   kTokens: inner = token id, outer = the token id before it in the sequence. Where
//            the store has no token ids: the layer's experts of the last two tokens.
//   kPair:   inner = the same, outer = the token's expert in the layer before.
// Integers only: every machine decodes the same.
// Thread rule: immutable once made; any number of threads.
// Shape letters: T tokens, L MoE layers of one stack, E experts.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "common/routing.h"
#include "storage/factor_rows.h"
#include "storage/topk_model.h"

namespace routecast {

enum class ContextKind : uint8_t { kTokens = 0, kPair = 1 };
// The context of id (l, t), of which ids before it in (layer, position) order are known.
ContextPair ContextOf(ContextKind kind, const RoutingSpan& span, int l, int t);

class ContextModel {
 public:
  // REQUIRES whole tables of E experts, at most kMaxCodedExperts. Throws DataError naming
  // `where` when they are too large to be used.
  ContextModel(int num_experts, ContextKind kind, StackTables encoder,
               StackTables decoder, const std::string& where);
  // Codes top-k ids as well from now on. REQUIRES its E and L.
  void Attach(TopkModel topk);
  // Null where top-k ids are not coded.
  const TopkModel* topk() const { return topk_ ? &*topk_ : nullptr; }
  // The file's bytes, and back. Throws DataError on any damage; sizes are checked before
  // memory is taken.
  std::string Serialize() const;
  static ContextModel Parse(std::string_view bytes, const std::string& where);
  // Hash of Serialize(): coded records are sealed with it.
  uint64_t fingerprint() const { return fingerprint_; }

  int num_experts() const { return num_experts_; }
  int num_layers(Stack s) const { return static_cast<int>(stack(s).layers.size()); }
  // Appends the coded plane of span.expert_ids. REQUIRES the model's E and L and ids <
  // E.
  void EncodeIds(Stack s, const RoutingSpan& span, std::string* out) const;
  // Fills span->expert_ids from its dims and token ids. False where the bytes are not
  // what EncodeIds writes for so many ids. REQUIRES the model's L.
  bool DecodeIds(Stack s, std::string_view bytes, RoutingSpan* span) const;
  // Adds the bits of each id to (*bits)[layer].
  void CountBits(Stack s, const RoutingSpan& span, std::vector<double>* bits) const;

 private:
  struct Coded {  // a stack as it is used
    // [L][E + 1][E + 1]; the first row of a layer: no layer before.
    std::vector<std::vector<uint16_t>> layers;
    ContextIndex index;
    FactorRows rows;  // [contexts * L]; context 0 is empty
  };
  struct RowView {
    const uint16_t* base;  // cumulative base weights [E + 1]
    FactorRows::View row;
  };
  struct Weights;
  struct Interval;
  void Fill(const RowView& view, Weights* weights) const;
  Interval Find(const RowView& view, uint16_t expert, Weights* weights) const;
  const Coded& stack(Stack s) const { return coded_[static_cast<size_t>(s)]; }
  void Build(const StackTables& tables, const std::string& where, Coded* coded) const;
  template <typename Visit>
  void ForEachId(Stack s, const RoutingSpan& span, const Visit& visit) const;

  int num_experts_;
  ContextKind kind_;
  StackTables tables_[2];
  Coded coded_[2];
  std::optional<TopkModel> topk_;
  uint64_t fingerprint_ = 0;
};

}  // namespace routecast
