#include "evaluator/imagined_model.h"

#include <algorithm>
#include <cmath>

#include "common/errors.h"
#include "common/files.h"
#include "evaluator/expert_budget.h"
#include "report/table.h"

namespace routecast {
namespace {

struct Named {
  const char* key;
  const ImaginedModel::Figure& figure;
  double scale;  // from `value` to what the key's unit says
};

}  // namespace

ImaginedModel Imagine(const ImaginedSizes& sizes, const LayerWork& otherwise,
                      const DeviceProfile& profile) {
  const LayerWork& work = sizes.work ? *sizes.work : otherwise;
  const std::string read_once =
      ", read once at " + Fixed(profile.memory_bytes_per_second / 1e9, 0) + " GB/s";
  const auto seconds = [&](const std::optional<double>& given, const char* flag,
                           double bytes, const std::string& whose) {
    if (given) return ImaginedModel::Figure{*given, flag};
    return ImaginedModel::Figure{bytes / profile.memory_bytes_per_second,
                                 whose + read_once};
  };
  ImaginedModel model;
  model.expert_bytes = {work.expert * work.weight_bytes, sizes.work_from};
  if (sizes.expert_bytes)
    model.expert_bytes = {static_cast<double>(*sizes.expert_bytes), "--expert_bytes"};
  // Of a model without a decoder the encoder's.
  const double between = work.between[1] > 0 ? work.between[1] : work.between[0];
  model.layer = seconds(sizes.layer_seconds, "--layer_us", between * work.weight_bytes,
                        sizes.work_from);
  model.expert = seconds(sizes.expert_seconds, "--expert_us", model.expert_bytes.value,
                         model.expert_bytes.from);
  model.head = seconds(sizes.head_seconds, "--head_us", work.head * work.weight_bytes,
                       sizes.work_from);
  return model;
}

namespace {

std::vector<Named> FiguresOf(const ImaginedModel& model) {
  return {{"expert_bytes", model.expert_bytes, 1},
          {"layer_us", model.layer, 1e6},
          {"expert_us", model.expert, 1e6},
          {"head_us", model.head, 1e6}};
}

}  // namespace

Json ImaginedModel::ToJson() const {
  Json json = Json::object();
  for (const Named& named : FiguresOf(*this)) {
    // As it was given: 1e6 times 100e-6 is a little less than 100.
    const double value = std::round(1e6 * named.scale * named.figure.value) / 1e6;
    json[named.key] = {{"value", value}, {"from", named.figure.from}};
  }
  return json;
}

std::string ImaginedModel::From() const {
  std::string text;
  for (const Named& named : FiguresOf(*this)) {
    text +=
        (text.empty() ? "" : "; ") + std::string(named.key) + ": " + named.figure.from;
  }
  return text;
}

std::vector<double> SharesOfBudgets(const std::vector<std::string>& budgets, int experts,
                                    const ImaginedModel& model) {
  std::vector<double> shares;
  for (const std::string& text : budgets) {
    const auto bytes = static_cast<double>(ParseBudget(text, 1));  // refuses what is none
    const double share =
        text.back() == '%' ? std::stod(text) / 100
                           : std::min(1.0, bytes / (experts * model.expert_bytes.value));
    if (std::find(shares.begin(), shares.end(), share) != shares.end()) {
      throw UsageError(ErrorText("--expert_budget names one twice", text,
                                 "name different ones: their rows could not be told "
                                 "apart"));
    }
    shares.push_back(share);
  }
  if (!shares.empty()) return shares;
  throw UsageError(ErrorText("--expert_budget names none", "",
                             "e.g. --expert_budget=25%, or 10%,25%,6GiB"));
}

std::string ImaginedModel::Text() const {
  const auto told = [](const std::string& value, const Figure& figure) {
    return value + " (" + figure.from + ")";
  };
  const auto us = [&](const char* what, const Figure& figure) {
    return ", " + told(what + (" " + Fixed(1e6 * figure.value, 1) + " us"), figure);
  };
  return "imagined model: an expert takes " +
         told(FormatBytes(static_cast<uint64_t>(expert_bytes.value)), expert_bytes) +
         us("computing it", expert) + us("a layer without experts", layer) +
         us("the head", head);
}

}  // namespace routecast
