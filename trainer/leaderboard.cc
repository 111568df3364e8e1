#include "trainer/leaderboard.h"

#include <algorithm>
#include <cmath>
#include <cstdio>

#include "common/errors.h"
#include "trainer/document_scores.h"
#include "trainer/domain_shift.h"
#include "trainer/leaderboard_rows.h"
#include "trainer/model_setup.h"
#include "trainer/question_timing.h"
#include "trainer/run_plan.h"
#include "trainer/training_checks.h"

namespace routecast {
namespace {

bool IsKind(const std::string& name) {
  const auto kinds = SpeculationKinds();
  return std::find(kinds.begin(), kinds.end(), name) != kinds.end();
}

// What a kind reads and the store has not; empty = it has all.
std::string LackOf(const std::string& kind, TraceDataset* dataset, bool routers) {
  const bool reads = KindOf(kind).router_inputs != RouterInputs::kNever;
  if (reads && !dataset->any_hidden()) return "router inputs";
  if (kind == "stale_correction" && !routers) return "the routers' weights";
  if (KindOf(kind).token_ids && dataset->vocab_size() == 0) return "token ids";
  return "";
}

bool IsAll(const LeaderboardJob& job) {
  return job.entries == std::vector<std::string>{"all"};
}

std::vector<std::string> NamesOf(const LeaderboardJob& job, TraceDataset* dataset,
                                 bool routers) {
  if (!IsAll(job)) return job.entries;
  std::vector<std::string> kinds = SpeculationKinds();
  std::erase_if(kinds, [&](const std::string& kind) {
    return !LackOf(kind, dataset, routers).empty();
  });
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

// What a training would refuse, of every run that is still to be trained.
void CheckEntries(const LeaderboardJob& job, const std::vector<LeaderboardEntry>& entries,
                  TraceDataset* dataset, int world) {
  for (const LeaderboardEntry& entry : entries) {
    for (size_t i = 0; entry.trained && i < entry.folders.size(); ++i) {
      const SpeculationJob run = RunOf(job, entry, i);
      if (IsFinished(run, *dataset)) continue;
      const SpeculationConfig config = ConfigsOf(run.options, {dataset})[0];
      RequireWork(run.options, world);
      RequireShift(run.shift.dataset, *dataset, HiddenOf(config), ReadsTopK(config));
      break;  // seeds differ in nothing else
    }
  }
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

Json KindsLeftOut(const LeaderboardJob& job, TraceDataset* dataset, bool routers) {
  Json lacks = Json::object();
  if (!IsAll(job)) return lacks;
  for (const std::string& kind : SpeculationKinds()) {
    const std::string lack = LackOf(kind, dataset, routers);
    if (!lack.empty()) lacks[lack].push_back(kind);
  }
  return lacks;
}

std::string LeftOutText(const Json& left_out) {
  std::string text;
  for (const auto& [lack, kinds] : left_out.items()) {
    std::string names;
    for (const Json& kind : kinds) {
      names += (names.empty() ? "" : ", ") + kind.get<std::string>();
    }
    text += (text.empty() ? "left out, as the store has no " : "; has no ") + lack +
            ": " + names;
  }
  return text;
}

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
  // What is wrong with an entry or the checkpoint is said before anything is trained.
  const std::vector<LeaderboardEntry> entries = EntriesOf(job, dataset, !routers.empty());
  CheckEntries(job, entries, dataset, comm->rank_info().world);
  const Json left_out = KindsLeftOut(job, dataset, !routers.empty());
  if (!left_out.empty() && !job.run.quiet && comm->rank_info().is_root()) {
    std::fprintf(stderr, "%s\n", LeftOutText(left_out).c_str());
  }
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
  comm->Barrier();  // has the time that the root may take alone
  Json board = {{"store", job.run.store}, {"split", split}, {"rows", Json::array()}};
  if (job.run.shift.dataset != nullptr) board["shift_store"] = job.run.shift.name;
  if (!left_out.empty()) board["left_out"] = left_out;
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
  MarkFewerPlaces(g, &board);
  AddDifferences(by_seed, key, job.run.options.seed, &board);
  std::vector<Json> rows = board["rows"];
  for (Json& row : rows) AddRates(g, &row);
  RankRows(key, &rows);
  board["rows"] = rows;
  if (comm->rank_info().is_root()) {
    WriteFileAtomic(job.run.out / "leaderboard.csv", LeaderboardCsv(board));
    // Before the page: whatever becomes of that, what was trained for hours is there.
    WriteFileAtomic(job.run.out / "leaderboard.json", board.dump(2) + "\n");
    WriteFileAtomic(job.run.out / "leaderboard.html", LeaderboardHtml(board));
  }
  comm->Barrier();
  return board;
}

}  // namespace routecast
