// From results of trainings to the rows of a leaderboard.
#pragma once

#include <string>
#include <vector>

#include "common/routing.h"
#include "common/run_record.h"

namespace routecast {

// Rows of results.json files (with training_seconds and time_limit, where they are
// known): one a (name, parameters), the mean of its seeds.
Json LeaderboardRow(const std::string& name, const std::vector<Json>& results,
                    double predict_us, double pass_us, int questions_a_pass);
// Adds the board's `places`, of each phase the most that a row but an estimate answers,
// and each row's `fewer_places`: it answers fewer of those that rank.
void MarkFewerPlaces(const MoeGeometry& geometry, Json* board);
// Best first by `key`, those of fewer places after the others: theirs are other means.
void RankRows(const std::string& key, std::vector<Json>* rows);
// Adds what a row's score is over chance, in points a second of training and in points a
// million parameters; null where one of them is not known, and where it answers fewer
// places.
void AddRates(const MoeGeometry& geometry, Json* row);

// What rows are ranked by: the mean over all places of the decoder, where there is one.
std::string RankingKey(const MoeGeometry& geometry);
Stack RankingStack(const MoeGeometry& geometry);
// A row a baseline of the results.
void AddBaselines(const std::vector<Json>& results, Json* rows);
// What router inputs, or `sets` of experts, could tell by their nearest neighbours
// (knn_estimate.h): no predictor, and of the places that have such features alone.
void AddEstimates(const std::vector<Json>& results, bool sets, Json* rows);

}  // namespace routecast
