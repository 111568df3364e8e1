#include "report/result_values.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>
#include <map>

#include "common/files.h"
#include "report/table.h"

namespace routecast {
namespace {
constexpr double kNone = std::numeric_limits<double>::quiet_NaN();

const Json* Member(const Json& object, const std::string& key) {
  if (!object.is_object()) return nullptr;
  const auto it = object.find(key);
  return it == object.end() ? nullptr : &*it;
}
}  // namespace

double NumberOf(const Json& object, const std::string& key) {
  const Json* value = Member(object, key);
  return value != nullptr && value->is_number() ? value->get<double>() : kNone;
}

std::string TextOf(const Json& object, const std::string& key) {
  const Json* value = Member(object, key);
  return value != nullptr && value->is_string() ? value->get<std::string>() : "";
}

bool FlagOf(const Json& object, const std::string& key) {
  const Json* value = Member(object, key);
  return value != nullptr && value->is_boolean() && value->get<bool>();
}

double HalfWidthOf(const Json& object, const std::string& key) {
  const Json* value = Member(object, key);
  if (value == nullptr) return kNone;
  if (value->is_number()) return value->get<double>();
  if (!value->is_array() || value->size() != 2 || !(*value)[0].is_number() ||
      !(*value)[1].is_number()) {
    return kNone;
  }
  return ((*value)[1].get<double>() - (*value)[0].get<double>()) / 2;
}

std::vector<Json> EntriesWith(const Json& value, const std::string& key) {
  std::vector<Json> found;
  if (value.is_array()) {
    for (const Json& entry : value) {
      if (Member(entry, key) != nullptr) found.push_back(entry);
    }
    return found;
  }
  if (!value.is_object()) return found;
  for (const auto& [name, inner] : value.items()) {
    found = EntriesWith(inner, key);
    if (!found.empty()) return found;
  }
  return found;
}

std::string RowsCsv(const Json& rows) {
  static const std::array<const char*, 5> kFive = {"_min", "_q1", "_median", "_q3",
                                                   "_max"};
  const auto text = [](const Json& value) {
    if (value.is_null()) return std::string();
    return value.is_string() ? value.get<std::string>() : value.dump();
  };
  std::vector<std::string> columns;
  std::vector<std::map<std::string, std::string>> cells;
  for (const Json& row : rows) {
    auto& line = cells.emplace_back();
    const auto put = [&](const std::string& column, const Json& value) {
      if (std::find(columns.begin(), columns.end(), column) == columns.end())
        columns.push_back(column);
      line[column] = text(value);
    };
    for (const auto& [key, value] : row.items()) {
      if (!value.is_array()) put(key, value);
      for (size_t i = 0; value.is_array() && i < value.size(); ++i)
        put(key + kFive.at(i), value[i]);
    }
  }
  Table table(columns);
  for (auto& line : cells) {
    std::vector<std::string> row;
    for (const std::string& column : columns) row.push_back(line[column]);
    table.AddRow(std::move(row));
  }
  return table.ToCsv();
}

std::string RowName(const Json& row) {
  const std::string predictor = TextOf(row, "predictor");
  const std::string policy = TextOf(row, "policy");
  const std::string eviction = TextOf(row, "eviction");
  if (!predictor.empty() && predictor != "none") {
    const std::string last = fs::path(predictor).filename().string();
    return last.empty() ? fs::path(predictor).parent_path().filename().string() : last;
  }
  // Eviction tells apart rows that load on demand; where everything stays it means
  // nothing.
  return policy != "on_demand" || eviction.empty() || eviction == "none"
             ? policy
             : policy + " " + eviction;
}

}  // namespace routecast
