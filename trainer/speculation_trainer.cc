#include "trainer/speculation_trainer.h"

#include <ATen/ATen.h>
#include <torch/csrc/autograd/autograd.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <optional>

#include "common/errors.h"
#include "common/progress.h"
#include "common/random.h"
#include "common/stop.h"
#include "models/device_choice.h"
#include "models/joint_model.h"
#include "models/speculation_onnx.h"
#include "trainer/agreed_stop.h"
#include "trainer/autocast.h"
#include "trainer/batch_loader.h"
#include "trainer/determinism.h"
#include "trainer/divergence.h"
#include "trainer/gradient_reducer.h"
#include "trainer/member_optimizer.h"
#include "trainer/model_setup.h"
#include "trainer/speculation_loss.h"
#include "trainer/trained_run.h"
#include "trainer/training_checks.h"
#include "trainer/training_log.h"
#include "trainer/training_progress.h"
#include "trainer/training_windows.h"

namespace routecast {
namespace {

constexpr uint64_t kDropoutStream = 0x64726f70ULL;
constexpr uint64_t kValidationStream = 0x76616cULL;
constexpr uint64_t kTestStream = 0x74657374ULL;
constexpr int kEvaluationsPerRun = 8;
constexpr int kEvaluationMicroBatch = 32;

class Stopwatch {
 public:
  double seconds() const {
    return std::chrono::duration<double>(std::chrono::steady_clock::now() - start_)
        .count();
  }

 private:
  std::chrono::steady_clock::time_point start_ = std::chrono::steady_clock::now();
};

class SpeculationTrainer {
 public:
  SpeculationTrainer(const SpeculationJob& job, TraceDataset* dataset,
                     const std::vector<RouterWeights>& routers, Communicator* comm)
      : job_(job),
        options_(job.options),
        dataset_(dataset),
        stores_(StoresOf(dataset, job.also)),
        routers_(routers),
        comm_(comm),
        rank_(comm->rank_info()),
        configs_(ConfigsOf(job.options, stores_)),
        config_(configs_[0]),
        hidden_(HiddenOf(config_)),
        windows_(options_, stores_, hidden_, config_.context, rank_),
        joint_(configs_, options_.seed),
        model_(&joint_.part(0)) {
    RequireWork(options_, rank_.world);
    RequireShift(job.shift.dataset, *dataset, hidden_, ReadsTopK(config_));
    for (size_t i = 0; i < stores_.size(); ++i) {
      validation_.push_back(Part(i, SplitPart::kValidation, options_.validation_sequences,
                                 kValidationStream));
    }
    const int64_t per_epoch = windows_.steps_per_epoch();
    steps_ = options_.steps > 0 ? options_.steps : options_.epochs * per_epoch;
    schedule_ = options_.schedule.InEpochsOf(per_epoch);
    validate_every_ =
        options_.validate_every > 0
            ? options_.validate_every
            : std::max<int64_t>(1, std::min(per_epoch, steps_ / kEvaluationsPerRun));
    StartFromRun(options_, model_);
    joint_.To(job.device);
    weights_ = {options_.confidence_weight,   options_.next_token_weight,
                options_.set_weight,          options_.distill_weight,
                options_.distill_temperature, 0,
                options_.contrastive_weight,  options_.backup_weight,
                options_.consistency_weight,  options_.diversity_weight,
                options_.loss == "focal",     ConfidenceFormOf(options_.confidence_loss),
                options_.pattern_entropy};
    for (const MemberOptions& o : TrainingOf(options_, config_)) {
      smoothing_.push_back(o.label_smoothing);
    }
    reducer_.emplace(joint_.parameters().tensors(), comm, job.bucket_bytes);
    optimizer_.emplace(joint_, TrainingOf(options_, config_), options_.beta1,
                       options_.beta2, options_.ema, options_.freeze);
  }

  SpeculationResult Run() {
    ThrowIfAnyStopped(comm_, "before the first step of this start");
    const StaleControl control = Control();
    Resume();
    for (TraceDataset* store : stores_) store->KeepAll(SplitPart::kTrain, hidden_);
    for (size_t i = 0; i < stores_.size(); ++i) {
      const fs::path folder = FolderOfStore(job_, i);
      if (rank_.is_root()) MakeFolder(folder);
      comm_->Barrier();
      const auto tables = FitBaselines(stores_[i], joint_.part(i).config().vocab_size,
                                       folder, folder / "baselines.safetensors", comm_);
      joint_.part(i).FitPriors(*tables);
      if (i == 0) tables_ = tables;
    }
    model_->FitRouters(routers_);
    windows_.FitCurriculum(tables_);
    if (rank_.is_root()) {
      log_ = TrainingLog(job_.out, at_.step);
      TellCostOfPinning();
    }
    comm_->Barrier();  // has the time that rank 0 may take alone
    ThrowIfAnyStopped(comm_, "before the first step of this start");
    Loop();
    return Finish(control);
  }

 private:
  void Loop() {
    Progress progress("train " + options_.kind, "steps", static_cast<uint64_t>(steps_),
                      job_.quiet || !rank_.is_root());
    progress.Update(static_cast<uint64_t>(at_.step));
    clock_ = Stopwatch();
    if (at_.validation_due) ValidateAndSave();
    BatchLoader loader(
        at_.step, steps_, [this](int64_t step) { return windows_.Of(step); },
        [this](const MicroBatch& micro) { return windows_.Read(micro); });
    while (at_.step < steps_ && !exhausted_ && !out_of_time_) {
      const double loss = Step(&loader, progress.seconds());
      progress.Update(static_cast<uint64_t>(at_.step),
                      NoteOf(loss, at_.best, config_.geometry.num_experts));
      if (at_.step % validate_every_ == 0 || at_.step == steps_ || out_of_time_) {
        optimizer_->RequireFinite();  // nothing is kept of what went wrong
        ValidateAndSave();
      }
      if (stop_ && at_.step < steps_ && !exhausted_ && !out_of_time_) {
        optimizer_->RequireFinite();
        Save();
        throw StoppedError("stopped at step " + std::to_string(at_.step) +
                           "; start the same command again and it goes on");
      }
    }
    progress.Finish();
    seconds_ = Seconds();
  }

  // On the first micro-batch, whose gradients go nowhere.
  void TellCostOfPinning() {
    if (!job_.deterministic || job_.quiet || at_.step >= steps_) return;
    const std::vector<MicroBatch> mine = windows_.Of(at_.step);
    if (mine.empty()) return;
    SpeculationBatch batch = windows_.Read(mine[0]);
    batch.window.training.teacher_BTH = batch.labels_BTH;
    const std::string line = CostOfPinning([&] {
      torch::autograd::grad({Loss(batch)}, joint_.parameters().tensors(), {},
                            /*retain_graph=*/false, /*create_graph=*/false,
                            /*allow_unused=*/true);
      Synchronize(job_.device);
    });
    if (!line.empty()) std::fprintf(stderr, "%s\n", line.c_str());
  }

  // Of training so far, over all processes of the run.
  double Seconds() const { return at_.seconds + clock_.seconds(); }

  EvaluationData Part(size_t store, SplitPart part, uint64_t sequences,
                      uint64_t stream) const {
    const auto groups = GroupsOf(*stores_[store], part, hidden_, static_cast<int>(store));
    return {stores_[store],
            EvaluationBatches(*stores_[store], groups, kEvaluationMicroBatch, sequences,
                              Mix(options_.seed, stream)),
            hidden_, job_.device};
  }
  fs::path StateFolder() const { return job_.out / "state"; }
  Json Configuration() const { return RunConfiguration(options_, configs_, stores_); }

  // The stale gate's control, before any time is spent on training.
  StaleControl Control() const {
    if (routers_.empty() || !dataset_->any_hidden()) return {};
    return CheckStaleGate(routers_, validation_[0], comm_);
  }

  void Resume() {
    if (rank_.is_root()) {
      MakeFolder(job_.out);
      if (job_.resume == "never") RemoveTrainStates(StateFolder());
      if (job_.resume == "last_good") RemoveDamagedStates(StateFolder());
    }
    comm_->Barrier();
    if (job_.resume == "never") return;
    // A run that began elsewhere and got further here goes on here.
    const bool own = job_.resume == "auto" || job_.resume == "last_good";
    const bool here =
        own || (fs::exists(job_.resume) && NewestStep(StateFolder()).has_value());
    const fs::path from = here ? StateFolder() : fs::path(job_.resume) / "state";
    if (!LoadProgress(from, job_.out, Configuration(), TrainedTensors(),
                      &optimizer_->adamw(), &at_)) {
      if (here) return;
      throw UsageError(ErrorText(from.string() + " holds no unfinished run", "",
                                 "give the --out of a stopped run to --resume"));
    }
    exhausted_ = Exhausted();
    out_of_time_ =
        job_.time_limit > 0 && at_.seconds > job_.time_limit && at_.best.step() > 0;
  }

  // One step of the global batch: fixed micro-batches dealt to ranks, gradients summed
  // while backward runs, divided by the labels of all ranks.
  double Step(BatchLoader* loader, double seconds) {
    // Loss, labels, windows; a stop was requested, the time is over.
    double sums[5] = {0, 0, 0, 0, 0};
    std::vector<at::Tensor> losses;  // of micro-batches, on the device
    double waited = 0;
    const Stopwatch step;
    reducer_->BeginStep();
    for (LoadedBatch next; !next.last;) {
      const Stopwatch data;
      next = loader->Next();
      waited += data.seconds();
      if (!next.batch) break;  // fewer micro-batches than ranks
      if (next.last) reducer_->LastBackward();
      SpeculationBatch& batch = *next.batch;
      windows_.Prepare(at_.step, &batch);
      const at::Tensor loss = Loss(batch);
      loss.backward();
      losses.push_back(loss.detach());
      sums[1] += static_cast<double>(batch.num_labels);
      sums[2] += static_cast<double>(batch.window.token_ids_BT.size(0));
    }
    sums[0] = Read(losses);
    sums[3] = StopRequested() || at_.step + 1 == job_.stop_after ? 1 : 0;
    sums[4] = job_.time_limit > 0 && Seconds() > job_.time_limit ? 1 : 0;
    reducer_->Finalize(1);  // before any other collective: see gradient_reducer.h
    comm_->AllReduceSum(sums);
    const double labels = std::max(1.0, sums[1]);
    reducer_->Scale(1 / labels);
    const double share = schedule_.Share(at_.step, steps_, at_.best.plateaus());
    optimizer_->Step(share, static_cast<int64_t>(windows_.EpochOf(at_.step)),
                     schedule_.Beta1(at_.step, steps_, options_.beta1));
    losses_.push_back(sums[0] / labels);
    at_.meter.Add({losses_.back(), sums[2], step.seconds(), waited});
    ++at_.step;
    stop_ = sums[3] > 0;
    out_of_time_ = sums[4] > 0;
    if (at_.step % options_.log_every == 0 || at_.step == steps_) {
      log_.Write(Place(),
                 at_.meter.Take(optimizer_->LearningRate(share),
                                optimizer_->GradientNorm(), seconds, loader->seconds()));
    }
    return losses_.back();
  }

  // Their sum, a mean over members. The one time in a step that the host waits for the
  // device: whether the step before met a gradient that is no number comes along.
  double Read(const std::vector<at::Tensor>& losses) {
    std::vector<at::Tensor> all = losses;
    if (optimizer_->broken().defined()) all.push_back(optimizer_->broken());
    if (all.empty()) return 0;
    const at::Tensor values = at::stack(all).cpu();
    const float* value = values.const_data_ptr<float>();
    if (all.size() > losses.size() && value[losses.size()] != 0) {
      optimizer_->RequireFinite();
    }
    double sum = 0;
    for (size_t i = 0; i < losses.size(); ++i) {
      if (!std::isfinite(value[i])) Diverged(i);
      sum += double{value[i]} / static_cast<double>(smoothing_.size());
    }
    return sum;
  }

  // Runs the step's micro-batch once more, to name what is not finite.
  [[noreturn]] void Diverged(size_t micro_batch) {
    SpeculationBatch batch = windows_.Read(windows_.Of(at_.step).at(micro_batch));
    windows_.Prepare(at_.step, &batch);
    ThrowDiverged("step " + std::to_string(at_.step + 1), joint_, batch, Outputs(batch));
  }

  std::vector<SpeculationOutput> Outputs(const SpeculationBatch& batch) {
    return ForwardMembersAs(options_.dtype == "bf16" ? at::kBFloat16 : at::kFloat,
                            &joint_, WindowTo(batch.window, job_.device),
                            Mix(options_.seed, kDropoutStream, batch.id));
  }

  // Of all members, each by its own output.
  at::Tensor Loss(const SpeculationBatch& batch) {
    const auto outputs = Outputs(batch);
    at::Tensor total;
    for (size_t m = 0; m < outputs.size(); ++m) {
      LossWeights weights = weights_;
      weights.label_smoothing = smoothing_[m];
      const at::Tensor loss = SpeculationLoss(outputs[m], batch, weights).total;
      total = m == 0 ? loss : total + loss;
    }
    return total;
  }

  // What a checkpoint holds beside the optimizer's moments.
  Parameters TrainedTensors() const {
    Parameters all = joint_.parameters();
    for (const auto& [name, tensor] : optimizer_->averages().items()) {
      all.Add("average." + name, tensor);
    }
    return all;
  }

  TrainingPlace Place() const {
    return {
        at_.step,
        static_cast<double>(at_.step) / static_cast<double>(windows_.steps_per_epoch()),
        at_.meter.samples()};
  }
  // Early stopping: the parameters of the best validation are what is kept; of averaged
  // ones where averages are.
  void ValidateAndSave() {
    optimizer_->SwapAverages();
    ValidationScores scores;
    try {
      scores = ValidateAll(&joint_, validation_, comm_);
    } catch (const StoppedError&) {
      optimizer_->SwapAverages();
      at_.validation_due = true;
      Save();
      throw;
    }
    at_.validation_due = false;
    log_.Write(Place(), scores);
    const double score = options_.monitor == "top1" ? -scores.recall : scores.loss;
    at_.best.Offer(score, at_.step, joint_.parameters(),
                   options_.schedule.plateau_patience);
    optimizer_->SwapAverages();
    exhausted_ = Exhausted();
    Save();
  }

  // Validation was not bettered for as long as it is waited for.
  bool Exhausted() const {
    return options_.patience > 0 && at_.best.worse() >= options_.patience;
  }

  void Save() {
    if (rank_.is_root()) {
      SaveProgress(StateFolder(), at_, Seconds(), Configuration(), TrainedTensors(),
                   optimizer_->adamw(), job_.keep_checkpoints);
    }
    comm_->Barrier();
  }

  SpeculationResult Finish(const StaleControl& control) {
    at_.best.CopyTo(joint_.parameters());
    const EvaluationData test =
        Part(0, SplitPart::kTest, options_.test_sequences, kTestStream);
    SpeculationResult result = ScoreAndWrite(
        {&job_, &joint_, validation_, test, tables_, &routers_, control, at_.step,
         at_.best.step(), seconds_, out_of_time_ && at_.step < steps_ && !exhausted_},
        comm_);
    result.losses = losses_;
    if (rank_.is_root()) RemoveTrainStates(StateFolder());
    comm_->Barrier();
    return result;
  }

  const SpeculationJob job_;
  const SpeculationOptions options_;
  TraceDataset* dataset_;                    // what is scored
  const std::vector<TraceDataset*> stores_;  // it, and the further ones
  const std::vector<RouterWeights> routers_;
  Communicator* comm_;
  RankInfo rank_;
  const std::vector<SpeculationConfig> configs_;  // by store
  const SpeculationConfig config_;                // of the first
  WithHidden hidden_;
  TrainingWindows windows_;
  std::vector<EvaluationData> validation_;  // by store
  JointModel joint_;
  SpeculationModel* model_;                       // its part for the first store
  std::shared_ptr<const BaselineTables> tables_;  // of the train part
  std::optional<GradientReducer> reducer_;
  std::optional<MemberOptimizer> optimizer_;
  LossWeights weights_;
  std::vector<double> smoothing_;  // of each member's labels
  LearningSchedule schedule_;
  TrainingLog log_;  // rank 0's writes
  int64_t steps_ = 0, validate_every_ = 1;

  TrainingProgress at_;
  Stopwatch clock_;     // since this process' first step
  double seconds_ = 0;  // of the whole training, once it is over
  bool stop_ = false, exhausted_ = false, out_of_time_ = false;
  std::vector<double> losses_;
};

}  // namespace

SpeculationResult TrainSpeculation(const SpeculationJob& job, TraceDataset* dataset,
                                   const std::vector<RouterWeights>& routers,
                                   Communicator* comm) {
  if (job.onnx) {  // before any time is spent
    RequireOnnxKind(job.options.kind, job.options.backup_experts,
                    job.options.attention_inputs, job.options.has_further_inputs());
  }
  PinAlgorithms(job.deterministic);
  return SpeculationTrainer(job, dataset, routers, comm).Run();
}

}  // namespace routecast
