#include "trainer/leaderboard.h"

#include <algorithm>
#include <cmath>

#include "common/errors.h"
#include "trainer/document_scores.h"
#include "trainer/domain_shift.h"
#include "trainer/leaderboard_rows.h"
#include "trainer/question_timing.h"
#include "trainer/run_plan.h"
#include "trainer/training_checks.h"

namespace routecast {
namespace {

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

Json ReadResults(const fs::path& folder, const TraceDataset& dataset) {
  if (!fs::exists(folder / "results.json")) {
    throw UsageError(ErrorText(folder.string() + " holds no finished run",
                               "results.json is not there",
                               "name a kind, or the --out of routecast-train"));
  }
  Json results = ReadJsonFile(folder / "results.json");
  const auto refuse = [&](const char* why) {
    throw UsageError(ErrorText(folder.string() + " was trained on another store", why,
                               "train it on this store, or leave it out"));
  };
  if (!results.contains("split") || results["split"] != dataset.SplitJson()) {
    refuse("its documents are split otherwise");
  }
  if (!fs::exists(folder / "config.json")) return results;
  const Json config = ReadJsonFile(folder / "config.json");
  const Json extra = config.value("extra", Json::object());
  if (extra.contains("traces") && extra["traces"] != dataset.fingerprint()) {
    refuse("its documents are split alike, but its traces are others");
  }
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
    if (!IsFinished(run, *dataset)) TrainSpeculation(run, dataset, routers, comm);
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
      const Json results = ReadResults(name, *dataset);
      if (results.value("attention_inputs", false) && dataset->attention_heads() == 0) {
        throw UsageError(ErrorText(name + " reads attention summaries",
                                   "this store was recorded without them",
                                   "leave it out, or name the store it learnt from"));
      }
      const bool top_k = results.value("topk_inputs", false);
      if (top_k && !dataset->has_teacher()) {
        throw UsageError(ErrorText(name + " reads the router's likeliest experts",
                                   "this store has none, or was opened without them",
                                   "give --topk_inputs, or leave it out"));
      }
      RequireShift(job.run.shift.dataset, *dataset, WithHidden::kNo, top_k);
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
    DropUnused(&run.options);
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
  if (job.run.shift.dataset != nullptr) board["shift_store"] = job.run.shift.name;
  if (times.pass_us > 0) board["pass_us"] = times.pass_us;
  if (!job.checkpoint.empty()) board["pass_model"] = job.checkpoint.string();
  const MoeGeometry& g = dataset->geometry();
  const int questions = g.decoder_layers > 0 ? g.decoder_layers + 1 : g.encoder_layers;
  std::vector<Json> last;
  std::vector<ScoresBySeed> by_seed;  // of each row
  for (size_t i = 0; i < entries.size(); ++i) {
    const LeaderboardEntry& entry = entries[i];
    std::vector<Json> results;
    for (const fs::path& f : entry.folders) {
      results.push_back(ReadResults(f, *dataset));
      AddAfterShift(job.run, f, routers, comm, &results.back());
    }
    by_seed.push_back(ReadDocumentScores(entry.folders, results, kModelScores));
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
  // Baselines; estimates have no scores by document.
  for (size_t i = by_seed.size(); i < board["rows"].size() && !last.empty(); ++i) {
    const Json& row = board["rows"][i];
    by_seed.push_back(row.contains("estimate")
                          ? ScoresBySeed()
                          : ReadDocumentScores(entries.back().folders, last,
                                               row.at("kind").get<std::string>()));
  }
  AddDifferences(by_seed, key, job.run.options.seed, &board);
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
