// One table of many models on one store, each over several seeds, beside the baselines:
// leaderboard.json, .csv and .html. Thread rule: one thread a rank; every rank makes the
// same calls.
#pragma once

#include <map>
#include <string>
#include <vector>

#include "trainer/speculation_trainer.h"

namespace routecast {

struct LeaderboardJob {
  // Kinds, which are trained into OUT/KIND/seed-N, or names of `settings`, the same, or
  // folders of finished runs; "all" = every kind that the store can serve.
  std::vector<std::string> entries;
  // Options of their own instead of run's (but seed); no kind's name. Of run's, a kind's
  // entry has those that it has a use for.
  std::map<std::string, SpeculationOptions> settings;
  int seeds = 3;
  double pass_us = 0;  // one token through the decoder; 0 = not known
  // Of training a kind, its seeds in equal parts: a run that is over its part keeps its
  // best so far. 0 = no limit.
  double kind_seconds = 0;
  // The traced model: its pass is timed here, beside the questions; empty = pass_us.
  fs::path checkpoint;
  // What every run is trained by, but kind, seed and folder; `out` is the table's folder.
  SpeculationJob run;
};

// A row to be: a kind or settings, with a folder a seed, or a finished run.
struct LeaderboardEntry {
  std::string name;
  bool trained = false;  // here; else a finished run
  std::vector<fs::path> folders;
};
// Of entries "all": what the store lacks, with the kinds left out for it; else empty.
Json KindsLeftOut(const LeaderboardJob& job, TraceDataset* dataset, bool routers);
std::string LeftOutText(const Json& left_out);  // of the same, a line for people
// Throws UsageError where a folder holds no finished run or one of another store, or
// where settings ask for what the traces have not.
std::vector<LeaderboardEntry> EntriesOf(const LeaderboardJob& job, TraceDataset* dataset,
                                        bool routers);
// The training of a trained entry's `number` (seed, folder).
SpeculationJob RunOf(const LeaderboardJob& job, const LeaderboardEntry& entry,
                     size_t number);

// A finished run of the same options is not trained again, an unfinished one goes on.
// Returns leaderboard.json's content. Throws what TrainSpeculation throws; UsageError
// where a folder holds no finished run or one of another store, or
// where a training that is to come would be refused: before the first one.
Json MakeLeaderboard(const LeaderboardJob& job, TraceDataset* dataset,
                     const std::vector<RouterWeights>& routers, Communicator* comm);

// The table for people: a row a model, best first.
std::string LeaderboardText(const Json& leaderboard);
std::string LeaderboardCsv(const Json& leaderboard);
std::string LeaderboardHtml(const Json& leaderboard);

}  // namespace routecast
