// An index of sequences and their expert ids packed to bytes (import_source.h).
#include <charconv>

#include "common/byte_file.h"
#include "common/errors.h"
#include "common/foreign_text.h"
#include "storage/import_source.h"
#include "storage/packed_stream.h"
#include "storage/trace_format.h"

namespace routecast {
namespace {

constexpr uint64_t kMaxIndexBytes = uint64_t{256} << 20;

struct Rows {
  uint64_t first = 0, count = 0;
};

std::vector<std::string_view> Columns(std::string_view line) {
  std::vector<std::string_view> columns;
  if (line.ends_with('\r')) line.remove_suffix(1);
  for (size_t from = 0; from <= line.size();) {
    const size_t end = std::min(line.find(',', from), line.size());
    columns.push_back(line.substr(from, end - from));
    from = end + 1;
  }
  return columns;
}

uint64_t Number(std::string_view text, const std::string& where) {
  uint64_t value = 0;
  const auto [end, error] =
      std::from_chars(text.data(), text.data() + text.size(), value);
  if (error != std::errc() || end != text.data() + text.size() || text.empty() ||
      value > uint64_t{1} << 40) {
    RefuseImport(where, Quoted(text, 40) + " is no number of rows");
  }
  return value;
}

size_t ColumnOf(const std::vector<std::string_view>& header, std::string_view name,
                const std::string& where) {
  for (size_t i = 0; i < header.size(); ++i) {
    if (header[i] == name) return i;
  }
  RefuseImport(where, "no column " + std::string(name) + " in " +
                          std::to_string(header.size()) + " columns");
}

class Packed : public ImportSource {
 public:
  Packed(fs::path index, Task task, int layers, int experts)
      : index_(std::move(index)),
        experts_path_(ExpertsPath(index_)),
        task_(task),
        layers_(static_cast<uint64_t>(layers)),
        experts_(static_cast<uint64_t>(experts)) {
    CheckRequestShape(1, layers_, experts_, index_.string());
    ReadIndex();
  }
  void Read(const Use& use) const override {
    PackedStream stream(experts_path_);
    const uint64_t row_bytes = layers_ * experts_;
    for (size_t i = 0; i < rows_.size(); ++i) {
      const std::string where = index_.string() + ": sequence " + std::to_string(i);
      const std::string bytes =
          stream.Read(rows_[i].first * row_bytes, rows_[i].count * row_bytes, where);
      Request r;
      r.request = r.document = i;
      r.task = task_;
      r.tokens = rows_[i].count;
      r.layers = layers_;
      r.experts = experts_;
      for (const char c : bytes) r.ids.push_back(static_cast<uint8_t>(c));
      use(TraceOfRequest(r, where));
    }
    RequireUsedUp(stream.Size());
  }
  std::vector<fs::path> files() const override { return {index_, experts_path_}; }

 private:
  // With half of the layers, say, there are enough bytes, and rows like any other.
  void RequireUsedUp(uint64_t bytes) const {
    const uint64_t rows = rows_.empty() ? 0 : rows_.back().first + rows_.back().count;
    const uint64_t used = rows * layers_ * experts_;
    if (rows == 0 || used == bytes) return;
    throw DataError(ErrorText(
        experts_path_.string() + " is not used up by " + index_.string(),
        std::to_string(rows) + " rows of " + std::to_string(layers_) + " layers x " +
            std::to_string(experts_) + " experts = " + std::to_string(used) +
            " bytes, it has " + std::to_string(bytes),
        "give the model's own --layers and --experts_per_token; of a part of the index, "
        "cut the file behind its last row"));
  }
  static fs::path ExpertsPath(const fs::path& index) {
    const std::string stem = index.stem(), prefix = "index";
    if (!stem.starts_with(prefix) || index.extension() != ".csv") {
      throw UsageError(ErrorText(index.string() + " is no index of packed routing",
                                 "its name is not index*.csv",
                                 "name the index; experts*.u8 is looked for beside it"));
    }
    const fs::path plain =
        index.parent_path() / ("experts" + stem.substr(prefix.size()) + ".u8");
    const fs::path zstd = plain.string() + ".zst";
    if (fs::exists(plain) || !fs::exists(zstd)) return plain;
    return zstd;
  }
  void ReadIndex() {
    const std::string text = ReadFile(index_, kMaxIndexBytes);
    size_t offset_column = 0, count_column = 0, number = 0, width = 0;
    uint64_t end = 0;
    for (size_t from = 0; from < text.size();) {
      const size_t line_end = std::min(text.find('\n', from), text.size());
      const std::string_view line(text.data() + from, line_end - from);
      from = line_end + 1;
      const std::string where = index_.string() + ": line " + std::to_string(++number);
      if (line.find('"') != line.npos) RefuseImport(where, "quoted columns are not read");
      const auto columns = Columns(line);
      if (number == 1) {
        offset_column = ColumnOf(columns, "row_offset", where);
        count_column = ColumnOf(columns, "decode_tokens", where);
        width = columns.size();
        continue;
      }
      if (columns.size() != width) {
        RefuseImport(where, std::to_string(columns.size()) + " columns, not " +
                                std::to_string(width));
      }
      const Rows rows{Number(columns[offset_column], where),
                      Number(columns[count_column], where)};
      CheckRequestShape(rows.count, layers_, experts_, where);
      if (rows.first < end) {
        RefuseImport(where, "row_offset " + std::to_string(rows.first) +
                                ", the sequence before ends at " + std::to_string(end));
      }
      end = rows.first + rows.count;
      rows_.push_back(rows);
    }
  }

  fs::path index_, experts_path_;
  Task task_;
  uint64_t layers_, experts_;
  std::vector<Rows> rows_;
};

}  // namespace

std::unique_ptr<ImportSource> OpenPacked(const fs::path& index, Task task, int num_layers,
                                         int experts_per_token) {
  return std::make_unique<Packed>(index, task, num_layers, experts_per_token);
}

}  // namespace routecast
