#include "evaluator/comparison_result.h"

#include <algorithm>
#include <cstdio>

#include "common/files.h"
#include "report/result_values.h"
#include "report/table.h"

namespace routecast {

std::string GroupName(const RowResult& row) {
  return row.prompts + ", batch " + std::to_string(row.batch) + ", " + row.schedule +
         (row.budget.empty() ? "" : ", " + row.budget);
}

void ComparisonResult::Append(ComparisonResult other) {
  if (rows.empty()) {
    *this = std::move(other);
    return;
  }
  const auto named = [](const ComparisonResult& result) {
    std::vector<std::string> notes;
    for (const std::string& note : result.notes)
      notes.push_back(GroupName(result.rows.front()) + ": " + note);
    return notes;
  };
  if (num_groups == 1) notes = named(*this);
  for (std::string& note : named(other)) notes.push_back(std::move(note));
  if (other.link_peak_bytes_per_second > link_peak_bytes_per_second) {
    link = other.link;
    link_peak_bytes_per_second = other.link_peak_bytes_per_second;
    link_bytes_per_second = other.link_bytes_per_second;
  }
  device_peak_bytes = std::max(device_peak_bytes, other.device_peak_bytes);
  emulated = emulated || other.emulated;
  lossless = lossless && other.lossless;
  ++num_groups;
  rows.insert(rows.end(), other.rows.begin(), other.rows.end());
}

Json ComparisonResult::ToJson() const {
  Json json;
  json["rows"] = Json::array();
  for (const RowResult& row : rows) {
    Json entry;
    entry["policy"] = row.policy;
    entry["predictor"] = row.predictor;
    entry["eviction"] = row.eviction;
    entry["tier"] = row.tier;
    entry["budget_bytes"] = row.budget_bytes;
    if (!row.budget.empty()) entry["budget"] = row.budget;
    entry["held_bytes_peak"] = row.held_bytes_peak;
    entry["budget_phase_share"] = row.budget_phase_share;
    if (row.memory_bytes_peak > 0) {
      entry["memory_bytes_peak"] = row.memory_bytes_peak;
      entry["least_slots"] = row.least_slots;
    }
    if (!row.warm_start.empty()) {
      entry["warm_start"] = row.warm_start;
      entry["warm_start_experts"] = row.warm_start_experts;
      entry["warm_start_bytes"] = row.warm_start_bytes;
      entry["warm_start_seconds"] = row.warm_start_seconds;
    }
    entry["phase"] = StackName(row.phase);
    entry["batch"] = row.batch;
    entry["prompts"] = row.prompts;
    entry["schedule"] = row.schedule;
    entry["pairs"] = row.pairs;
    entry["tokens_per_second"] = row.tokens_per_second;
    entry["spread"] = row.spread;
    entry["speed_up"] = row.speed_up;
    entry["speed_up_spread"] = row.speed_up_spread;
    entry["effect_size"] = row.effect_size;
    entry["rounds"] = {{"tokens_per_second", row.round_rates},
                       {"speed_up", row.round_speed_ups}};
    entry["switched_off"] = row.switched_off;
    entry["compute_ms_spread"] = row.compute_ms_spread;
    entry["stall_ms_spread"] = row.stall_ms_spread;
    entry["p50_ms"] = row.p50_ms;
    entry["p95_ms"] = row.p95_ms;
    entry["p99_ms"] = row.p99_ms;
    entry["hit_rate"] = row.hit_rate;
    entry["prefetch_precision"] = row.prefetch_precision;
    entry["prefetch_recall"] = row.prefetch_recall;
    entry["prefetch_timely"] = row.prefetch_timely;
    entry["batch_dedup"] = row.batch_dedup;
    entry["bytes_useful"] = row.bytes_useful;
    entry["bytes_late"] = row.bytes_late;
    entry["bytes_wasted"] = row.bytes_wasted;
    entry["bytes_belady"] = row.bytes_belady;
    entry["stall_seconds"] = row.stall_seconds;
    entry["compute_seconds"] = row.compute_seconds;
    entry["transfer_seconds"] = row.transfer_seconds;
    entry["predictor_seconds"] = row.predictor_seconds;
    entry["predictor_aside_seconds"] = row.predictor_aside_seconds;
    entry["predictor_share"] = row.predictor_share;
    entry["link_share"] = row.link_share;
    entry["compute_share"] = row.compute_share;
    entry["bound"] = row.bound;
    entry["lossless"] = row.lossless;
    entry["copies"] = row.copies;
    if (row.copies != "lossless") {
      entry["exact_match"] = row.exact_match;
      entry["logit_kl"] = row.logit_kl;
      entry["perplexity_change"] = row.perplexity_change;
      entry["compared_sequences"] = row.compared_sequences;
      entry["compression_ratio"] = row.copy.ratio;
      entry["weight_error"] = row.copy.weight_error;
      entry["weight_scale"] = row.copy.weight_scale;
    }
    if (row.memory_manager) {
      entry["memory_regime"] = row.memory_manager->regime;
      entry["most_experts"] = row.memory_manager->most_experts;
      entry["aggressiveness"] = row.memory_manager->aggressiveness;
    }
    for (const auto& [a, wasted_bytes, saved_seconds] : row.speculation) {
      entry["speculation"].push_back({{"lead", a.lead},
                                      {"open", a.open()},
                                      {"threshold", a.threshold},
                                      {"trust", a.trust},
                                      {"judged", a.judged},
                                      {"used", a.used},
                                      {"unused", a.unused},
                                      {"wasted_bytes", wasted_bytes},
                                      {"saved_seconds", saved_seconds},
                                      {"saved", a.saved},
                                      {"cost", a.cost}});
    }
    entry["output_sha256"] = row.output_sha256;
    entry["synthetic_weights"] = synthetic_weights;
    entry["emulated"] = row.emulated;
    json["rows"].push_back(entry);
  }
  json["device"] = device;
  if (device_peak_bytes > 0) json["device_peak_bytes"] = device_peak_bytes;
  json["link_peak_bytes_per_second"] = link_peak_bytes_per_second;
  return json;
}

std::string ComparisonResult::ToCsv() const {
  Json rows = ToJson().at("rows");
  for (Json& row : rows) {  // tables of their own: results.json has them
    row.erase("speculation");
    row.erase("rounds");
  }
  return RowsCsv(rows);
}

namespace {

// What the table says behind a row.
std::string Verdict(const RowResult& row) {
  if (row.copies == "lossless")
    return !row.lossless ? "  OUTPUT DIFFERS" : row.switched_off ? "  off" : "";
  if (row.phase == Stack::kEncoder) return "  LOSSY " + row.copies;
  char text[200];
  std::snprintf(
      text, sizeof text,
      "  LOSSY %s (1/%.1f of the bytes, weights off by %.1f%%): %.1f%% of %lld texts "
      "equal, KL %.4f nats, perplexity %+.2f%%",
      row.copies.c_str(), row.copy.ratio,
      100 * row.copy.weight_error / row.copy.weight_scale, 100 * row.exact_match,
      static_cast<long long>(row.compared_sequences), row.logit_kl,
      100 * row.perplexity_change);
  return text;
}

// Where a quarter of the rounds were no faster than on-demand LRU, chance may have
// chosen.
std::string ToldApart(const RowResult& row) {
  const bool itself = row.policy == "on_demand" && row.eviction == "lru";
  const double quartile = row.speed_up_spread[1];
  if (itself || !(quartile <= 1)) return "";
  return ", not told apart from on-demand LRU (" + Fixed(row.speed_up, 2) +
         "x, lower quartile " + Fixed(quartile, 2) + "x)";
}

// The fastest over on-demand LRU of the rows that a user could choose: within the budget,
// lossless, without the future, and not off, which is on-demand LRU under another name;
// one a stack of each comparison.
std::string FastestText(const ComparisonResult& result) {
  std::vector<const RowResult*> fastest;
  for (const RowResult& row : result.rows) {
    if (row.policy == "resident" || row.predictor == "oracle" ||
        row.copies != "lossless" || row.switched_off)
      continue;
    const auto same =
        std::find_if(fastest.begin(), fastest.end(), [&](const auto* other) {
          return other->phase == row.phase && GroupName(*other) == GroupName(row);
        });
    if (same == fastest.end()) {
      fastest.push_back(&row);
    } else if (row.speed_up > (*same)->speed_up) {
      *same = &row;
    }
  }
  std::string text;
  for (const RowResult* row : fastest) {
    text +=
        "fastest within the budget (" + std::string(StackName(row->phase)) +
        (result.num_groups > 1 ? ", " + GroupName(*row) : "") + "): " + row->policy +
        (row->predictor == "none" ? ", " + row->eviction : " with " + row->predictor) +
        ", " + Fixed(row->tokens_per_second, 1) + " tokens/s" + ToldApart(*row) + "\n";
  }
  return text;
}

}  // namespace

std::string ComparisonTable(const ComparisonResult& result) {
  std::string text;
  char line[512];
  const auto mib = [](int64_t bytes) { return static_cast<double>(bytes) / (1 << 20); };
  int width = 18;  // of the predictors' column: labels of one kind differ at their ends
  for (const RowResult& row : result.rows)
    width = std::clamp(static_cast<int>(row.predictor.size()), width, 48);
  std::snprintf(line, sizeof line,
                "%-8s %-14s %-*s %-7s %9s %7s %6s %8s %8s %8s %7s %7s %7s %6s\n", "phase",
                "policy", width, "predictor", "evict", "tokens/s", "speed", "hits",
                "useful", "late", "wasted", "stall s", "Tc s", "Tx s", "bound");
  text += line;
  std::string group;
  for (const RowResult& row : result.rows) {
    if (result.num_groups > 1 && GroupName(row) != group) {
      group = GroupName(row);
      text += group + "\n";
    }
    std::snprintf(line, sizeof line,
                  "%-8s %-14s %-*.*s %-7.7s %9.1f %6.2fx %5.1f%% %8.0f %8.0f %8.0f %7.2f "
                  "%7.2f %7.2f %6.2f%s\n",
                  StackName(row.phase), row.policy.c_str(), width, width,
                  row.predictor.c_str(), row.eviction.c_str(), row.tokens_per_second,
                  row.speed_up, 100 * row.hit_rate, mib(row.bytes_useful),
                  mib(row.bytes_late), mib(row.bytes_wasted), row.stall_seconds,
                  row.compute_seconds, row.transfer_seconds, row.bound,
                  Verdict(row).c_str());
    text += line;
  }
  text += "speed: median over rounds of the rate over on-demand LRU's; bytes in MiB\n" +
          FastestText(result);
  const bool several = result.num_groups > 1;  // each has its own: results.json, notes
  text += (several ? "link of the fastest comparison: " : "link: ") + result.link +
          ", peak " +
          FormatBytes(static_cast<uint64_t>(result.link_peak_bytes_per_second)) + "/s" +
          (result.emulated ? " (emulated)" : "") +
          (result.synthetic_weights ? "; synthetic weights" : "") + "\n";
  if (result.device_peak_bytes > 0) {
    text += "device memory: " + FormatBytes(result.device_peak_bytes) +
            " in use at most, whoever used it\n";
  }
  for (const std::string& note : result.notes) text += "note: " + note + "\n";
  return text;
}

}  // namespace routecast
