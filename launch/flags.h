// The command line of every program. gflags defines and holds the flags; this file reads
// the command line itself, because gflags ends the process with 1 and names no nearest
// flag.
//
// Grammar: --name=value, --name value (not for bool), --name and --noname (bool), "--"
// ends the flags, everything else is an argument. `--flagfile=PATH` reads the same
// grammar, one flag a line, blank lines and lines that start with # skipped, nested files
// relative to the file that names them. The command line wins over flag files, wherever
// it names them; within each, the last value wins. Thread rule: main thread, before any
// other is started.
#pragma once

#include <functional>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "common/run_record.h"

namespace routecast {

struct CommandLine {
  bool help = false;
  bool version = false;
  std::vector<std::string> arguments;  // what is not a flag, in order
};

// Sets the gflags of this process. Throws UsageError for an unknown flag (naming the
// nearest), for a value of the wrong type, a missing value and a flag file that cannot be
// read.
CommandLine ParseCommandLine(const std::vector<std::string>& args);

// Runs `body` with the flags of the file at `path` set, too; what the command line gave
// wins over them. Afterwards all flags are what they were. Throws as ParseCommandLine.
void WithFlagFile(const fs::path& path, const std::function<void()>& body);

// Every value given for a repeatable flag, in order (those of the command line if it has
// any, else those of the flag files); the default, where it is not empty, if none was
// given.
std::vector<std::string> FlagValues(const std::string& name);

// Of each mode of a program the flags that it heeds, of those that are of some modes
// only.
using HeededFlags = std::vector<std::pair<std::string, std::vector<std::string>>>;
// Throws UsageError where a flag was given that `mode` does not heed and another one
// does; `prefix` stands before a mode's name ("--mode="). REQUIRES that `heeded` names
// `mode`.
void RefuseUnheeded(const HeededFlags& heeded, const std::string& prefix,
                    const std::string& mode);

// Whether the command line or a flag file names it.
bool IsGiven(const std::string& flag);
// Throws UsageError: `flag` (with its dashes) would do nothing, and why.
[[noreturn]] void RefuseUseless(const std::string& flag, const std::string& why,
                                const std::string& fix = "leave it out");
// Seconds that a flag of microseconds gives; nullopt where it is not given. UsageError
// where that is less than 0 or more than 1e9.
std::optional<double> GivenSeconds(const std::string& flag, double microseconds);

// The full effective configuration for run.json: this program's flags, typed.
Json EffectiveFlags();

// Usage and this program's flags with type, default and description.
std::string HelpText(const std::string& program, const std::string& usage);

}  // namespace routecast
