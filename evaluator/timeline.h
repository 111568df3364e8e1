// What a runtime did when, as a file that Perfetto and chrome://tracing open: a process a
// row of the comparison, with tracks for the model, what it waits for, the link and the
// predictor, and marks for evictions. Torch-free.
#pragma once

#include <cstdint>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

#include "common/files.h"

namespace routecast {

// Thread rule: any thread.
class Timeline {
 public:
  enum class Track { kModel = 1, kWaiting, kLink, kPredictor, kCache };
  static constexpr size_t kMostEvents = 200'000;  // then events are counted, not kept

  // Events that follow belong to the process `name`.
  void BeginProcess(const std::string& name);
  // Seconds of one clock; end >= begin. Texts of `arguments` are shown with the event.
  void Span(Track track, const std::string& name, double begin, double end,
            std::vector<std::pair<std::string, std::string>> arguments = {});
  void Mark(Track track, const std::string& name, double at);
  size_t num_events() const;
  size_t num_dropped() const;

  // The JSON object format of trace events. Spans of one track that overlap are laid into
  // lanes of their own, as the format has it that spans of a thread nest.
  std::string ToJson() const;
  void Write(const fs::path& file) const;  // atomic

 private:
  struct Event {
    int process = 0;
    Track track = Track::kModel;
    bool mark = false;
    double begin = 0, end = 0;
    std::string name;
    std::vector<std::pair<std::string, std::string>> arguments;
  };
  void Add(Event event);
  mutable std::mutex mutex_;
  std::vector<std::string> processes_;
  std::vector<Event> events_;
  size_t dropped_ = 0;
};

}  // namespace routecast
