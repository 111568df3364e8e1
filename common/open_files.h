// How many files a process may hold open at once: of a trace store some of its table
// files stay open, and how many follows from this.
// Thread rule: free functions.
#pragma once

#include <cstdint>
#include <string>

namespace routecast {

// Raises this process' limit as far as it may without privileges (the hard limit), and
// returns it. Systems start programs with 1,024, for those that cannot take more.
uint64_t RaiseOpenFileLimit();

// What this process may hold open, and what of it is left now.
uint64_t OpenFileLimit();
uint64_t OpenFilesLeft();

// EnvironmentError where `what` holds more files open than this process may; `otherwise`:
// what else than a higher limit would help.
void RequireOpenFiles(uint64_t files, const std::string& what,
                      const std::string& otherwise);

}  // namespace routecast
