// The shipped predictor belongs to the shipped checkpoint: it names most of the experts
// that a generation takes.
#include <ATen/ATen.h>
#include <c10/core/GradMode.h>
#include <gtest/gtest.h>
#include <unistd.h>

#include <algorithm>
#include <map>

#include "corpus/tokenizer.h"
#include "evaluator/foresight.h"
#include "evaluator/predictor_set.h"
#include "models/checkpoint.h"
#include "models/generation.h"
#include "models/predictor_factory.h"
#include "tests/support/reference.h"

namespace routecast {
namespace {

// Counts how often the newest forecast's likeliest expert is the one that is taken.
class Scores : public RoutingObserver {
 public:
  Scores(Foresight* foresight, const MoeGeometry& geometry)
      : foresight_(foresight), geometry_(geometry) {}
  void OnPassBegin(const PassInfo& pass) override { Keep(foresight_->AtPassBegin(pass)); }
  void OnRouting(const LayerRouting& routing) override {
    const auto known = forecasts_.find(routing.layer);
    if (known != forecasts_.end() &&
        geometry_.StackOf(routing.layer) == Stack::kDecoder) {
      const std::vector<float>& p = known->second;
      const auto likeliest = std::max_element(p.begin(), p.end()) - p.begin();
      right += likeliest == routing.expert_ids_BT.item<int64_t>();
      ++asked;
    }
    Keep(foresight_->AtLayer(routing));
  }
  void OnPassEnd(const PassInfo& pass) override { Keep(foresight_->AtPassEnd(pass)); }
  int asked = 0, right = 0;

 private:
  void Keep(const std::vector<LayerForecast>& forecasts) {
    for (const LayerForecast& f : forecasts) forecasts_[f.layer] = f.probabilities;
  }
  Foresight* foresight_;
  MoeGeometry geometry_;
  std::map<int, std::vector<float>> forecasts_;
};

TEST(ShippedPredictorTest, NamesWhatTheShippedCheckpointTakes) {
  const c10::NoGradGuard no_grad;
  const fs::path configs = fs::path(EnvOr("ROUTECAST_SOURCE_DIR", ".")) / "configs";
  const fs::path folder = configs / "checkpoints/small-16";
  ResidentModel resident(LoadCheckpoint(folder, at::kFloat, at::kCPU));
  const MoeGeometry geometry = resident.checkpoint().config.geometry();
  const auto predictor =
      LoadPredictor(configs / "predictors/small-16-hidden", geometry, "", {});
  predictor->PrepareServing();
  PredictorForesight foresight(predictor.get(), geometry, 4);
  Scores scores(&foresight, geometry);
  const Tokenizer tokenizer = Tokenizer::Load(folder);
  for (const char* text : {"A small bird that sings in the morning, found in Europe.",
                           "One who believes that all men are equal before the law."}) {
    const at::Tensor ids = at::tensor(tokenizer.Encode(text)).to(at::kLong).unsqueeze(0);
    GenerationOptions options;
    options.max_new_tokens = 16;
    options.min_new_tokens = 16;
    options.forward.observer = &scores;
    Generate(&resident.model(), ids, at::ones_like(ids, at::kBool), options);
  }
  EXPECT_EQ(scores.asked, 2 * 16 * geometry.decoder_layers);
  EXPECT_GE(scores.right, 0.6 * scores.asked);
}

// In a table of two checkpoints of one kind both were called by it.
TEST(ShippedPredictorTest, TwoRunsOfOneKindAreToldApartByTheirFolders) {
  const fs::path configs = fs::path(EnvOr("ROUTECAST_SOURCE_DIR", ".")) / "configs";
  const fs::path config = configs / "checkpoints/small-16/config.json";
  const MoeGeometry geometry =
      SwitchConfig::FromJson(ReadJsonFile(config), config.string()).geometry();
  const fs::path folder = fs::temp_directory_path() /
                          ("shipped_predictor_test." + std::to_string(::getpid()));
  const auto labels = [&](std::vector<std::string> names) {
    for (std::string& name : names) {
      const fs::path link =
          folder / fs::path(name + "/.").lexically_normal().parent_path();
      fs::create_directories(link.parent_path());
      if (!fs::exists(link))
        fs::create_directory_symlink(configs / "predictors/small-16-hidden", link);
      name = (folder / name).string();
    }
    std::vector<std::string> all;
    for (const auto& p : MakePredictors(names, names, geometry, {}, nullptr, true))
      all.push_back(p->label());
    return all;
  };
  EXPECT_EQ(labels({"one"}), (std::vector<std::string>{"hidden"}));
  EXPECT_EQ(labels({"one", "other/"}),
            (std::vector<std::string>{"hidden (one)", "hidden (other)"}));
  EXPECT_EQ(labels({"a/run", "b/run"}),
            (std::vector<std::string>{"hidden (run)", "hidden (run, 2)"}));
  fs::remove_all(folder);
}

}  // namespace
}  // namespace routecast
