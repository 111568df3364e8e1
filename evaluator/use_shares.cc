#include "evaluator/use_shares.h"

#include <algorithm>
#include <array>
#include <charconv>
#include <optional>
#include <sstream>

#include "common/errors.h"

namespace routecast {
namespace {

constexpr uint64_t kMostIds = 1 << 20;  // layers, experts
constexpr char kHeader[] = "layer_id,expert_id,count";

// Three numbers of a line; nullopt where it has others.
std::optional<std::array<uint64_t, 3>> NumbersOf(const std::string& line) {
  std::array<uint64_t, 3> numbers{};
  const char *at = line.data(), *const end = at + line.size();
  for (size_t i = 0; i < numbers.size(); ++i) {
    const auto [next, error] = std::from_chars(at, end, numbers[i]);
    if (error != std::errc()) return std::nullopt;
    at = next;
    if (i + 1 < numbers.size() && (at == end || *at++ != ',')) return std::nullopt;
  }
  if (at != end || numbers[0] >= kMostIds || numbers[1] >= kMostIds) return std::nullopt;
  return numbers;
}

[[noreturn]] void RefuseLine(const fs::path& csv, size_t line, const std::string& text) {
  throw DataError(ErrorText(
      "not a table of uses: " + csv.string(),
      "line " + std::to_string(line) + ": '" + text.substr(0, 60) + "' is not " + kHeader,
      "give load.csv of routecast-trace stats"));
}

}  // namespace

UseShares SharesOf(const std::vector<uint64_t>& counts, const MoeGeometry& g,
                   std::string source) {
  UseShares shares{std::move(source), std::vector<double>(counts.size(), 0.0)};
  for (int layer = 0; layer < g.num_layers(); ++layer) {
    const auto from = static_cast<size_t>(ExpertKey{layer, 0}.Index(g));
    const auto experts = static_cast<size_t>(g.num_experts);
    double sum = 0;
    for (size_t i = from; i < from + experts; ++i) sum += static_cast<double>(counts[i]);
    for (size_t i = from; i < from + experts && sum > 0; ++i)
      shares.by_key[i] = static_cast<double>(counts[i]) / sum;
  }
  return shares;
}

UseShares ReadUseShares(const fs::path& csv, const MoeGeometry& g) {
  if (!fs::is_regular_file(csv)) {
    throw UsageError(ErrorText("no such table of uses: " + csv.string(), "",
                               "give load.csv of routecast-trace stats"));
  }
  constexpr uintmax_t kLongest = uintmax_t{64} << 20;
  std::stringstream in(ReadFile(csv, kLongest));
  std::vector<std::array<uint64_t, 3>> rows;
  uint64_t layers = 0, experts = 0;
  size_t number = 0;
  for (std::string line; std::getline(in, line);) {
    if (!line.empty() && line.back() == '\r') line.pop_back();
    const auto row = NumbersOf(line);
    if (++number == 1 ? line != kHeader : !row) RefuseLine(csv, number, line);
    if (number == 1) continue;
    rows.push_back(*row);
    layers = std::max(layers, rows.back()[0] + 1);
    experts = std::max(experts, rows.back()[1] + 1);
  }
  if (number == 0) RefuseLine(csv, 1, "");
  if (layers != static_cast<uint64_t>(g.num_layers()) ||
      experts != static_cast<uint64_t>(g.num_experts)) {
    throw UsageError(ErrorText("uses of a model of another geometry: " + csv.string(),
                               std::to_string(layers) + " MoE layers x " +
                                   std::to_string(experts) + " experts, here are " +
                                   std::to_string(g.num_layers()) + " x " +
                                   std::to_string(g.num_experts),
                               "give the statistics of this model's store"));
  }
  std::vector<uint64_t> counts(static_cast<size_t>(g.num_keys()), 0);
  for (const auto& [layer, expert, count] : rows) {
    const ExpertKey key{static_cast<int>(layer), static_cast<int>(expert)};
    counts[static_cast<size_t>(key.Index(g))] += count;
  }
  return SharesOf(counts, g, csv.string());
}

std::vector<ExpertKey> MostUsed(const UseShares& shares, const MoeGeometry& g,
                                std::vector<ExpertKey> keys, size_t count) {
  const auto share = [&](ExpertKey key) {
    return shares.by_key[static_cast<size_t>(key.Index(g))];
  };
  std::erase_if(keys, [&](ExpertKey key) { return share(key) <= 0; });
  std::sort(keys.begin(), keys.end(), [&](ExpertKey a, ExpertKey b) {
    return share(a) != share(b) ? share(a) > share(b) : a < b;
  });
  keys.resize(std::min(keys.size(), count));
  std::reverse(keys.begin(), keys.end());
  return keys;
}

}  // namespace routecast
