// What run.json says of a run, however it ends.
#include "evaluator/recorded_run.h"

#include <gtest/gtest.h>
#include <unistd.h>

#include <functional>
#include <new>

#include "common/errors.h"

namespace routecast {
namespace {

TEST(RecordedTest, EveryEndHasItsCode) {
  const fs::path out =
      fs::temp_directory_path() / ("recorded_test." + std::to_string(::getpid()));
  const auto status = [&] { return ReadJsonFile(out / "run.json")["exit_status"]; };
  const auto ends = [&](int code, const std::function<Json()>& work) {
    WriteFileAtomic(out / "old.json", "{}");
    const auto watched = [&]() -> Json {
      EXPECT_TRUE(status().is_null()) << "it runs";
      EXPECT_FALSE(fs::exists(out / "old.json"));
      return work();
    };
    try {
      Recorded(out, {"old.json"}, Json::object(), watched);
    } catch (const std::exception&) {
    }
    EXPECT_EQ(status(), code);
  };
  fs::create_directories(out);
  ends(kExitDone, [] { return Json{{"figure", 1}}; });
  EXPECT_EQ(ReadJsonFile(out / "run.json")["results"]["figure"], 1);
  ends(kExitStopped, []() -> Json { throw StoppedError("stopped"); });
  ends(kExitUsage, []() -> Json { throw UsageError("usage"); });
  ends(kExitBadData, []() -> Json { throw DataError("data"); });
  ends(kExitEnvironment, []() -> Json { throw EnvironmentError("disk"); });
  ends(kExitEnvironment, []() -> Json { throw std::bad_alloc(); });
  ends(kExitDefect, []() -> Json { throw std::logic_error("defect"); });
  fs::remove_all(out);
}

}  // namespace
}  // namespace routecast
