// A run whose output folder says what became of it, however it ends: run_record.h's file
// from the start on.
#pragma once

#include <functional>
#include <string>
#include <vector>

#include "common/run_record.h"

namespace routecast {

// A command that is refused (exit 2) before Begin leaves the run.json of an earlier run
// as it was: nothing ran. Thread rule: one thread. Only rank 0 makes one.
class RecordedRun {
 public:
  RecordedRun(const fs::path& folder, std::string program, Json configuration)
      : folder_(folder), record_(folder, std::move(program), std::move(configuration)) {}
  ~RecordedRun();
  RecordedRun(const RecordedRun&) = delete;
  RecordedRun& operator=(const RecordedRun&) = delete;
  void Set(const std::string& key, Json value) { record_.Set(key, std::move(value)); }
  void SetMissing(const std::string& key, Json value) {
    record_.SetMissing(key, std::move(value));
  }
  // What the run writes: those of an earlier run go at Begin, or at an end before it.
  void Replaces(std::vector<std::string> files) { files_ = std::move(files); }
  // Keeps what run.json says now as an earlier run's; Start does it, too.
  void ReadEarlier();
  // What it said; an empty object where there was none, or a damaged one.
  Json Earlier() const;
  void Start();
  // The inputs were read and fit: from here on the folder is this run's.
  void Begin();
  // What the folder holds is left as it was: where the run ends well, run.json says again
  // what the earlier run's did.
  void LeavesAll() { leaves_all_ = true; }
  void Finish(int exit_status, Json headline);

 private:
  fs::path folder_;
  RunRecord record_;
  std::vector<std::string> files_;
  bool begun_ = false, leaves_all_ = false;
  std::string earlier_;  // run.json before this run; empty: none
};

// For a process that has to end by _Exit, as a call never comes back: run.json of the run
// under way says how it ended. Returns after `seconds` at most, as that disk may hang as
// well. Thread rule: any thread, beside the run's own.
void RecordAbruptEnd(int exit_status, double seconds = 5);

// Runs `work`, which returns the headline figures, with a run.json that says from the
// start on that it runs and in the end how it ended, whatever `work` throws (which goes
// on to the caller). Null: nobody records (no folder, or another rank does).
Json Recorded(RecordedRun* run, const std::function<Json()>& work);

}  // namespace routecast
