// What predictors said, token by token, as columns that NumPy opens: answers.npz or
// answers.csv. A row is an expert of an answer, the likeliest first. Memory does not grow
// with the rows: they wait in files without a name. docs/metrics.md has the columns.
// Thread rule: one thread.
#pragma once

#include <array>
#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "common/byte_file.h"
#include "common/routing.h"

namespace routecast {

enum class AnswerFormat { kCsv, kNpz };

// One answer: about the expert that `token` of `sequence` takes `lead` visits behind its
// MoE layer `layer` (of the stack; -1: before the first).
struct LoggedAnswer {
  int predictor = 0;  // its place in quality.json
  uint64_t sequence = 0;
  Stack stack = Stack::kDecoder;
  int64_t token = 0;
  int layer = 0, lead = 0;
  std::span<const float> probabilities;  // by expert, as they were said
  std::span<const int64_t> chosen;       // those that were taken; the first < 0: no label
};

class AnswerLog {
 public:
  // Into `folder`, which exists: at most `most_ranks` >= 1 experts of an answer.
  // EnvironmentError where the disk refuses, here and below.
  AnswerLog(const fs::path& folder, AnswerFormat format, int most_ranks);
  ~AnswerLog();
  AnswerLog(const AnswerLog&) = delete;
  AnswerLog& operator=(const AnswerLog&) = delete;
  void Add(const LoggedAnswer& answer);
  // Writes the file, atomically. Once, at the end; without it nothing is left.
  void Finish();
  static std::string FileName(AnswerFormat format);

 private:
  class Column;
  struct Row;
  void Append(const Row& row);

  fs::path file_;
  int most_ranks_;
  int64_t rows_ = 0;
  std::vector<int> order_;                 // of an answer's experts
  std::unique_ptr<AtomicFileWriter> csv_;  // null: columns
  std::string lines_;                      // of csv_, not written yet
  std::vector<std::unique_ptr<Column>> columns_;
};

}  // namespace routecast
