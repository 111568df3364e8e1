// What tests against the reference's values share: the cases, and the comparisons of one
// case's folder (tests/golden/switch_reference.py says what is in it).
#pragma once

#include <gtest/gtest.h>

#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "models/generation.h"
#include "models/switch_losses.h"
#include "tests/models/switch_test_support.h"
#include "tests/support/reference.h"

namespace routecast {

// Cases of switch_reference.py.
inline const char* const kGoldenCases[] = {"plain",
                                           "experts_2",
                                           "experts_3_bias",
                                           "experts_32",
                                           "experts_128",
                                           "one_expert",
                                           "capacity_3",
                                           "capacity_1",
                                           "capacity_0",
                                           "capacity_padding",
                                           "tied",
                                           "tied_bias",
                                           "step_3",
                                           "every_block_sparse",
                                           "step_from_5_by_2",
                                           "step_0_encoder",
                                           "sparse_count_0",
                                           "decoder_deeper",
                                           "decoder_shallower",
                                           "long",
                                           "few_buckets",
                                           "gelu",
                                           "gelu_new",
                                           "silu",
                                           "gated_gelu",
                                           "gated_silu_tied",
                                           "narrow_heads",
                                           "router_bf16",
                                           "router_fp16",
                                           "bf16",
                                           "bf16_tied_gelu",
                                           "fp16",
                                           "fp16_overflow",
                                           "sharded",
                                           "pickled"};

// One case: the checkpoint in the dtype of its reference, and the reference's values.
// An id may differ only where the reference's own margin is below 8 times its spread over
// shapes of batches; what follows from it in that row is then not compared.
class GoldenCase {
 public:
  explicit GoldenCase(const fs::path& folder);

  void CompareForward();  // hidden states, logits, routing, drops
  void CompareLosses();
  void CompareGreedy();
  void CompareBeams();

  ResidentModel& resident() { return *resident_; }
  SwitchModel& model() { return resident_->model(); }
  at::Tensor Get(const std::string& name) const { return golden_.Get(name); }
  at::Tensor valid() const { return Get("valid").to(at::kBool); }

 private:
  void CompareLayer(const LayerRouting& routing, std::vector<bool>* same);
  void CompareRows(const std::string& name, const at::Tensor& ours, double tolerance,
                   const std::vector<bool>& same) const;
  void CompareSequence(const std::vector<int64_t>& ours, const at::Tensor& reference,
                       const std::function<double(size_t)>& margin,
                       const std::string& where) const;
  int64_t end_token() const { return resident_->checkpoint().config.eos_token_id; }
  double logit_spread() const { return Get("spread")[0].item<double>(); }
  double router_spread() const { return Get("spread")[1].item<double>(); }

  std::unique_ptr<ResidentModel> resident_;
  Parameters golden_;
};

// The warped logits of sampling.safetensors in `folder`.
void CompareWarpers(const fs::path& folder);

}  // namespace routecast
