#include "trainer/leaderboard.h"

#include <algorithm>
#include <cmath>
#include <tuple>

#include "common/errors.h"
#include "trainer/question_timing.h"
#include "trainer/run_plan.h"
#include "trainer/training_checks.h"

namespace routecast {
namespace {

constexpr double kServableShare = 0.05;  // of the pass

bool IsKind(const std::string& name) {
  const auto kinds = SpeculationKinds();
  return std::find(kinds.begin(), kinds.end(), name) != kinds.end();
}

std::vector<std::string> NamesOf(const LeaderboardJob& job, TraceDataset* dataset,
                                 bool routers) {
  if (job.entries != std::vector<std::string>{"all"}) return job.entries;
  std::vector<std::string> kinds;
  for (const std::string& kind : SpeculationKinds()) {
    const bool reads = KindOf(kind).router_inputs != RouterInputs::kNever;
    if (reads && !dataset->any_hidden()) continue;
    if (kind == "stale_correction" && !routers) continue;
    if (KindOf(kind).token_ids && dataset->vocab_size() == 0) continue;
    kinds.push_back(kind);
  }
  return kinds;
}

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

// What rows are ranked by: the mean over all places of the decoder, where there is one.
std::string RankingKey(const MoeGeometry& g) {
  return std::string(g.decoder_layers > 0 ? "decoder" : "encoder") +
         (g.experts_per_token > 1 ? "_recall" : "_top1");
}

void AddSummary(Json* row) {
  const Json scores = (*row)["scores"];  // adding keys moves what they hold
  for (const char* phase : {"encoder", "decoder"}) {
    const std::string name = phase;
    (*row)[name + "_next_top1"] = MeanOf(scores, name, true, "top1");
    (*row)[name + "_next_top4"] = MeanOf(scores, name, true, "top4");
    (*row)[name + "_top1"] = MeanOf(scores, name, false, "top1");
    (*row)[name + "_next_recall"] = MeanOf(scores, name, true, "recall");
    (*row)[name + "_next_recall_at_2k"] = MeanOf(scores, name, true, "recall_at_2k");
    (*row)[name + "_recall"] = MeanOf(scores, name, false, "recall");
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
  AddSummary(&row);
  AddBackups(results, &row);
  AddTimes(results, &row);
  return row;
}

void AddRates(const MoeGeometry& geometry, Json* row) {
  const Json& score = row->at(RankingKey(geometry));
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

namespace {

Json ReadResults(const fs::path& folder, const Json& split) {
  if (!fs::exists(folder / "results.json")) {
    throw UsageError(ErrorText(folder.string() + " holds no finished run",
                               "results.json is not there",
                               "name a kind, or the --out of routecast-train"));
  }
  Json results = ReadJsonFile(folder / "results.json");
  if (!results.contains("split") || results["split"] != split) {
    throw UsageError(ErrorText(folder.string() + " was trained on another store",
                               "its documents are split otherwise",
                               "train it on this store, or leave it out"));
  }
  if (!fs::exists(folder / "config.json")) return results;
  const Json config = ReadJsonFile(folder / "config.json");
  const Json extra = config.value("extra", Json::object());
  for (const char* key : {"training_seconds", "time_limit"}) {
    if (extra.contains(key)) results[key] = extra[key];
  }
  return results;
}

void TrainEntry(const LeaderboardJob& job, const LeaderboardEntry& entry,
                TraceDataset* dataset, const std::vector<RouterWeights>& routers,
                Communicator* comm) {
  for (size_t i = 0; i < entry.folders.size(); ++i) {
    const SpeculationJob run = RunOf(job, entry, i);
    if (!IsFinished(run)) TrainSpeculation(run, dataset, routers, comm);
  }
}

void AddBaselines(const std::vector<Json>& results, Json* rows) {
  for (const auto& [name, scores] : results.at(0).at("baselines").items()) {
    Json row = {{"kind", name},           {"parameters", nullptr},
                {"seeds", Json::array()}, {"validation_loss", nullptr},
                {"predict_us", nullptr},  {"offline_only", nullptr},
                {"baseline", true},       {"scores", Merged({&scores})}};
    AddSummary(&row);
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
    rows->push_back(row);
  }
}

}  // namespace

std::vector<LeaderboardEntry> EntriesOf(const LeaderboardJob& job, TraceDataset* dataset,
                                        bool routers) {
  std::vector<LeaderboardEntry> entries;
  for (const std::string& name : NamesOf(job, dataset, routers)) {
    const bool set = job.settings.contains(name);
    LeaderboardEntry entry{name, set || IsKind(name), {}};
    if (set) CheckTraces(job.settings.at(name), dataset);
    for (int i = 0; entry.trained && i < job.seeds; ++i) {
      const uint64_t seed = job.run.options.seed + static_cast<uint64_t>(i);
      entry.folders.push_back(job.run.out / name / ("seed-" + std::to_string(seed)));
    }
    if (!entry.trained) {
      entry.folders.push_back(name);
      const Json results = ReadResults(name, dataset->SplitJson());
      if (results.value("attention_inputs", false) && dataset->attention_heads() == 0) {
        throw UsageError(ErrorText(name + " reads attention summaries",
                                   "this store was recorded without them",
                                   "leave it out, or name the store it learnt from"));
      }
    }
    entries.push_back(entry);
  }
  return entries;
}

SpeculationJob RunOf(const LeaderboardJob& job, const LeaderboardEntry& entry,
                     size_t number) {
  SpeculationJob run = job.run;
  if (const auto set = job.settings.find(entry.name); set != job.settings.end()) {
    run.options = set->second;
  } else {
    run.options.kind = entry.name;
    if (entry.name != "ensemble") {
      run.options.members.clear();
      run.options.combine = SpeculationOptions().combine;
    }
  }
  run.options.seed = job.run.options.seed + number;
  run.time_limit = job.kind_seconds / job.seeds;
  run.out = entry.folders.at(number);
  return run;
}

Json MakeLeaderboard(const LeaderboardJob& job, TraceDataset* dataset,
                     const std::vector<RouterWeights>& routers, Communicator* comm) {
  const Json split = dataset->SplitJson();
  // What is wrong with folders and checkpoint is said before anything is trained.
  const std::vector<LeaderboardEntry> entries = EntriesOf(job, dataset, !routers.empty());
  if (!job.checkpoint.empty()) RequireTracedModel(job.checkpoint, dataset->geometry());
  std::vector<fs::path> timed;
  for (const LeaderboardEntry& entry : entries) {
    if (entry.trained) TrainEntry(job, entry, dataset, routers, comm);
    timed.push_back(entry.folders[0]);
  }
  QuestionTimes times;
  times.question_us.assign(entries.size(), 0);
  times.question_flops.assign(entries.size(), 0);
  times.pass_us = job.pass_us;
  if (comm->rank_info().is_root()) {
    times = TimeQuestions(timed, job.checkpoint, job.run.device, dataset);
    if (job.checkpoint.empty()) times.pass_us = job.pass_us;
  }
  Json board = {{"store", job.run.store}, {"split", split}, {"rows", Json::array()}};
  if (times.pass_us > 0) board["pass_us"] = times.pass_us;
  if (!job.checkpoint.empty()) board["pass_model"] = job.checkpoint.string();
  const MoeGeometry& g = dataset->geometry();
  const int questions = g.decoder_layers > 0 ? g.decoder_layers + 1 : g.encoder_layers;
  std::vector<Json> last;
  for (size_t i = 0; i < entries.size(); ++i) {
    const LeaderboardEntry& entry = entries[i];
    std::vector<Json> results;
    for (const fs::path& f : entry.folders) results.push_back(ReadResults(f, split));
    const std::string name = entry.trained
                                 ? entry.name
                                 : results[0].at("kind").get<std::string>() + " (" +
                                       fs::path(entry.name).filename().string() + ")";
    board["rows"].push_back(
        LeaderboardRow(name, results, times.question_us[i], times.pass_us, questions));
    if (std::isfinite(times.question_flops[i])) {
      board["rows"].back()["predict_flops"] = times.question_flops[i];
    }
    last = results;
  }
  if (!last.empty()) AddBaselines(last, &board["rows"]);
  if (!last.empty()) AddEstimates(last, g.experts_per_token > 1, &board["rows"]);
  board["experts_per_token"] = g.experts_per_token;
  const std::string key = RankingKey(g);
  std::vector<Json> rows = board["rows"];
  for (Json& row : rows) AddRates(g, &row);
  std::stable_sort(rows.begin(), rows.end(), [&](const Json& a, const Json& b) {
    const auto value = [&](const Json& r) {
      return r[key].is_number() ? r[key].get<double>() : -1;
    };
    return value(a) > value(b);
  });
  board["rows"] = rows;
  if (comm->rank_info().is_root()) {
    WriteFileAtomic(job.run.out / "leaderboard.csv", LeaderboardCsv(board));
    WriteFileAtomic(job.run.out / "leaderboard.html", LeaderboardHtml(board));
    WriteFileAtomic(job.run.out / "leaderboard.json", board.dump(2) + "\n");
  }
  comm->Barrier();
  return board;
}

}  // namespace routecast
