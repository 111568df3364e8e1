// Fitting rows of factors to counts: shared by the trainers of a context coder. Internal
// to them. Thread rule: pure functions.
#pragma once

#include <cstdint>
#include <map>
#include <vector>

#include "storage/context_tables.h"
#include "storage/context_trainer.h"

namespace routecast {

// An expert in a context: how often it came, and how often the model without the row
// expected it.
struct Observed {
  uint16_t expert;
  double count, expected;
};

struct Fitted {
  Row row;
  double saved_bits = 0;  // what the entries save, beyond their cost
};

// Entries for the experts whose counts are far from expected. The others keep their
// proportions: they share what is left, so every factor is relative to theirs.
Fitted FitRow(const std::vector<Observed>& observed, double total,
              const TrainerOptions& options);

std::vector<uint64_t> CountsOf(const std::vector<uint16_t>& ids, size_t experts);
// Weights in the proportions of `counts`: each at least 1, sum kBaseScale.
std::vector<uint32_t> MarginalWeights(const std::vector<uint64_t>& counts);

// Where a context is: positions of all spans, one after the other.
struct Place {
  uint64_t key;  // inner << 32 | outer
  uint32_t position;
};

struct ContextRows {
  std::vector<Row> rows;
  double saved_bits = 0;
};
using Contexts = std::map<uint64_t, ContextRows>;  // by outer << 32 | inner
// The contexts that save more than they cost, in the tables' order.
void KeepContexts(Contexts contexts, const TrainerOptions& options, StackTables* tables);

}  // namespace routecast
