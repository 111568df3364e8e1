// The kernels around experts against slow loops, one token at a time: choice, capacity,
// sort, gather, scatter. Edge cases: no token, one expert, ties, padding, full and one
// more, more tokens than a tile.
#include <vector>

#include "models/host_copy.h"
#include "models/token_groups.h"
#include "models/top1_router.h"
#include "tests/models/device_test.h"

namespace routecast {
namespace {

class RoutingKernels : public DeviceTest {};
ROUTECAST_INSTANTIATE_DEVICES(RoutingKernels);

constexpr at::ScalarType kTypes[] = {at::kFloat, at::kBFloat16, at::kHalf};

at::Tensor Host(const at::Tensor& t) { return t.to(at::kCPU); }

TEST_P(RoutingKernels, TheChoiceEqualsTheLibrarysStepByStep) {
  at::manual_seed(1);
  for (int64_t experts : {1, 2, 31, 32, 33, 128, 256}) {
    for (at::ScalarType router : kTypes) {
      for (at::ScalarType model : kTypes) {
        const at::Tensor logits = (3 * at::randn({3, 5, experts})).to(router);
        const Top1Choice got = Top1OfLogits(On(logits), model);
        const at::Tensor probs = at::softmax(logits, -1).to(model);
        const at::Tensor want = std::get<0>(probs.max(-1)).to(at::kFloat);
        const at::Tensor gates = Host(got.gate_probs_BT).to(at::kFloat);
        EXPECT_EQ(got.gate_probs_BT.scalar_type(), model);
        // exp may differ in its last bit; then a narrow type rounds to a neighbour.
        const double unit = router == at::kBFloat16 || model == at::kBFloat16 ? 8e-3
                            : router == at::kHalf || model == at::kHalf       ? 1e-3
                                                                              : 1e-6;
        EXPECT_TRUE(at::allclose(gates, want, unit, 1e-7)) << experts << router << model;
        const at::Tensor chosen =
            probs.gather(-1, Host(got.expert_ids_BT).unsqueeze(-1)).squeeze(-1);
        EXPECT_TRUE(at::allclose(chosen.to(at::kFloat), want, unit, 1e-7))
            << experts << router << model;
        EXPECT_TRUE(at::equal(Host(got.logits_BTE), logits.to(at::kFloat)));
      }
    }
  }
}

TEST_P(RoutingKernels, OfEqualProbabilitiesTheFirstWins) {
  for (int64_t experts : {2, 40, 128}) {
    const at::Tensor logits = at::zeros({1, 1, experts});
    EXPECT_EQ(Top1OfLogits(On(logits), at::kFloat).expert_ids_BT.item<int64_t>(), 0);
    logits[0][0][experts - 1] = 1.00001;
    logits[0][0][experts / 2] = 1.0;
    // fp32 tells the two apart, bf16 does not.
    EXPECT_EQ(Top1OfLogits(On(logits), at::kFloat).expert_ids_BT.item<int64_t>(),
              experts - 1);
    EXPECT_EQ(Top1OfLogits(On(logits), at::kBFloat16).expert_ids_BT.item<int64_t>(),
              experts / 2);
  }
}

TEST_P(RoutingKernels, MarginsAreTheTwoLargestLogitsApart) {
  at::manual_seed(2);
  for (int64_t experts : {1, 2, 100}) {
    const at::Tensor logits = at::randn({4, 6, experts});
    logits[0][0].fill_(2);  // a tie: no margin
    const at::Tensor got = Host(Top1OfLogits(On(logits), at::kFloat).margins_BT);
    const at::Tensor sorted = std::get<0>(logits.sort(-1, /*descending=*/true));
    const at::Tensor want =
        experts == 1 ? at::zeros({4, 6}) : sorted.select(-1, 0) - sorted.select(-1, 1);
    EXPECT_TRUE(at::equal(got, want)) << experts;
  }
}

TEST_P(RoutingKernels, LogitsThatAreNoNumbersStillGiveAnExpertThatIsThere) {
  const at::Tensor logits = at::full({1, 2, 70}, std::numeric_limits<float>::quiet_NaN());
  const Top1Choice got = Top1OfLogits(On(logits), at::kFloat);
  EXPECT_TRUE(at::equal(Host(got.expert_ids_BT), at::zeros({1, 2}, at::kLong)));
  EXPECT_TRUE(at::isnan(Host(got.gate_probs_BT)).all().item<bool>());
}

TEST_P(RoutingKernels, NoTokenIsAChoiceOfNothing) {
  const Top1Choice got = Top1OfLogits(On(at::zeros({2, 0, 5})), at::kFloat);
  EXPECT_EQ(got.expert_ids_BT.sizes(), (std::vector<int64_t>{2, 0}));
}

// Position by position: an expert takes a sequence's first `capacity` tokens.
at::Tensor DroppedByLoop(const at::Tensor& ids, int64_t experts, int64_t capacity,
                         const at::Tensor& counted) {
  at::Tensor dropped = at::zeros(ids.sizes(), at::kBool);
  for (int64_t b = 0; b < ids.size(0); ++b) {
    std::vector<int64_t> taken(static_cast<size_t>(experts), 0);
    for (int64_t t = 0; t < ids.size(1); ++t) {
      if (counted.defined() && !counted[b][t].item<bool>()) {
        dropped[b][t] = true;
        continue;
      }
      dropped[b][t] = ++taken[static_cast<size_t>(ids[b][t].item<int64_t>())] > capacity;
    }
  }
  return dropped;
}

TEST_P(RoutingKernels, CapacityEqualsAPositionByPositionCount) {
  at::manual_seed(3);
  for (int64_t experts : {1, 3, 256}) {
    for (int64_t length : {1, 32, 75}) {
      const at::Tensor ids = at::randint(0, experts, {3, length}, at::kLong);
      const at::Tensor some = at::rand({3, length}) < 0.7;
      for (int64_t capacity : {int64_t{0}, int64_t{1}, length / 2, length - 1, length}) {
        for (const at::Tensor& counted : {at::Tensor(), some}) {
          EXPECT_TRUE(
              at::equal(Host(DroppedByCapacity(On(ids), experts, capacity, On(counted))),
                        DroppedByLoop(ids, experts, capacity, counted)))
              << experts << " experts, length " << length << ", capacity " << capacity;
        }
      }
    }
  }
}

struct Sorted {
  std::vector<int64_t> order, place, offsets;
};

Sorted SortedByLoop(const at::Tensor& ids, const at::Tensor& dropped, int64_t experts) {
  Sorted s;
  s.place.assign(static_cast<size_t>(ids.numel()), -1);
  for (int64_t e = 0; e <= experts; ++e) {
    s.offsets.push_back(static_cast<int64_t>(s.order.size()));
    for (int64_t i = 0; i < ids.numel(); ++i) {
      const bool out = dropped.defined() && dropped[i].item<bool>();
      if (e < experts ? out || ids[i].item<int64_t>() != e : !out) continue;
      if (e < experts) {
        s.place[static_cast<size_t>(i)] = static_cast<int64_t>(s.order.size());
      }
      s.order.push_back(i);
    }
  }
  return s;
}

TEST_P(RoutingKernels, TheSortIsStableAndLeavesDroppedTokensLast) {
  at::manual_seed(4);
  for (int64_t experts : {1, 2, 31, 32, 256}) {
    for (int64_t tokens : {0, 1, 33, 256, 257, 700}) {
      const at::Tensor ids = at::randint(0, experts, {tokens}, at::kLong);
      const at::Tensor some = at::rand({tokens}) < 0.3;
      for (const at::Tensor& dropped : {at::Tensor(), some, at::ones_like(some)}) {
        const TokenGroups got = GroupByExpert(On(ids), On(dropped), experts);
        const Sorted want = SortedByLoop(ids, dropped, experts);
        const auto equal = [](const at::Tensor& t, const std::vector<int64_t>& v) {
          return at::equal(Host(t).to(at::kLong), at::tensor(v, at::kLong));
        };
        EXPECT_TRUE(equal(got.order_N, want.order)) << experts << " " << tokens;
        EXPECT_TRUE(equal(got.place_N, want.place)) << experts << " " << tokens;
        EXPECT_TRUE(equal(got.offsets_E1, want.offsets)) << experts << " " << tokens;
      }
    }
  }
}

// Widths of whole 16-byte words and of others, and a tensor that begins between them.
TEST_P(RoutingKernels, GatheredRowsAreTheTokensInSortedOrder) {
  at::manual_seed(5);
  const at::Tensor ids = at::randint(0, 7, {90}, at::kLong);
  const TokenGroups groups = GroupByExpert(On(ids), {}, 7);
  for (at::ScalarType type : kTypes) {
    for (int64_t width : {1, 7, 8, 96}) {
      const at::Tensor all = at::randn({90 * width + 1}).to(type);
      const at::Tensor x = On(all).narrow(0, 1, 90 * width).view({90, width});
      EXPECT_TRUE(at::equal(Host(GatherRows(x, groups)),
                            Host(x).index_select(0, Host(groups.order_N))))
          << type << " " << width;
    }
  }
}

TEST_P(RoutingKernels, ScatteringAddsTheScaledRowToItsTokenAlone) {
  at::manual_seed(6);
  const int64_t tokens = 70;
  const at::Tensor ids = at::randint(0, 5, {tokens}, at::kLong);
  const at::Tensor dropped = at::rand({tokens}) < 0.25;
  const TokenGroups groups = GroupByExpert(On(ids), On(dropped), 5);
  const int64_t kept = Host(groups.offsets_E1)[5].item<int64_t>();
  for (at::ScalarType type : kTypes) {
    for (int64_t width : {1, 33, 64}) {
      const at::Tensor residual = at::randn({tokens, width}).to(type);
      const at::Tensor outputs = at::randn({kept, width}).to(type);
      const at::Tensor gates = at::rand({tokens}).to(type);
      at::Tensor want = residual.clone();
      for (int64_t i = 0; i < tokens; ++i) {
        const int64_t row = Host(groups.place_N)[i].item<int>();
        EXPECT_EQ(row < 0, dropped[i].item<bool>());
        if (row >= 0) want[i] = residual[i] + outputs[row] * gates[i];
      }
      // Each product and each sum is rounded once: the same bits.
      EXPECT_TRUE(at::equal(
          Host(AddScattered(On(residual), On(outputs), On(gates), groups)), want))
          << type << " " << width;
    }
  }
}

TEST_P(RoutingKernels, WhereAllAreDroppedTheResidualIsLeft) {
  const at::Tensor residual = at::randn({3, 8});
  const TokenGroups groups =
      GroupByExpert(On(at::zeros({3}, at::kLong)), On(at::ones({3}, at::kBool)), 4);
  EXPECT_TRUE(at::equal(
      Host(AddScattered(On(residual), On(at::zeros({0, 8})), On(at::ones({3})), groups)),
      residual));
}

// Where gradients are wanted other code runs; it must say the same.
TEST_P(RoutingKernels, WithGradientsTheValuesAreTheSameAndTheGradientsThere) {
  at::manual_seed(7);
  const at::Tensor ids = at::randint(0, 4, {30}, at::kLong);
  const at::Tensor some = at::rand({30}) < 0.3;
  for (const at::Tensor& dropped : {at::Tensor(), some}) {
    const TokenGroups groups = GroupByExpert(On(ids), On(dropped), 4);
    const int64_t kept = Host(groups.offsets_E1)[4].item<int64_t>();
    const at::Tensor x = On(at::randn({30, 6})), gates = On(at::rand({30}));
    const auto run = [&](const at::Tensor& from, const at::Tensor& gate) {
      return AddScattered(from, 2 * GatherRows(from, groups).narrow(0, 0, kept), gate,
                          groups);
    };
    const at::Tensor plain = run(x, gates);
    const at::Tensor xg = x.clone().requires_grad_(true);
    const at::Tensor gg = gates.clone().requires_grad_(true);
    const at::Tensor out = run(xg, gg);
    EXPECT_TRUE(at::equal(Host(out.detach()), Host(plain)));
    out.sum().backward();
    const at::Tensor used =
        dropped.defined() ? dropped.logical_not() : at::ones({30}, at::kBool);
    EXPECT_TRUE(at::allclose(Host(xg.grad()).select(1, 0),
                             1 + 2 * Host(gates) * used.to(at::kFloat)));
    EXPECT_TRUE(at::allclose(Host(gg.grad()), 2 * Host(x).sum(1) * used.to(at::kFloat),
                             1e-4, 1e-5));
  }
}

TEST_P(RoutingKernels, ACopyToTheHostHoldsWhatTheTensorHeld) {
  const at::Tensor x = On(at::randn({300, 7}));
  HostCopy none, copy(x.t());
  EXPECT_FALSE(none.defined());
  none = std::move(copy);
  const at::Tensor& host = none.Wait();
  EXPECT_TRUE(host.device().is_cpu() && host.is_contiguous());
  EXPECT_TRUE(at::equal(host, Host(x).t()));
}

}  // namespace
}  // namespace routecast
