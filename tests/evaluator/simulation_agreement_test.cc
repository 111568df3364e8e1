// P14: does the simulator say what the runtime does? The same recorded routing goes
// through both: through SimulatePrefetch, and through the real runtime under a real
// (small) model, whose clock and link are virtual, so that what is compared is decisions
// and not this machine's mood.
#include <ATen/ATen.h>
#include <c10/core/GradMode.h>
#include <gtest/gtest.h>

#include "evaluator/policy_simulation.h"
#include "evaluator/prefetch_runtime.h"
#include "evaluator/replay.h"
#include "evaluator/simulated_link.h"
#include "evaluator/slot_arena.h"
#include "tests/evaluator/synthetic_traces.h"

namespace routecast {
namespace {

// Carries nothing, but has memory for a model to read.
class LinkWithMemory : public SimulatedLink {
 public:
  LinkWithMemory(const SimulatedLinkOptions& options, int slots, ManualClock* clock)
      : SimulatedLink(options, clock), arena_(slots, options.expert_bytes) {}
  std::byte* slot(int slot) const override { return arena_.slot(slot); }

 private:
  SlotArena arena_;
};

// Lets virtual time pass where a model would work: the head before a pass, the dense
// layers before a choice, an expert before its release.
class WorkingModel : public ExpertSource, public RoutingObserver {
 public:
  WorkingModel(PrefetchRuntime* runtime, SimulatedLink* link, const ManualClock* clock,
               const StepCosts& costs)
      : runtime_(runtime), link_(link), clock_(clock), costs_(costs) {}
  void OnPassBegin(const PassInfo& pass) override {
    if (pass.stack == Stack::kDecoder) Work(costs_.head);
    runtime_->OnPassBegin(pass);
  }
  void OnRouting(const LayerRouting& routing) override {
    Work(costs_.between_layers);
    runtime_->OnRouting(routing);
  }
  void OnPassEnd(const PassInfo& pass) override { runtime_->OnPassEnd(pass); }
  void Begin(int layer, std::span<const int> experts) override {
    runtime_->Begin(layer, experts);
  }
  ExpertLease Next() override {
    auto lease = std::make_shared<ExpertLease>(runtime_->Next());
    const ExpertWeights weights = lease->weights();
    const int expert = lease->expert();
    return {expert, weights, [this, lease]() mutable {
              Work(costs_.expert);
              lease.reset();
            }};
  }

 private:
  void Work(double seconds) { link_->AdvanceTo(clock_->Now() + seconds); }
  PrefetchRuntime* runtime_;
  SimulatedLink* link_;
  const ManualClock* clock_;
  StepCosts costs_;
};

// An answer takes its time.
class SlowForesight : public Foresight {
 public:
  SlowForesight(std::unique_ptr<Foresight> inner, SimulatedLink* link,
                const ManualClock* clock, double seconds)
      : inner_(std::move(inner)), link_(link), clock_(clock), seconds_(seconds) {}
  std::string name() const override { return inner_->name(); }
  std::vector<LayerForecast> AtPassBegin(const PassInfo& pass) override {
    return Asked(inner_->AtPassBegin(pass));
  }
  std::vector<LayerForecast> AtLayer(const LayerRouting& routing) override {
    return Asked(inner_->AtLayer(routing));
  }
  std::vector<LayerForecast> AtPassEnd(const PassInfo& pass) override {
    return Asked(inner_->AtPassEnd(pass));
  }
  void SkipPass(const PassInfo& pass) override { inner_->SkipPass(pass); }
  void Skip(const LayerRouting& routing) override { inner_->Skip(routing); }

 private:
  std::vector<LayerForecast> Asked(std::vector<LayerForecast> answer) {
    if (!answer.empty()) link_->AdvanceTo(clock_->Now() + seconds_);
    return answer;
  }
  std::unique_ptr<Foresight> inner_;
  SimulatedLink* link_;
  const ManualClock* clock_;
  double seconds_;
};

struct Figures {
  double tokens_per_second = 0, hit_rate = 0;
  uint64_t speculations = 0;
};

class SimulationAgreementTest : public testing::Test {
 protected:
  static constexpr int kSequences = 14, kWarmUp = 2, kTokens = 12, kSlots = 8;

  SimulationAgreementTest() {
    synthetic_.geometry = {1, 3, 10, 1, 0};
    synthetic_.tokens = kTokens;
    synthetic_.source_tokens = 5;
    replay_.d_model = 32;
    replay_.d_ff = 64;
    replay_.d_kv = 8;
    replay_.num_heads = 4;
    replay_.vocab_size = 512;
    replay_.tokens = kTokens;
    traces_ = SyntheticTraces(synthetic_, kSequences, 3);
    spec_.geometry = ReplayConfig(synthetic_.geometry, replay_).geometry();
    spec_.d_ff = replay_.d_ff;
    link_.expert_bytes = spec_.blob_bytes();
    link_.chunk_bytes = link_.expert_bytes / 4;
    // One expert takes about as long as a layer.
    link_.bytes_per_second = static_cast<double>(link_.expert_bytes) / 900e-6;
    link_.fixed_seconds = 20e-6;
    costs_ = {600e-6, 200e-6, 500e-6, 150e-6};
  }

  PlannerOptions Planner(const std::string& policy) const {
    PlannerOptions planner;
    planner.expert_bytes = link_.expert_bytes;
    planner.engine_can_cancel = true;
    planner.late_allowance = 0.95;
    planner.link_bytes_per_second = link_.bytes_per_second;
    planner.policy = ParsePolicy(policy);
    planner.policy.auto_off = false;  // the simulator leaves the gauge out
    return planner;
  }
  std::unique_ptr<Foresight> Predictor(const PlannerOptions& planner) {
    if (!planner.policy.speculate) return nullptr;
    return std::make_unique<PredictorForesight>(&predictor_, spec_.geometry,
                                                planner.policy.max_lead);
  }

  Figures Simulated(const std::string& policy, Eviction eviction) {
    const PlannerOptions planner = Planner(policy);
    const auto foresight = Predictor(planner);
    std::vector<SimulatedVisit> visits;
    size_t counted_from = 0;
    for (int i = 0; i < kSequences; ++i) {
      if (i == warm_up_) counted_from = visits.size();
      if (replay_.encoder) {
        AppendEncoderVisits(traces_[static_cast<size_t>(i)], spec_.geometry,
                            replay_.max_source, costs_, foresight.get(), &visits);
      }
      AppendVisits(traces_[static_cast<size_t>(i)], spec_.geometry, kTokens, costs_,
                   foresight.get(), &visits);
    }
    const SimulationResult r = SimulatePrefetch(spec_.geometry, kSlots, eviction, planner,
                                                link_, visits, counted_from, warm_start_);
    return {kTokens * (kSequences - warm_up_) / r.seconds,
            static_cast<double>(r.ledger.hits) / static_cast<double>(r.ledger.uses),
            r.ledger.speculations};
  }

  Figures Run(const std::string& policy, Eviction eviction) {
    const c10::NoGradGuard no_grad;
    ManualClock clock;
    LinkWithMemory link(link_, kSlots, &clock);
    RuntimeOptions options;
    options.num_slots = kSlots;
    options.eviction = eviction;
    options.planner = Planner(policy);
    options.clock = &clock;
    std::unique_ptr<Foresight> foresight = Predictor(options.planner);
    if (foresight) {
      foresight = std::make_unique<SlowForesight>(std::move(foresight), &link, &clock,
                                                  costs_.question);
    }
    PrefetchRuntime runtime(spec_, &link, std::move(foresight), options);
    WorkingModel model(&runtime, &link, &clock, costs_);
    ReplayWorkload workload(synthetic_.geometry, traces_, replay_);
    double begin = 0;
    if (warm_start_) {
      std::vector<ExpertKey> decoder;
      for (int i = spec_.geometry.encoder_layers * spec_.geometry.num_experts;
           i < spec_.geometry.num_keys(); ++i)
        decoder.push_back(ExpertKey::FromIndex(i, spec_.geometry));
      runtime.Suspend();
      runtime.WarmStart(*warm_start_, decoder);
    }
    for (int i = 0; i < kSequences; ++i) {
      if (i == warm_up_) {
        runtime.ResetStats();
        begin = clock.Now();
      }
      OutputHash ignored;
      workload.Run(i, &model, &model, &ignored);
    }
    const PhaseStats encoder = runtime.stats(Stack::kEncoder),
                     decoder = runtime.stats(Stack::kDecoder);
    return {kTokens * (kSequences - warm_up_) / (clock.Now() - begin),
            static_cast<double>(encoder.hits + decoder.hits) /
                static_cast<double>(encoder.uses + decoder.uses),
            static_cast<uint64_t>(encoder.speculations + decoder.speculations)};
  }

  void ExpectAgreement(const std::string& policy, Eviction eviction) {
    const Figures said = Simulated(policy, eviction), done = Run(policy, eviction);
    EXPECT_NEAR(said.hit_rate, done.hit_rate, 0.01) << policy;
    EXPECT_NEAR(said.tokens_per_second / done.tokens_per_second, 1, 0.10) << policy;
    EXPECT_GT(done.hit_rate, 0);
    EXPECT_LT(done.hit_rate, 1);
    EXPECT_EQ(done.speculations > 0, policy != "on_demand");
  }

  SyntheticTraceOptions synthetic_;
  SignalPredictor predictor_{synthetic_};
  ReplayOptions replay_;
  std::vector<RoutingTrace> traces_;
  ExpertFileSpec spec_;
  SimulatedLinkOptions link_;
  StepCosts costs_;
  int warm_up_ = kWarmUp;
  const UseShares* warm_start_ = nullptr;
};

TEST_F(SimulationAgreementTest, OnDemand) {
  ExpectAgreement("on_demand", Eviction::kLru);
}
TEST_F(SimulationAgreementTest, OnDemandLeastStale) {
  ExpectAgreement("on_demand", Eviction::kLeastStale);
}
TEST_F(SimulationAgreementTest, Auto) { ExpectAgreement("auto", Eviction::kLru); }
TEST_F(SimulationAgreementTest, TopK) { ExpectAgreement("top_k", Eviction::kLfu); }
TEST_F(SimulationAgreementTest, Intelligent) {
  ExpectAgreement("intelligent", Eviction::kLru);
}

TEST_F(SimulationAgreementTest, MemoryManager) {
  ExpectAgreement("memory_manager", Eviction::kLru);
}

TEST_F(SimulationAgreementTest, AWarmStart) {
  const MoeGeometry& g = spec_.geometry;
  std::vector<uint64_t> counts(static_cast<size_t>(g.num_keys()), 0);
  const RoutingSpan& first = traces_[0].decoder;
  for (size_t i = 0; i < first.expert_ids.size(); ++i) {
    const auto layer = static_cast<int>(i) / first.num_tokens;
    const ExpertKey key{g.GlobalLayer(Stack::kDecoder, layer), first.expert_ids[i]};
    counts[static_cast<size_t>(key.Index(g))] +=
        static_cast<int>(i) % first.num_tokens == 0 ? 100 : 1;
  }
  const UseShares shares = SharesOf(counts, g, "test");
  warm_up_ = 0;
  const Figures cold = Run("on_demand", Eviction::kLru);
  warm_start_ = &shares;
  ExpectAgreement("on_demand", Eviction::kLru);
  ExpectAgreement("auto", Eviction::kLru);
  EXPECT_GT(Run("on_demand", Eviction::kLru).hit_rate, cold.hit_rate);
}

// Encoder passes, too, whose idle link warms the decoder.
TEST_F(SimulationAgreementTest, PhaseAwareWithItsEncoder) {
  synthetic_.geometry = {2, 3, 10, 1, 0};
  traces_ = SyntheticTraces(synthetic_, kSequences, 3);
  spec_.geometry = ReplayConfig(synthetic_.geometry, replay_).geometry();
  replay_.encoder = true;
  costs_.between_layers = 2e-3;
  ExpectAgreement("auto", Eviction::kPhaseAware);
  const uint64_t warmed = Run("auto", Eviction::kPhaseAware).speculations;
  EXPECT_EQ(warmed, Simulated("auto", Eviction::kPhaseAware).speculations);
  EXPECT_NE(warmed, Simulated("auto", Eviction::kLru).speculations);
}

// The comparison above would see a simulator that forgets what questions cost.
TEST_F(SimulationAgreementTest, AForgottenCostIsSeen) {
  const Figures said = Simulated("auto", Eviction::kLru);
  costs_.question = 800e-6;
  const Figures done = Run("auto", Eviction::kLru);
  EXPECT_GT(said.tokens_per_second / done.tokens_per_second, 1.10);
}

}  // namespace
}  // namespace routecast
