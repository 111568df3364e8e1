#include "trainer/domain_shift.h"

#include "common/random.h"
#include "trainer/model_setup.h"
#include "trainer/speculation_report.h"

namespace routecast {
namespace {

constexpr uint64_t kShiftStream = 0x7368696674ULL;
constexpr int kMicroBatch = 32;

}  // namespace

EvaluationData ShiftData(const SpeculationJob& job, WithHidden hidden) {
  TraceDataset* dataset = job.shift.dataset;
  const auto groups = GroupsOf(*dataset, SplitPart::kTest, hidden);
  return {dataset,
          EvaluationBatches(*dataset, groups, kMicroBatch, job.options.test_sequences,
                            Mix(job.options.seed, kShiftStream)),
          hidden, job.device};
}

void AddAfterShift(const SpeculationJob& job, const fs::path& folder,
                   const std::vector<RouterWeights>& routers, Communicator* comm,
                   Json* results) {
  if (job.shift.dataset == nullptr) return;
  if (results->value("shift_store", "") == job.shift.name) return;
  SpeculationJob run = job;
  run.options.seed = results->at("seed");  // the run's own, as if it had been asked then
  SavedSpeculationModel saved = LoadSpeculationModel(folder);
  saved.model->To(job.device);
  const EvaluationData data = ShiftData(run, HiddenOf(saved.model->config()));
  const auto tables = std::make_shared<BaselineTables>(
      BaselineTables::Load(folder / "baselines.safetensors"));
  const TestScores after = Test(saved.model.get(), saved.calibration, tables, routers,
                                data, run.options.seed, comm);
  results->update(AfterShiftJson(job.shift.name, after));
}

}  // namespace routecast
