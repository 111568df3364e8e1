#include "models/predictor_factory.h"

#include <ATen/ATen.h>
#include <c10/core/GradMode.h>

#include <algorithm>
#include <cmath>
#include <string_view>

#include "common/errors.h"
#include "models/adaptive_context.h"
#include "models/known_ids.h"
#include "models/online_predictor.h"
#include "models/serving_strategies.h"

namespace routecast {

namespace {

constexpr int64_t kFewLogits = 1 << 13;  // up to here tensor calls cost more than numbers

// softmax(logits of one lead / temperature) in plain loops, for a question between
// layers.
at::Tensor Softmax(const at::Tensor& logits_BTHE, int lead, double temperature) {
  const int64_t H = logits_BTHE.size(2), E = logits_BTHE.size(3);
  at::Tensor probs = at::empty({logits_BTHE.size(0), logits_BTHE.size(1), E}, at::kFloat);
  const auto scale = static_cast<float>(1 / temperature);
  const float* from = logits_BTHE.const_data_ptr<float>() + lead * E;
  float* to = probs.data_ptr<float>();
  for (int64_t row = 0; row < probs.numel(); row += E, from += H * E, to += E) {
    const float largest = *std::max_element(from, from + E);
    float total = 0;
    for (int64_t e = 0; e < E; ++e)
      total += to[e] = std::exp((from[e] - largest) * scale);
    for (int64_t e = 0; e < E; ++e) to[e] /= total;
  }
  return probs;
}

}  // namespace

LearnedPredictor::LearnedPredictor(std::string name, SavedSpeculationModel saved)
    : name_(std::move(name)), saved_(std::move(saved)) {}

bool LearnedPredictor::needs_hidden() const { return config().hidden_width > 0; }

int LearnedPredictor::history_tokens() const { return saved_.model->history_tokens(); }

std::optional<at::Tensor> LearnedPredictor::Predict(const RoutingWindow& window,
                                                    int lead) {
  if (lead < 1 || lead > saved_.model->NumLeads(window.stack, window.source_layer)) {
    return std::nullopt;
  }
  return PredictLeads(window, lead).back();
}

std::vector<std::optional<at::Tensor>> LearnedPredictor::PredictLeads(
    const RoutingWindow& window, int num_leads) {
  RequireOwn(window);
  const c10::NoGradGuard no_grad;
  return Calibrated(window, saved_.model->Forward(Known(window), 0).logits_BTHE,
                    num_leads);
}

std::vector<std::optional<at::Tensor>> LearnedPredictor::PredictLast(
    const RoutingWindow& window, int num_leads) {
  RequireOwn(window);
  const c10::NoGradGuard no_grad;
  const SpeculationOutput said = saved_.model->ForwardLast(Known(window));
  later_BLE_.reset();
  if (said.later_BTLE.defined()) {
    later_BLE_ = at::softmax(said.later_BTLE.squeeze(1), 2);
  }
  return Calibrated(window, said.logits_BTHE, num_leads);
}

RoutingWindow LearnedPredictor::Known(const RoutingWindow& window) const {
  return WithKnownIds(window, config().vocab_size);
}

void LearnedPredictor::RequireOwn(const RoutingWindow& window) const {
  const MoeGeometry& g = config().geometry;
  if (window.num_experts != g.num_experts ||
      window.num_layers != g.layers(window.stack)) {
    throw std::logic_error("a window of another model than the predictor's");
  }
}

std::vector<std::optional<at::Tensor>> LearnedPredictor::Calibrated(
    const RoutingWindow& window, const at::Tensor& logits_BTHE, int num_leads) const {
  const auto leads = static_cast<int>(logits_BTHE.size(2));
  const bool few = logits_BTHE.is_cpu() && logits_BTHE.is_contiguous() &&
                   logits_BTHE.numel() <= kFewLogits;
  std::vector<std::optional<at::Tensor>> all;
  for (int lead = 1; lead <= num_leads; ++lead) {
    if (lead > leads) {
      all.push_back(std::nullopt);
      continue;
    }
    const double temperature =
        saved_.calibration.Temperature(window.stack, window.source_layer, lead);
    all.push_back(few ? Softmax(logits_BTHE, lead - 1, temperature)
                      : at::softmax(logits_BTHE.select(2, lead - 1) / temperature, -1));
  }
  return all;
}

namespace {

constexpr std::string_view kAdaptivePrefix = "adaptive_context:";
constexpr double kConfident = 0.7;  // the original engine's threshold
constexpr std::string_view kOnlinePrefix = "online:";
constexpr double kOnlineRate = 0.005;  // of a token's gradient

[[noreturn]] void OtherGeometry(const std::string& what, const MoeGeometry& found,
                                const MoeGeometry& wanted) {
  const auto text = [](const MoeGeometry& g) {
    return std::to_string(g.encoder_layers) + "+" + std::to_string(g.decoder_layers) +
           " MoE layers of " + std::to_string(g.num_experts) + " experts, " +
           std::to_string(g.experts_per_token) + " a token";
  };
  throw DataError(ErrorText(what + " belongs to another model",
                            text(found) + ", expected " + text(wanted),
                            "train it on this model's traces"));
}

bool SameRouting(const MoeGeometry& a, const MoeGeometry& b) {
  return a.encoder_layers == b.encoder_layers && a.decoder_layers == b.decoder_layers &&
         a.num_experts == b.num_experts && a.experts_per_token == b.experts_per_token;
}

[[noreturn]] void NoFolder(const std::string& name) {
  const fs::path path = name, parent = path.parent_path();
  std::vector<std::string> runs;  // beside it
  std::error_code absent;
  for (fs::directory_iterator it(parent.empty() ? "." : parent, absent), end;
       !absent && it != end; it.increment(absent)) {
    std::error_code unreadable;  // a link in a circle, another one's folder
    if (fs::exists(it->path() / "config.json", unreadable))
      runs.push_back(it->path().filename().string());
  }
  throw UsageError(ErrorText("no such predictor folder: " + name,
                             DidYouMean(path.filename().string(), runs,
                                        parent.empty() ? "" : parent.string() + "/"),
                             "name the folder of a finished run"));
}

// What people take for a predictor's folder: a traced model's, one that is not finished.
void RequireTrainedRun(const fs::path& folder) {
  const fs::path config = folder / "config.json";
  if (fs::exists(folder / "state") && !fs::exists(config)) {
    throw UsageError(ErrorText(folder.string() + " is an unfinished training", "",
                               "start the same routecast-train command again"));
  }
  if (!fs::exists(config)) {
    throw UsageError(ErrorText(folder.string() + " holds no predictor",
                               "there is no config.json in it",
                               "name the folder of a finished run of routecast-train"));
  }
  const Json json = ParseJson(ReadFile(config, 16 << 20), config.string());
  if (json.is_object() && json.contains("num_experts") && !json.contains("format")) {
    throw UsageError(ErrorText(folder.string() + " is a checkpoint, not a predictor",
                               "its config.json is of a Switch Transformer",
                               "name the folder of a finished run of routecast-train"));
  }
}

std::unique_ptr<LearnedPredictor> LoadLearned(const fs::path& folder,
                                              const MoeGeometry& geometry) {
  const bool inside = !fs::exists(folder / "config.json") && fs::exists(folder / "model");
  RequireTrainedRun(inside ? folder / "model" : folder);
  auto saved = LoadSpeculationModel(inside ? folder / "model" : folder);
  const SpeculationConfig& config = saved.model->config();
  if (!SameRouting(config.geometry, geometry)) {
    OtherGeometry(folder.string(), config.geometry, geometry);
  }
  if (config.attention_heads > 0) {
    throw UsageError(ErrorText(folder.string() + " is offline only",
                               "it reads attention summaries, which nothing that serves "
                               "collects",
                               "train it without --attention_inputs"));
  }
  if (ReadsTopK(config)) {
    throw UsageError(ErrorText(folder.string() + " is offline only",
                               "it reads the router's likeliest experts, which nothing "
                               "that serves collects",
                               "train it without --topk_inputs"));
  }
  const std::string name = config.kind;
  return std::make_unique<LearnedPredictor>(name, std::move(saved));
}

}  // namespace

std::unique_ptr<ExpertPredictor> LoadPredictor(
    const std::string& name_or_folder, const MoeGeometry& geometry,
    const fs::path& baselines_file, const std::vector<RouterWeights>& routers) {
  if (name_or_folder.starts_with(kOnlinePrefix)) {
    return std::make_unique<OnlinePredictor>(
        LoadPredictor(name_or_folder.substr(kOnlinePrefix.size()), geometry,
                      baselines_file, routers),
        kOnlineRate);
  }
  if (name_or_folder.starts_with(kAdaptivePrefix)) {
    const std::string folder = name_or_folder.substr(kAdaptivePrefix.size());
    if (!fs::is_directory(folder)) NoFolder(folder);
    return std::make_unique<AdaptiveContextPredictor>(LoadLearned(folder, geometry),
                                                      kConfident);
  }
  if (fs::is_directory(name_or_folder)) return LoadLearned(name_or_folder, geometry);
  if (name_or_folder.find('/') != std::string::npos) {
    NoFolder(name_or_folder);
  }
  const auto strategies = ServingStrategyNames();
  if (std::find(strategies.begin(), strategies.end(), name_or_folder) !=
      strategies.end()) {
    return MakeServingStrategy(name_or_folder, geometry);
  }
  auto names = BaselineNames();
  names.insert(names.end(), strategies.begin(), strategies.end());
  ParseChoice("--predictor", name_or_folder, names);
  std::shared_ptr<const BaselineTables> tables;
  if (name_or_folder != "stale_gate" && !baselines_file.empty()) {
    tables = std::make_shared<BaselineTables>(BaselineTables::Load(baselines_file));
    if (!SameRouting(tables->geometry(), geometry)) {
      OtherGeometry(baselines_file.string(), tables->geometry(), geometry);
    }
  }
  return MakeBaseline(name_or_folder, tables, geometry, routers);
}

}  // namespace routecast
