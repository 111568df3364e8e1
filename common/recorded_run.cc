#include "common/recorded_run.h"

#include "common/errors.h"
#include "common/exit_code.h"

namespace routecast {

void RecordedRun::ReadEarlier() {
  const fs::path file = folder_ / "run.json";
  if (earlier_.empty() && fs::exists(file)) earlier_ = ReadFile(file);
}

void RecordedRun::Start() {
  ReadEarlier();
  record_.WriteStart();
}

void RecordedRun::Begin() {
  begun_ = true;
  for (const std::string& file : files_) fs::remove(folder_ / file);
}

void RecordedRun::Finish(int exit_status, Json headline) {
  if (!begun_ && exit_status == kExitUsage && !earlier_.empty()) {
    WriteFileAtomic(folder_ / "run.json", earlier_);
    return;
  }
  if (!begun_) Begin();
  record_.Finish(exit_status, std::move(headline));
}

Json Recorded(RecordedRun* run, const std::function<Json()>& work) {
  if (!run) return work();
  run->Start();
  try {
    Json headline = work();
    run->Finish(kExitDone, headline);
    return headline;
  } catch (const std::exception& e) {
    try {
      run->Finish(ExitCodeOf(e), Json::object());
    } catch (const std::exception&) {
      // A full disk: what `work` threw says more.
    }
    throw;
  }
}

}  // namespace routecast
