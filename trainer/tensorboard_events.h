// Scalars in the event files that TensorBoard reads: records of the TFRecord framing
// (length, masked CRC-32C, bytes, masked CRC-32C) holding Event messages of the protocol
// buffers' wire format. Thread rule: one thread at a time.
#pragma once

#include <cstdint>
#include <fstream>
#include <string>
#include <utility>
#include <vector>

#include "common/files.h"

namespace routecast {

class TensorboardEvents {
 public:
  // Opens a new file in `folder` (made where absent), named by the time. `first_step`:
  // readers drop what earlier files say of it and of later steps, so that a resumed run
  // reads like one that was never stopped. Throws EnvironmentError.
  TensorboardEvents(const fs::path& folder, int64_t first_step);
  // Reaches the file system at once, so that a running job can be watched.
  void Write(int64_t step, const std::vector<std::pair<std::string, double>>& scalars);

 private:
  void Record(const std::string& event);
  fs::path path_;
  std::ofstream file_;
};

// CRC-32C (Castagnoli), for tests.
uint32_t Crc32c(const std::string& bytes);

}  // namespace routecast
