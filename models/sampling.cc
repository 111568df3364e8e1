#include "models/sampling.h"

#include <ATen/ATen.h>

#include <algorithm>
#include <cmath>
#include <limits>

#include "common/errors.h"
#include "common/random.h"

namespace routecast {
namespace {

constexpr double kMinusInfinity = -std::numeric_limits<double>::infinity();
constexpr uint64_t kSamplingKey = 0x73616d706c65ULL;  // apart from other uses of a seed

at::Tensor KeepTopK(const at::Tensor& logits_BV, int64_t k) {
  k = std::min(k, logits_BV.size(-1));
  const at::Tensor smallest_kept =
      std::get<0>(logits_BV.topk(k, -1)).narrow(-1, k - 1, 1);
  return logits_BV.masked_fill(logits_BV < smallest_kept, kMinusInfinity);
}

at::Tensor KeepTopP(const at::Tensor& logits_BV, double p) {
  const auto [ascending, order] =
      at::sort(logits_BV, /*stable=*/true, /*dim=*/-1, /*descending=*/false);
  at::Tensor left_out = at::softmax(ascending, -1).cumsum(-1) <= 1.0 - p;
  left_out.select(-1, -1).fill_(false);  // the most probable one stays
  return logits_BV.masked_fill(left_out.scatter(-1, order, left_out), kMinusInfinity);
}

}  // namespace

void SamplingOptions::Validate() const {
  const auto refuse = [](const std::string& name, double value,
                         const std::string& range) {
    throw UsageError(
        ErrorText(name + " is out of range", std::to_string(value), "use " + range));
  };
  if (!(temperature >= 0) || std::isinf(temperature)) {
    refuse("temperature", temperature, "a number from 0 (greedy) on");
  }
  if (top_k < 0) refuse("top_k", top_k, "0 (all) or more");
  if (!(top_p > 0 && top_p <= 1)) refuse("top_p", top_p, "more than 0, at most 1");
}

at::Tensor WarpLogits(const at::Tensor& logits_BV, const SamplingOptions& options) {
  at::Tensor warped = logits_BV / options.temperature;
  if (options.top_k > 0) warped = KeepTopK(warped, options.top_k);
  if (options.top_p < 1) warped = KeepTopP(warped, options.top_p);
  return warped;
}

void RefuseLogits(int64_t row, int step) {
  throw DataError(
      ErrorText("no token can be chosen",
                "the logits of row " + std::to_string(row) + ", step " +
                    std::to_string(step) + " are not finite",
                "are the weights damaged? else use a wider --dtype or a higher "
                "temperature; a collection leaves such out: --nonfinite=skip"));
}

at::Tensor SampleIds(const at::Tensor& warped_BV, const SamplingOptions& options,
                     int step) {
  const int64_t rows = warped_BV.size(0), vocabulary = warped_BV.size(1);
  const at::Tensor sums = at::softmax(warped_BV.to(at::kDouble), -1).cumsum(-1);
  const auto sum = sums.accessor<double, 2>();
  at::Tensor ids = at::empty({rows}, at::kLong);
  for (int64_t b = 0; b < rows; ++b) {
    const auto row = static_cast<size_t>(b);
    const uint64_t key = options.row_keys.empty() ? row : options.row_keys.at(row);
    const double total = sum[b][vocabulary - 1];
    if (!std::isfinite(total)) {
      ids[b] = kNoToken;
      continue;
    }
    const double drawn =
        ToUnit(Mix(options.seed, kSamplingKey, key, static_cast<uint64_t>(step))) * total;
    // drawn < total, so the search ends before the end; a token of probability 0 adds
    // nothing and is never the first to pass.
    const double* begin = sum[b].data();
    ids[b] = std::upper_bound(begin, begin + vocabulary, drawn) - begin;
  }
  return ids;
}

}  // namespace routecast
