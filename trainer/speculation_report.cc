#include "trainer/speculation_report.h"

#include <cmath>
#include <cstdio>

namespace routecast {
namespace {

constexpr const char* kShown[] = {"frequency", "token_table", "markov", "previous_token",
                                  "stale_gate"};

Json Entries(const std::vector<LeadScores>& scores) {
  Json entries = Json::array();
  for (const LeadScores& s : scores) entries.push_back(s.ToJson());
  return entries;
}

const LeadScores* Find(const std::vector<LeadScores>& scores, const LeadScores& like) {
  for (const LeadScores& s : scores) {
    if (s.phase == like.phase && s.layer == like.layer && s.lead == like.lead) return &s;
  }
  return nullptr;
}

template <typename... Values>
std::string Format(const char* format, Values... values) {
  char text[256];
  std::snprintf(text, sizeof text, format, values...);
  return text;
}

// What models are compared by, and what ci95 is of: top-1, or where a token takes K
// experts the recall of them among the K likeliest.
double Headline(const LeadScores& s) { return s.by_choice.empty() ? s.top[0] : s.recall; }

std::string Row(const LeadScores& s, const TestScores& test) {
  const bool sets = !s.by_choice.empty();
  std::string row = Format(
      "%-8s %5d %5d %6d  %5.1f %5.1f %5.1f  %5.1f-%-5.1f", StackName(s.phase), s.layer,
      s.lead, s.target, 100 * Headline(s), 100 * (sets ? s.recall_twice : s.top[1]),
      100 * (sets ? s.top[0] : s.top[3]), 100 * s.ci95_low, 100 * s.ci95_high);
  for (const char* name : kShown) {
    const LeadScores* other = nullptr;
    for (const auto& [baseline, scores] : test.baselines) {
      if (baseline == name) other = Find(scores, s);
    }
    row += other ? Format(" %14.1f", 100 * Headline(*other)) : Format(" %14s", "-");
  }
  return row + "\n";
}

Json BaselinesJson(const TestScores& test) {
  Json baselines = Json::object();
  for (const auto& [name, scores] : test.baselines) baselines[name] = Entries(scores);
  return baselines;
}

}  // namespace

Json AfterShiftJson(const std::string& store, const TestScores& after) {
  return {{"shift_store", store},
          {"scores_after_shift", Entries(after.model)},
          {"baselines_after_shift", BaselinesJson(after)}};
}

Json ResultsJson(const SpeculationReport& r) {
  const auto validation = [](const ValidationScores& v) {
    return Json{{"loss", v.loss},
                {"top1", v.top1},
                {"top4", v.top4},
                {"recall", v.recall},
                {"samples", v.labels}};
  };
  Json json = {{"kind", r.options.kind},
               {"parameters", r.parameters},
               {"seed", r.options.seed},
               {"dtype", r.options.dtype},
               {"world_size", r.world_size},
               {"steps", r.steps},
               {"best_step", r.best_step},
               {"split", r.split},
               {"validation", validation(r.validation)},
               {"scores", Entries(r.test.model)},
               {"baselines", BaselinesJson(r.test)}};
  if (!r.shift_store.empty()) json.update(AfterShiftJson(r.shift_store, r.after_shift));
  if (r.options.attention_inputs) json["attention_inputs"] = true;
  if (r.options.topk_inputs) json["topk_inputs"] = true;
  for (const auto& [store, scores] : r.also) {
    json["also"].push_back({{"store", store}, {"validation", validation(scores)}});
  }
  for (const SetScores& set : r.test.sets) json["sets"].push_back(set.ToJson());
  for (const BackupScores& b : r.test.backups) json["backups"].push_back(b.ToJson());
  for (const Json& e : r.neighbours) json["neighbours"].push_back(e);
  for (const ValidationScores& member : r.members) {
    json["members"].push_back({{"validation_loss", member.loss},
                               {"validation_top1", member.top1},
                               {"validation_top4", member.top4},
                               {"validation_recall", member.recall}});
  }
  for (size_t i = 0; i < r.test.uncalibrated.size(); ++i) {
    json["scores"][i]["ece_uncalibrated"] = r.test.uncalibrated[i].ece;
  }
  if (r.has_control) {
    json["stale_gate_control"] = {{"accuracy", r.control.share()},
                                  {"tokens", r.control.tokens},
                                  {"ties_within_rounding", r.control.ties}};
  }
  return json;
}

std::string ResultsTable(const SpeculationReport& r, int num_experts) {
  std::string text = Format(
      "%s, %lld parameters: test documents, %% (chance %.1f; loss in nats, ln E = %.3f, "
      "validation %.3f)\n",
      r.options.kind.c_str(), static_cast<long long>(r.parameters), 100.0 / num_experts,
      std::log(double(num_experts)), r.validation.loss);
  const bool sets = !r.test.model.empty() && !r.test.model[0].by_choice.empty();
  text += Format("%-8s %5s %5s %6s  %5s %5s %5s  %-11s", "phase", "layer", "lead",
                 "target", sets ? "at K" : "top1", sets ? "at 2K" : "top2",
                 sets ? "top1" : "top4", sets ? "at K 95 %" : "top1 95 %");
  for (const char* name : kShown) text += Format(" %14.14s", name);
  text += "\n";
  for (const LeadScores& s : r.test.model) text += Row(s, r.test);
  if (!r.shift_store.empty()) text += "then " + r.shift_store + ":\n";
  for (const LeadScores& s : r.after_shift.model) text += Row(s, r.after_shift);
  if (r.has_control) {
    text += Format(
        "stale gate at distance 0: %.1f %% of %lld tokens (%lld ties within bf16)\n",
        100 * r.control.share(), static_cast<long long>(r.control.tokens),
        static_cast<long long>(r.control.ties));
  }
  return text;
}

}  // namespace routecast
