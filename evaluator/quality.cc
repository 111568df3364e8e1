#include "evaluator/quality.h"

#include <ATen/ATen.h>
#include <c10/core/GradMode.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <map>
#include <tuple>

#include "common/errors.h"
#include "common/progress.h"
#include "common/stop.h"
#include "models/routing_window.h"
#include "report/table.h"
#include "storage/one_model.h"

namespace routecast {
namespace {

struct Place {
  LeadAccumulator scores;
  Correlation confidence;
  EqualMassCalibration calibration;
  RouterAgreement agreement;
  double variation = 0, confidence_variation = 0;
  int64_t neighbours = 0;
};

// One predictor's answers so far.
struct Asked {
  std::map<std::tuple<Stack, int, int>, Place> places;
  std::vector<float> right;  // by decoder token: share of the layers, one visit ahead
  std::vector<double> microseconds;
};

double Quantile(std::vector<double> values, double q) {
  if (values.empty()) return 0;
  const auto at = static_cast<size_t>(q * static_cast<double>(values.size() - 1));
  std::nth_element(values.begin(), values.begin() + static_cast<int64_t>(at),
                   values.end());
  return values[at];
}

// probs [T,E] of tokens from `first` on; labels of the whole sequence.
void Score(const RoutingTrace& trace, Stack stack, int source, int lead,
           const MoeGeometry& g, const at::Tensor& probs_TE, int64_t first,
           Asked* asked) {
  const int target = (source + lead) % g.layers(stack);
  auto [it, made] = asked->places.try_emplace(std::tuple(stack, source, lead));
  Place& place = it->second;
  if (made) place.scores = LeadAccumulator(stack, source, lead, target);
  const int64_t tokens = probs_TE.size(0);
  const at::Tensor labels =
      WindowLabels(trace, stack, source, lead).narrow(0, first, tokens).contiguous();
  place.scores.Add(
      probs_TE, labels,
      at::full({tokens}, static_cast<int64_t>(trace.document_id), at::kLong));
  const RoutingSpan& span = stack == Stack::kEncoder ? trace.encoder : trace.decoder;
  const at::Tensor rows = probs_TE.to(at::kFloat).contiguous();
  std::vector<float> router(static_cast<size_t>(g.num_experts));
  const int64_t ahead = source + lead >= g.layers(stack) ? 1 : 0;  // in the next token
  const auto [largest, guess] = probs_TE.max(1);
  for (int64_t t = 0; t < tokens; ++t) {
    const auto label = labels[t].item<int64_t>();
    if (label < 0) continue;
    const bool right = guess[t].item<int64_t>() == label;
    place.confidence.Add(largest[t].item<double>(), right);
    place.calibration.Add(largest[t].item<double>(), right);
    if (RouterDistribution(span, target, static_cast<int>(first + t + ahead), &router)) {
      place.agreement.Add(rows.const_data_ptr<float>() + t * g.num_experts, router,
                          span.top_k);
    }
  }
  if (tokens > 1) {
    const auto change =
        probs_TE.narrow(0, 1, tokens - 1) - probs_TE.narrow(0, 0, tokens - 1);
    place.variation += change.abs().sum().item<double>() / 2;
    place.confidence_variation += largest.diff().abs().sum().item<double>();
    place.neighbours += tokens - 1;
  }
}

// `kept` tokens up to token `newest`.
RoutingWindow UpTo(const RoutingWindow& all, int64_t newest, int64_t kept) {
  RoutingWindow w = all;
  const int64_t first = newest + 1 - kept;
  for (at::Tensor* x :
       {&w.token_ids_BT, &w.valid_BT, &w.experts_BTL, &w.hidden_BTD, &w.context_BTD}) {
    if (x->defined()) *x = x->narrow(1, first, kept).contiguous();
  }
  w.first_token = first;
  return w;
}

class Interview {
 public:
  Interview(const MoeGeometry& geometry, const QualityOptions& options)
      : g_(geometry), options_(options) {}

  void Ask(const RoutingTrace& trace, ExpertPredictor* predictor, Asked* asked) const {
    if (trace.encoder.num_tokens > 0) AskEncoder(trace, predictor, asked);
    if (trace.decoder.num_tokens > 0) AskDecoder(trace, predictor, asked);
  }

 private:
  template <typename Question>
  static auto Timed(Asked* asked, const Question& question) {
    const auto start = std::chrono::steady_clock::now();
    auto answers = question();
    const std::chrono::duration<double, std::micro> us =
        std::chrono::steady_clock::now() - start;
    asked->microseconds.push_back(us.count());
    return answers;
  }

  void AskEncoder(const RoutingTrace& trace, ExpertPredictor* predictor,
                  Asked* asked) const {
    for (int source = -1; source < g_.encoder_layers - 1; ++source) {
      const RoutingWindow window =
          WindowOf(trace, Stack::kEncoder, source, g_.num_experts);
      const int leads = g_.encoder_layers - 1 - source;
      const auto answers =
          Timed(asked, [&] { return predictor->PredictLeads(window, leads); });
      for (int lead = 1; lead <= leads; ++lead) {
        const auto& probs = answers[static_cast<size_t>(lead - 1)];
        if (!probs) continue;
        Score(trace, Stack::kEncoder, source, lead, g_, probs->squeeze(0).cpu(), 0,
              asked);
      }
    }
  }

  void AskDecoder(const RoutingTrace& trace, ExpertPredictor* predictor,
                  Asked* asked) const {
    const int leads = g_.decoder_layers;
    const int64_t tokens = std::min(trace.decoder.num_tokens, options_.tokens);
    struct Source {
      RoutingWindow all;
      at::Tensor next_layer_T;                    // labels one visit ahead
      std::vector<std::vector<at::Tensor>> said;  // by lead
    };
    std::vector<Source> sources;
    for (int source = -1; source < g_.decoder_layers; ++source) {
      sources.push_back(
          {WindowOf(trace, Stack::kDecoder, source, g_.num_experts),
           WindowLabels(trace, Stack::kDecoder, source, 1),
           std::vector<std::vector<at::Tensor>>(static_cast<size_t>(leads))});
    }
    // In the order of the pass: some predictors learn from what came.
    int64_t held = 0;  // by the window, as by the runtime's
    for (int64_t t = 0; t < tokens; ++t) {
      held = KeptTokens(*predictor, held, 1) + 1;
      int right = 0, counted = 0;
      for (Source& source : sources) {
        const RoutingWindow window = UpTo(source.all, t, held);
        const auto answers =
            Timed(asked, [&] { return predictor->PredictLast(window, leads); });
        for (size_t lead = 0; lead < answers.size(); ++lead) {
          if (answers[lead])
            source.said[lead].push_back(answers[lead]->flatten(0, 1).cpu());
        }
        const auto label = source.next_layer_T[t].item<int64_t>();
        if (label < 0 || answers.empty() || !answers[0]) continue;
        right += source.said[0].back()[0].argmax().item<int64_t>() == label;
        ++counted;
      }
      if (counted > 0)
        asked->right.push_back(static_cast<float>(right) / static_cast<float>(counted));
    }
    for (size_t s = 0; s < sources.size(); ++s) {
      const auto& said = sources[s].said;
      for (size_t lead = 0; lead < said.size(); ++lead) {
        if (said[lead].empty()) continue;
        Score(trace, Stack::kDecoder, static_cast<int>(s) - 1, static_cast<int>(lead) + 1,
              g_, at::cat(said[lead]), tokens - static_cast<int64_t>(said[lead].size()),
              asked);
      }
    }
  }

  MoeGeometry g_;
  QualityOptions options_;
};

PredictorQuality Summary(const std::string& name, const Asked& asked, uint64_t seed) {
  PredictorQuality quality;
  quality.predictor = name;
  for (const auto& [key, place] : asked.places) {
    if (place.scores.samples() == 0) continue;
    QualityScores scores;
    scores.scores = place.scores.Scores(seed);
    scores.confidence_correlation = place.confidence.Value();
    scores.agreement = place.agreement;
    const auto neighbours = static_cast<double>(std::max<int64_t>(1, place.neighbours));
    scores.variation = place.variation / neighbours;
    scores.confidence_variation = place.confidence_variation / neighbours;
    scores.ece_equal_mass = place.calibration.Value();
    quality.places.push_back(scores);
  }
  quality.p50_us = Quantile(asked.microseconds, 0.5);
  quality.p95_us = Quantile(asked.microseconds, 0.95);
  quality.questions = static_cast<int64_t>(asked.microseconds.size());
  return quality;
}

}  // namespace

Json PredictorQuality::ToJson() const {
  Json json = {{"predictor", predictor},
               {"predict_p50_us", p50_us},
               {"predict_p95_us", p95_us},
               {"questions", questions},
               {"scores", Json::array()}};
  for (const QualityScores& place : places) {
    Json entry = place.scores.ToJson();
    entry["confidence_correlation"] = std::isfinite(place.confidence_correlation)
                                          ? Json(place.confidence_correlation)
                                          : Json();
    entry["variation"] = place.variation;
    entry["confidence_variation"] = place.confidence_variation;
    entry["ece_equal_mass"] = place.ece_equal_mass;
    const RouterAgreement& agreement = place.agreement;
    if (agreement.rows() > 0) {
      entry["kl"] = agreement.kl();
      entry["overlap_at_k"] = agreement.overlap();
      entry["probability_correlation"] = agreement.rows() > agreement.constant_rows()
                                             ? Json(agreement.correlation())
                                             : Json();
      entry["constant_rows"] = agreement.constant_rows();
    }
    json["scores"].push_back(entry);
  }
  if (adaptation) {
    json["adaptation"] = {{"before", adaptation->before},
                          {"first_window", adaptation->first},
                          {"after", adaptation->after},
                          {"tokens", adaptation->tokens}};
  }
  return json;
}

namespace {

using Predictors = std::vector<std::unique_ptr<ExpertPredictor>>;

// Asks all predictors about the test sequences of `reader`.
std::vector<Asked> AskAll(const TraceReader& reader, const Predictors& predictors,
                          const QualityOptions& options) {
  const bool hidden = std::any_of(predictors.begin(), predictors.end(),
                                  [](const auto& p) { return p->needs_hidden(); });
  std::vector<uint64_t> ids;
  for (const SequenceInfo& info : reader.sequences()) {
    if (SplitOf(info.group_id) != SplitPart::kTest || (hidden && !info.has_hidden)) {
      continue;
    }
    ids.push_back(info.sequence_id);
    if (ids.size() == static_cast<size_t>(options.sequences)) break;
  }
  if (ids.empty()) {
    throw UsageError(ErrorText("the store has no test sequence" +
                                   std::string(hidden ? " with router inputs" : "") +
                                   ": " + reader.path().string(),
                               "", "collect more, with --record=ids,probs,hidden"));
  }
  std::vector<Asked> asked(predictors.size());
  const Interview interview(reader.config().geometry, options);
  Progress progress("asking " + std::to_string(predictors.size()) + " predictors",
                    "sequences", ids.size(), options.quiet);
  for (size_t i = 0; i < ids.size(); ++i) {
    const RoutingTrace trace =
        reader.Read(ids[i], hidden ? WithHidden::kYes : WithHidden::kNo);
    for (size_t p = 0; p < predictors.size(); ++p) {
      ThrowIfStopped("while asking predictors");
      interview.Ask(trace, predictors[p].get(), &asked[p]);
    }
    progress.Update(i + 1);
  }
  progress.Finish();
  return asked;
}

}  // namespace

std::vector<PredictorQuality> MeasureQuality(const TraceReader& reader,
                                             const Predictors& predictors,
                                             const QualityOptions& options) {
  const c10::NoGradGuard no_grad;
  const std::vector<Asked> asked = AskAll(reader, predictors, options);
  std::vector<PredictorQuality> all;
  for (size_t p = 0; p < predictors.size(); ++p) {
    all.push_back(Summary(predictors[p]->name(), asked[p], options.seed));
  }
  return all;
}

ShiftedQuality MeasureShift(const TraceReader& from, const TraceReader& to,
                            const Predictors& predictors, const QualityOptions& options) {
  RequireOneModel({from.path().string(), from.config().geometry},
                  {to.path().string(), to.config().geometry});
  const c10::NoGradGuard no_grad;
  const std::vector<Asked> before = AskAll(from, predictors, options),
                           after = AskAll(to, predictors, options);
  ShiftedQuality shifted;
  for (size_t p = 0; p < predictors.size(); ++p) {
    const std::string name = predictors[p]->name();
    shifted.before.push_back(Summary(name, before[p], options.seed));
    shifted.after.push_back(Summary(name, after[p], options.seed));
    shifted.after.back().adaptation = AdaptationOf(before[p].right, after[p].right);
  }
  return shifted;
}

std::string QualityTable(const std::vector<PredictorQuality>& all) {
  Table table({"<predictor", "<phase", "layer", "lead", "top-1", "95 %", "top-2", "top-4",
               "nats", "ECE", "corr.", "variation", "p50 us", "p95 us"});
  for (const PredictorQuality& quality : all) {
    for (const QualityScores& place : quality.places) {
      const LeadScores& s = place.scores;
      table.AddRow({quality.predictor, StackName(s.phase), std::to_string(s.layer),
                    std::to_string(s.lead), Fixed(100 * s.top[0], 1),
                    Fixed(100 * s.ci95_low, 1) + "-" + Fixed(100 * s.ci95_high, 1),
                    Fixed(100 * s.top[1], 1), Fixed(100 * s.top[3], 1),
                    Fixed(s.cross_entropy, 3), Fixed(100 * s.ece, 1),
                    Fixed(place.confidence_correlation, 2), Fixed(place.variation, 2),
                    Fixed(quality.p50_us, 0), Fixed(quality.p95_us, 0)});
    }
  }
  std::string text = table.ToText();
  for (const PredictorQuality& quality : all) {
    if (!quality.adaptation) continue;
    const Adaptation& a = *quality.adaptation;
    text += quality.predictor + ": " + Fixed(100 * a.before, 1) +
            " % right before the change, " + Fixed(100 * a.first, 1) +
            " % in the first " + std::to_string(kAdaptationWindow) + " tokens after, " +
            Fixed(100 * a.after, 1) + " % in the end; settled after " +
            std::to_string(a.tokens) + " tokens\n";
  }
  return text;
}

}  // namespace routecast
