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

// Rows of a result as CSV (RFC 4180): a column a key, in the order of their first
// appearance; of five numbers a column each (_min, _q1, _median, _q3, _max); nothing
// where a row has no such key, or null. REQUIRES arrays of five at most.
std::string RowsCsv(const Json& rows);

// How an evaluation's row is called: the predictor, or the policy with its eviction.
std::string RowName(const Json& row);

}  // namespace routecast
