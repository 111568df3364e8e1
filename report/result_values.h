// Tolerant reading of result files: a missing or foreign value is NaN or "", never an
// exception.
#pragma once

#include <string>
#include <vector>

#include "common/run_record.h"

namespace routecast {

double NumberOf(const Json& object, const std::string& key);  // NaN where it is no number
std::string TextOf(const Json& object,
                   const std::string& key);               // "" where it is no string
bool FlagOf(const Json& object, const std::string& key);  // false where it is no bool
// Half of a 95 % interval: a number is the half width itself, [low, high] its two ends.
double HalfWidthOf(const Json& object, const std::string& key);
// The objects of the first array inside `value` whose entries have `key`.
std::vector<Json> EntriesWith(const Json& value, const std::string& key);

// How an evaluation's row is called: the predictor, or the policy with its eviction.
std::string RowName(const Json& row);

}  // namespace routecast
