#include "evaluator/timeline.h"

#include <gtest/gtest.h>

#include <map>
#include <string>
#include <utility>
#include <vector>

#include "common/run_record.h"

namespace routecast {
namespace {

TEST(TimelineTest, SpansOfALaneNeverOverlap) {
  Timeline timeline;
  timeline.BeginProcess("row");
  timeline.Span(Timeline::Track::kLink, "a", 10, 13, {{"for", "demand"}});
  timeline.Span(Timeline::Track::kLink, "b", 11, 12);
  timeline.Span(Timeline::Track::kLink, "c", 12.5, 14);
  timeline.Span(Timeline::Track::kModel, "d", 11, 12);
  timeline.Mark(Timeline::Track::kCache, "evict", 12);
  const Json json = Json::parse(timeline.ToJson());
  std::map<std::string, Json> events;
  std::map<int, std::vector<std::pair<double, double>>> lanes;
  for (const Json& e : json["traceEvents"]) {
    if (e["ph"] == "M") continue;
    events[e["name"]] = e;
    if (e["ph"] != "X") continue;
    const double ts = e["ts"], dur = e["dur"];
    for (const auto& [begin, end] : lanes[e["tid"]])
      EXPECT_TRUE(ts >= end || ts + dur <= begin);
    lanes[e["tid"]].emplace_back(ts, ts + dur);
  }
  EXPECT_EQ(lanes.size(), 3u);  // two of the link, one of the model
  EXPECT_DOUBLE_EQ(events["a"]["ts"].get<double>(), 0);  // from the first event on
  EXPECT_DOUBLE_EQ(events["b"]["ts"].get<double>(), 1e6);
  EXPECT_EQ(events["a"]["args"]["for"], "demand");
  EXPECT_EQ(events["evict"]["ph"], "i");
  EXPECT_NE(events["a"]["tid"], events["b"]["tid"]);
  EXPECT_EQ(events["b"]["tid"], events["c"]["tid"]);
}

TEST(TimelineTest, KeepsABoundedNumberOfEventsAndSaysSo) {
  Timeline timeline;
  timeline.BeginProcess("row");
  for (size_t i = 0; i < Timeline::kMostEvents + 5; ++i) {
    timeline.Mark(Timeline::Track::kCache, "x", static_cast<double>(i));
  }
  EXPECT_EQ(timeline.num_events(), Timeline::kMostEvents);
  EXPECT_EQ(timeline.num_dropped(), 5u);
}

}  // namespace
}  // namespace routecast
