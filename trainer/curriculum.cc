#include "trainer/curriculum.h"

#include <ATen/ATen.h>
#include <c10/core/GradMode.h>

#include <algorithm>
#include <cmath>
#include <limits>

#include "common/random.h"

namespace routecast {
namespace {

constexpr double kFirstShare = 0.3;
constexpr uint64_t kMeasured = 256;  // sequences of each group
constexpr int kMicroBatch = 32;
constexpr uint64_t kStream = 0x63757272ULL;

}  // namespace

double CurriculumShare(uint64_t epoch, int epochs) {
  const double passed = static_cast<double>(epoch) / epochs;
  return std::min(1.0, kFirstShare + (1 - kFirstShare) * passed);
}

Curriculum::Curriculum(int epochs, std::shared_ptr<const BaselineTables> tables,
                       TraceDataset* dataset, const std::vector<SampleGroup>& groups,
                       uint64_t seed)
    : epochs_(epochs), markov_(MakeBaseline("pattern", tables, tables->geometry(), {})) {
  for (const MicroBatch& micro :
       EvaluationBatches(*dataset, groups, kMicroBatch, kMeasured, Mix(seed, kStream))) {
    const at::Tensor losses =
        Losses(MakeSpeculationBatch(micro, dataset, WithHidden::kNo)).contiguous();
    const double* loss = losses.data_ptr<double>();
    for (int64_t i = 0; i < losses.numel(); ++i) {
      if (!std::isnan(loss[i])) sorted_.push_back(loss[i]);
    }
  }
  std::sort(sorted_.begin(), sorted_.end());
}

at::Tensor Curriculum::Losses(const SpeculationBatch& batch) const {
  const c10::NoGradGuard no_grad;
  const int64_t leads = batch.labels_BTH.size(2);
  const at::Tensor sets = LabelSets(batch);
  const auto probs = markov_->PredictLeads(batch.window, static_cast<int>(leads));
  std::vector<at::Tensor> all;
  for (int64_t h = 0; h < leads; ++h) {
    const auto labels = sets.select(2, h);  // [B,T,K]
    const auto counts = labels.select(2, 0).ge(0).to(at::kDouble);
    const auto chosen = probs.at(static_cast<size_t>(h))
                            .value()
                            .gather(2, labels.clamp_min(0))
                            .to(at::kDouble);
    all.push_back(-(chosen.log().mean(2) * counts).sum(1) / counts.sum(1));
  }
  return at::stack(all, 1);
}

double Curriculum::Limit(uint64_t epoch) const {
  const double share = CurriculumShare(epoch, epochs_);
  if (share >= 1 || sorted_.empty()) return std::numeric_limits<double>::infinity();
  const auto count = static_cast<double>(sorted_.size());
  return sorted_[static_cast<size_t>(std::ceil(share * count)) - 1];
}

void Curriculum::Apply(uint64_t epoch, SpeculationBatch* batch) const {
  const double limit = Limit(epoch);
  if (std::isinf(limit)) return;
  const auto hard = Losses(*batch).gt(limit).unsqueeze(1);  // [B,1,H]
  batch->labels_BTH = batch->labels_BTH.masked_fill(hard, -100);
  batch->num_labels = batch->labels_BTH.ne(-100).sum().item<int64_t>();
}

}  // namespace routecast
