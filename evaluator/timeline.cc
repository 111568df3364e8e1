#include "evaluator/timeline.h"

#include <algorithm>
#include <limits>
#include <map>

#include "common/run_record.h"

namespace routecast {
namespace {

constexpr int kLanes = 100;  // room for the lanes of a track in the numbers of threads

const char* TrackName(int track) {
  constexpr const char* kNames[] = {"", "model", "waiting", "link", "predictor", "cache"};
  return kNames[track];
}

Json Metadata(const char* kind, int process, int thread, const std::string& name) {
  return {{"ph", "M"},
          {"name", kind},
          {"pid", process},
          {"tid", thread},
          {"args", {{"name", name}}}};
}

}  // namespace

void Timeline::BeginProcess(const std::string& name) {
  const std::lock_guard lock(mutex_);
  processes_.push_back(name);
}

void Timeline::Add(Event event) {
  const std::lock_guard lock(mutex_);
  if (events_.size() == kMostEvents) {
    ++dropped_;
    return;
  }
  event.process = static_cast<int>(processes_.size());
  events_.push_back(std::move(event));
}

void Timeline::Span(Track track, const std::string& name, double begin, double end,
                    std::vector<std::pair<std::string, std::string>> arguments) {
  Add({0, track, false, begin, std::max(begin, end), name, std::move(arguments)});
}

void Timeline::Mark(Track track, const std::string& name, double at) {
  Add({0, track, true, at, at, name, {}});
}

size_t Timeline::num_events() const {
  const std::lock_guard lock(mutex_);
  return events_.size();
}

size_t Timeline::num_dropped() const {
  const std::lock_guard lock(mutex_);
  return dropped_;
}

std::string Timeline::ToJson() const {
  const std::lock_guard lock(mutex_);
  std::vector<const Event*> sorted;
  double first = std::numeric_limits<double>::max();
  for (const Event& e : events_) {
    sorted.push_back(&e);
    first = std::min(first, e.begin);
  }
  std::stable_sort(sorted.begin(), sorted.end(),
                   [](const Event* a, const Event* b) { return a->begin < b->begin; });
  Json all = Json::array();
  for (size_t p = 0; p < processes_.size(); ++p) {
    all.push_back(Metadata("process_name", static_cast<int>(p) + 1, 0, processes_[p]));
  }
  std::map<std::pair<int, int>, std::vector<double>> lanes;  // ends, by process and track
  for (const Event* e : sorted) {
    const int track = static_cast<int>(e->track);
    std::vector<double>& ends = lanes[{e->process, track}];
    size_t lane = 0;
    while (lane < ends.size() && ends[lane] > e->begin) ++lane;
    lane = std::min<size_t>(lane, kLanes - 1);
    const int thread = track * kLanes + static_cast<int>(lane);
    if (lane >= ends.size()) {
      ends.push_back(0);
      all.push_back(Metadata("thread_name", e->process, thread,
                             lane == 0
                                 ? TrackName(track)
                                 : TrackName(track) + (" " + std::to_string(lane + 1))));
    }
    ends[lane] = e->end;
    Json event = {{"name", e->name},
                  {"cat", TrackName(track)},
                  {"pid", e->process},
                  {"tid", thread},
                  {"ts", (e->begin - first) * 1e6}};  // microseconds
    if (e->mark) {
      event["ph"] = "i";
      event["s"] = "t";
    } else {
      event["ph"] = "X";
      event["dur"] = (e->end - e->begin) * 1e6;
    }
    for (const auto& [key, value] : e->arguments) event["args"][key] = value;
    all.push_back(event);
  }
  Json json = {{"displayTimeUnit", "ms"}, {"traceEvents", std::move(all)}};
  if (dropped_ > 0) json["otherData"] = {{"events_dropped", dropped_}};
  return json.dump();
}

void Timeline::Write(const fs::path& file) const {
  WriteFileAtomic(file, ToJson() + "\n");
}

}  // namespace routecast
