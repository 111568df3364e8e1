#include "models/next_token_guess.h"

#include <ATen/ATen.h>
#include <c10/core/GradMode.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <stdexcept>
#include <utility>

#include "common/errors.h"
#include "common/wide_loops.h"
#include "models/parameters.h"
#include "models/small_math.h"

namespace routecast {
namespace {

constexpr int kBlock = 64;

// The best of a block's rows: scores = scale (preview^T x).
ROUTECAST_WIDE float BestOfBlock(const int8_t* preview, const float* scale,
                                 const float* x, int directions, int rows, int* best) {
  float score[kBlock] = {};
  for (int i = 0; i < directions; ++i) {
    const float v = x[i];
    const int8_t* w = preview + i * kBlock;
    for (int k = 0; k < kBlock; ++k) score[k] += v * static_cast<float>(w[k]);
  }
  float largest = -std::numeric_limits<float>::infinity();
  for (int k = 0; k < rows; ++k) {
    const float s = score[k] * scale[k];
    if (s > largest) {
      largest = s;
      *best = k;
    }
  }
  return largest;
}

}  // namespace

NextTokenGuess::NextTokenGuess(const at::Tensor& head_VD, int64_t rows,
                               std::vector<int64_t> shortlist)
    : shortlist_(std::move(shortlist)),
      head_VD_(head_VD.to(at::kCPU, at::kFloat).contiguous()) {
  const c10::NoGradGuard no_grad;
  if (!shortlist_.empty()) {
    head_VD_ = head_VD_.index_select(0, at::tensor(shortlist_, at::kLong));
  }
  const int64_t V = head_VD_.size(0), D = head_VD_.size(1);
  if (V == 0 || D == 0) throw std::logic_error("a vocabulary head of no size");
  if (!at::isfinite(head_VD_).all().item<bool>()) {
    throw DataError(ErrorText("the vocabulary head holds numbers that are not finite", "",
                              "give a sound checkpoint, or --guess_next_token=false"));
  }
  const int64_t R = std::min<int64_t>(kDirections, D);
  // The directions in which the head's rows differ most; ascending eigenvalues.
  const at::Tensor centred = head_VD_ - head_VD_.mean(0, true);
  const auto [values, vectors] = at::linalg_eigh(at::matmul(centred.t(), centred));
  directions_RD_ = vectors.narrow(1, D - R, R).t().contiguous();
  const at::Tensor narrow = at::matmul(head_VD_, directions_RD_.t()).contiguous();
  const NarrowMatrix by_row(narrow.const_data_ptr<float>(), V, static_cast<int>(R));
  const int64_t blocks = (std::max(rows, V) + kBlock - 1) / kBlock;
  preview_.assign(static_cast<size_t>(blocks * kBlock * R), 0);
  scale_.assign(static_cast<size_t>(blocks * kBlock), 0.f);
  for (int64_t v = 0; v < V; ++v) {
    scale_[static_cast<size_t>(v)] = by_row.scale[static_cast<size_t>(v)];
    for (int64_t i = 0; i < R; ++i) {
      preview_[static_cast<size_t>(((v / kBlock) * R + i) * kBlock + v % kBlock)] =
          by_row.weight[static_cast<size_t>(v * R + i)];
    }
  }
}

at::Tensor ReadVocabularyHead(const fs::path& routers, int d_model) {
  if (!fs::exists(routers)) return {};
  const std::string name = "vocabulary_head";
  const Parameters all = ReadParameters(
      routers, at::kFloat, [&](const std::string& tensor) { return tensor == name; });
  if (!all.Has(name)) return {};
  const at::Tensor& head = all.Get(name);
  if (head.dim() != 2 || head.size(1) != d_model || head.size(0) == 0) {
    throw DataError(ErrorText(routers.string() + ": " + name + " has another shape",
                              "ids x " + std::to_string(d_model) + " expected",
                              "collect the store again"));
  }
  return head;
}

at::Tensor NextTokenGuess::operator()(const at::Tensor& output) const {
  if (output.dim() < 1 || output.size(-1) != width()) {
    throw std::logic_error("an output of another width than the vocabulary head's");
  }
  const bool plain =
      output.is_cpu() && output.scalar_type() == at::kFloat && output.is_contiguous();
  const at::Tensor rows = plain ? output : output.to(at::kCPU, at::kFloat).contiguous();
  at::Tensor ids = at::empty(rows.sizes().slice(0, rows.dim() - 1), at::kLong);
  for (int64_t row = 0; row < ids.numel(); ++row) {
    ids.data_ptr<int64_t>()[row] = GuessRow(rows.const_data_ptr<float>() + row * width());
  }
  return ids;
}

int64_t NextTokenGuess::GuessRow(const float* output) const {
  const int64_t V = head_VD_.size(0);
  const auto D = static_cast<int>(width()), R = static_cast<int>(directions_RD_.size(0));
  const float none[kDirections] = {};
  float x[kDirections];
  DenseRows(output, 1, D, directions_RD_.const_data_ptr<float>(), none, R, x);
  struct Candidate {
    float score;
    int64_t row;
  };
  const auto blocks = static_cast<int64_t>(scale_.size()) / kBlock;
  std::vector<Candidate> candidates(static_cast<size_t>(blocks));
  // On this thread alone: it may be one beside the model's, which has the others.
  for (int64_t b = 0; b < blocks; ++b) {
    int best = 0;
    const auto rows = static_cast<int>(std::clamp<int64_t>(V - b * kBlock, 0, kBlock));
    const float score = BestOfBlock(preview_.data() + b * kBlock * R,
                                    scale_.data() + b * kBlock, x, R, rows, &best);
    candidates[static_cast<size_t>(b)] = {score, b * kBlock + best};
  }
  std::erase_if(candidates, [](const Candidate& c) { return !std::isfinite(c.score); });
  const auto kept = std::min<size_t>(kCandidates, candidates.size());
  std::partial_sort(
      candidates.begin(), candidates.begin() + static_cast<std::ptrdiff_t>(kept),
      candidates.end(),
      [](const Candidate& a, const Candidate& b) { return a.score > b.score; });
  int64_t guess = 0;
  float highest = -std::numeric_limits<float>::infinity();
  for (size_t i = 0; i < kept; ++i) {
    float exact = 0;
    DenseRows(output, 1, D, head_VD_.const_data_ptr<float>() + candidates[i].row * D,
              none, 1, &exact);
    if (exact > highest) {
      highest = exact;
      guess = candidates[i].row;
    }
  }
  return shortlist_.empty() ? guess : shortlist_[static_cast<size_t>(guess)];
}

}  // namespace routecast
