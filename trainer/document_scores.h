// What a run's predictors got right of each test document (documents.safetensors), and
// how far the rows of a leaderboard lie apart on the same documents. docs/metrics.md has
// the formula. Thread rule: pure functions but for the files.
#pragma once

#include <map>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "trainer/speculation_evaluation.h"

namespace routecast {

// Of one predictor, by (source layer, lead), documents ascending.
using DocumentScores = std::map<std::pair<int, int>, std::vector<DocumentScore>>;
using ScoresBySeed = std::map<uint64_t, DocumentScores>;

inline constexpr char kModelScores[] = "model";  // beside the baselines' names

// Writes the model's and the baselines' scores at the places of the stack that ranks.
void WriteDocumentScores(const fs::path& folder, const MoeGeometry& geometry,
                         const TestScores& scores);
// One predictor's, of runs in `folders` with their `results` (whose seeds count); runs
// that have none (older versions) are left out. Throws DataError where a file is damaged.
ScoresBySeed ReadDocumentScores(const std::vector<fs::path>& folders,
                                const std::vector<Json>& results,
                                const std::string& predictor);

struct PairedDifference {
  double mean = 0, ci95_low = 0, ci95_high = 0;  // a - b, shares
  std::vector<uint64_t> seeds;                   // that both have
  int64_t documents = 0;                         // that both were asked about
};
// nullopt where they share no seed, place or document. 1,000 resamples drawn by `seed`.
std::optional<PairedDifference> DifferenceOf(const ScoresBySeed& a, const ScoresBySeed& b,
                                             uint64_t seed, int resamples = 1000);

// Adds `best`, `without_document_scores` where there are such rows, and each row's
// `to_best` to a leaderboard with a row for each of `by_seed`; `key` ranks, but a row
// of `fewer_places` is not the best one.
void AddDifferences(const std::vector<ScoresBySeed>& by_seed, const std::string& key,
                    uint64_t seed, Json* board);

}  // namespace routecast
