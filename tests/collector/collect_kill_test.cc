// routecast-collect killed, stopped and hung, again and again; what comes out in the end
// equals an undisturbed run's export, byte for byte. Long forms, by hand:
//   ROUTECAST_KILLS=500 ROUTECAST_STOPS=100 ROUTECAST_KILL_SEED=7 collect_kill_test
// All that is random is drawn from the seed; when exactly a signal meets the program is
// the machine's.
#include <gtest/gtest.h>
#include <sys/ptrace.h>
#include <sys/wait.h>
#include <unistd.h>

#include <chrono>
#include <cstdio>
#include <functional>
#include <thread>

#include "common/errors.h"
#include "common/random.h"
#include "tests/collector/collect_fixture.h"

namespace routecast {
namespace {

using Milliseconds = std::chrono::milliseconds;
using Clock = std::chrono::steady_clock;

constexpr double kStopSeconds = 30;  // a stop takes at most so long

uint64_t Number(const char* name, const char* fallback) {
  return std::stoull(EnvOr(name, fallback));
}

double Since(Clock::time_point begin) {
  return std::chrono::duration<double>(Clock::now() - begin).count();
}

// A process that holds the first thread of `pid`, and no other, until that one has died.
pid_t HoldFirstThread(pid_t pid, bool* held) {
  int pipe[2];
  if (::pipe(pipe) != 0) return 0;
  const pid_t holder = ::fork();
  if (holder == 0) {
    const bool holds = ::ptrace(PTRACE_SEIZE, pid, nullptr, nullptr) == 0 &&
                       ::ptrace(PTRACE_INTERRUPT, pid, nullptr, nullptr) == 0;
    const char answer = holds ? 'y' : 'n';
    if (::write(pipe[1], &answer, 1) != 1 || !holds) ::_exit(1);
    int status = 0;
    do {
      if (::waitpid(pid, &status, __WALL) != pid) break;
    } while (!WIFEXITED(status) && !WIFSIGNALED(status));
    ::_exit(0);
  }
  char answer = 'n';
  *held = holder > 0 && ::read(pipe[0], &answer, 1) == 1 && answer == 'y';
  ::close(pipe[0]);
  ::close(pipe[1]);
  return holder;
}

// The mpirun of a launch script; 0 where it has none (yet).
pid_t MpirunOf(pid_t script) {
  for (const pid_t child : ChildrenOf(script)) {
    std::ifstream in("/proc/" + std::to_string(child) + "/comm");
    std::string name;
    if (in >> name && name == "mpirun") return child;
  }
  return 0;
}

// What is done to one run, and when.
struct Draw {
  Draw(uint64_t seed, uint64_t number, Milliseconds longest)
      : ranks(1 + static_cast<int>(ToRange(Mix(seed, number, 1), 4))),
        victim(static_cast<int>(ToRange(Mix(seed, number, 2), 4))),
        rank(static_cast<size_t>(ToRange(Mix(seed, number, 3), uint64_t(ranks)))),
        after(ToRange(Mix(seed, number, 4), static_cast<uint64_t>(longest.count()))) {}
  // One rank (the manager is rank 0), two in four; all ranks; or mpirun. `job`: a launch
  // script; of one rank it has become the program.
  void Kill(pid_t job) const {
    const pid_t launcher = MpirunOf(job);
    const std::vector<pid_t> processes =
        launcher == 0 ? std::vector<pid_t>{} : ChildrenOf(launcher);
    if (victim == 3 || processes.size() <= rank) {
      ::kill(launcher == 0 ? job : launcher, SIGKILL);
    } else if (victim == 2) {
      for (const pid_t p : processes) ::kill(p, SIGKILL);
    } else {
      ::kill(processes[rank], SIGKILL);
    }
  }
  const int ranks, victim;
  const size_t rank;
  const Milliseconds after;
};

class CollectKillTest : public CollectFixture {
 protected:
  // Open MPI's shared memory and session folders lie where only this test's jobs write.
  static void SetUpTestSuite() {
    CollectFixture::SetUpTestSuite();
    temporary_ = fs::temp_directory_path() / ("rckill-" + std::to_string(::getpid()));
    fs::create_directories(temporary_ / "shm");
    ::setenv("TMPDIR", temporary_.c_str(), 1);
    ::setenv("OMPI_MCA_btl_vader_backing_directory", (temporary_ / "shm").c_str(), 1);
    const auto begin = Clock::now();
    Golden();
    // Later moments mostly find a run that goes on with a store at its end.
    longest_ = Milliseconds(static_cast<int64_t>(600 * Since(begin)));
  }
  static void TearDownTestSuite() { fs::remove_all(temporary_); }

  static void ExpectWhole(const std::string& store,
                          const std::string& golden = Golden()) {
    EXPECT_EQ(RunProgram({Bin("routecast-trace"), "verify", "--quiet",
                          "--store=" + (folder_ / store).string()}),
              0);
    EXPECT_TRUE(Export(store) == golden);
    EXPECT_TRUE(fs::is_empty(folder_ / store / "staging"));
    fs::remove_all(folder_ / store);
  }
  // Files that jobs left in the temporary folder.
  static std::vector<std::string> Left() {
    std::vector<std::string> files;
    for (const auto& entry : fs::recursive_directory_iterator(temporary_)) {
      if (!entry.is_directory()) files.push_back(entry.path().string());
    }
    return files;
  }
  // Two ranks at work, one of which `signal` or `harm` meets: how the job ends, and what
  // it says.
  static void ExpectEndsNaming(const std::string& store, size_t rank, int signal,
                               const std::string& named) {
    ExpectEndsNaming(store, rank, named, [signal](pid_t pid) { ::kill(pid, signal); });
  }
  static void ExpectEndsNaming(const std::string& store, size_t rank,
                               const std::string& named,
                               const std::function<void(pid_t)>& harm) {
    const fs::path errors = folder_ / (store + ".errors");
    const pid_t job = Start(Launched(2, store, {"--hang_seconds=3"}), errors);
    WaitForChunk(store);
    const std::vector<pid_t> ranks = ChildrenOf(MpirunOf(job));
    ASSERT_EQ(ranks.size(), 2u);
    harm(ranks[rank]);
    const auto begin = Clock::now();
    EXPECT_EQ(Wait(job), kExitEnvironment);
    EXPECT_LE(Since(begin), 20);  // with the default of 45 s: below 60
    WaitForOrphans();
    EXPECT_NE(ReadFile(errors).find(named), std::string::npos) << ReadFile(errors);
    ASSERT_EQ(Collect(1, store), 0);
    ExpectWhole(store);
  }
  static std::vector<std::string> Launched(int ranks, const std::string& store,
                                           const std::vector<std::string>& more) {
    std::vector<std::string> command = {
        EnvOr("ROUTECAST_SOURCE_DIR", ".") + "/launch/run_ranks.sh", "-n",
        std::to_string(ranks)};
    for (const std::string& a : Program(store, more)) command.push_back(a);
    return command;
  }
  // Until a rank of the job has staged a chunk.
  static void WaitForChunk(const std::string& store) {
    const fs::path spans = folder_ / store / "spans";
    for (int ms = 0; ms < 60000; ++ms) {
      for (int rank = 0; rank < 2; ++rank) {
        const fs::path file = spans / ("rank-0000" + std::to_string(rank) + ".jsonl");
        if (fs::exists(file) && ReadFile(file).find("\"chunk\"") != std::string::npos) {
          return;
        }
      }
      std::this_thread::sleep_for(Milliseconds(1));
    }
  }
  // Runs with `flags` are killed `kills` times; then one is left alone and has to export
  // `golden`.
  static void KillAndGoOn(const std::string& store, uint64_t kills, uint64_t seed,
                          const std::vector<std::string>& flags,
                          const std::string& golden) {
    const fs::path errors = folder_ / (store + ".errors");
    uint64_t killed = 0, finished = 0, number = 0;
    for (; killed < kills && number < 4 * kills + 20; ++number) {
      const Draw draw(seed, number, longest_);
      // mpirun asks those whom the killed one leaves to end, and kills them a second
      // later: here in one run of four. In the others, at once.
      ::setenv("OMPI_MCA_odls_base_sigkill_timeout", number % 4 == 0 ? "1" : "0", 1);
      const pid_t job = Start(Launched(draw.ranks, store, flags), errors);
      std::this_thread::sleep_for(draw.after);
      draw.Kill(job);
      const int code = Wait(job);
      WaitForOrphans();
      if (code == 0) {  // it was done before
        ++finished;
        ExpectWhole(store, golden);
        continue;
      }
      // The script says who died; of one rank it is the one that was killed. A defect,
      // damage or a refusal that an earlier kill left behind would be said in other
      // words.
      const std::string said = ReadFile(errors);
      const bool died =
          code == 128 + SIGKILL ||
          (code == kExitEnvironment && said.find("a rank died") != std::string::npos);
      ASSERT_TRUE(died) << code << " in run " << number << " of seed " << seed << ": "
                        << said;
      ++killed;
      if (killed % 50 == 0) std::printf("%d kills\n", static_cast<int>(killed));
    }
    ::unsetenv("OMPI_MCA_odls_base_sigkill_timeout");
    EXPECT_EQ(killed, kills);
    ASSERT_EQ(Collect(Draw(seed, number, longest_).ranks, store, flags), 0);
    ExpectWhole(store, golden);
    std::printf("%d kills, %d runs that ended first\n", static_cast<int>(killed),
                static_cast<int>(finished));
  }
  static inline fs::path temporary_;
  static inline Milliseconds longest_;
};

TEST_F(CollectKillTest, KilledAtRandomMomentsItEndsWithTheSameRecords) {
  KillAndGoOn("killed", Number("ROUTECAST_KILLS", "20"),
              Number("ROUTECAST_KILL_SEED", "1"), {}, Golden());
}

// Decoder steps, the coder's model and its table files are killed, too.
TEST_F(CollectKillTest, KilledWhileItGeneratesAndCodesItEndsWithTheSameRecords) {
  const std::vector<std::string> flags = {"--task=generate", "--compression=context"};
  ASSERT_EQ(Collect(1, "golden-coded", flags), 0);
  KillAndGoOn("killed-coded", Number("ROUTECAST_KILLS", "20") / 4,
              Number("ROUTECAST_KILL_SEED", "1") + 2000, flags, Export("golden-coded"));
}

// Ctrl-C: INT to the whole process group of the launch script, twice in every third run.
TEST_F(CollectKillTest, StoppedAgainAndAgainItEndsWithTheSameRecordsAndLeavesNothing) {
  const uint64_t stops = Number("ROUTECAST_STOPS", "4");
  const uint64_t seed = Number("ROUTECAST_KILL_SEED", "1") + 1000;
  for (const std::string& file : Left()) fs::remove(file);  // of killed jobs
  uint64_t stopped = 0, number = 0;
  for (; stopped < stops && number < 4 * stops + 20; ++number) {
    const Draw draw(seed, number, longest_);
    std::vector<std::string> command = Launched(draw.ranks, "stopped", {});
    command.insert(command.begin(), "setsid");
    const pid_t job = Start(command);
    std::this_thread::sleep_for(draw.after);
    const auto begin = Clock::now();
    ::kill(-job, SIGINT);
    if (number % 3 == 0) {
      std::this_thread::sleep_for(Milliseconds(50));
      ::kill(-job, SIGINT);
    }
    const int code = Wait(job);
    WaitForOrphans();
    EXPECT_LE(Since(begin), kStopSeconds);
    if (code == 0) {
      ExpectWhole("stopped");
      continue;
    }
    // A program or script that has not yet got to its handlers ends by the signal.
    ASSERT_TRUE(code == kExitStopped || code == 128 + SIGINT) << code << " " << number;
    ++stopped;
    EXPECT_EQ(Left(), std::vector<std::string>()) << number;
  }
  EXPECT_EQ(stopped, stops);
  ASSERT_EQ(Collect(2, "stopped"), 0);
  ExpectWhole("stopped");
  EXPECT_EQ(Left(), std::vector<std::string>());
}

TEST_F(CollectKillTest, AHungWorkerEndsTheJobByName) {
  ExpectEndsNaming("hung-worker", 1, SIGSTOP, "rank 1 hangs");
}
// Its other threads live on: the one that shows signs of life among them.
TEST_F(CollectKillTest, AWorkerWhoseWorkHangsEndsTheJobByName) {
  bool held = false;
  pid_t holder = 0;
  ExpectEndsNaming("stuck-worker", 1, "rank 1 hangs", [&](pid_t rank) {
    holder = HoldFirstThread(rank, &held);
    if (!held) ::kill(rank, SIGSTOP);  // no tracing here: as above
  });
  ::waitpid(holder, nullptr, 0);
  if (!held) GTEST_SKIP() << "no process may be traced here";
}
TEST_F(CollectKillTest, AHungManagerEndsTheJobByName) {
  ExpectEndsNaming("hung-manager", 0, SIGSTOP, "rank 0 hangs");
}
TEST_F(CollectKillTest, ADeadWorkerEndsTheJobByName) {
  ExpectEndsNaming("dead-worker", 1, SIGKILL, "rank 1 on node");
}
TEST_F(CollectKillTest, ADeadManagerEndsTheJobByName) {
  ExpectEndsNaming("dead-manager", 0, SIGKILL, "rank 0 on node");
}

}  // namespace
}  // namespace routecast
