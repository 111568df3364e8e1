#include "common/files.h"

#include <gtest/gtest.h>
#include <signal.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include <fstream>
#include <functional>
#include <iterator>

#include "common/byte_file.h"
#include "common/errors.h"
#include "common/temporary_file.h"

namespace routecast {
namespace {

class FilesTest : public ::testing::Test {
 protected:
  FilesTest()
      : folder_(fs::path(::testing::TempDir()) /
                ::testing::UnitTest::GetInstance()->current_test_info()->name()) {
    fs::remove_all(folder_);
    fs::create_directories(folder_);
  }
  ~FilesTest() override { fs::remove_all(folder_); }
  size_t NumEntries() const {
    return static_cast<size_t>(
        std::distance(fs::directory_iterator(folder_), fs::directory_iterator()));
  }
  fs::path folder_;
};

TEST_F(FilesTest, WritesAllBytesReadableByAllAndLeavesNothingElse) {
  const std::string bytes("a\0b", 3);
  WriteFileAtomic(folder_ / "f", "old");
  WriteFileAtomic(folder_ / "f", bytes);
  EXPECT_EQ(ReadFile(folder_ / "f"), bytes);
  EXPECT_EQ(NumEntries(), 1u);
  struct stat info;
  ASSERT_EQ(::stat((folder_ / "f").c_str(), &info), 0);
  EXPECT_EQ(info.st_mode & 0444, 0444u);
}

TEST_F(FilesTest, ReadingWhatIsMissingAFolderOrTooLarge) {
  EXPECT_THROW(ReadFile(folder_ / "absent"), UsageError);
  EXPECT_THROW(ReadFile(folder_), UsageError);
  WriteFileAtomic(folder_ / "f", "12345");
  EXPECT_THROW(ReadFile(folder_ / "f", 4), DataError);
  EXPECT_THROW(WriteFileAtomic(folder_ / "absent" / "f", "x"), UsageError);
}

// Runs `work` in a process of its own, which waits afterwards; `meanwhile` in this one,
// between `work` and the other's death by SIGKILL.
void InAnotherProcess(const std::function<void()>& work,
                      const std::function<void()>& meanwhile) {
  int ready[2];
  ASSERT_EQ(::pipe(ready), 0);
  const pid_t child = ::fork();
  if (child == 0) {
    work();
    const ssize_t told = ::write(ready[1], "x", 1);
    for (; told == 1;) ::pause();
    ::_exit(1);
  }
  char byte = 0;
  EXPECT_EQ(::read(ready[0], &byte, 1), 1);
  meanwhile();
  ::kill(child, SIGKILL);
  ::waitpid(child, nullptr, 0);
  ::close(ready[0]);
  ::close(ready[1]);
}

TEST_F(FilesTest, WhatAKilledWriterLeftGoesWithTheNextOfThatFile) {
  const fs::path path = folder_ / "f", other = folder_ / "g";
  InAnotherProcess(
      [&] {
        for (const fs::path& of : {path, other}) {
          (new AtomicFileWriter(of, 0))->Append("half", 4);
        }
      },
      [] {});
  EXPECT_EQ(NumEntries(), 2u);
  // Not of a writer, though nearly named like it.
  for (const char* name : {"f.tmp", "f.1x.tmp", "f.7.tmp.old", "ff.7.tmp", "7.tmp"}) {
    std::ofstream(folder_ / name) << "mine";
  }
  WriteFileAtomic(path, "whole");
  EXPECT_EQ(ReadFile(path), "whole");
  EXPECT_EQ(NumEntries(), 7u);  // f, the five, and what was left of g
  AtomicFileWriter(other, 0).Commit();
  EXPECT_EQ(NumEntries(), 7u);
}

TEST_F(FilesTest, ALivingWritersFileIsNotTakenForALeftover) {
  const fs::path path = folder_ / "f";
  InAnotherProcess([&] { (new AtomicFileWriter(path, 0))->Append("theirs", 6); },
                   [&] {
                     WriteFileAtomic(path, "ours");
                     EXPECT_EQ(NumEntries(), 2u);
                   });
  WriteFileAtomic(path, "ours again");
  EXPECT_EQ(NumEntries(), 1u);
}

// Laid under the name that this process will use: what it leads to stays as it is.
TEST_F(FilesTest, ALinkUnderATemporaryNameIsNotWrittenThrough) {
  const fs::path path = folder_ / "f", victim = folder_ / "victim";
  WriteFileAtomic(victim, "theirs");
  fs::create_symlink(victim, path.string() + "." + std::to_string(::getpid()) + ".tmp");
  EXPECT_THROW(WriteFileAtomic(path, "ours"), UsageError);
  EXPECT_EQ(ReadFile(victim), "theirs");
}

// Nobody writes into it: an open that waits would wait for ever.
TEST_F(FilesTest, ANamedPipeIsNoFileToRead) {
  ASSERT_EQ(::mkfifo((folder_ / "pipe").c_str(), 0600), 0);
  EXPECT_THROW(ReadFile(folder_ / "pipe"), UsageError);
}

TEST_F(FilesTest, NamesOfTemporaryFiles) {
  EXPECT_EQ(PathOfTemporary("a/traces.npz.12.tmp"), "a/traces.npz");
  EXPECT_EQ(PathOfTemporary("f.1.tmp"), "f");
  for (const char* path : {"", "f", "f.tmp", "f..tmp", "f.1", "f.1.tmpx", "f.-1.tmp"}) {
    EXPECT_EQ(PathOfTemporary(path), "") << path;
  }
}

TEST_F(FilesTest, AFileInTheWayOfAFolderIsUsage) {
  WriteFileAtomic(folder_ / "f", "x");
  EXPECT_THROW(MakeFolder(folder_ / "f"), UsageError);
  EXPECT_NO_THROW(MakeFolder(folder_ / "a" / "b"));
  EXPECT_NO_THROW(MakeFolder(folder_ / "a" / "b"));
}

TEST_F(FilesTest, SealedFolderAppearsOnlyWhenCommitted) {
  {
    SealedFolder sealed(folder_ / "out");
    WriteFileAtomic(sealed.path() / "f", "1");
    EXPECT_FALSE(fs::exists(folder_ / "out"));
  }
  EXPECT_EQ(NumEntries(), 0u);
  SealedFolder sealed(folder_ / "out");
  WriteFileAtomic(sealed.path() / "f", "2");
  sealed.Commit();
  EXPECT_EQ(ReadFile(folder_ / "out" / "f"), "2");
}

// "out/" is out: its temporary folder must not lie inside it.
TEST_F(FilesTest, SealedFolderTakesANameWithASlash) {
  SealedFolder folder(folder_ / "slash/");
  EXPECT_FALSE(fs::exists(folder_ / "slash"));
  WriteFileAtomic(folder.path() / "a", "1");
  folder.Commit();
  EXPECT_EQ(ReadFile(folder_ / "slash" / "a"), "1");
  EXPECT_THROW(SealedFolder(fs::path(".")), UsageError);
}

TEST_F(FilesTest, SealedFolderReplacesAndDropsWhatAnEarlierRunLeft) {
  for (const char* text : {"1", "2"}) {
    fs::create_directories(folder_ / "out.tmp");
    WriteFileAtomic(folder_ / "out.tmp" / "left", "half");
    SealedFolder sealed(folder_ / "out");
    WriteFileAtomic(sealed.path() / "f", text);
    sealed.Commit();
  }
  EXPECT_EQ(ReadFile(folder_ / "out" / "f"), "2");
  EXPECT_FALSE(fs::exists(folder_ / "out" / "left"));
  EXPECT_EQ(NumEntries(), 1u);
}

TEST_F(FilesTest, HashFileSaysEachMiB) {
  const std::string bytes((size_t{5} << 20) / 2, 'x');
  WriteFileAtomic(folder_ / "f", bytes);
  int blocks = 0;
  EXPECT_EQ(HashFile(folder_ / "f", 3, [&] { ++blocks; }), Hash64(bytes, 3));
  EXPECT_EQ(blocks, 3);
}

TEST(ParseBytes, UnitsAndNonsense) {
  EXPECT_EQ(ParseBytes("--b", "1000"), 1000u);
  EXPECT_EQ(ParseBytes("--b", "1.5KiB"), 1536u);
  EXPECT_EQ(ParseBytes("--b", "2GB"), 2'000'000'000u);
  for (const char* text : {"", "GiB", "-1", "1XB", "nan", "1e30GiB"}) {
    EXPECT_THROW(ParseBytes("--b", text), UsageError) << text;
  }
}

TEST(FormatBytes, LargestUnitBelow1024) {
  EXPECT_EQ(FormatBytes(1023), "1023 B");
  EXPECT_EQ(FormatBytes(1536), "1.50 KiB");
}

TEST(Hash64, DependsOnBytesAndSeedAndPrintsSixteenDigits) {
  EXPECT_EQ(Hash64("abc"), Hash64("abc"));
  EXPECT_NE(Hash64("abc"), Hash64("abd"));
  EXPECT_NE(Hash64("abc", 1), Hash64("abc", 2));
  EXPECT_EQ(Hex64(255), "00000000000000ff");
}

TEST_F(FilesTest, RoomIsAskedForWithBothNumbers) {
  const fs::path folder = fs::temp_directory_path();
  EXPECT_NO_THROW(RequireFreeBytes(folder / "not" / "there", 1));
  try {
    RequireFreeBytes(folder / "store", uint64_t{1} << 60);
    FAIL();
  } catch (const EnvironmentError& e) {
    const std::string text = e.what();
    EXPECT_NE(text.find((folder / "store").string()), std::string::npos);
    EXPECT_NE(text.find("1048576.00 TiB are needed"), std::string::npos);
    EXPECT_NE(text.find("are free"), std::string::npos);
  }
}

}  // namespace
}  // namespace routecast
