// What every record begins and ends with: a version, and a checksum over its key and
// bytes. Internal to the record formats of trace_format.h.
// Thread rule: pure functions; an object belongs to one thread.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>

struct XXH3_state_s;

namespace routecast {

// Appends the checksum. `model`: fingerprint of the context model that the value needs;
// 0 = none.
void SealRecord(std::string_view key, std::string* value, uint64_t model = 0);
// The value without version and checksum. DataError naming `where` where the checksum
// does not hold, or the version is above `newest`.
std::string_view UnsealRecord(std::string_view key, std::string_view value,
                              const std::string& where, uint64_t model = 0,
                              uint8_t newest = 1);
// The checksum of a value that comes in parts, which are not held at once.
class RecordChecksum {
 public:
  RecordChecksum(std::string_view key, uint64_t model);
  ~RecordChecksum();
  RecordChecksum(const RecordChecksum&) = delete;
  RecordChecksum& operator=(const RecordChecksum&) = delete;
  void Add(std::string_view part);
  uint64_t Sum() const;

 private:
  XXH3_state_s* state_;
};
// std::logic_error: what is to be written is not as it must be.
void RequireSize(bool fits, const char* plane);

}  // namespace routecast
