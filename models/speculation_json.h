// Bounded reading of a speculation model's config.json: every refusal names the file, the
// key and the value. No LibTorch. Holds references to what it is made of.
#pragma once

#include <string>

#include "common/errors.h"
#include "common/run_record.h"

namespace routecast {

class SpeculationJson {
 public:
  SpeculationJson(const Json& json, const std::string& what) : json_(json), what_(what) {}

  [[noreturn]] void Bad(const std::string& values) const {
    throw DataError(ErrorText(what_ + " is not the configuration of a speculation model",
                              values, "train the model again, or copy its folder again"));
  }
  const Json& Field(const std::string& key) const {
    if (!json_.is_object() || !json_.contains(key)) Bad(key + " is missing");
    return json_[key];
  }
  int Int(const std::string& key) const {
    const Json& value = Field(key);
    // Unsigned values above int64's range come back negative and are refused here, too.
    const int64_t number = value.is_number_integer() ? value.get<int64_t>() : -2;
    if (number < -1 || number > (1 << 30)) {
      Bad(key + "=" + value.dump() + ", expected an integer in range");
    }
    return static_cast<int>(number);
  }
  bool Flag(const std::string& key) const {
    const Json& value = Field(key);
    if (!value.is_boolean()) Bad(key + "=" + value.dump() + ", expected true or false");
    return value.get<bool>();
  }
  double Number(const std::string& key) const {
    const Json& value = Field(key);
    if (!value.is_number()) Bad(key + "=" + value.dump() + ", expected a number");
    return value.get<double>();
  }
  std::string Text(const std::string& key) const {
    const Json& value = Field(key);
    if (!value.is_string()) Bad(key + "=" + value.dump() + ", expected a text");
    return value.get<std::string>();
  }

 private:
  const Json& json_;
  const std::string what_;
};

}  // namespace routecast
