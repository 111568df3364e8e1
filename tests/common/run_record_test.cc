#include "common/run_record.h"

#include <gtest/gtest.h>

#include "common/errors.h"

namespace routecast {
namespace {

fs::path FreshFolder(const std::string& name) {
  const fs::path folder = fs::path(::testing::TempDir()) / name;
  fs::remove_all(folder);
  return folder;
}

TEST(RunRecord, IsThereFromTheStartAndCompleteAtTheEnd) {
  const fs::path folder = FreshFolder("run_record");
  RunRecord record(folder, "program", {{"steps", 3}});
  record.Set("ranks", 2);
  record.WriteStart();
  Json read = ReadJsonFile(folder / "run.json");
  EXPECT_TRUE(read["exit_status"].is_null());
  EXPECT_TRUE(read["end"].is_null());
  EXPECT_EQ(read["configuration"]["steps"], 3);
  EXPECT_EQ(read["version"], Version());
  record.Finish(75, {{"loss", 1.5}});
  read = ReadJsonFile(folder / "run.json");
  EXPECT_EQ(read["exit_status"], 75);
  EXPECT_EQ(read["ranks"], 2);
  EXPECT_EQ(read["results"]["loss"], 1.5);
  EXPECT_GT(read["peak_memory_bytes"], 1 << 20);
  EXPECT_TRUE(read["end"].is_string());
}

TEST(ParseJson, RefusesBrokenAndHostileText) {
  EXPECT_THROW(ParseJson("{\"a\":", "x"), DataError);
  EXPECT_THROW(ParseJson("", "x"), DataError);
  EXPECT_THROW(ParseJson(std::string(100000, '['), "x"), DataError);
  EXPECT_THROW(ParseJson(std::string(200, '[') + std::string(200, ']'), "x"), DataError);
  EXPECT_EQ(ParseJson("{\"b\":1,\"a\":2}", "x").begin().key(), "b");  // keeps the order
}

TEST(JsonLines, AppendsOrStartsAnew) {
  const fs::path folder = FreshFolder("json_lines");
  MakeFolder(folder);
  { JsonLines(folder / "m", false).Write({{"step", 1}}); }
  { JsonLines(folder / "m", true).Write({{"step", 2}}); }
  EXPECT_EQ(ReadFile(folder / "m"), "{\"step\":1}\n{\"step\":2}\n");
  { JsonLines(folder / "m", false).Write({{"step", 3}}); }
  EXPECT_EQ(ReadFile(folder / "m"), "{\"step\":3}\n");
  EXPECT_THROW(JsonLines(folder / "absent" / "m", true), UsageError);
}

TEST(JsonLines, AFullDiskIsTheEnvironment) {
  JsonLines lines("/dev/full", true);
  EXPECT_THROW(lines.Write({{"step", 1}}), EnvironmentError);
}

}  // namespace
}  // namespace routecast
