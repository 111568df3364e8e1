#include "evaluator/answer_log.h"

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdio>
#include <cstring>
#include <numeric>
#include <utility>

#include "common/errors.h"
#include "common/temporary_file.h"
#include "storage/npy.h"

namespace routecast {
namespace {

constexpr size_t kBuffer = 1 << 18;
constexpr char kHeader[] =
    "predictor,sequence,stack,token,layer,lead,rank,expert,probability,used\n";

}  // namespace

// A column of an .npz until its length is known: a file that has no name, and goes with
// its descriptor.
class AnswerLog::Column {
 public:
  Column(const fs::path& beside, const char* name, const char* npy_type)
      : name_(name), npy_type_(npy_type), path_(beside.string() + "." + name) {
    fs::path temporary;
    fd_ = OpenTemporary(path_, &temporary);
    ::unlink(temporary.c_str());
  }
  ~Column() {
    if (mapped_) ::munmap(mapped_, size_);
    ::close(fd_);
  }
  Column(const Column&) = delete;
  Column& operator=(const Column&) = delete;

  template <typename T>
  void Append(T value) {
    char bytes[sizeof value];
    std::memcpy(bytes, &value, sizeof value);
    waiting_.append(bytes, sizeof value);
    if (waiting_.size() >= kBuffer) Write();
  }

  // The array, valid as long as this object.
  NamedArray Array(int64_t rows) {
    Write();
    if (size_ > 0) {
      mapped_ = ::mmap(nullptr, size_, PROT_READ, MAP_SHARED, fd_, 0);
      if (mapped_ == MAP_FAILED) {
        const int error = std::exchange(errno, 0);
        mapped_ = nullptr;
        ThrowErrno(error, "map", path_.string());
      }
    }
    return {name_, npy_type_, {rows}, mapped_, size_};
  }

 private:
  void Write() {
    for (size_t done = 0; done < waiting_.size();) {
      const ssize_t n = ::write(fd_, waiting_.data() + done, waiting_.size() - done);
      if (n < 0 && errno == EINTR) continue;
      if (n < 0) ThrowErrno(errno, "write", path_.string());
      done += static_cast<size_t>(n);
    }
    size_ += waiting_.size();
    waiting_.clear();
  }

  std::string name_, npy_type_;
  fs::path path_;
  int fd_ = -1;
  std::string waiting_;
  uint64_t size_ = 0;
  void* mapped_ = nullptr;
};

struct AnswerLog::Row {
  uint16_t predictor;
  uint64_t sequence;
  uint8_t stack;
  int32_t token;
  int16_t layer;
  uint16_t lead, rank, expert;
  float probability;
  int8_t used;
};

std::string AnswerLog::FileName(AnswerFormat format) {
  return format == AnswerFormat::kCsv ? "answers.csv" : "answers.npz";
}

AnswerLog::AnswerLog(const fs::path& folder, AnswerFormat format, int most_ranks)
    : file_(folder / FileName(format)), most_ranks_(most_ranks) {
  if (format == AnswerFormat::kCsv) {
    csv_ = std::make_unique<AtomicFileWriter>(file_, 0);
    lines_ = kHeader;
    return;
  }
  constexpr std::array<std::array<const char*, 2>, 10> kColumns = {
      {{"predictor", "<u2"},
       {"sequence", "<u8"},
       {"stack", "|u1"},
       {"token", "<i4"},
       {"layer", "<i2"},
       {"lead", "<u2"},
       {"rank", "<u2"},
       {"expert", "<u2"},
       {"probability", "<f4"},
       {"used", "|i1"}}};
  for (const auto& [name, type] : kColumns)
    columns_.push_back(std::make_unique<Column>(file_, name, type));
}

AnswerLog::~AnswerLog() = default;

void AnswerLog::Append(const Row& row) {
  ++rows_;
  if (csv_) {
    char line[160];
    std::snprintf(line, sizeof line, "%d,%llu,%d,%d,%d,%d,%d,%d,%.9g,%d\n", row.predictor,
                  static_cast<unsigned long long>(row.sequence), row.stack, row.token,
                  row.layer, row.lead, row.rank, row.expert,
                  static_cast<double>(row.probability), row.used);
    lines_ += line;
    if (lines_.size() < kBuffer) return;
    csv_->Append(lines_.data(), lines_.size());
    lines_.clear();
    return;
  }
  size_t at = 0;
  const auto append = [&](auto value) { columns_[at++]->Append(value); };
  append(row.predictor);
  append(row.sequence);
  append(row.stack);
  append(row.token);
  append(row.layer);
  append(row.lead);
  append(row.rank);
  append(row.expert);
  append(row.probability);
  append(row.used);
}

void AnswerLog::Add(const LoggedAnswer& a) {
  const std::span<const float> p = a.probabilities;
  order_.resize(p.size());
  std::iota(order_.begin(), order_.end(), 0);
  const size_t ranks = std::min(p.size(), static_cast<size_t>(most_ranks_));
  const auto likelier = [&](int x, int y) {
    const float of_x = p[static_cast<size_t>(x)], of_y = p[static_cast<size_t>(y)];
    return of_x != of_y ? of_x > of_y : x < y;
  };
  std::partial_sort(order_.begin(), order_.begin() + static_cast<ptrdiff_t>(ranks),
                    order_.end(), likelier);
  const bool labelled = !a.chosen.empty() && a.chosen[0] >= 0;
  for (size_t rank = 0; rank < ranks; ++rank) {
    const int expert = order_[rank];
    const bool used =
        std::find(a.chosen.begin(), a.chosen.end(), expert) != a.chosen.end();
    Append({static_cast<uint16_t>(a.predictor), a.sequence, static_cast<uint8_t>(a.stack),
            static_cast<int32_t>(a.token), static_cast<int16_t>(a.layer),
            static_cast<uint16_t>(a.lead), static_cast<uint16_t>(rank + 1),
            static_cast<uint16_t>(expert), p[static_cast<size_t>(expert)],
            static_cast<int8_t>(labelled ? used : -1)});
  }
}

void AnswerLog::Finish() {
  if (csv_) {
    csv_->Append(lines_.data(), lines_.size());
    csv_->Commit();
    return;
  }
  std::vector<NamedArray> arrays;
  for (const auto& column : columns_) arrays.push_back(column->Array(rows_));
  WriteNpz(file_, arrays);
}

}  // namespace routecast
