#include "trainer/training_windows.h"

#include "common/random.h"
#include "trainer/augmentation.h"

namespace routecast {
namespace {

constexpr uint64_t kAugmentStream = 0x61756721ULL;

}  // namespace

TrainingWindows::TrainingWindows(const SpeculationOptions& options,
                                 std::vector<TraceDataset*> stores, WithHidden hidden,
                                 int context, RankInfo rank)
    : options_(options),
      stores_(std::move(stores)),
      hidden_(hidden),
      context_(context),
      rank_(rank),
      sampler_(GroupsOfAll(stores_, SplitPart::kTrain, hidden_),
               {options_.seed, options_.micro_batch, options_.global_batch}) {}

void TrainingWindows::FitCurriculum(std::shared_ptr<const BaselineTables> tables) {
  if (options_.curriculum_epochs == 0) return;
  curriculum_.emplace(options_.curriculum_epochs, std::move(tables), stores_[0],
                      sampler_.groups(), options_.seed);
}

uint64_t TrainingWindows::EpochOf(int64_t step) const {
  return static_cast<uint64_t>(step) / sampler_.steps_per_epoch();
}

std::vector<MicroBatch> TrainingWindows::Of(int64_t step) const {
  return sampler_.Step(EpochOf(step),
                       static_cast<uint64_t>(step) % sampler_.steps_per_epoch(),
                       rank_.rank, rank_.world);
}

SpeculationBatch TrainingWindows::Read(const MicroBatch& micro) const {
  return MakeSpeculationBatch(micro, stores_[static_cast<size_t>(micro.store)], hidden_);
}

void TrainingWindows::Prepare(int64_t step, SpeculationBatch* batch) const {
  batch->window.training.teacher_BTH = batch->labels_BTH;
  batch->window.training.pattern_entropy = options_.pattern_entropy > 0;
  if (curriculum_) curriculum_->Apply(EpochOf(step), batch);
  Augment(options_.augment, Mix(options_.seed, kAugmentStream, batch->id), batch,
          context_);
}

}  // namespace routecast
