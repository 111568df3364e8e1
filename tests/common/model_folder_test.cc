#include "common/model_folder.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <unistd.h>

#include <cstdlib>
#include <optional>

#include "common/errors.h"

namespace routecast {
namespace {

constexpr char kCommit[] = "0123456789abcdef0123456789abcdef01234567";
const char* const kVariables[] = {"HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_HOME",
                                  "XDG_CACHE_HOME", "HOME"};

class ModelFolderTest : public testing::Test {
 protected:
  void SetUp() override {
    folder_ = fs::temp_directory_path() / ("models." + std::to_string(::getpid()));
    fs::remove_all(folder_);
    MakeFolder(folder_);
    for (const char* variable : kVariables) {
      const char* value = std::getenv(variable);
      before_.push_back(value ? std::optional<std::string>(value) : std::nullopt);
      ::unsetenv(variable);
    }
    ::setenv("HOME", (folder_ / "home").c_str(), 1);
  }
  void TearDown() override {
    for (size_t i = 0; i < before_.size(); ++i) {
      before_[i] ? ::setenv(kVariables[i], before_[i]->c_str(), 1)
                 : ::unsetenv(kVariables[i]);
    }
    fs::remove_all(folder_);
  }
  // A downloaded model as huggingface_hub lays it out: blobs, links to them, a ref.
  fs::path Download(const fs::path& cache, const std::string& model) {
    const fs::path repository = cache / model;
    const fs::path snapshot = repository / "snapshots" / kCommit;
    MakeFolder(repository / "blobs");
    MakeFolder(repository / "refs/pr");
    MakeFolder(snapshot);
    WriteFileAtomic(repository / "blobs/abc", "{}");
    fs::create_symlink("../../blobs/abc", snapshot / "config.json");
    WriteFileAtomic(repository / "refs/main", kCommit);
    WriteFileAtomic(repository / "refs/pr/7", std::string(kCommit) + "\n");
    return snapshot;
  }
  static std::string Refusal(const std::string& name) {
    try {
      return "found " + FindModelFolder(name).string();
    } catch (const UsageError& e) {
      return e.what();
    }
  }
  fs::path folder_;
  std::vector<std::optional<std::string>> before_;
};

TEST_F(ModelFolderTest, AFolderIsItselfEvenWhereTheCacheHasTheName) {
  EXPECT_EQ(FindModelFolder(folder_.string()), folder_);
  EXPECT_EQ(FindModelFolder(""), fs::path());
}

TEST_F(ModelFolderTest, ANameIsFoundInTheCacheThroughItsRef) {
  const fs::path cache = folder_ / "home/.cache/huggingface/hub";
  const fs::path snapshot = Download(cache, "models--google--switch-base-8");
  const std::string name = "google/switch-base-8";
  EXPECT_EQ(FindModelFolder(name), snapshot);
  EXPECT_EQ(FindModelFolder(name + "@main"), snapshot);
  EXPECT_EQ(FindModelFolder(name + "@pr/7"), snapshot);
  EXPECT_EQ(FindModelFolder(name + "@" + kCommit), snapshot);
  EXPECT_EQ(ReadFile(FindModelFolder(name) / "config.json"), "{}");
  const fs::path single = Download(cache, "models--gpt2");
  EXPECT_EQ(FindModelFolder("gpt2"), single);
}

TEST_F(ModelFolderTest, TheVariablesWinInTheOrderOfHuggingfaceHub) {
  EXPECT_EQ(HuggingFaceCache(), folder_ / "home/.cache/huggingface/hub");
  ::setenv("XDG_CACHE_HOME", "/x", 1);
  EXPECT_EQ(HuggingFaceCache(), "/x/huggingface/hub");
  ::setenv("HF_HOME", "~/hf", 1);
  EXPECT_EQ(HuggingFaceCache(), folder_ / "home/hf/hub");
  ::setenv("HUGGINGFACE_HUB_CACHE", "/h", 1);
  EXPECT_EQ(HuggingFaceCache(), "/h");
  ::setenv("HF_HUB_CACHE", "/c", 1);
  EXPECT_EQ(HuggingFaceCache(), "/c");
}

TEST_F(ModelFolderTest, AnAbsentModelNamesWhatWasLookedAtAndTheCommand) {
  ::setenv("HF_HUB_CACHE", "/c", 1);
  const std::string message = Refusal("google/switch-base-8@v2");
  EXPECT_THAT(message,
              testing::HasSubstr("/c/models--google--switch-base-8/snapshots/v2"));
  EXPECT_THAT(message,
              testing::HasSubstr("hf download google/switch-base-8 --revision v2"));
  EXPECT_THAT(message, testing::HasSubstr(fs::current_path().string()));
}

TEST_F(ModelFolderTest, NamesThatLeadElsewhereAreRefused) {
  Download(folder_ / "home/.cache/huggingface/hub", "models--a--b");
  for (const char* name : {"../b", "a/..", "a/b@../../x", "/absent/folder", "a/b/c",
                           "a/b@", "a b", "a/b@/etc"}) {
    EXPECT_THAT(Refusal(name), testing::HasSubstr("nor can it be a model's name"))
        << name;
  }
}

TEST_F(ModelFolderTest, ARefThatIsNoCommitIsBadData) {
  const fs::path cache = folder_ / "home/.cache/huggingface/hub";
  Download(cache, "models--a--b");
  WriteFileAtomic(cache / "models--a--b/refs/main", "../../../../etc");
  EXPECT_THROW(FindModelFolder("a/b"), DataError);
}

}  // namespace
}  // namespace routecast
