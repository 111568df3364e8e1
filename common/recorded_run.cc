#include "common/recorded_run.h"

#include <chrono>
#include <future>
#include <memory>
#include <mutex>
#include <thread>

#include "common/errors.h"
#include "common/exit_code.h"

namespace routecast {
namespace {

// The run.json that RecordAbruptEnd completes; empty: none.
std::mutex under_way_mutex;
fs::path under_way;

void SetUnderWay(const fs::path& file) {
  const std::lock_guard lock(under_way_mutex);
  under_way = file;
}

}  // namespace

RecordedRun::~RecordedRun() { SetUnderWay({}); }

void RecordAbruptEnd(int exit_status, double seconds) {
  const auto over = std::make_shared<std::promise<void>>();
  std::thread([exit_status, over] {
    const std::lock_guard lock(under_way_mutex);
    try {
      if (!under_way.empty()) RunRecord::FinishOnDisk(under_way, exit_status);
    } catch (const std::exception&) {
      // What was said on stderr says more.
    }
    over->set_value();
  }).detach();
  over->get_future().wait_for(std::chrono::duration<double>(seconds));
}

void RecordedRun::ReadEarlier() {
  const fs::path file = folder_ / "run.json";
  if (earlier_.empty() && fs::exists(file)) earlier_ = ReadFile(file);
}

Json RecordedRun::Earlier() const {
  const Json earlier = Json::parse(earlier_, nullptr, /*allow_exceptions=*/false);
  return earlier.is_object() ? earlier : Json::object();
}

void RecordedRun::Start() {
  ReadEarlier();
  record_.WriteStart();
  SetUnderWay(folder_ / "run.json");
}

void RecordedRun::Begin() {
  begun_ = true;
  for (const std::string& file : files_) fs::remove(folder_ / file);
}

void RecordedRun::Finish(int exit_status, Json headline) {
  SetUnderWay({});
  const bool left =
      (!begun_ && exit_status == kExitUsage) || (leaves_all_ && exit_status == kExitDone);
  if (left && !earlier_.empty()) {
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
