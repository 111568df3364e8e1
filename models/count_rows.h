// Rows of counts of experts by a key, of which only what was seen is held: a table of
// (layer, token id) or of two choices has few of its E counts a row.
#pragma once

#include <cstdint>
#include <functional>
#include <string>
#include <unordered_map>
#include <vector>

#include "models/parameters.h"

namespace routecast {

// Thread rule: const from any thread, else by one. Memory: 8 bytes a (key, expert) that
// was counted and some 100 a key.
class CountRows {
 public:
  struct Entry {
    uint64_t expert : 16;
    uint64_t count : 48;
  };
  class Row {
   public:
    void Add(uint16_t expert, uint64_t count = 1);
    uint64_t total() const { return total_; }
    const std::vector<Entry>& entries() const { return entries_; }  // experts ascend

   private:
    friend class CountRows;
    uint64_t total_ = 0;
    std::vector<Entry> entries_;
  };

  Row* Make(uint64_t key) { return &rows_[key]; }  // valid until the next Make
  const Row* Find(uint64_t key) const;             // null where nothing was counted
  // probs[num_experts] = (counts + weight * probs) / (total + weight); a row never seen
  // leaves probs as they are.
  void Mix(uint64_t key, double weight, int num_experts, float* probs) const;
  void Merge(const CountRows& other);
  size_t size() const { return rows_.size(); }

  // As tensors NAME.keys [rows], NAME.ends [rows] (entries up to and with the row),
  // NAME.experts and NAME.counts [entries], all int64; equal counts make equal tensors.
  void Save(const std::string& name, Parameters* tensors) const;
  // Also reads what was written before rows were sparse (NAME.keys [rows] and NAME.counts
  // [rows, num_experts] of float or double, with what `old_key` makes of their keys).
  // Throws DataError with `what` where tensors do not fit each other or `num_experts`.
  static CountRows Load(const std::string& name, const Parameters& tensors,
                        int num_experts, const std::string& what,
                        const std::function<uint64_t(uint64_t)>& old_key);

 private:
  std::unordered_map<uint64_t, Row> rows_;
};

}  // namespace routecast
