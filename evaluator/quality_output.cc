// What the results of quality look like: the file's entries and the printed table.
#include <cmath>
#include <map>
#include <utility>

#include "evaluator/quality.h"
#include "evaluator/question_guard.h"
#include "report/table.h"

namespace routecast {

Json PredictorQuality::ToJson() const {
  Json json = {{"predictor", predictor},
               {"predict_p50_us", p50_us},
               {"predict_p95_us", p95_us},
               {"questions", questions},
               {"scores", Json::array()}};
  if (failed_questions > 0) {
    json["failed_questions"] = failed_questions;
    json["first_failure"] = first_failure;
  }
  for (const QualityScores& place : places) {
    Json entry = place.scores.ToJson();
    entry["confidence_correlation"] = std::isfinite(place.confidence_correlation)
                                          ? Json(place.confidence_correlation)
                                          : Json();
    entry["variation"] = place.variation;
    entry["confidence_variation"] = place.confidence_variation;
    entry["ece_equal_mass"] = place.ece_equal_mass;
    if (place.unanswered > 0) entry["unanswered"] = place.unanswered;
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

// Of one expert a token; of several: what of the set is found.
constexpr const char* kFirstColumns[2][4] = {{"top-1", "95 %", "top-2", "top-4"},
                                             {"recall", "95 %", "at 2K", "top-1"}};

constexpr size_t kMostPlaces = 100;  // of a predictor, that are printed one by one

// Over the source layers of each phase and lead, weighted by their samples. A correlation
// that is not defined counts as none.
std::vector<QualityScores> MeansByLead(const std::vector<QualityScores>& places) {
  std::map<std::pair<Stack, int>, std::vector<const QualityScores*>> by_lead;
  for (const QualityScores& place : places)
    by_lead[{place.scores.phase, place.scores.lead}].push_back(&place);
  std::vector<QualityScores> means;
  for (const auto& [key, of_lead] : by_lead) {
    QualityScores& mean = means.emplace_back();
    LeadScores& to = mean.scores;
    to.phase = key.first;
    to.lead = key.second;
    for (const QualityScores* place : of_lead) to.samples += place->scores.samples;
    for (const QualityScores* place : of_lead) {
      const LeadScores& from = place->scores;
      const double share =
          static_cast<double>(from.samples) / static_cast<double>(to.samples);
      for (size_t i = 0; i < to.top.size(); ++i) to.top[i] += share * from.top[i];
      to.recall += share * from.recall;
      to.recall_twice += share * from.recall_twice;
      to.cross_entropy += share * from.cross_entropy;
      to.ece += share * from.ece;
      mean.variation += share * place->variation;
      if (std::isfinite(place->confidence_correlation))
        mean.confidence_correlation += share * place->confidence_correlation;
    }
  }
  return means;
}

bool OfSets(const std::vector<PredictorQuality>& all) {
  for (const PredictorQuality& quality : all) {
    for (const QualityScores& place : quality.places) {
      if (!place.scores.by_choice.empty()) return true;
    }
  }
  return false;
}

}  // namespace

std::string QualityTable(const std::vector<PredictorQuality>& all) {
  const bool sets = OfSets(all);
  const auto& first = kFirstColumns[sets];
  Table table({"<predictor", "<phase", "layer", "lead", first[0], first[1], first[2],
               first[3], "nats", "ECE", "corr.", "variation", "p50 us", "p95 us"});
  bool means = false;
  for (const PredictorQuality& quality : all) {
    const bool many = quality.places.size() > kMostPlaces;
    means = means || many;
    for (const QualityScores& place :
         many ? MeansByLead(quality.places) : quality.places) {
      const LeadScores& s = place.scores;
      const std::string interval =
          Fixed(100 * s.ci95_low, 1) + "-" + Fixed(100 * s.ci95_high, 1);
      table.AddRow({quality.predictor, StackName(s.phase),
                    many ? "all" : std::to_string(s.layer), std::to_string(s.lead),
                    Fixed(100 * (sets ? s.recall : s.top[0]), 1), many ? "" : interval,
                    Fixed(100 * (sets ? s.recall_twice : s.top[1]), 1),
                    Fixed(100 * (sets ? s.top[0] : s.top[3]), 1),
                    Fixed(s.cross_entropy, 3), Fixed(100 * s.ece, 1),
                    Fixed(place.confidence_correlation, 2), Fixed(place.variation, 2),
                    Fixed(quality.p50_us, 0), Fixed(quality.p95_us, 0)});
    }
  }
  std::string text = table.ToText();
  if (means) {
    text +=
        "layer all: means over source layers by their samples; --out has every layer "
        "in quality.json\n";
  }
  for (const PredictorQuality& quality : all) {
    if (quality.failed_questions > 0) {
      text += FailureText(quality.predictor, quality.failed_questions,
                          "count as wrong, of " + std::to_string(quality.questions),
                          quality.first_failure) +
              "\n";
    }
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
