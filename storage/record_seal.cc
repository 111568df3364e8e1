#include "storage/record_seal.h"

#include <cstring>
#include <stdexcept>

#include "storage/byte_codec.h"
#include "storage/trace_format.h"
#include "xxhash.h"

namespace routecast {
namespace {

uint64_t Checksum(std::string_view key, std::string_view value, uint64_t model) {
  return XXH3_64bits_withSeed(value.data(), value.size(),
                              XXH3_64bits(key.data(), key.size()) + model);
}

}  // namespace

void SealRecord(std::string_view key, std::string* value, uint64_t model) {
  const uint64_t sum = Checksum(key, *value, model);
  ByteWriter(value).U64(sum);
}

std::string_view UnsealRecord(std::string_view key, std::string_view value,
                              const std::string& where, uint64_t model, uint8_t newest) {
  if (value.size() <= kChecksumBytes)
    ByteReader(value, where).Fail("shorter than a checksum");
  const std::string_view body = value.substr(0, value.size() - kChecksumBytes);
  uint64_t sum;
  std::memcpy(&sum, value.data() + body.size(), sizeof sum);
  if (sum != Checksum(key, body, model)) {
    ByteReader(value, where)
        .Fail("checksum " + std::to_string(sum) + ", bytes give " +
              std::to_string(Checksum(key, body, model)));
  }
  const auto version = static_cast<uint8_t>(body[0]);
  if (version < kRecordVersion || version > newest) {
    ByteReader(value, where)
        .Fail("record version " + std::to_string(version) + ", this program reads " +
              std::to_string(kRecordVersion) +
              (newest > kRecordVersion ? " to " + std::to_string(newest) : ""));
  }
  return body.substr(1);
}

RecordChecksum::RecordChecksum(std::string_view key, uint64_t model)
    : state_(XXH3_createState()) {
  XXH3_64bits_reset_withSeed(state_, XXH3_64bits(key.data(), key.size()) + model);
}

RecordChecksum::~RecordChecksum() { XXH3_freeState(state_); }

void RecordChecksum::Add(std::string_view part) {
  XXH3_64bits_update(state_, part.data(), part.size());
}

uint64_t RecordChecksum::Sum() const { return XXH3_64bits_digest(state_); }

void RequireSize(bool fits, const char* plane) {
  if (!fits) throw std::logic_error(std::string("RoutingSpan: wrong size of ") + plane);
}

}  // namespace routecast
