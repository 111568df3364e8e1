#include "common/files.h"

#include <gtest/gtest.h>
#include <sys/stat.h>

#include <iterator>

#include "common/errors.h"

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
