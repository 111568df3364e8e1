// How many files a process may hold open at once. A trace store that is being written has
// a table file or more a chunk open, until it is complete.
// Thread rule: free functions.
#pragma once

#include <cstdint>
#include <string>

namespace routecast {

// Raises this process' limit as far as it may without privileges (the hard limit), and
// returns it. Systems start programs with 1,024, for those that cannot take more.
uint64_t RaiseOpenFileLimit();

// EnvironmentError where `what` holds more files open than this process may; `otherwise`:
// what else than a higher limit would help.
void RequireOpenFiles(uint64_t files, const std::string& what,
                      const std::string& otherwise);

}  // namespace routecast
