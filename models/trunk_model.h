// A model of the shape that most kinds have: one vector a token from a trunk of the
// kind's own, then, for each lead, logits and confidence. M members
// (speculation_layers.h), B sequences, T tokens, H leads, E experts, D width.
#pragma once

#include <map>
#include <utility>

#include "models/expert_slots.h"
#include "models/speculation_layers.h"
#include "models/speculation_model.h"

namespace routecast {

// One matrix a target layer; a lead's logits are its target's rows.
struct TargetHead {
  TargetHead(ParameterMaker* make, const std::string& name, const MoeGeometry& geometry,
             int64_t width, double gain = 1);
  // h [M * B,T,D] -> [M * B,T,H,E], leads 1..H of the window's source.
  at::Tensor operator()(const at::Tensor& h, const RoutingWindow& window) const;
  MoeGeometry geometry;
  at::Tensor weight, bias;  // [layers,E,D], [layers,E]
};

// What a kind that was published for one stack and one lead does not know otherwise: the
// source layer, the token's id, and what stands for a router input that is not there.
struct SourceFeatures {
  // Names start with "ours.". `width` of what is added to.
  SourceFeatures(ParameterMaker* make, const SpeculationConfig& config, int64_t width);
  // x [M * B,T,width] + source layer + token id.
  at::Tensor Add(const at::Tensor& x, const RoutingWindow& window) const;
  // The router's input at the source layer; before the first layer of a decoder the one
  // of the token before at the last layer; in an encoder there a learnt vector. [M *
  // B,T,S]
  at::Tensor State(const RoutingWindow& window) const;

 private:
  static constexpr int kTokenWidth = 64;
  MoeGeometry geometry_;
  EmbeddingLayer source_;
  std::vector<EmbeddingLayer> token_;  // one or none
  std::vector<LinearLayer> token_in_;
  std::vector<EmbeddingLayer> absent_;  // one or none
};

class TrunkModel : public SpeculationModel {
 public:
  int history_tokens() const override { return 64; }
  bool keeps_tokens() const override { return true; }
  SpeculationOutput Forward(const RoutingWindow& window, uint64_t dropout_key) final;
  // Once served: computes the tokens alone that were not in the window before, of the
  // same source and context; whatever is asked in between, the answer is Forward's.
  SpeculationOutput ForwardLast(const RoutingWindow& window) override;
  void PrepareServing() override;

 protected:
  TrunkModel(SpeculationConfig config, int64_t members)
      : SpeculationModel(std::move(config)), members_(members) {}
  // `window` holds every sequence once a member. No leads or no tokens: never asked.
  // `past` is null, or holds what the kind kept of the tokens before the window's; what a
  // decoder's token takes from others it then takes from there, too.
  virtual SpeculationOutput Compute(const RoutingWindow& window, KeyedDropout* dropout,
                                    TokenMemory* past) = 0;
  int64_t members() const { return members_; }

 private:
  // The decoder's tokens that were computed from one source with one context.
  struct Served {
    TokenRecord tokens;
    TokenMemory memory;
  };
  int64_t members_;
  bool serving_ = false;
  std::map<std::pair<int, int>, Served> served_;  // by source layer and context
};

// The key of member `m` of several in one pass; of one alone, `key` itself.
uint64_t MemberKey(uint64_t key, int64_t m);

// The largest probability of each lead: the confidence of kinds that have no other.
at::Tensor LargestProbability(const at::Tensor& logits_BTHE);

}  // namespace routecast
