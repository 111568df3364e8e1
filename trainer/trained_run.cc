#include "trainer/trained_run.h"

#include <string>

#include "models/ensemble_model.h"
#include "models/speculation_onnx.h"
#include "trainer/document_scores.h"
#include "trainer/domain_shift.h"
#include "trainer/ensemble_stack.h"
#include "trainer/knn_estimate.h"
#include "trainer/speculation_report.h"

namespace routecast {
namespace {

// Beside a model's configuration. The time it took is no result: those are equal bits
// however often a run was stopped.
Json ExtraOf(const TrainedRun& run, const TraceDataset& dataset) {
  Json extra = {{"options", run.job->options.ToJson()},
                {"traces", dataset.fingerprint()},
                {"best_step", run.best_step},
                {"training_seconds", run.seconds}};
  if (!run.job->also.empty()) extra["further_stores"] = run.job->also.size();
  if (run.out_of_time) extra["time_limit"] = run.job->time_limit;
  return extra;
}

// An ensemble's members count by their validation top-1, or by what was learnt there; no
// member, no scores.
std::vector<ValidationScores> WeighMembers(const EvaluationData& data,
                                           SpeculationModel* model, Communicator* comm) {
  if (model->config().members.empty()) return {};
  const auto scores = ValidateMembers(model, data, comm);
  std::vector<double> weights;
  for (const ValidationScores& s : scores) weights.push_back(s.recall + 1e-9);
  SetMemberWeights(model, weights);
  if (model->config().combine == "stack") FitStack(model, data, comm);
  return scores;
}

// The models of the further stores: they share the trunk that is kept.
void FinishOthers(const TrainedRun& run, Communicator* comm, SpeculationReport* report) {
  for (size_t i = 1; i < run.validation.size(); ++i) {
    SpeculationModel& part = run.joint->part(i);
    const EvaluationData& data = run.validation[i];
    report->also.push_back({run.job->also[i - 1].name, Validate(&part, data, comm)});
    const Calibration calibration = FitCalibration(&part, data, comm);
    if (!comm->rank_info().is_root()) continue;
    SaveSpeculationModel(FolderOfStore(*run.job, i), part, calibration,
                         ExtraOf(run, *data.dataset));
  }
}

}  // namespace

fs::path FolderOfStore(const SpeculationJob& job, size_t store) {
  return store == 0 ? job.out : job.out / ("also-" + std::to_string(store));
}

SpeculationResult ScoreAndWrite(const TrainedRun& run, Communicator* comm) {
  const SpeculationJob& job = *run.job;
  SpeculationModel& model = run.joint->part(0);
  const EvaluationData& validation = run.validation[0];
  TraceDataset* dataset = validation.dataset;
  SpeculationReport report;
  report.options = job.options;
  report.parameters = model.parameters().num_elements();
  report.world_size = comm->rank_info().world;
  report.steps = run.steps;
  report.best_step = run.best_step;
  report.split = dataset->SplitJson();
  report.members = WeighMembers(validation, &model, comm);
  report.validation = Validate(&model, validation, comm);
  report.has_control = run.control.tokens > 0;
  report.control = run.control;
  const Calibration calibration = FitCalibration(&model, validation, comm);
  report.test = Test(&model, calibration, run.tables, *run.routers, run.test,
                     job.options.seed, comm);
  if (job.shift.dataset != nullptr) {
    report.shift_store = job.shift.name;
    report.after_shift = Test(&model, calibration, run.tables, *run.routers,
                              ShiftData(job, run.test.hidden), job.options.seed, comm);
  }
  report.neighbours = NeighboursJson(dataset, job.options.seed, comm);
  FinishOthers(run, comm, &report);
  SpeculationResult result;
  result.results = ResultsJson(report);
  result.table = ResultsTable(report, model.config().geometry.num_experts);
  if (comm->rank_info().is_root()) {
    SaveSpeculationModel(job.out, model, calibration, ExtraOf(run, *dataset));
    if (job.onnx) WriteSpeculationOnnx(job.out / "onnx", model);
    WriteDocumentScores(job.out, dataset->geometry(), report.test);
    WriteFileAtomic(job.out / "results.json", result.results.dump(2) + "\n");
  }
  return result;
}

}  // namespace routecast
