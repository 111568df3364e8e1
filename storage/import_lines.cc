// Requests as JSON lines (import_source.h).
#include <cmath>
#include <fstream>

#include "common/errors.h"
#include "common/foreign_text.h"
#include "storage/import_source.h"
#include "storage/packed_stream.h"

namespace routecast {
namespace {

using Value = nlohmann::json;

// Parsed values take about five times as much memory as their text.
constexpr size_t kMaxLineBytes = size_t{64} << 20;
constexpr int kMaxDepth = 16;  // of what stands beside the routing

// Calls `use` with each line, without its end, and its number from 1.
template <typename UseLine>
void ForEachLine(const fs::path& path, const UseLine& use) {
  PackedStream stream(path);
  std::string line;
  uint64_t number = 1;
  for (std::string_view block; !(block = stream.NextPart()).empty();) {
    for (size_t from = 0; from < block.size();) {
      const size_t end = std::min(block.find('\n', from), block.size());
      line.append(block, from, end - from);
      if (line.size() > kMaxLineBytes) {
        RefuseImport(path.string() + ": line " + std::to_string(number),
                     "longer than " + std::to_string(kMaxLineBytes) + " bytes");
      }
      from = end + 1;
      if (end == block.size()) break;
      use(line, number++);
      line.clear();
    }
  }
  if (!line.empty()) use(line, number);
}

uint64_t Natural(const Value& value, uint64_t limit, const std::string& where,
                 const char* what) {
  if (!value.is_number_unsigned() || value.get<uint64_t>() > limit) {
    RefuseImport(where,
                 Quoted(value.dump(-1, ' ', true, Value::error_handler_t::replace), 40) +
                     " is no " + what + ": 0 to " + std::to_string(limit));
  }
  return value.get<uint64_t>();
}

// Walks [T][L][K], whose sizes `request` has or gets from the first of each.
template <typename UseItem>
void ForEachItem(const Value& rows, const char* name, Request* request,
                 const std::string& where, const UseItem& use) {
  const auto require = [&](const Value& list, uint64_t size, const std::string& place) {
    if (list.is_array() && list.size() == size) return;
    RefuseImport(where, "\"" + std::string(name) + "\"" + place + " has " +
                            (list.is_array() ? std::to_string(list.size()) : "no") +
                            " entries, not " + std::to_string(size));
  };
  require(rows, request->tokens, "");
  for (uint64_t t = 0; t < request->tokens; ++t) {
    const std::string token = "[" + std::to_string(t) + "]";
    require(rows[t], request->layers, token);
    for (uint64_t l = 0; l < request->layers; ++l) {
      if (!rows[t][l].is_array() || rows[t][l].size() != request->experts) {
        require(rows[t][l], request->experts, token + "[" + std::to_string(l) + "]");
      }
      for (const Value& item : rows[t][l]) use(item);
    }
  }
}

float Probability(const Value& value, const std::string& where) {
  const double p = value.is_number() ? value.get<double>() : -1;
  if (!(p >= 0 && p <= 1)) RefuseImport(where, "a probability is not in [0, 1]");
  return static_cast<float>(p);
}

Request ParseLine(const std::string& line, const std::string& where) {
  const Value json = ParseForeignJson(line, where, kMaxDepth);
  const auto rows = json.find("routing");
  Request r;
  if (rows == json.end() || !rows->is_array()) {
    RefuseImport(where, "no list \"routing\" [tokens][layers][experts a token]");
  }
  const bool nested = !rows->empty() && (*rows)[0].is_array() && !(*rows)[0].empty() &&
                      (*rows)[0][0].is_array();
  if (!nested) RefuseImport(where, "\"routing\" is no list of lists of lists");
  r.tokens = rows->size();
  r.layers = (*rows)[0].size();
  r.experts = (*rows)[0][0].size();
  CheckRequestShape(r.tokens, r.layers, r.experts, where);
  ForEachItem(*rows, "routing", &r, where, [&](const Value& item) {
    r.ids.push_back(static_cast<uint16_t>(Natural(item, 0xFFFF, where, "expert id")));
  });
  if (const auto probs = json.find("probs"); probs != json.end()) {
    ForEachItem(*probs, "probs", &r, where,
                [&](const Value& item) { r.probs.push_back(Probability(item, where)); });
  }
  if (const auto tokens = json.find("token_ids"); tokens != json.end()) {
    if (!tokens->is_array() || tokens->size() != r.tokens) {
      RefuseImport(where, "\"token_ids\" is no list of " + std::to_string(r.tokens));
    }
    for (const Value& id : *tokens) {
      r.token_ids.push_back(
          static_cast<uint32_t>(Natural(id, 0xFFFFFFFFu, where, "token id")));
    }
  }
  return r;
}

class RequestLines : public ImportSource {
 public:
  RequestLines(fs::path path, Task task) : path_(std::move(path)), task_(task) {}
  void Read(const Use& use) const override {
    uint64_t next = 0;
    ForEachLine(path_, [&](const std::string& line, uint64_t number) {
      if (line.find_first_not_of(" \t\r") == std::string::npos) return;
      const std::string where = path_.string() + ": line " + std::to_string(number);
      Request request = ParseLine(line, where);
      request.task = task_;
      request.request = request.document = next++;
      use(TraceOfRequest(std::move(request), where));
    });
  }
  std::vector<fs::path> files() const override { return {path_}; }

 private:
  fs::path path_;
  Task task_;
};

}  // namespace

std::unique_ptr<ImportSource> OpenRequestLines(const fs::path& path, Task task) {
  return std::make_unique<RequestLines>(path, task);
}

}  // namespace routecast
