#include "trainer/training_progress.h"

#include <cmath>
#include <cstdio>

#include "common/errors.h"

namespace routecast {
namespace {

constexpr char kSecondsFile[] = "seconds.json";

double ReadSeconds(const fs::path& file) {
  if (!fs::exists(file)) return 0;
  try {
    const Json json = ReadJsonFile(file);
    if (json.is_number()) return json;
  } catch (const DataError&) {
  }
  throw DataError(ErrorText(file.string() + " is damaged: it is no number",
                            "it says how long the training took so far, nothing else",
                            "remove it: the time then counts from here"));
}

}  // namespace

Json RunConfiguration(const SpeculationOptions& options,
                      const std::vector<SpeculationConfig>& configs,
                      const std::vector<TraceDataset*>& stores) {
  Json json = options.ToJson();
  json["model"] = configs[0].ToJson();
  json["traces"] = stores[0]->fingerprint();
  for (size_t i = 1; i < stores.size(); ++i) {
    json["also"].push_back(
        {{"model", configs[i].ToJson()}, {"traces", stores[i]->fingerprint()}});
  }
  return json;
}

std::string NoteOf(double loss, const BestParameters& best, int num_experts) {
  char score[32] = "", text[96];
  // Of top-1 the score is its negative: less is better.
  if (best.step() > 0) {
    std::snprintf(score, sizeof score, ", best %.3f", std::abs(best.score()));
  }
  std::snprintf(text, sizeof text, "loss %.3f%s (ln E %.3f)", loss, score,
                std::log(double(num_experts)));
  return text;
}

// The best parameters first, under a name of their own: the state that names them comes
// after, and only then one goes that no state names.
void SaveProgress(const fs::path& folder, const TrainingProgress& progress,
                  double seconds, const Json& configuration, const Parameters& trained,
                  const AdamW& optimizer, int keep) {
  MakeFolder(folder);
  // Beside the checkpoints: those are equal bits, however long they took.
  WriteFileAtomic(folder / kSecondsFile, Json(seconds).dump() + "\n");
  progress.best.Write(folder);
  Json extra = progress.best.ToJson();
  extra.update(progress.meter.ToJson());
  if (progress.validation_due) extra["validation_due"] = true;
  std::vector<std::string> beside;
  if (progress.best.step() > 0) beside.push_back(progress.best.file_name());
  SaveTrainState(folder, {progress.step, configuration, extra, beside}, trained,
                 optimizer, keep);
  RemoveUnnamed(folder);
}

bool LoadProgress(const fs::path& folder, const fs::path& out, const Json& configuration,
                  const Parameters& trained, AdamW* optimizer,
                  TrainingProgress* progress) {
  const auto state = FindTrainState(folder);
  if (!state) return false;
  CheckSameConfiguration(state->configuration, configuration, out);
  LoadTrainState(folder, state->step, trained, optimizer);
  progress->step = state->step;
  progress->best.Load(folder, state->extra);
  progress->meter.Load(state->extra);
  progress->validation_due = state->extra.value("validation_due", false);
  progress->seconds = ReadSeconds(folder / kSecondsFile);
  return true;
}

}  // namespace routecast
