#include "trainer/tensorboard_events.h"

#include <array>
#include <chrono>
#include <cstring>

#include "common/errors.h"

namespace routecast {
namespace {

constexpr uint32_t kCastagnoli = 0x82f63b78;  // reflected
constexpr uint32_t kMaskDelta = 0xa282ead8;

// Fields of Event, Summary, Summary.Value and SessionLog, with their wire types.
enum Wire { kVarint = 0, kFixed64 = 1, kBytes = 2, kFixed32 = 5 };
constexpr int kEventWallTime = 1, kEventStep = 2, kEventFileVersion = 3,
              kEventSummary = 5, kEventSessionLog = 7, kSummaryValue = 1, kValueTag = 1,
              kValueSimple = 2, kSessionStatus = 1, kSessionStart = 1;

void AddVarint(uint64_t value, std::string* out) {
  for (; value >= 0x80; value >>= 7) out->push_back(static_cast<char>(value | 0x80));
  out->push_back(static_cast<char>(value));
}

void AddTag(int field, Wire wire, std::string* out) {
  AddVarint(static_cast<uint64_t>(field) << 3 | wire, out);
}

void AddBytes(int field, const std::string& bytes, std::string* out) {
  AddTag(field, kBytes, out);
  AddVarint(bytes.size(), out);
  *out += bytes;
}

template <typename T>
void AddFixed(T value, std::string* out) {
  char bytes[sizeof value];
  std::memcpy(bytes, &value, sizeof value);  // little-endian machines alone
  out->append(bytes, sizeof value);
}

std::string EventOf(int64_t step) {
  const std::chrono::duration<double> now =
      std::chrono::system_clock::now().time_since_epoch();
  std::string event;
  AddTag(kEventWallTime, kFixed64, &event);
  AddFixed(now.count(), &event);
  AddTag(kEventStep, kVarint, &event);
  AddVarint(static_cast<uint64_t>(step), &event);
  return event;
}

uint32_t Masked(const std::string& bytes) {
  const uint32_t crc = Crc32c(bytes);
  return ((crc >> 15) | (crc << 17)) + kMaskDelta;
}

}  // namespace

uint32_t Crc32c(const std::string& bytes) {
  static const std::array<uint32_t, 256> table = [] {
    std::array<uint32_t, 256> t{};
    for (uint32_t i = 0; i < 256; ++i) {
      t[i] = i;
      for (int bit = 0; bit < 8; ++bit) t[i] = (t[i] >> 1) ^ (t[i] & 1 ? kCastagnoli : 0);
    }
    return t;
  }();
  uint32_t crc = ~uint32_t{0};
  for (const char c : bytes) {
    crc = table[(crc ^ static_cast<unsigned char>(c)) & 0xff] ^ (crc >> 8);
  }
  return ~crc;
}

TensorboardEvents::TensorboardEvents(const fs::path& folder, int64_t first_step) {
  MakeFolder(folder);
  const auto now = std::chrono::system_clock::now().time_since_epoch();
  // Readers take files in the order of their names.
  path_ =
      folder / ("events.out.tfevents." +
                std::to_string(
                    std::chrono::duration_cast<std::chrono::microseconds>(now).count()) +
                ".routecast");
  file_.open(path_, std::ios::binary | std::ios::trunc);
  std::string version = EventOf(0);
  AddBytes(kEventFileVersion, "brain.Event:2", &version);
  Record(version);
  std::string status;
  AddTag(kSessionStatus, kVarint, &status);
  AddVarint(kSessionStart, &status);
  std::string start = EventOf(first_step);
  AddBytes(kEventSessionLog, status, &start);
  Record(start);
}

void TensorboardEvents::Write(
    int64_t step, const std::vector<std::pair<std::string, double>>& scalars) {
  std::string summary;
  for (const auto& [tag, number] : scalars) {
    std::string value;
    AddBytes(kValueTag, tag, &value);
    AddTag(kValueSimple, kFixed32, &value);
    AddFixed(static_cast<float>(number), &value);
    AddBytes(kSummaryValue, value, &summary);
  }
  std::string event = EventOf(step);
  AddBytes(kEventSummary, summary, &event);
  Record(event);
}

void TensorboardEvents::Record(const std::string& event) {
  std::string length, frame;
  AddFixed(static_cast<uint64_t>(event.size()), &length);
  frame = length;
  AddFixed(Masked(length), &frame);
  frame += event;
  AddFixed(Masked(event), &frame);
  file_.write(frame.data(), static_cast<std::streamsize>(frame.size()));
  file_.flush();
  if (!file_) {
    throw EnvironmentError(ErrorText("cannot write " + path_.string(), "",
                                     "look at the space that is left there"));
  }
}

}  // namespace routecast
