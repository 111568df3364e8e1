// Choosing the next token by chance. Reference of the warpers: transformers 5.23.0,
// generation/logits_process.py. Pure functions: any thread. B rows, V vocabulary.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <vector>

namespace routecast {

struct SamplingOptions {
  double temperature = 0;  // logits are divided by it; 0 = greedy, nothing is drawn
  int top_k = 0;           // only the k most probable tokens; 0 = all
  double top_p = 1;        // only the most probable tokens that reach this sum; 1 = all
  uint64_t seed = 0;
  // What draws depend on beside seed and step: give a sequence the same key in every
  // batch and it draws the same numbers. Empty: the row's index.
  std::vector<uint64_t> row_keys{};
  bool enabled() const { return temperature > 0; }
  // Throws UsageError naming the option that is out of range.
  void Validate() const;
};

// fp32 [B,V] on the CPU -> the same, divided by the temperature, -inf where top_k or
// top_p leaves a token out (in this order; ties at the k-th are kept). REQUIRES
// enabled().
at::Tensor WarpLogits(const at::Tensor& logits_BV, const SamplingOptions& options);

// Throws DataError: what overflows or is damaged ends as logits that are no numbers, and
// whichever id came of them would be one that the model never chose.
[[noreturn]] void RefuseLogits(int64_t row, int step);

// What is chosen of logits that are no numbers.
inline constexpr int64_t kNoToken = -1;

// int64 [B]: for each row the first token at which the running sum of its probabilities,
// in the order of ids, passes a uniform number made of (seed, row key, step) alone, or
// kNoToken.
at::Tensor SampleIds(const at::Tensor& warped_BV, const SamplingOptions& options,
                     int step);

}  // namespace routecast
