// What run.json says of a run, however it ends.
#include "evaluator/recorded_run.h"

#include <gtest/gtest.h>
#include <unistd.h>

#include <functional>
#include <new>

#include "common/errors.h"

namespace routecast {
namespace {

class RecordedTest : public testing::Test {
 protected:
  void SetUp() override { fs::create_directories(out_); }
  void TearDown() override { fs::remove_all(out_); }
  Json status() const { return ReadJsonFile(out_ / "run.json")["exit_status"]; }
  bool old() const { return fs::exists(out_ / "old.json"); }
  void Run(const std::function<Json(const BeginRun&)>& work) {
    WriteFileAtomic(out_ / "old.json", "{}");
    try {
      Recorded(out_, {"old.json"}, Json::object(), work);
    } catch (const std::exception&) {
    }
  }
  fs::path out_ =
      fs::temp_directory_path() / ("recorded_test." + std::to_string(::getpid()));
};

TEST_F(RecordedTest, EveryEndHasItsCode) {
  const auto ends = [&](int code, const std::function<Json()>& work) {
    Run([&](const BeginRun& begin) -> Json {
      EXPECT_TRUE(status().is_null()) << "it runs";
      EXPECT_TRUE(old()) << "its inputs may be refused";
      begin();
      EXPECT_FALSE(old());
      return work();
    });
    EXPECT_EQ(status(), code);
  };
  ends(kExitDone, [] { return Json{{"figure", 1}}; });
  EXPECT_EQ(ReadJsonFile(out_ / "run.json")["results"]["figure"], 1);
  ends(kExitStopped, []() -> Json { throw StoppedError("stopped"); });
  ends(kExitUsage, []() -> Json { throw UsageError("usage"); });
  ends(kExitBadData, []() -> Json { throw DataError("data"); });
  ends(kExitEnvironment, []() -> Json { throw EnvironmentError("disk"); });
  ends(kExitEnvironment, []() -> Json { throw std::bad_alloc(); });
  ends(kExitDefect, []() -> Json { throw std::logic_error("defect"); });
}

TEST_F(RecordedTest, SoHasOneBeforeItsInputsAreRead) {
  Run([](const BeginRun&) -> Json { throw UsageError("no such store"); });
  EXPECT_EQ(status(), kExitUsage);
  Run([](const BeginRun&) -> Json { throw StoppedError("stopped"); });
  EXPECT_EQ(status(), kExitStopped);
  EXPECT_FALSE(old()) << "results of an earlier run beside this one's run.json";
  Run([](const BeginRun&) -> Json { throw DataError("cut"); });
  EXPECT_EQ(status(), kExitBadData);
}

TEST_F(RecordedTest, ACommandThatIsRefusedLeavesAnEarlierRun) {
  Run([](const BeginRun& begin) -> Json {
    begin();
    return {{"figure", 1}};
  });
  const std::string earlier = ReadFile(out_ / "run.json");
  Run([](const BeginRun&) -> Json { throw UsageError("no such store"); });
  EXPECT_EQ(ReadFile(out_ / "run.json"), earlier);
  EXPECT_TRUE(old());
}

}  // namespace
}  // namespace routecast
