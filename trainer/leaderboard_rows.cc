#include "trainer/leaderboard_rows.h"

#include <algorithm>
#include <cmath>
#include <map>
#include <tuple>

namespace routecast {
namespace {

constexpr double kServableShare = 0.05;  // of the pass

using Place = std::tuple<std::string, int, int>;  // phase, layer, lead

// Mean over seeds; the interval reaches from the lowest to the highest end of the seeds'
// intervals over documents.
Json Merged(const std::vector<const Json*>& lists) {
  struct Sum {
    double top1 = 0, top4 = 0, cross_entropy = 0, ece = 0, low = 1, high = 0;
    double recall = 0, recall_twice = 0;  // of several experts a token
    double least = 1, most = 0;
    int seeds = 0;
    bool sets = false;
  };
  std::map<Place, Sum> sums;
  for (const Json* list : lists) {
    for (const Json& s : *list) {
      Sum& sum = sums[Place(s.at("phase").get<std::string>(), s.at("layer").get<int>(),
                            s.at("lead").get<int>())];
      const double headline = s.at(s.contains("recall") ? "recall" : "top1");
      sum.top1 += s.at("top1").get<double>();
      sum.sets = s.contains("recall");
      sum.recall += s.value("recall", 0.0);
      sum.recall_twice += s.value("recall_at_2k", 0.0);
      sum.top4 += s.at("top4").get<double>();
      sum.cross_entropy += s.at("cross_entropy").get<double>();
      sum.ece += s.at("ece").get<double>();
      sum.low = std::min(sum.low, s.at("ci95").at(0).get<double>());
      sum.high = std::max(sum.high, s.at("ci95").at(1).get<double>());
      sum.least = std::min(sum.least, headline);
      sum.most = std::max(sum.most, headline);
      ++sum.seeds;
    }
  }
  Json merged = Json::array();
  for (const auto& [place, s] : sums) {
    const auto& [phase, layer, lead] = place;
    merged.push_back({{"phase", phase},
                      {"layer", layer},
                      {"lead", lead},
                      {"top1", s.top1 / s.seeds},
                      {"top4", s.top4 / s.seeds},
                      {"cross_entropy", s.cross_entropy / s.seeds},
                      {"ece", s.ece / s.seeds},
                      {"ci95", {s.low, s.high}},
                      {"seed_range", {s.least, s.most}}});
    if (!s.sets) continue;
    merged.back()["recall"] = s.recall / s.seeds;
    merged.back()["recall_at_2k"] = s.recall_twice / s.seeds;
  }
  return merged;
}

// Mean of `key` over a phase's places of lead 1 (or of all leads).
Json MeanOf(const Json& scores, const std::string& phase, bool only_next,
            const char* key) {
  double sum = 0;
  int count = 0;
  for (const Json& s : scores) {
    if (s.at("phase") != phase || (only_next && s.at("lead") != 1)) continue;
    if (!s.contains(key)) return Json();
    sum += s.at(key).get<double>();
    ++count;
  }
  return count > 0 ? Json(sum / count) : Json();
}

// Means of the places in `from`, under names that end so.
void AddMeans(const char* from, const std::string& end, Json* row) {
  const Json scores = (*row)[from];  // adding keys moves what they hold
  for (const char* phase : {"encoder", "decoder"}) {
    for (const char* key : {"top1", "top4", "recall", "recall_at_2k"}) {
      const std::string name = std::string(phase) + "_next_" + key;
      (*row)[name + end] = MeanOf(scores, phase, true, key);
    }
    for (const char* key : {"top1", "recall"}) {
      const std::string name = std::string(phase) + "_" + key;
      (*row)[name + end] = MeanOf(scores, phase, false, key);
    }
  }
}

// How many places of each phase the means are over.
void CountPlaces(const Json& scores, Json* row) {
  for (const char* phase : {"encoder", "decoder"}) {
    (*row)["places"][phase] =
        std::count_if(scores.begin(), scores.end(),
                      [&](const Json& s) { return s.at("phase") == phase; });
  }
}

void AddSummary(Json* row) {
  AddMeans("scores", "", row);
  CountPlaces(row->at("scores"), row);
}

// Of the test documents of another domain, and what is lost there.
void AddShift(const std::vector<const Json*>& lists, Json* row) {
  constexpr char kScores[] = "scores_after_shift";
  (*row)[kScores] = Merged(lists);
  AddMeans(kScores, "_after_shift", row);
  for (const char* phase : {"encoder", "decoder"}) {
    for (const char* key : {"_next_top1", "_next_recall"}) {
      const std::string name = std::string(phase) + key;
      const Json before = (*row)[name], after = (*row)[name + "_after_shift"];
      const bool known = before.is_number() && after.is_number();
      (*row)[name + "_lost"] =
          known ? Json(before.get<double>() - after.get<double>()) : Json();
    }
  }
}

// Of heads for the router's further choices: their recall over places, choices and seeds,
// and that of as many experts by the first head alone (speculation_backups.h).
void AddBackups(const std::vector<Json>& results, Json* row) {
  for (const char* key : {"recall", "recall_primary"}) {
    double sum = 0;
    int count = 0;
    for (const Json& r : results) {
      for (const Json& place : r.value("backups", Json::array())) {
        for (const Json& choice : place.at(key)) sum += choice.get<double>(), ++count;
      }
    }
    if (count > 0) (*row)["backup_" + std::string(key)] = sum / count;
  }
}

// Mean seconds of training; null where a run did not say. How many runs ended before
// their time was enough.
void AddTimes(const std::vector<Json>& results, Json* row) {
  double sum = 0;
  int timed = 0, ended = 0;
  for (const Json& r : results) {
    timed += r.contains("training_seconds");
    sum += r.value("training_seconds", 0.0);
    ended += r.contains("time_limit");
  }
  const bool all = timed == static_cast<int>(results.size());
  (*row)["training_seconds"] = all ? Json(sum / timed) : Json();
  if (ended > 0) (*row)["stopped_by_time"] = ended;
}

}  // namespace

Stack RankingStack(const MoeGeometry& g) {
  return g.decoder_layers > 0 ? Stack::kDecoder : Stack::kEncoder;
}

// What rows are ranked by: the mean over all places of the decoder, where there is one.
std::string RankingKey(const MoeGeometry& g) {
  return std::string(StackName(RankingStack(g))) +
         (g.experts_per_token > 1 ? "_recall" : "_top1");
}

Json LeaderboardRow(const std::string& name, const std::vector<Json>& results,
                    double predict_us, double pass_us, int questions_a_pass) {
  std::vector<const Json*> lists;
  Json seeds = Json::array();
  double loss = 0;
  for (const Json& r : results) {
    lists.push_back(&r.at("scores"));
    seeds.push_back(r.at("seed"));
    loss += r.at("validation").at("loss").get<double>();
  }
  Json row = {{"kind", name},
              {"parameters", results.at(0).at("parameters")},
              {"seeds", seeds},
              {"validation_loss", loss / static_cast<double>(results.size())},
              {"predict_us", nullptr},
              {"predict_flops", nullptr},
              {"offline_only", nullptr},
              {"scores", Merged(lists)}};
  if (std::isfinite(predict_us)) row["predict_us"] = predict_us;
  if (std::isfinite(predict_us) && pass_us > 0) {
    row["offline_only"] = predict_us * questions_a_pass > kServableShare * pass_us;
  }
  // Nothing that serves has them, however fast the model is.
  if (results[0].value("attention_inputs", false)) {
    row["kind"] = name + " + attention";
    row["offline_only"] = true;
  }
  if (results[0].value("topk_inputs", false)) {
    row["kind"] = row["kind"].get<std::string>() + " + top-k";
    row["offline_only"] = true;
  }
  AddSummary(&row);
  AddBackups(results, &row);
  AddTimes(results, &row);
  std::vector<const Json*> shifted;
  for (const Json& r : results) {
    if (r.contains("scores_after_shift")) shifted.push_back(&r.at("scores_after_shift"));
  }
  if (!shifted.empty()) AddShift(shifted, &row);
  return row;
}

void MarkFewerPlaces(const MoeGeometry& geometry, Json* board) {
  Json most = {{"encoder", 0}, {"decoder", 0}};
  for (const Json& row : board->at("rows")) {
    if (row.contains("estimate")) continue;
    for (const auto& [phase, count] : row.at("places").items()) {
      most[phase] = std::max(most[phase].get<int>(), count.get<int>());
    }
  }
  const char* const ranks = StackName(RankingStack(geometry));
  for (Json& row : board->at("rows")) {
    row["fewer_places"] = row.at("places").at(ranks) < most.at(ranks);
  }
  (*board)["places"] = most;
}

void RankRows(const std::string& key, std::vector<Json>* rows) {
  const auto standing = [&](const Json& r) {
    const bool all = !r.at("fewer_places").get<bool>();
    return std::pair(all, r.at(key).is_number() ? r.at(key).get<double>() : -1);
  };
  std::stable_sort(rows->begin(), rows->end(), [&](const Json& a, const Json& b) {
    return standing(a) > standing(b);
  });
}

void AddRates(const MoeGeometry& geometry, Json* row) {
  // A mean over fewer places is no score that ranks.
  const bool fewer = row->value("fewer_places", false);
  const Json score = fewer ? Json() : row->at(RankingKey(geometry));
  const double chance = double(geometry.experts_per_token) / double(geometry.num_experts);
  const auto over = [&](const char* key, double scale) {
    const Json by = row->value(key, Json());
    if (!score.is_number() || !by.is_number() || !(by.get<double>() > 0)) return Json();
    return Json(100 * score.get<double>() / (by.get<double>() / scale));
  };
  const Json per_second = over("training_seconds", 1);
  const Json per_million = over("parameters", 1e6);
  const Json times = score.is_number() ? Json(score.get<double>() / chance) : Json();
  (*row)["times_chance"] = times;
  (*row)["points_per_second"] = per_second;
  (*row)["points_per_million_parameters"] = per_million;
}

void AddBaselines(const std::vector<Json>& results, Json* rows) {
  for (const auto& [name, scores] : results.at(0).at("baselines").items()) {
    Json row = {{"kind", name},           {"parameters", nullptr},
                {"seeds", Json::array()}, {"validation_loss", nullptr},
                {"predict_us", nullptr},  {"offline_only", nullptr},
                {"baseline", true},       {"scores", Merged({&scores})}};
    AddSummary(&row);
    const Json shifted = results[0].value("baselines_after_shift", Json::object());
    if (shifted.contains(name)) AddShift({&shifted.at(name)}, &row);
    rows->push_back(row);
  }
}

// What router inputs, or sets of experts, could tell by their nearest neighbours
// (knn_estimate.h): no predictor, and of the places that have such features alone.
void AddEstimates(const std::vector<Json>& results, bool sets, Json* rows) {
  if (!results.at(0).contains("neighbours")) return;
  const Json& places = results.at(0).at("neighbours");
  const std::string score = sets ? "recall" : "top1";
  const bool states = places.at(0).value("features", "router inputs") == "router inputs";
  const std::string what = states ? "state" : "routing";
  const std::pair<std::string, std::string> kinds[] = {
      {"nearest " + what, score + "_nearest"},
      {"32 nearest " + what + (states ? "s" : ""), score + "_of_32"},
      {"bound by the nearest " + what, "bayes_bound"}};
  for (const auto& [name, key] : kinds) {
    Json row = {{"kind", name},           {"parameters", nullptr},
                {"seeds", Json::array()}, {"validation_loss", nullptr},
                {"predict_us", nullptr},  {"offline_only", nullptr},
                {"baseline", true},       {"estimate", true},
                {"scores", Json::array()}};
    AddSummary(&row);  // the same keys as every row's
    for (const char* phase : {"encoder", "decoder"}) {
      row[phase + ("_next_" + score)] = MeanOf(places, phase, true, key.c_str());
      row[phase + ("_" + score)] = MeanOf(places, phase, false, key.c_str());
    }
    CountPlaces(places, &row);
    rows->push_back(row);
  }
}

}  // namespace routecast
