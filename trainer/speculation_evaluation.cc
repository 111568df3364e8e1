#include "trainer/speculation_evaluation.h"

#include <ATen/ATen.h>
#include <c10/core/GradMode.h>

#include <algorithm>
#include <cmath>
#include <map>
#include <tuple>

#include "common/errors.h"
#include "models/known_ids.h"
#include "trainer/agreed_stop.h"
#include "trainer/divergence.h"
#include "trainer/speculation_loss.h"

namespace routecast {
namespace {

// Temperatures kGridRatio^-kGridHalf .. kGridRatio^kGridHalf: 0.25 to 4.
constexpr int kGridHalf = 12;
constexpr int kGridPoints = 2 * kGridHalf + 1;
const double kLogRatio = std::log(4.0) / kGridHalf;
constexpr double kBf16Rounding = 0x1p-8;  // half a unit in the last place, relative
constexpr double kFloatNoise = 1e-4;      // of logits computed in another order

using LeadKey = std::tuple<Stack, int, int>;  // stack, source, lead

// This rank's batches.
std::vector<const MicroBatch*> Mine(const EvaluationData& data, Communicator* comm) {
  std::vector<const MicroBatch*> mine;
  const RankInfo rank = comm->rank_info();
  for (size_t i = static_cast<size_t>(rank.rank); i < data.batches.size();
       i += static_cast<size_t>(rank.world)) {
    mine.push_back(&data.batches[i]);
  }
  return mine;
}

// Keys that the batches can have scores for, the same on every rank.
std::vector<LeadKey> KeysOf(const EvaluationData& data) {
  std::map<std::pair<Stack, int>, bool> sources;
  for (const MicroBatch& b : data.batches) sources[{b.stack, b.source_layer}] = true;
  std::vector<LeadKey> keys;
  for (const auto& [source, unused] : sources) {
    const int leads = NumLeadsOf(data.dataset->geometry(), source.first, source.second);
    for (int lead = 1; lead <= leads; ++lead) {
      keys.emplace_back(source.first, source.second, lead);
    }
  }
  return keys;
}

// Logits and labels of the rows that count at one lead; K experts a token.
struct LeadRows {
  at::Tensor values_NE, labels_NK, documents_N;
};
LeadRows RowsOf(const at::Tensor& values_BTE, const SpeculationBatch& batch, int lead) {
  const at::Tensor labels = batch.labels_BTH.select(2, lead - 1).flatten();
  const at::Tensor rows = labels.ne(-100).nonzero().squeeze(1);
  return {values_BTE.reshape({-1, values_BTE.size(-1)})
              .index_select(0, rows.to(values_BTE.device()))
              .cpu(),
          LabelSets(batch).select(2, lead - 1).flatten(0, 1).index_select(0, rows),
          batch.documents_BT.flatten().index_select(0, rows)};
}

// Vertex of the parabola through (-1, a), (0, b), (1, c), within one step.
double Vertex(double a, double b, double c) {
  const double curvature = a - 2 * b + c;
  return curvature > 0 ? std::clamp(0.5 * (a - c) / curvature, -1.0, 1.0) : 0;
}

}  // namespace

namespace {

// Of a model's `outputs`, one row of sums a column: cross-entropy, top-1, top-4, recall,
// labels.
template <typename Outputs>
std::vector<ValidationScores> Score(const SpeculationModel& model, size_t columns,
                                    const EvaluationData& data, Communicator* comm,
                                    const Outputs& outputs) {
  const c10::NoGradGuard no_grad;
  std::vector<double> sums(5 * columns, 0);
  for (const MicroBatch* micro : Mine(data, comm)) {
    if (StopRequested()) break;
    const SpeculationBatch batch =
        MakeSpeculationBatch(*micro, data.dataset, data.hidden);
    if (batch.num_labels == 0) continue;
    const std::vector<SpeculationOutput> all =
        outputs(WindowTo(batch.window, data.device));
    for (size_t i = 0; i < columns; ++i) {
      const RoutingScores scores = ScoresOf(all.at(i), batch);
      if (!std::isfinite(scores.cross_entropy)) {
        ThrowDiverged("validation", model, batch, all);
      }
      sums[5 * i] += scores.cross_entropy;
      sums[5 * i + 1] += scores.top1;
      sums[5 * i + 2] += scores.top4;
      sums[5 * i + 3] += scores.recall;
      sums[5 * i + 4] += static_cast<double>(scores.labels);
    }
  }
  ThrowIfAnyStopped(comm, "while it was validated");
  comm->AllReduceSum(sums);
  std::vector<ValidationScores> scores;
  for (size_t i = 0; i < columns; ++i) {
    const double* sum = &sums[5 * i];
    const double n = std::max(1.0, sum[4]);
    scores.push_back(
        {sum[0] / n, sum[1] / n, sum[2] / n, sum[3] / n, static_cast<int64_t>(sum[4])});
  }
  return scores;
}

}  // namespace

ValidationScores Validate(SpeculationModel* model, const EvaluationData& data,
                          Communicator* comm) {
  return Score(*model, 1, data, comm, [&](const RoutingWindow& window) {
    return std::vector<SpeculationOutput>{model->Forward(window, 0)};
  })[0];
}

ValidationScores ValidateAll(SpeculationModel* model,
                             const std::vector<EvaluationData>& stores,
                             Communicator* comm) {
  ValidationScores mean;
  for (const EvaluationData& data : stores) {
    const ValidationScores own = Validate(model, data, comm);
    const double share = 1 / static_cast<double>(stores.size());
    mean.loss += own.loss * share;
    mean.top1 += own.top1 * share;
    mean.top4 += own.top4 * share;
    mean.recall += own.recall * share;
    mean.labels += own.labels;
  }
  return mean;
}

std::vector<ValidationScores> ValidateMembers(SpeculationModel* model,
                                              const EvaluationData& data,
                                              Communicator* comm) {
  return Score(
      *model, model->MemberParameters().size(), data, comm,
      [&](const RoutingWindow& window) { return model->ForwardMembers(window, 0); });
}

Calibration FitCalibration(SpeculationModel* model, const EvaluationData& data,
                           Communicator* comm) {
  const c10::NoGradGuard no_grad;
  const std::vector<LeadKey> keys = KeysOf(data);
  std::map<LeadKey, size_t> place;
  for (size_t i = 0; i < keys.size(); ++i) place[keys[i]] = i;
  std::vector<double> loss(keys.size() * kGridPoints, 0.0);
  for (const MicroBatch* micro : Mine(data, comm)) {
    if (StopRequested()) break;
    const SpeculationBatch batch =
        MakeSpeculationBatch(*micro, data.dataset, data.hidden);
    const SpeculationOutput out = model->Forward(WindowTo(batch.window, data.device), 0);
    for (int lead = 1; lead <= static_cast<int>(batch.labels_BTH.size(2)); ++lead) {
      const LeadRows rows = RowsOf(out.logits_BTHE.select(2, lead - 1), batch, lead);
      if (rows.labels_NK.size(0) == 0) continue;
      const size_t at = place.at({micro->stack, micro->source_layer, lead});
      for (int k = 0; k < kGridPoints; ++k) {
        const double temperature = std::exp((k - kGridHalf) * kLogRatio);
        loss[at * kGridPoints + static_cast<size_t>(k)] +=
            RoutingCrossEntropy(rows.values_NE / temperature, rows.labels_NK)
                .sum()
                .item<double>();
      }
    }
  }
  ThrowIfAnyStopped(comm, "before it was calibrated");
  comm->AllReduceSum(loss);
  Calibration calibration;
  for (size_t i = 0; i < keys.size(); ++i) {
    const double* row = &loss[i * kGridPoints];
    const auto best = std::clamp<int64_t>(std::min_element(row, row + kGridPoints) - row,
                                          1, kGridPoints - 2);
    if (row[best] == 0) continue;  // nothing was seen at this lead
    const double step = Vertex(row[best - 1], row[best], row[best + 1]);
    const auto [stack, source, lead] = keys[i];
    calibration.Set(stack, source, lead,
                    std::exp((static_cast<double>(best) - kGridHalf + step) * kLogRatio));
  }
  return calibration;
}

std::shared_ptr<const BaselineTables> FitBaselines(TraceDataset* dataset,
                                                   int least_vocabulary,
                                                   const fs::path& folder,
                                                   const fs::path& file,
                                                   Communicator* comm) {
  const RankInfo rank = comm->rank_info();
  const auto part = [&](int r) {
    return folder / ("baselines-" + std::to_string(r) + ".safetensors");
  };
  const int vocab = std::max(static_cast<int>(dataset->vocab_size()), least_vocabulary);
  auto tables = std::make_shared<BaselineTables>(dataset->geometry(), vocab);
  for (uint32_t i = static_cast<uint32_t>(rank.rank); i < dataset->sequences().size();
       i += static_cast<uint32_t>(rank.world)) {
    if (dataset->part(i) != SplitPart::kTrain) continue;
    if (StopRequested()) break;
    tables->Fit(*dataset->Read({&i, 1}, WithHidden::kNo)[0]);
  }
  ThrowIfAnyStopped(comm, "before the first step of this start");
  if (rank.world > 1) {
    tables->Save(part(rank.rank));
    comm->Barrier();
    // In the same order on every rank: the sums are the same bits.
    tables = std::make_shared<BaselineTables>(dataset->geometry(), vocab);
    for (int r = 0; r < rank.world; ++r) tables->Merge(BaselineTables::Load(part(r)));
    comm->Barrier();
    fs::remove(part(rank.rank));
  }
  if (rank.is_root()) tables->Save(file);
  return tables;
}

StaleControl CheckStaleGate(const std::vector<RouterWeights>& routers,
                            const EvaluationData& data, Communicator* comm) {
  const c10::NoGradGuard no_grad;
  const MoeGeometry& g = data.dataset->geometry();
  const StaleGatePredictor gate(g, routers);
  double sums[3] = {0, 0, 0};  // tokens, wrong, ties
  for (const MicroBatch* micro : Mine(data, comm)) {
    if (micro->source_layer < 0) continue;
    if (StopRequested()) break;
    const RoutingWindow w =
        MakeSpeculationBatch(*micro, data.dataset, WithHidden::kYes).window;
    if (!w.hidden_BTD.defined()) continue;
    const at::Tensor rows = w.valid_BT.flatten().nonzero().squeeze(1);
    const at::Tensor logits =
        gate.PredictLead0(w).reshape({-1, g.num_experts}).index_select(0, rows).log();
    const at::Tensor truth =
        w.experts_BTL.select(2, w.source_layer).flatten().index_select(0, rows);
    const at::Tensor guess = logits.argmax(1);
    const at::Tensor x =
        w.hidden_BTD.reshape({-1, w.hidden_BTD.size(2)}).index_select(0, rows).abs();
    const at::Tensor& weight =
        routers[static_cast<size_t>(g.GlobalLayer(w.stack, w.source_layer))].weight_ED;
    const at::Tensor reach =
        kBf16Rounding *
            (x * (weight.index_select(0, guess) - weight.index_select(0, truth)).abs())
                .sum(1) +
        kFloatNoise;
    const at::Tensor gap =
        (logits.gather(1, guess.unsqueeze(1)) - logits.gather(1, truth.unsqueeze(1)))
            .squeeze(1);
    const at::Tensor differs = guess.ne(truth);
    sums[0] += static_cast<double>(rows.size(0));
    sums[1] += differs.logical_and(gap.le(reach).logical_not()).sum().item<double>();
    sums[2] += differs.logical_and(gap.le(reach)).sum().item<double>();
  }
  ThrowIfAnyStopped(comm, "before the first step of this start");
  comm->AllReduceSum(sums);
  const StaleControl control{static_cast<int64_t>(sums[0]), static_cast<int64_t>(sums[1]),
                             static_cast<int64_t>(sums[2])};
  if (control.wrong > 0) {
    throw DataError(ErrorText(
        "the stale gate at distance 0 does not give the recorded experts: router inputs, "
        "routers.safetensors and expert ids disagree",
        std::to_string(control.wrong) + " of " + std::to_string(control.tokens) +
            " tokens are wrong",
        "collect the store again; no score would mean anything"));
  }
  return control;
}

namespace {

using Accumulators = std::map<LeadKey, LeadAccumulator>;

Accumulators MakeAccumulators(const EvaluationData& data, bool equal_mass) {
  Accumulators all;
  for (const LeadKey& key : KeysOf(data)) {
    const auto [stack, source, lead] = key;
    const int target = (source + lead) % data.dataset->geometry().layers(stack);
    all.emplace(key, LeadAccumulator(stack, source, lead, target, equal_mass));
  }
  return all;
}

void AddRows(Accumulators* to, const at::Tensor& probs_BTE, const SpeculationBatch& batch,
             int lead) {
  const LeadRows rows = RowsOf(probs_BTE, batch, lead);
  if (rows.labels_NK.size(0) == 0) return;
  to->at({batch.window.stack, batch.window.source_layer, lead})
      .Add(rows.values_NE, rows.labels_NK, rows.documents_N);
}

// Sums of all ranks, in rank order: the same on every rank.
std::vector<LeadScores> Gather(const Accumulators& mine, uint64_t seed,
                               Communicator* comm) {
  std::vector<LeadScores> scores;
  for (const auto& [key, accumulator] : mine) {
    const auto [stack, source, lead] = key;
    const LeadScores own = accumulator.Scores(seed, /*resamples=*/0);
    LeadAccumulator sum(stack, source, lead, own.target);
    for (const std::string& bytes : comm->AllGather(accumulator.Bytes())) {
      sum.Merge(bytes);
    }
    if (sum.samples() > 0) scores.push_back(sum.Scores(seed));
  }
  return scores;
}

}  // namespace

namespace {

// Frequencies of the targets of an encoder's leads, [H,E].
at::Tensor FrequencyOf(const BaselineTables& tables, const MicroBatch& micro, int leads) {
  const int experts = tables.geometry().num_experts;
  at::Tensor all = at::empty({leads, experts});
  for (int lead = 1; lead <= leads; ++lead) {
    tables.Frequency(micro.source_layer + lead,
                     all.data_ptr<float>() + int64_t{lead - 1} * experts);
  }
  return all;
}

}  // namespace

TestScores Test(SpeculationModel* model, const Calibration& calibration,
                const std::shared_ptr<const BaselineTables>& tables,
                const std::vector<RouterWeights>& routers, const EvaluationData& data,
                uint64_t seed, Communicator* comm) {
  const c10::NoGradGuard no_grad;
  std::vector<std::unique_ptr<ExpertPredictor>> baselines;
  for (const std::string& name : BaselineNames()) {
    if (name == "stale_gate" && routers.empty()) continue;
    if (name == "token_table" && tables->vocab_size() == 0) continue;
    baselines.push_back(MakeBaseline(name, tables, data.dataset->geometry(), routers));
  }
  Accumulators model_sums = MakeAccumulators(data, /*equal_mass=*/true),
               raw_sums = MakeAccumulators(data, /*equal_mass=*/false);
  SetAccumulator sets;
  BackupAccumulator backups(data.dataset->geometry(), model->config().backup_experts);
  std::vector<Accumulators> baseline_sums(baselines.size(), raw_sums);
  // The stale gate needs router inputs even where the model does not.
  const WithHidden hidden =
      routers.empty() ? data.hidden : std::max(data.hidden, WithHidden::kYes);
  for (const MicroBatch* micro : Mine(data, comm)) {
    if (StopRequested()) break;
    const SpeculationBatch batch = MakeSpeculationBatch(*micro, data.dataset, hidden);
    RoutingWindow seen = WithKnownIds(batch.window, model->config().vocab_size);
    if (data.hidden == WithHidden::kNo) ForgetRouterInputs(&seen);
    const SpeculationOutput out = model->Forward(WindowTo(seen, data.device), 0);
    const int leads = static_cast<int>(batch.labels_BTH.size(2));
    if (out.backups_BTHKE.defined()) backups.Add(out, batch);
    std::vector<at::Tensor> calibrated;
    for (int lead = 1; lead <= leads; ++lead) {
      const double t = calibration.Temperature(micro->stack, micro->source_layer, lead);
      const at::Tensor logits = out.logits_BTHE.select(2, lead - 1);
      const at::Tensor probs = (logits / t).softmax(-1);
      AddRows(&model_sums, probs, batch, lead);
      AddRows(&raw_sums, logits.softmax(-1), batch, lead);
      calibrated.push_back(probs);
    }
    if (micro->stack == Stack::kEncoder && leads > 0) {
      sets.Add(micro->source_layer, at::stack(calibrated, 2).cpu(), LabelSets(batch),
               FrequencyOf(*tables, *micro, leads));
    }
    for (size_t b = 0; b < baselines.size(); ++b) {
      const auto probs = baselines[b]->PredictLeads(batch.window, leads);
      for (int lead = 1; lead <= leads; ++lead) {
        const auto& p = probs[static_cast<size_t>(lead - 1)];
        if (p) AddRows(&baseline_sums[b], *p, batch, lead);
      }
    }
  }
  ThrowIfAnyStopped(comm, "before it was scored");
  TestScores scores;
  scores.model = Gather(model_sums, seed, comm);
  scores.uncalibrated = Gather(raw_sums, seed, comm);
  const int encoder_layers = data.dataset->geometry().encoder_layers;
  std::vector<double> set_sums = sets.Sums(encoder_layers);
  comm->AllReduceSum(set_sums);
  scores.sets = SetAccumulator::Scores(set_sums, encoder_layers);
  if (model->config().backup_experts > 0) {
    std::vector<double> backup_sums = backups.Sums();
    comm->AllReduceSum(backup_sums);
    scores.backups = backups.Scores(backup_sums);
  }
  for (size_t b = 0; b < baselines.size(); ++b) {
    scores.baselines.emplace_back(baselines[b]->name(),
                                  Gather(baseline_sums[b], seed, comm));
  }
  return scores;
}

}  // namespace routecast
