// What a run may add to plain training on labels: each against plain loops, and each
// changes what is learnt.
#include <ATen/ATen.h>
#include <gtest/gtest.h>

#include <cmath>
#include <string>

#include "common/errors.h"
#include "models/expert_slots.h"
#include "tests/storage/temp_folder.h"
#include "tests/trainer/synthetic_traces.h"
#include "trainer/augmentation.h"
#include "trainer/curriculum.h"
#include "trainer/speculation_loss.h"
#include "trainer/speculation_trainer.h"
#include "trainer/training_progress.h"

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
    return FitBaselines(&dataset_, 0, folder_.path(), folder_.path() / "tables", &comm);
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

TEST_F(TrainingAids, TheGatingLossChangesWhatAStepLearns) {
  const SpeculationJob plain = Job("gating_plain", "simple");
  const double without = Losses(plain)[0];
  SpeculationJob consistent = Job("consistent", "simple");
  consistent.options.consistency_weight = 1;
  EXPECT_GT(Losses(consistent)[0], without);
  SpeculationJob diverse = Job("diverse", "simple");
  diverse.options.diversity_weight = 1;
  EXPECT_GT(Losses(diverse)[0], without);
}

TEST_F(TrainingAids, TheContrastiveTermIsLearnt) {
  for (const char* kind : {"interlayer", "moe", "autoregressive"}) {
    const SpeculationJob plain = Job(std::string("plain_") + kind, kind);
    SpeculationJob more = Job(std::string("more_") + kind, kind);
    more.options.contrastive_weight = 0.1;
    EXPECT_GT(Losses(more)[0], Losses(plain)[0] + 0.05) << kind;  // it is a term more
    more.options.steps = 60;
    more.out = folder_.path() / (std::string("long_") + kind);
    const auto losses = Losses(more);
    EXPECT_LT(losses.back(), losses.front() - 0.1) << kind;
  }
}

TEST_F(TrainingAids, OptionsOnEmbeddingsAreRefusedWhereThereAreNone) {
  for (const char* option : {"contrastive", "mixup", "noise", "context", "masked"}) {
    SpeculationJob job = Job("run", "simple");
    if (option == std::string("contrastive")) job.options.contrastive_weight = .1;
    if (option == std::string("mixup")) job.options.augment.mixup = .2;
    if (option == std::string("noise")) job.options.augment.noise = .05;
    if (option == std::string("context")) job.options.augment.context = .5;
    if (option == std::string("masked")) job.options.augment.masked_ids = .15;
    EXPECT_THROW(Losses(job), UsageError) << option;
    job.options.kind = "ensemble";
    job.options.sizes = {};
    job.options.members = "interlayer;simple";
    EXPECT_THROW(Losses(job), UsageError) << option;
    EXPECT_FALSE(fs::exists(job.out));
  }
}

TEST(Mixup, IsAFunctionOfItsKeyAndDrawsABeta) {
  SpeculationBatch batch;
  batch.window.valid_BT = at::ones({64, 2}, at::kBool);
  batch.labels_BTH = at::zeros({64, 2, 1}, at::kLong);
  double sum = 0, squares = 0;
  int mixed = 0;
  for (uint64_t key = 0; key < 40; ++key) {
    SpeculationBatch a = batch, b = batch;
    Augment({.mixup = .5}, key, &a);
    at::manual_seed(key);
    Augment({.mixup = .5}, key, &b);
    const TrainingHints &x = a.window.training, &y = b.window.training;
    EXPECT_TRUE(at::equal(x.order_B, y.order_B) && at::equal(x.share_B, y.share_B));
    for (int64_t i = 0; i < 64; ++i) {
      if (x.order_B[i].item<int64_t>() == i) {
        EXPECT_EQ(x.share_B[i].item<double>(), 1);
        continue;
      }
      const auto share = x.share_B[i].item<double>();
      sum += share;
      squares += share * share;
      ++mixed;
    }
  }
  EXPECT_NEAR(mixed / (40. * 64), 0.5, 0.04);
  const double mean = sum / mixed;
  EXPECT_NEAR(mean, 0.5, 0.04);
  // Beta(.2, .2): variance 1 / (4 (2 a + 1)).
  EXPECT_NEAR(squares / mixed - mean * mean, 1 / 5.6, 0.02);
}

// All of it is a function of seed and step: a run that was stopped has equal bits.
TEST_F(TrainingAids, StoppedRunsGoOnWithEqualBits) {
  const auto configure = [&](const std::string& name) {
    SpeculationJob job = Job(name, "ensemble");
    job.options.sizes = {};
    job.options.members =
        "interlayer*2:width=16,heads=2,layers=1;autoregressive:width=16,heads=2,layers=1";
    job.options.curriculum_epochs = 2;
    job.options.contrastive_weight = 0.1;
    job.options.augment.mixup = job.options.augment.noise = 0.3;
    job.options.augment.context = 0.5;
    job.options.augment.masked_ids = 0.15;
    return job;
  };
  const SpeculationJob whole = configure("whole");
  SpeculationJob parts = configure("parts");
  const auto expected = Losses(whole);
  parts.stop_after = 3;
  EXPECT_THROW(Losses(parts), StoppedError);
  parts.stop_after = 0;
  const auto rest = Losses(parts);
  EXPECT_EQ(rest, std::vector<double>(expected.begin() + 3, expected.end()));
  EXPECT_EQ(ReadFile(parts.out / "model.safetensors"),
            ReadFile(whole.out / "model.safetensors"));
}

TEST_F(TrainingAids, MixupAndNoiseChangeWhatAStepLearns) {
  const auto plain = Losses(Job("plain", "interlayer"));
  SpeculationJob mixed = Job("mixed", "interlayer"), noisy = Job("noisy", "interlayer");
  mixed.options.augment.mixup = 1;
  noisy.options.augment.noise = .5;
  EXPECT_NE(Losses(mixed)[0], plain[0]);
  EXPECT_NE(Losses(noisy)[0], plain[0]);
}

TEST_F(TrainingAids, HiddenIdsAreTheTrueOnes) {
  const auto groups = GroupsOf(dataset_, SplitPart::kTrain, WithHidden::kNo);
  const auto micro = EvaluationBatches(dataset_, groups, 8, 8, 1).back();
  SpeculationBatch batch = MakeSpeculationBatch(micro, &dataset_, WithHidden::kNo);
  const auto before = batch.window.experts_BTL.clone();
  SpeculationBatch again = batch;
  Augment({.masked_ids = .15}, 9, &batch);
  Augment({.masked_ids = .15}, 9, &again);
  const auto& ids = batch.window.training.hidden_ids_BTL;
  EXPECT_TRUE(at::equal(ids, again.window.training.hidden_ids_BTL));
  const auto hidden = ids.ge(0);
  EXPECT_TRUE(at::equal(batch.window.experts_BTL, at::where(hidden, 8, before)));
  EXPECT_TRUE(at::equal(at::where(hidden, ids, before), before));
  const double share = hidden.sum().item<double>() / before.lt(8).sum().item<double>();
  EXPECT_NEAR(share, 0.15, 0.05);
}

TEST_F(TrainingAids, NamingHiddenIdsIsLearnt) {
  SpeculationJob job = Job("run", "interlayer");
  job.options.augment.masked_ids = 0.15;
  job.options.training.learning_rate = 3e-3;
  // Nats a hidden expert of training windows, after so many steps.
  const auto cost = [&](int64_t steps) {
    job.options.steps = job.options.validate_every = steps;
    job.out = folder_.path() / std::to_string(steps);
    Losses(job);
    const auto model = LoadSpeculationModel(job.out).model;
    const auto groups = GroupsOf(dataset_, SplitPart::kTrain, WithHidden::kNo);
    const auto micro = EvaluationBatches(dataset_, groups, 8, 8, 1).back();
    SpeculationBatch batch = MakeSpeculationBatch(micro, &dataset_, WithHidden::kNo);
    Augment({.masked_ids = .15}, 9, &batch);
    const auto asked = SlotRows(batch.window.training.hidden_ids_BTL, batch.window,
                                model->config().context, -100);
    return model->Forward(batch.window, 5).own_loss.item<double>() /
           asked.ge(0).sum().item<double>();
  };
  const double untrained = cost(1);
  const double trained = cost(300);
  EXPECT_LT(trained, untrained - 0.2);
  EXPECT_LT(trained, std::log(8.0));  // better than chance
}

TEST(ContextLength, IsDrawnEvenly) {
  int count[4] = {};
  for (uint64_t key = 0; key < 900; ++key) {
    SpeculationBatch batch;
    batch.labels_BTH = at::zeros({1, 2, 1}, at::kLong);
    Augment({.context = 1}, key, &batch, 3);
    ++count[batch.window.context_layers];
  }
  EXPECT_EQ(count[0], 0);
  for (int layers = 1; layers <= 3; ++layers) EXPECT_NEAR(count[layers], 300, 60);
}

TEST_F(TrainingAids, AShorterContextChangesWhatAStepLearns) {
  SpeculationJob job = Job("short", "interlayer");
  job.options.augment.context = 1;
  EXPECT_NE(Losses(job)[0], Losses(Job("plain", "interlayer"))[0]);
}

TEST(LayerFreezing, ReleasesFromTheTop) {
  const LayerFreezing freeze{3, 4};
  EXPECT_EQ(freeze.ReleasedAt("layer.2.in.weight"), 4);
  EXPECT_EQ(freeze.ReleasedAt("group.1.layer.1.out_norm.bias"), 8);
  EXPECT_EQ(freeze.ReleasedAt("block.0.in.weight"), 12);
  EXPECT_EQ(freeze.ReleasedAt("expert.embedding"), 12);
  EXPECT_EQ(freeze.ReleasedAt("layer.3.in.weight"), 0);
  EXPECT_EQ(freeze.ReleasedAt("head.out.weight"), 0);
  EXPECT_EQ(LayerFreezing{}.ReleasedAt("layer.0.in.weight"), 0);
}

TEST_F(TrainingAids, FrozenLayersStayUntilTheyAreReleased) {
  const SpeculationJob first = Job("first", "interlayer");
  Losses(first);
  const auto before = ReadParameters(first.out / "model.safetensors", at::kFloat);
  for (const int epochs : {1, 1000}) {
    SpeculationJob more = Job("more" + std::to_string(epochs), "interlayer");
    more.options.sizes = {};
    more.options.start_from = first.out;
    more.options.freeze = {1, epochs};
    more.options.ema = 0.5;
    more.options.steps = 40;  // several epochs
    more.options.validate_every = 40;
    Losses(more);
    const auto after = ReadParameters(more.out / "model.safetensors", at::kFloat);
    for (const char* name : {"layer.0.in.weight", "expert.embedding"}) {
      EXPECT_EQ(at::equal(before.Get(name), after.Get(name)), epochs == 1000) << name;
    }
    EXPECT_FALSE(at::equal(before.Get("head.out.weight"), after.Get("head.out.weight")));
  }
  SpeculationJob none = Job("none", "simple");
  Losses(none);
  none.options.sizes = {};
  none.options.start_from = none.out;
  none.out = folder_.path() / "more_none";
  none.options.freeze = {1, 1};
  EXPECT_THROW(Losses(none), UsageError);  // it has no layers
}

TEST_F(TrainingAids, LayersMoveToAnotherModelsTraces) {
  const SpeculationJob first = Job("first", "interlayer");
  Losses(first);
  const SyntheticTraces other = TraceSynthesizer(2, 6, 24, 200, 9).Make(40, 6, 24, true);
  TraceDataset dataset(other.traces, other.geometry);
  LocalCommunicator comm;
  SpeculationJob more = Job("more", "interlayer");
  more.options.sizes = {};
  more.options.start_from = first.out;
  more.options.freeze = {1, 1000};
  more.options.steps = 2;
  EXPECT_THROW(TrainSpeculation(more, &dataset, {}, &comm), UsageError);
  more.options.transfer = true;
  TrainSpeculation(more, &dataset, {}, &comm);
  const auto before = ReadParameters(first.out / "model.safetensors", at::kFloat);
  const auto after = ReadParameters(more.out / "model.safetensors", at::kFloat);
  EXPECT_TRUE(at::equal(before.Get("layer.0.in.weight"), after.Get("layer.0.in.weight")));
  EXPECT_EQ(after.Get("expert.embedding").size(0), 7);
  EXPECT_EQ(after.Get("head.out.weight").size(0), 6);
}

TEST(FineTuning, NeedsARunToStartFrom) {
  SpeculationOptions options;
  options.transfer = true;
  EXPECT_THROW(options.Validate(), UsageError);
  options.transfer = false;
  options.freeze.layers = 1;
  EXPECT_THROW(options.Validate(), UsageError);
  options.start_from = "somewhere";
  options.Validate();
}

TEST(ProgressNote, NamesABestOnlyOnceAValidationGaveOne) {
  BestParameters best;
  EXPECT_EQ(NoteOf(1.25, best, 8), "loss 1.250 (ln E 2.079)");
  best.Offer(-.5, 3, Parameters(), 1);  // of top-1: less is better
  EXPECT_EQ(NoteOf(1.25, best, 8), "loss 1.250, best 0.500 (ln E 2.079)");
}

}  // namespace
}  // namespace routecast
