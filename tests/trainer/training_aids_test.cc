// What a run may add to plain training on labels: each against plain loops, and each
// changes what is learnt.
#include <ATen/ATen.h>
#include <gtest/gtest.h>

#include <cmath>
#include <set>

#include "common/errors.h"
#include "tests/storage/temp_folder.h"
#include "tests/trainer/synthetic_traces.h"
#include "trainer/curriculum.h"
#include "trainer/speculation_trainer.h"

namespace routecast {
namespace {

class TrainingAids : public testing::Test {
 protected:
  TrainingAids()
      : synthetic_(
            TraceSynthesizer(3, 8, 24, 200, 5).Make(40, 6, 24, /*every_hidden=*/false)),
        dataset_(synthetic_.traces, synthetic_.geometry) {}

  SpeculationJob Job(const std::string& name, const std::string& kind) const {
    SpeculationJob job;
    job.options.kind = kind;
    job.options.sizes = {16, 2, 32, 1, 0, -1};
    job.options.steps = 6;
    job.options.global_batch = 16;
    job.options.micro_batch = 4;
    job.options.validation_sequences = job.options.test_sequences = 4;
    job.out = folder_.path() / name;
    job.quiet = true;
    return job;
  }
  std::vector<double> Losses(const SpeculationJob& job) {
    LocalCommunicator comm;
    return TrainSpeculation(job, &dataset_, synthetic_.routers, &comm).losses;
  }
  std::shared_ptr<const BaselineTables> Tables() {
    LocalCommunicator comm;
    return FitBaselines(&dataset_, folder_.path(), folder_.path() / "tables", &comm);
  }

  TempFolder folder_;
  const SyntheticTraces synthetic_;
  TraceDataset dataset_;
};

TEST(CurriculumShare, GrowsToAll) {
  EXPECT_DOUBLE_EQ(CurriculumShare(0, 4), 0.3);
  EXPECT_DOUBLE_EQ(CurriculumShare(2, 4), 0.65);
  EXPECT_DOUBLE_EQ(CurriculumShare(4, 4), 1);
  EXPECT_DOUBLE_EQ(CurriculumShare(9, 4), 1);
}

// The targets that count are the easiest share of all, by the table's loss.
TEST_F(TrainingAids, TheCurriculumTakesEasyTargetsFirst) {
  const auto tables = Tables();
  const auto groups = GroupsOf(dataset_, SplitPart::kTrain, WithHidden::kNo);
  const Curriculum curriculum(4, tables, &dataset_, groups, 1);
  const auto markov = MakeBaseline("pattern", tables, synthetic_.geometry, {});
  for (const uint64_t epoch : {0, 2, 4}) {
    double hardest_kept = 0, easiest_left = INFINITY;
    int kept = 0, all = 0;
    for (const MicroBatch& micro : EvaluationBatches(dataset_, groups, 8, 0, 1)) {
      SpeculationBatch batch = MakeSpeculationBatch(micro, &dataset_, WithHidden::kNo);
      const at::Tensor before = batch.labels_BTH.clone();
      curriculum.Apply(epoch, &batch);
      EXPECT_EQ(batch.num_labels, batch.labels_BTH.ge(0).sum().item<int64_t>());
      for (int64_t b = 0; b < before.size(0); ++b) {
        for (int64_t h = 0; h < before.size(2); ++h) {
          const auto probs = *markov->Predict(batch.window, static_cast<int>(h) + 1);
          double loss = 0;
          int count = 0;
          for (int64_t t = 0; t < before.size(1); ++t) {
            const auto label = before[b][t][h].item<int64_t>();
            if (label < 0) continue;
            loss -= std::log(probs[b][t][label].item<double>());
            ++count;
          }
          if (count == 0) continue;
          ++all;
          const auto left = batch.labels_BTH[b].select(1, h).ge(0).sum().item<int>();
          EXPECT_TRUE(left == 0 || left == count);
          kept += left > 0;
          if (left > 0) hardest_kept = std::max(hardest_kept, loss / count);
          if (left == 0) easiest_left = std::min(easiest_left, loss / count);
        }
      }
    }
    EXPECT_LE(hardest_kept, easiest_left + 1e-6);
    EXPECT_NEAR(double(kept) / all, CurriculumShare(epoch, 4), 1.0 / all + 1e-9);
  }
}

TEST_F(TrainingAids, TheCurriculumChangesWhatAStepLearns) {
  const SpeculationJob plain = Job("plain", "interlayer");
  SpeculationJob staged = Job("staged", "interlayer");
  staged.options.curriculum_epochs = 3;
  EXPECT_LT(Losses(staged)[0], Losses(plain)[0] - 0.1);  // easy targets alone
}

}  // namespace
}  // namespace routecast
