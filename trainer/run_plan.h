// What a job of many trainings would do, and what of it is done: --dry_run of
// --leaderboard and --search. Nothing is written. Thread rule: one thread.
#pragma once

#include <string>

#include "trainer/leaderboard.h"
#include "trainer/search.h"

namespace routecast {

// True where run.out holds a finished run of these options over these traces (of older
// versions: which they were is not known): it is not trained again. One that its time
// ended counts only where the limit has not grown. What --also names is only counted, and
// --shift_store not looked at: a command with either trains.
bool IsFinished(const SpeculationJob& run, const TraceDataset& dataset);

// Of a finished run: its results.json. Writes what `run` asks for beside the model and is
// not there (ONNX). Rank 0 alone.
Json KeepFinished(const SpeculationJob& run);

// Runs, steps, memory and disk, a line an entry. Throws what the job itself would refuse
// before its first step.
std::string DescribeLeaderboard(const LeaderboardJob& job, TraceDataset* dataset,
                                bool routers, int world);
std::string DescribeSearch(const SearchJob& job, TraceDataset* dataset, int world);

}  // namespace routecast
