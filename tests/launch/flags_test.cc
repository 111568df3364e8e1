#include "launch/flags.h"

#include <gflags/gflags.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "common/errors.h"

DECLARE_bool(quiet);
DECLARE_int32(threads);
DECLARE_uint64(seed);
DEFINE_double(test_share, 0.1, "A number that no double holds to the last digit");

namespace routecast {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;

class FlagsTest : public ::testing::Test {
 protected:
  FlagsTest() : folder_(fs::path(::testing::TempDir()) / "flags_test") {
    fs::remove_all(folder_);
    fs::create_directories(folder_);
  }
  std::string File(const std::string& name, const std::string& text) {
    WriteFileAtomic(folder_ / name, text);
    return (folder_ / name).string();
  }
  gflags::FlagSaver saver_;
  fs::path folder_;
};

std::string ErrorOf(const std::vector<std::string>& args) {
  try {
    ParseCommandLine(args);
  } catch (const UsageError& e) {
    return e.what();
  }
  return "no error";
}

TEST_F(FlagsTest, ReadsEveryForm) {
  const CommandLine line =
      ParseCommandLine({"verb", "--threads", "3", "--quiet", "-seed=7", "--", "--x"});
  EXPECT_EQ(FLAGS_threads, 3);
  EXPECT_TRUE(FLAGS_quiet);
  EXPECT_EQ(FLAGS_seed, 7u);
  EXPECT_THAT(line.arguments, ElementsAre("verb", "--x"));
}

TEST_F(FlagsTest, LastValueWinsAndNoNegates) {
  ParseCommandLine({"--threads=1", "--threads=4", "--quiet", "--noquiet"});
  EXPECT_EQ(FLAGS_threads, 4);
  EXPECT_FALSE(FLAGS_quiet);
}

TEST_F(FlagsTest, NamesTheNearestFlag) {
  EXPECT_THAT(ErrorOf({"--sede=1"}), HasSubstr("--seed?"));
  EXPECT_THAT(ErrorOf({"--nothreads"}), HasSubstr("--threads?"));
  EXPECT_THAT(ErrorOf({"--hlep"}), HasSubstr("--help?"));
}

TEST_F(FlagsTest, RefusesWrongTypesAndMissingValues) {
  EXPECT_THAT(ErrorOf({"--threads=many"}), HasSubstr("not a valid int32"));
  EXPECT_THAT(ErrorOf({"--threads"}), HasSubstr("needs a value"));
  EXPECT_THAT(ErrorOf({"--seed=-1x"}), HasSubstr("not a valid uint64"));
}

// They would not go into run.json.
TEST_F(FlagsTest, RefusesValuesThatAreNotUtf8) {
  EXPECT_THAT(ErrorOf({"--seed=caf\xe9"}), HasSubstr("--seed=\"caf?\" is not UTF-8"));
  EXPECT_THAT(ErrorOf({"--flagfile=" + File("b.flags", "--seed=\xe9")}),
              HasSubstr("is not UTF-8"));
  EXPECT_THAT(ErrorOf({"--seed=caf\xc3\xa9"}), HasSubstr("is not a valid uint64"));
}

TEST_F(FlagsTest, FlagFileIsReadAndTheCommandLineWins) {
  File("inner.flags", "--seed=9\n");
  const std::string outer =
      File("outer.flags", "# a comment\n\n  --threads=5 \n--flagfile=inner.flags\n");
  ParseCommandLine({"--threads=2", "--flagfile=" + outer});
  EXPECT_EQ(FLAGS_threads, 2);
  EXPECT_EQ(FLAGS_seed, 9u);
}

TEST_F(FlagsTest, AFileOfFlagsIsSetForAWhile) {
  const std::string file = File("settings.flags", "--threads=7\n--seed=3\n");
  ParseCommandLine({"--seed=4"});
  const int before = FLAGS_threads;
  WithFlagFile(file, [] {
    EXPECT_EQ(FLAGS_threads, 7);
    EXPECT_EQ(FLAGS_seed, 4u) << "the command line wins";
  });
  EXPECT_EQ(FLAGS_threads, before);
  EXPECT_EQ(FLAGS_seed, 4u);
  EXPECT_THROW(WithFlagFile(File("wrong.flags", "--threads=7\n--sede=1\n"), [] {}),
               UsageError);
  EXPECT_EQ(FLAGS_threads, before);
}

TEST_F(FlagsTest, FlagFileErrorsNameTheLine) {
  EXPECT_THAT(ErrorOf({"--flagfile=" + File("a", "--threads=1\nthreads=1\n")}),
              HasSubstr("a:2"));
  EXPECT_THAT(ErrorOf({"--flagfile=" + File("b", "--flagfile=b\n")}),
              HasSubstr("nested"));
}

TEST_F(FlagsTest, RepeatedValuesAreKeptInOrder) {
  const std::string file = File("c", "--seed=5\n");
  ParseCommandLine({"--flagfile=" + file});
  EXPECT_THAT(FlagValues("seed"), ElementsAre("5"));
  ParseCommandLine({"--flagfile=" + file, "--seed=1", "--seed=2"});
  EXPECT_THAT(FlagValues("seed"), ElementsAre("1", "2"));
}

TEST_F(FlagsTest, EffectiveFlagsAreTypedAndOurs) {
  ParseCommandLine({"--threads=3", "--quiet"});
  const Json flags = EffectiveFlags();
  EXPECT_EQ(flags["threads"], 3);
  EXPECT_EQ(flags["quiet"], true);
  EXPECT_FALSE(flags.contains("logtostderr"));
}

TEST_F(FlagsTest, HelpPrintsDefaultsAsTheyAreWritten) {
  EXPECT_THAT(HelpText("program", "usage"), HasSubstr("--test_share=0.1  (double)"));
}

}  // namespace
}  // namespace routecast
