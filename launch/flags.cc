#include "launch/flags.h"

#include <gflags/gflags.h>

#include <algorithm>
#include <charconv>
#include <cstdlib>
#include <map>
#include <sstream>

#include "common/errors.h"
#include "common/foreign_text.h"

namespace routecast {
namespace {

constexpr int kMaxFlagFileDepth = 10;

using FlagInfo = gflags::CommandLineFlagInfo;

struct GivenFlag {
  std::string name, value;
};

std::map<std::string, std::vector<std::string>>& GivenValues() {
  static std::map<std::string, std::vector<std::string>> values;
  return values;
}

// Of the command line itself.
std::vector<GivenFlag>& GivenOnLine() {
  static std::vector<GivenFlag> flags;
  return flags;
}

// gflags knows the flags of every linked library; ours are those defined in launch/ and
// bench/.
bool IsOurs(const FlagInfo& flag) {
  const fs::path folder = fs::path(flag.filename).parent_path().filename();
  return folder == "launch" || folder == "bench";
}

std::vector<FlagInfo> OurFlags() {
  std::vector<FlagInfo> all, ours;
  gflags::GetAllFlags(&all);
  std::copy_if(all.begin(), all.end(), std::back_inserter(ours), IsOurs);
  std::sort(ours.begin(), ours.end(),
            [](const FlagInfo& a, const FlagInfo& b) { return a.name < b.name; });
  return ours;
}

const FlagInfo* Find(const std::vector<FlagInfo>& flags, const std::string& name) {
  for (const FlagInfo& flag : flags) {
    if (flag.name == name) return &flag;
  }
  return nullptr;
}

[[noreturn]] void ThrowUnknown(const std::string& text, const std::string& name,
                               const std::vector<FlagInfo>& flags) {
  std::vector<std::string> names = {"flagfile", "help", "version"};
  for (const FlagInfo& flag : flags) names.push_back(flag.name);
  throw UsageError(ErrorText("unknown flag " + text, DidYouMean(name, names, "--"),
                             "--help lists all flags"));
}

// Flags are kept in run.json, some in store.json.
void RequireUtf8(const GivenFlag& flag) {
  try {
    Json(flag.value).dump();
  } catch (const Json::exception&) {
    throw UsageError(
        ErrorText("--" + flag.name + "=" + Quoted(flag.value) + " is not UTF-8", "",
                  "rename that file or folder, or link to it"));
  }
}

struct Reader {
  const std::vector<FlagInfo> flags = OurFlags();
  CommandLine line;
  std::vector<GivenFlag> from_files, from_line;

  // One argument; `next` is the following one or nullptr. Returns true where it was
  // consumed.
  bool Read(const std::string& text, const std::string* next, const fs::path& file,
            int depth) {
    const std::string body = text.substr(text.compare(0, 2, "--") == 0 ? 2 : 1);
    const size_t equals = body.find('=');
    const std::string name = body.substr(0, equals);
    if (equals == std::string::npos && name == "help") return line.help = true, false;
    if (equals == std::string::npos && name == "version")
      return line.version = true, false;
    const FlagInfo* flag = Find(flags, name);
    const bool negated =
        flag == nullptr && name.compare(0, 2, "no") == 0 && equals == std::string::npos;
    if (negated) {
      const FlagInfo* positive = Find(flags, name.substr(2));
      if (positive == nullptr || positive->type != "bool")
        ThrowUnknown(text, name, flags);
      Keep({positive->name, "false"}, depth);
      return false;
    }
    if (flag == nullptr && name != "flagfile") ThrowUnknown(text, name, flags);
    if (equals == std::string::npos && flag != nullptr && flag->type == "bool") {
      Keep({name, "true"}, depth);
      return false;
    }
    if (equals == std::string::npos && next == nullptr) {
      throw UsageError(
          ErrorText("--" + name + " needs a value", "", "write --" + name + "=VALUE"));
    }
    const std::string value =
        equals == std::string::npos ? *next : body.substr(equals + 1);
    if (name == "flagfile") {
      ReadFlagFile(value, file, depth + 1);
    } else {
      Keep({name, value}, depth);
    }
    return equals == std::string::npos;
  }

  void Keep(GivenFlag flag, int depth) {
    RequireUtf8(flag);
    (depth == 0 ? from_line : from_files).push_back(std::move(flag));
  }

  void ReadFlagFile(const fs::path& named, const fs::path& parent, int depth) {
    if (depth > kMaxFlagFileDepth) {
      throw UsageError(ErrorText(
          "flag files are nested deeper than " + std::to_string(kMaxFlagFileDepth),
          named.string(), "does a file name itself?"));
    }
    const fs::path path =
        named.is_relative() && !parent.empty() ? parent.parent_path() / named : named;
    std::istringstream in(ReadFile(path, uint64_t{1} << 20));
    std::string text;
    for (int number = 1; std::getline(in, text); ++number) {
      const size_t first = text.find_first_not_of(" \t\r");
      if (first == std::string::npos || text[first] == '#') continue;
      text = text.substr(first, text.find_last_not_of(" \t\r") - first + 1);
      if (text.size() < 2 || text[0] != '-') {
        throw UsageError(ErrorText(
            path.string() + ":" + std::to_string(number) + ": not a flag: " + text, "",
            "write --name=value"));
      }
      Read(text, nullptr, path, depth);
    }
  }
};

void Apply(const std::vector<GivenFlag>& given) {
  for (const GivenFlag& flag : given) {
    if (!gflags::SetCommandLineOption(flag.name.c_str(), flag.value.c_str()).empty())
      continue;
    FlagInfo info;
    gflags::GetCommandLineFlagInfo(flag.name.c_str(), &info);
    throw UsageError(
        ErrorText("--" + flag.name + "=" + flag.value + " is not a valid " + info.type,
                  info.description, ""));
  }
}

// gflags prints a double with 17 digits: 0.10000000000000001.
std::string DefaultText(const FlagInfo& flag) {
  if (flag.type == "string") return "\"" + flag.default_value + "\"";
  if (flag.type != "double") return flag.default_value;
  char shortest[32];
  const auto end = std::to_chars(shortest, std::end(shortest),
                                 std::strtod(flag.default_value.c_str(), nullptr));
  return std::string(shortest, end.ptr);
}

Json Typed(const FlagInfo& flag) {
  const std::string& text = flag.current_value;
  if (flag.type == "bool") return text == "true";
  if (flag.type == "double") return std::strtod(text.c_str(), nullptr);
  if (flag.type == "uint64") return std::strtoull(text.c_str(), nullptr, 10);
  if (flag.type == "string") return text;
  return std::strtoll(text.c_str(), nullptr, 10);
}

}  // namespace

CommandLine ParseCommandLine(const std::vector<std::string>& args) {
  Reader reader;
  for (size_t i = 0; i < args.size(); ++i) {
    const std::string& text = args[i];
    if (text == "--") {
      reader.line.arguments.insert(reader.line.arguments.end(), args.begin() + i + 1,
                                   args.end());
      break;
    }
    if (text.size() < 2 || text[0] != '-') {
      reader.line.arguments.push_back(text);
      continue;
    }
    if (reader.Read(text, i + 1 < args.size() ? &args[i + 1] : nullptr, {}, 0)) ++i;
  }
  auto& values = GivenValues();
  values.clear();
  for (const GivenFlag& flag : reader.from_files) values[flag.name].push_back(flag.value);
  for (const GivenFlag& flag : reader.from_line) values[flag.name].clear();
  for (const GivenFlag& flag : reader.from_line) values[flag.name].push_back(flag.value);
  Apply(reader.from_files);
  Apply(reader.from_line);
  GivenOnLine() = reader.from_line;
  return reader.line;
}

void WithFlagFile(const fs::path& path, const std::function<void()>& body) {
  const gflags::FlagSaver saver;
  Reader reader;
  reader.ReadFlagFile(path, {}, 1);
  Apply(reader.from_files);
  Apply(GivenOnLine());
  body();
}

std::vector<std::string> FlagValues(const std::string& name) {
  const auto it = GivenValues().find(name);
  if (it != GivenValues().end()) return it->second;
  FlagInfo info;
  if (!gflags::GetCommandLineFlagInfo(name.c_str(), &info) ||
      info.current_value.empty()) {
    return {};
  }
  return {info.current_value};
}

void RefuseUnheeded(const HeededFlags& heeded, const std::string& prefix,
                    const std::string& mode) {
  const auto heeds = [](const std::vector<std::string>& flags, const std::string& flag) {
    return std::find(flags.begin(), flags.end(), flag) != flags.end();
  };
  const auto here = std::find_if(heeded.begin(), heeded.end(),
                                 [&](const auto& one) { return one.first == mode; });
  for (const auto& [_, flags] : heeded) {
    for (const std::string& flag : flags) {
      const bool given = !gflags::GetCommandLineFlagInfoOrDie(flag.c_str()).is_default;
      if (!given || heeds(here->second, flag)) continue;
      std::string modes;  // all that heed it
      for (const auto& [name, its_flags] : heeded) {
        if (heeds(its_flags, flag)) modes += (modes.empty() ? "" : ", ") + name;
      }
      throw UsageError(ErrorText("--" + flag + " is of " + prefix + modes,
                                 "this is " + prefix + mode, "leave --" + flag + " out"));
    }
  }
}

bool IsGiven(const std::string& flag) {
  return !gflags::GetCommandLineFlagInfoOrDie(flag.c_str()).is_default;
}

void RefuseUseless(const std::string& flag, const std::string& why,
                   const std::string& fix) {
  throw UsageError(ErrorText(flag + " does nothing here", why, fix));
}

std::optional<double> GivenSeconds(const std::string& flag, double microseconds) {
  if (!IsGiven(flag)) return std::nullopt;
  if (microseconds >= 0 && microseconds <= 1e9) return 1e-6 * microseconds;
  throw UsageError(
      ErrorText("--" + flag + "=" + std::to_string(microseconds) + " is out of bounds",
                "microseconds, from 0 to 1e9", "e.g. --" + flag + "=50"));
}

Json EffectiveFlags() {
  Json all = Json::object();
  for (const FlagInfo& flag : OurFlags()) {
    const auto it = GivenValues().find(flag.name);
    const bool repeated = it != GivenValues().end() && it->second.size() > 1;
    all[flag.name] = repeated && flag.type == "string" ? Json(it->second) : Typed(flag);
  }
  return all;
}

std::string HelpText(const std::string& program, const std::string& usage) {
  std::string text = program + " " + Version() + "\n" + usage + "\n\nFlags:\n";
  for (const FlagInfo& flag : OurFlags()) {
    text += "  --" + flag.name + "=" + DefaultText(flag) + "  (" + flag.type +
            ")\n      " + flag.description + "\n";
  }
  return text +
         "  --flagfile=PATH  flags from a file, one a line; the command line wins\n"
         "  --help  this text\n"
         "  --version  version and commit\n";
}

}  // namespace routecast
