#include "trainer/pretrainer.h"

#include <ATen/ATen.h>
#include <c10/core/GradMode.h>

#include <chrono>
#include <cmath>
#include <cstdio>
#include <iterator>
#include <numeric>

#include "common/errors.h"
#include "common/progress.h"
#include "common/random.h"
#include "common/stop.h"
#include "models/checkpoint.h"
#include "trainer/adamw.h"
#include "trainer/gradient_reducer.h"
#include "trainer/switch_initializer.h"
#include "trainer/train_state.h"

namespace routecast {
namespace {

constexpr uint64_t kJitterStream = 0x6a6974ULL;
constexpr uint64_t kRowStream = 0x726f77ULL;
constexpr double kBeta2 = 0.99;

fs::path StateFolder(const PretrainJob& job) { return job.out / "state"; }

// The tokenizer of the run: trained by rank 0 on the train part, once. One that lies
// there without a run to go on with may be of other text.
Tokenizer MakeTokenizer(const PretrainJob& job, const Corpus& corpus,
                        Communicator* comm) {
  const bool goes_on = job.resume != Resume::kNever && NewestStep(StateFolder(job)) &&
                       fs::exists(job.out / "tokenizer_config.json");
  comm->Barrier();  // every rank has looked
  if (comm->rank_info().is_root() && !goes_on) {
    MakeFolder(job.out);
    std::vector<uint64_t> train;
    for (uint64_t i = 0; i < corpus.size(); ++i) {
      if (corpus.document(i).part == SplitPart::kTrain) train.push_back(i);
    }
    TokenizerTrainingOptions options;
    options.pieces = job.options.pieces;
    options.extra_ids = job.options.extra_ids;
    options.seed = job.options.seed;
    Tokenizer::Train(
        train.size(), [&](uint64_t i) { return std::string(corpus.Text(train[i])); },
        options, job.out);
  }
  comm->Barrier();
  return Tokenizer::Load(job.out);
}

SwitchConfig FinalConfig(const PretrainOptions& o, int vocab_size) {
  SwitchConfig c = o.model;
  c.vocab_size = vocab_size;
  c.expert_capacity =
      static_cast<int>(std::ceil(o.capacity_factor * o.sequence_tokens / c.num_experts));
  return c;
}

double LearningRate(const PretrainOptions& o, int64_t step) {
  if (step < o.warmup_steps) {
    return o.learning_rate * static_cast<double>(step + 1) / o.warmup_steps;
  }
  return o.learning_rate * static_cast<double>(o.steps - step) /
         static_cast<double>(std::max(1, o.steps - o.warmup_steps));
}

// A model over trainable parameters: the same executor as everywhere.
struct TrainableModel {
  TrainableModel(const SwitchConfig& config, const Parameters& parameters)
      : source(config.geometry(), ExpertWeightsOf(config, parameters)),
        executor(&source),
        model(config, parameters, &executor) {}
  ResidentExpertSource source;
  LocalExpertExecutor executor;
  SwitchModel model;
};

class Pretrainer {
 public:
  Pretrainer(const PretrainJob& job, const Corpus& corpus, Communicator* comm)
      : job_(job),
        options_(job.options),
        comm_(comm),
        rank_(comm->rank_info()),
        corpus_(corpus.fingerprint()),
        tokenizer_(MakeTokenizer(job, corpus, comm)),
        config_(FinalConfig(options_, tokenizer_.vocab_size())),
        train_(corpus, tokenizer_, SplitPart::kTrain, options_.sequence_tokens,
               uint64_t(options_.steps) * uint64_t(options_.global_batch), options_.seed,
               job.quiet),
        validation_(corpus, tokenizer_, SplitPart::kValidation, options_.sequence_tokens,
                    uint64_t(options_.validation_sequences), options_.seed, job.quiet),
        test_(corpus, tokenizer_, SplitPart::kTest, options_.sequence_tokens,
              uint64_t(options_.validation_sequences) * 2, options_.seed, job.quiet) {
    denoising_.spans.noise_density = options_.noise_density;
    denoising_.spans.mean_span = options_.mean_span;
    denoising_.mask_share = options_.mask_share;
    denoising_.seed = options_.seed;
    const Parameters initial =
        InitialParameters(config_, options_.router_deviation, options_.seed);
    for (const auto& [name, tensor] : initial.items()) {
      parameters_.Add(name, tensor.detach().to(job.device).requires_grad_());
    }
    model_.emplace(config_, parameters_);
    AdamWOptions adamw;
    adamw.beta2 = kBeta2;
    adamw.weight_decay = options_.weight_decay;
    optimizer_.emplace(parameters_, adamw);
    reducer_.emplace(parameters_.tensors(), comm);
  }

  RoutingMeasures Run() {
    ResumeIfAsked();
    std::optional<JsonLines> metrics;
    if (rank_.is_root()) {
      if (step_ > 0) TruncateJsonLines(job_.out / "metrics.jsonl", "step", step_);
      metrics.emplace(job_.out / "metrics.jsonl", step_ > 0);
    }
    Progress progress("pretrain", "steps", uint64_t(options_.steps), job_.quiet);
    progress.Update(uint64_t(step_));
    if (!unvalidated_.is_null())
      LogValidated(unvalidated_, metrics ? &*metrics : nullptr);
    while (step_ < options_.steps) {
      const double loss = Step();
      const bool validate =
          step_ % options_.validate_every == 0 || step_ == options_.steps;
      const bool save = step_ % options_.checkpoint_every == 0;
      if (save || validate || MustStop()) RequireFinite();
      if (step_ % options_.log_every == 0 || validate) {
        const Json line = LogLine(loss, progress.Rate(uint64_t(step_)));
        if (validate) {
          LogValidated(line, metrics ? &*metrics : nullptr);
        } else if (metrics) {
          metrics->Write(line);
        }
      }
      char note[48];
      std::snprintf(note, sizeof note, "loss %.3f", loss);
      progress.Update(uint64_t(step_), note);
      if (save) Save();
      if (step_ < options_.steps && MustStop()) SaveAndStop();
    }
    progress.Finish();
    return Finish();
  }

 private:
  void ResumeIfAsked() {
    const fs::path folder = StateFolder(job_);
    if (rank_.is_root() && job_.resume == Resume::kNever) RemoveTrainStates(folder);
    if (rank_.is_root() && job_.resume == Resume::kLastGood) RemoveDamagedStates(folder);
    comm_->Barrier();
    if (job_.resume == Resume::kNever) return;
    const auto state = FindTrainState(folder);
    if (!state) return;
    CheckSameConfiguration(state->configuration, Configuration(), job_.out);
    LoadTrainState(folder, state->step, parameters_, &*optimizer_);
    step_ = state->step;
    unvalidated_ = state->extra.value("unvalidated", Json());
  }

  Json Configuration() const {
    Json json = options_.ToJson();
    json["corpus"] = corpus_;
    return json;
  }

  // Agreed by all ranks in the step, so that they save and leave together.
  bool MustStop() const { return stop_ || step_ == job_.stop_after; }

  // One step: the global batch as fixed micro-batches, dealt round-robin. What a
  // micro-batch holds depends on (seed, step, its number) only.
  double Step() {
    const int micro = options_.global_batch / options_.micro_batch;
    double sums[3] = {0, 0, 0};  // loss, micro-batches, whether to stop
    std::vector<int> mine;
    for (int m = rank_.rank; m < micro; m += rank_.world) mine.push_back(m);
    std::vector<at::Tensor> losses;  // on the device
    reducer_->BeginStep();
    for (size_t i = 0; i < mine.size(); ++i) {
      if (i + 1 == mine.size()) reducer_->LastBackward();
      losses.push_back(MicroBatch(mine[i]));
    }
    reducer_->Finalize(1.0 / micro);
    sums[0] = Read(losses);
    sums[1] = static_cast<double>(losses.size());
    norm_ = reducer_->GradientNorm();
    broken_ = norm_.isfinite().logical_not().to(at::kFloat);
    reducer_->Scale(
        at::where(norm_ > options_.clip_norm, options_.clip_norm / norm_, 1.0));
    optimizer_->Step({LearningRate(options_, step_)}, broken_);
    ++step_;
    sums[2] = StopRequested() ? 1 : 0;
    comm_->AllReduceSum(sums);
    stop_ = sums[2] > 0;
    return sums[0] / sums[1];
  }

  // Their sum. The one time in a step that the host waits for the device: whether the
  // step before met a gradient that is no number comes along.
  double Read(std::vector<at::Tensor> losses) const {
    const size_t count = losses.size();
    if (broken_.defined()) losses.push_back(broken_);
    if (losses.empty()) return 0;
    const at::Tensor values = at::stack(losses).cpu();
    const float* value = values.const_data_ptr<float>();
    if (broken_.defined() && value[count] != 0) RequireFinite();
    double sum = 0;
    for (size_t i = 0; i < count; ++i) sum += value[i];
    return sum;
  }

  // Of the step before: it was not taken where its gradient was no number.
  void RequireFinite() const {
    if (!broken_.defined() || broken_.item<float>() == 0) return;
    throw UsageError(ErrorText(
        "the gradient is not finite at step " + std::to_string(step_ - 1),
        "its norm was " + std::to_string(norm_.item<double>()) + "; it was not taken",
        "start anew (--resume=never) with a lower --learning_rate; the last checkpoint "
        "is whole"));
  }

  at::Tensor MicroBatch(int number) {
    const uint64_t per_step = uint64_t(options_.global_batch);
    std::vector<uint64_t> rows, samples;
    for (int i = 0; i < options_.micro_batch; ++i) {
      const uint64_t sample = uint64_t(step_) * per_step +
                              uint64_t(number) * uint64_t(options_.micro_batch) +
                              uint64_t(i);
      const uint64_t epoch = sample / train_.size();
      const Permutation order(train_.size(), Mix(options_.seed, kRowStream, epoch));
      rows.push_back(order(sample % train_.size()));
      samples.push_back(sample);
    }
    const DenoisingBatch batch =
        MakeDenoisingBatch(train_, rows, samples, tokenizer_, denoising_);
    RoutingCollector routing;
    ForwardOptions forward;
    forward.observer = &routing;
    forward.jitter = config_.router_jitter_noise;
    forward.jitter_key = Mix(options_.seed, kJitterStream, samples[0]);
    const DenoisingLoss loss = DenoisingLosses(&model_->model, batch, forward);
    at::Tensor total = loss.span + config_.router_aux_loss_coef * BalanceLoss(routing);
    if (loss.masked.defined()) total = total + options_.mask_weight * loss.masked;
    total.backward();
    return total.detach();
  }

  Json LogLine(double loss, double steps_per_second) const {
    return {{"step", step_},
            {"epoch", double(step_) * options_.global_batch / double(train_.size())},
            {"samples", step_ * options_.global_batch},
            {"train_loss", loss},
            {"learning_rate", LearningRate(options_, step_ - 1)},
            {"grad_norm", norm_.item<double>()},
            {"samples_per_second", steps_per_second * options_.global_batch}};
  }

  // Rank 0 measures. Asked to stop meanwhile, all save and leave: the next start measures
  // before it goes on.
  void LogValidated(Json line, JsonLines* metrics) {
    std::optional<RoutingMeasures> m;
    if (rank_.is_root()) {
      m = MeasureRouting(&model_->model, validation_, tokenizer_, denoising_,
                         options_.micro_batch, uint64_t(options_.validation_sequences));
    }
    unvalidated_ = line;
    StopWhere(rank_.is_root() && !m);
    unvalidated_ = Json();
    if (!m) return;
    line["valid_loss"] = m->span_loss;
    line["valid"] = m->ToJson();
    metrics->Write(line);
  }

  // On all ranks, where one of them says so. Rank 0 may come late, from measuring: a
  // barrier waits longer than a sum.
  void StopWhere(bool cut) {
    comm_->Barrier();
    double ranks[1] = {cut ? 1.0 : 0.0};
    comm_->AllReduceSum(ranks);
    if (ranks[0] > 0) SaveAndStop();
  }

  [[noreturn]] void SaveAndStop() {
    Save();
    throw StoppedError("stopped at step " + std::to_string(step_) +
                       "; start the same command again and it goes on");
  }

  void Save() {
    if (rank_.is_root()) {
      Json extra = Json::object();
      if (!unvalidated_.is_null()) extra["unvalidated"] = unvalidated_;
      SaveTrainState(StateFolder(job_), {step_, Configuration(), extra, {}}, parameters_,
                     *optimizer_);
    }
    comm_->Barrier();
  }

  // The measures are those of the weights as written.
  RoutingMeasures Finish() {
    std::optional<RoutingMeasures> measures;
    Parameters written;
    if (rank_.is_root()) {
      for (const auto& [name, tensor] : parameters_.items()) {
        written.Add(name, tensor.detach().to(job_.save_dtype).to(at::kFloat));
      }
      TrainableModel model(config_, written);
      measures = MeasureRouting(&model.model, test_, tokenizer_, denoising_,
                                options_.micro_batch, test_.size());
    }
    StopWhere(rank_.is_root() && !measures);
    if (rank_.is_root()) {
      SaveCheckpoint(job_.out, config_, written, job_.save_dtype);
      Json json = {{"options", options_.ToJson()}, {"test", measures->ToJson()}};
      WriteFileAtomic(job_.out / "pretrain.json", json.dump(2) + "\n");
      RemoveTrainStates(StateFolder(job_));
    }
    comm_->Barrier();
    return measures.value_or(RoutingMeasures());
  }

  PretrainJob job_;
  PretrainOptions options_;
  Communicator* comm_;
  RankInfo rank_;
  const std::string corpus_;  // what it is
  Tokenizer tokenizer_;
  SwitchConfig config_;
  TokenRows train_, validation_, test_;
  DenoisingOptions denoising_;
  Parameters parameters_;
  std::optional<TrainableModel> model_;
  std::optional<AdamW> optimizer_;
  std::optional<GradientReducer> reducer_;
  int64_t step_ = 0;
  Json unvalidated_;          // the line of a step whose validation a stop cut short
  at::Tensor norm_, broken_;  // of the last step's gradient, on the device
  bool stop_ = false;
};

}  // namespace

namespace {

SwitchConfig PlannedConfig(const PretrainOptions& o) {
  return FinalConfig(o, o.pieces + o.extra_ids);
}

int64_t NumElements(const SwitchConfig& config) {
  int64_t elements = 0;
  for (const auto& [name, shape] : ParameterShapes(config)) {
    elements +=
        std::accumulate(shape.begin(), shape.end(), int64_t{1}, std::multiplies<>());
  }
  return elements;
}

// Checkpoints of a run lie beside each other while the newest is written: of each weights
// and two moments in fp32. Those that are there already give their room back, or have it.
uint64_t DiskBytes(const PretrainJob& job) {
  std::error_code none;
  const auto there = std::distance(fs::directory_iterator(StateFolder(job), none), {});
  const auto checkpoints = static_cast<uint64_t>(
      kKeptStates + 1 - std::min<std::ptrdiff_t>(there, kKeptStates));
  return checkpoints * 3 * sizeof(float) *
         static_cast<uint64_t>(NumElements(PlannedConfig(job.options)));
}

}  // namespace

void RequirePretrainingRoom(const PretrainJob& job) {
  RequireFreeBytes(job.out, DiskBytes(job));
}

RoutingMeasures Pretrain(const PretrainJob& job, const Corpus& corpus,
                         Communicator* comm) {
  if (comm->rank_info().is_root()) RequirePretrainingRoom(job);
  return Pretrainer(job, corpus, comm).Run();
}

std::string DescribePretraining(const PretrainJob& job, const Corpus& corpus, int world) {
  const PretrainOptions& o = job.options;
  const SwitchConfig c = PlannedConfig(o);
  const int64_t elements = NumElements(c);
  // Weights, gradients and two moments in fp32, and the gradients' sums in fp64.
  const auto memory = static_cast<uint64_t>(elements) * (4 * 4 + 8);
  char text[512];
  std::snprintf(
      text, sizeof text,
      "corpus: %llu documents\nmodel: %d + %d blocks, %d experts, %lld parameters\n"
      "run: %d steps of %d sequences x %d tokens on %d ranks\n"
      "memory: %s a rank before activations; disk: %s of %s free at %s\n",
      static_cast<unsigned long long>(corpus.size()), c.num_layers, c.num_decoder_layers,
      c.num_experts, static_cast<long long>(elements), o.steps, o.global_batch,
      o.sequence_tokens, world, FormatBytes(memory).c_str(),
      FormatBytes(DiskBytes(job)).c_str(), FormatBytes(FreeBytes(job.out)).c_str(),
      job.out.c_str());
  return text;
}

}  // namespace routecast
