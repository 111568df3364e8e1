#include "collector/intakes.h"

#include <algorithm>

#include "common/errors.h"
#include "corpus/source.h"

namespace routecast {
namespace {

bool IsThere(const std::string& source) {
  try {
    ListFiles(ParseSourceSpec(source));
    return true;
  } catch (const UsageError&) {
    return false;
  }
}

// The intake that holds `source`; intakes.size() where none does.
size_t IntakeOf(const std::vector<StoreIntake>& intakes, const std::string& source) {
  const auto holds = [&](const StoreIntake& intake) {
    return std::find(intake.sources.begin(), intake.sources.end(), source) !=
           intake.sources.end();
  };
  return static_cast<size_t>(std::find_if(intakes.begin(), intakes.end(), holds) -
                             intakes.begin());
}

// The stored intakes under the names that `data` gives their sources.
std::vector<StoreIntake> Renamed(std::vector<StoreIntake> intakes,
                                 const std::vector<std::string>& data,
                                 const std::string& missing) {
  size_t at = 0;
  for (StoreIntake& intake : intakes) {
    for (std::string& source : intake.sources) {
      if (at == data.size()) {
        throw UsageError(ErrorText(
            missing + " is in the store, but not here any more",
            "documents that come in later are held against those that were there",
            "name all of the store's sources, in their order, then further ones"));
      }
      source = data[at++];
    }
  }
  return intakes;
}

}  // namespace

IntakeList ListIntakes(const std::vector<StoreIntake>& stored,
                       const std::vector<std::string>& data) {
  IntakeList list;
  std::vector<StoreIntake> intakes = stored;
  for (const StoreIntake& intake : stored) {
    const auto missing = std::find_if_not(intake.sources.begin(), intake.sources.end(),
                                          [](const auto& s) { return IsThere(s); });
    if (missing == intake.sources.end()) continue;
    intakes = Renamed(stored, data, *missing);
    break;
  }
  for (const StoreIntake& intake : intakes) list.sources.push_back(intake.sources);
  std::vector<std::string> further;
  for (const std::string& source : data) {
    const size_t intake = IntakeOf(intakes, source);
    if (intake == intakes.size()) {
      further.push_back(source);
    } else {
      list.named = std::max(list.named, intake);
    }
  }
  list.adds = !further.empty();
  if (list.adds) {
    list.named = list.sources.size();
    list.sources.push_back(std::move(further));
  }
  return list;
}

}  // namespace routecast
