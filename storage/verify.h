// Reads every byte of a store and holds it against every checksum and rule, and against
// the seals of its shards where it is complete.
// Thread rule: one thread. The store must not be written meanwhile.
#pragma once

#include <string>
#include <vector>

#include "common/files.h"

namespace routecast {

struct VerifyReport {
  int64_t chunks = 0, num_chunks = 0;
  uint64_t sequences = 0, records = 0;  // sequences: sound ones
  uint64_t left_out = 0;                // sequences without records, as their chunks say
  bool sealed = false;                  // every shard has a seal
  std::vector<std::string> problems;    // the first hundred
  uint64_t num_problems = 0;
  bool sound() const { return num_problems == 0; }
};

// Goes on after a problem. Throws only where the folder is no store at all (UsageError).
VerifyReport VerifyStore(const fs::path& store);

}  // namespace routecast
