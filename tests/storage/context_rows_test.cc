// The coded plane is what docs/trace_format.md says, by an encoder that only follows the
// text: short rows, long ones (which lie by experts, for wide vectors) and none.
#include <gtest/gtest.h>

#include <map>

#include "storage/context_model.h"
#include "storage/range_coder.h"
#include "tests/storage/random_trace.h"

namespace routecast {
namespace {

constexpr int kLayers = 2, kTokenIds = 8;

Row RandomRow(uint64_t key, int experts, int entries) {
  std::map<uint16_t, int16_t> row;
  for (uint64_t i = 0; row.size() < static_cast<size_t>(entries); ++i) {
    const uint64_t draw = Mix(key, i);
    // Both ends among them: a factor may push a weight below 1.
    const auto factor = static_cast<int16_t>(
        draw % 9 == 0 ? (draw % 2 ? kMaxFactor : -kMaxFactor) : draw % 97 - 48);
    row[static_cast<uint16_t>(ToRange(Mix(draw), static_cast<uint64_t>(experts)))] =
        factor;
  }
  Row entries_of_row;
  for (const auto& [expert, f] : row) entries_of_row.push_back({expert, f});
  return entries_of_row;
}

// Token ids 0..4 have rows of their own, pairs (5, token) on top of some.
StackTables RandomTables(int experts) {
  StackTables tables;
  std::vector<uint32_t> weights(static_cast<size_t>(experts), 1);
  for (uint32_t left = kBaseScale - static_cast<uint32_t>(experts), i = 0; left > 0;
       ++i) {
    const uint32_t more = std::min<uint32_t>(left, 1 + Mix(experts, i) % 200);
    weights[ToRange(Mix(experts, i, 1), weights.size())] += more;
    left -= more;
  }
  for (int l = 0; l < kLayers; ++l) {
    tables.marginal.push_back(weights);
    std::vector<Row>& previous = tables.previous.emplace_back();
    for (int e = 0; l > 0 && e < experts; ++e) {
      previous.push_back(RandomRow(Mix(8, e), experts, std::min(experts, e % 7)));
    }
  }
  const auto add = [&](uint32_t outer, uint32_t inner, int entries) {
    auto& context = tables.contexts.emplace_back();
    context.outer = outer;
    context.inner = inner;
    for (int l = 0; l < kLayers; ++l) {
      context.rows.push_back(
          RandomRow(Mix(outer, inner, l), experts, std::min(experts, entries + l)));
    }
  };
  add(5, 0, 2);
  add(5, 1, experts / 2);
  for (uint32_t token = 0; token < 5; ++token) {
    add(kAnyContext, token, static_cast<int>(token) * experts / 4);  // none to all
  }
  return tables;
}

RoutingSpan RandomIds(uint64_t key, int experts) {
  RoutingSpan span;
  span.num_tokens = 200;
  span.num_layers = kLayers;
  for (uint64_t t = 0; t < 200; ++t) {
    span.token_ids.push_back(static_cast<uint32_t>(ToRange(Mix(key, t), kTokenIds)));
  }
  for (uint64_t i = 0; i < 200 * kLayers; ++i) {
    span.expert_ids.push_back(
        static_cast<uint16_t>(ToRange(Mix(key, 1, i), static_cast<uint64_t>(experts))));
  }
  return span;
}

Row RowOf(const StackTables& tables, const RoutingSpan& span, int l, int t) {
  const Row* alone = nullptr;
  const Row* pair = nullptr;
  for (const auto& context : tables.contexts) {
    if (context.inner != span.token_ids[static_cast<size_t>(t)]) continue;
    const Row* row = &context.rows[static_cast<size_t>(l)];
    if (context.outer == kAnyContext) alone = row;
    if (t > 0 && context.outer == span.token_ids[static_cast<size_t>(t - 1)]) pair = row;
  }
  if (pair != nullptr && alone != nullptr) return Compose(*alone, *pair);
  return pair != nullptr ? *pair : alone != nullptr ? *alone : Row();
}

std::string EncodeSlowly(const StackTables& tables, const RoutingSpan& span) {
  std::string out;
  RangeEncoder coder(&out);
  for (int l = 0; l < kLayers; ++l) {
    for (int t = 0; t < span.num_tokens; ++t) {
      const size_t at = static_cast<size_t>(l * span.num_tokens + t);
      const uint16_t id = span.expert_ids[at];
      const auto layer = static_cast<size_t>(l);
      const Row none;
      const std::vector<uint32_t> base = BaseWeights(
          tables.marginal[layer],
          l == 0 ? none
                 : tables.previous[layer][span.expert_ids[at - size_t(span.num_tokens)]]);
      const Row row = RowOf(tables, span, l, t);
      uint32_t total = kBaseScale, rest = kBaseScale, start = 0, size = 0;
      std::vector<bool> own(base.size());
      for (const RowEntry& e : row) {
        own[e.expert] = true;
        const auto weight = std::max<uint32_t>(
            1, static_cast<uint32_t>(uint64_t{base[e.expert]} * FactorTimes(e.factor) >>
                                     16));
        if (e.expert < id) start += weight;
        if (e.expert == id) size = weight;
        total += weight - base[e.expert];
        rest -= base[e.expert];
      }
      if (size > 0) {
        coder.Encode(start, size, total);
        continue;
      }
      if (!row.empty()) coder.Encode(total - rest, rest, total);
      uint32_t before = 0;
      for (size_t e = 0; e < id; ++e) before += own[e] ? 0 : base[e];
      coder.Encode(before, base[id], rest);
    }
  }
  coder.Finish();
  return out;
}

class ContextRows : public testing::TestWithParam<int> {};

TEST_P(ContextRows, CodesAsTheFormatSays) {
  const int experts = GetParam();
  const StackTables tables = RandomTables(experts);
  const ContextModel model(experts, ContextKind::kTokens, StackTables(), tables, "test");
  for (uint64_t seed = 0; seed < 20; ++seed) {
    const RoutingSpan span = RandomIds(seed, experts);
    std::string coded;
    model.EncodeIds(Stack::kDecoder, span, &coded);
    ASSERT_TRUE(coded == EncodeSlowly(tables, span)) << seed;
    RoutingSpan back = span;
    back.expert_ids.clear();
    ASSERT_TRUE(model.DecodeIds(Stack::kDecoder, coded, &back));
    ASSERT_EQ(back, span);
  }
}

// Widths that are and are not whole vectors.
INSTANTIATE_TEST_SUITE_P(Experts, ContextRows, testing::Values(2, 16, 50, 64, 128, 300));

}  // namespace
}  // namespace routecast
