#include "models/count_rows.h"

#include <ATen/ATen.h>

#include <algorithm>

#include "common/errors.h"

namespace routecast {
namespace {

constexpr int64_t kMostCount = (int64_t{1} << 48) - 1;

[[noreturn]] void Bad(const std::string& what, const std::string& tensor) {
  throw DataError(
      ErrorText(what, "tensor " + tensor, "are the store and the model of one make?"));
}

const at::Tensor& Integers(const Parameters& tensors, const std::string& name,
                           const std::string& what) {
  const at::Tensor& values = tensors.Get(name);
  if (values.scalar_type() != at::kLong || values.dim() != 1) Bad(what, name);
  return values;
}

}  // namespace

void CountRows::Row::Add(uint16_t expert, uint64_t count) {
  auto at =
      std::lower_bound(entries_.begin(), entries_.end(), expert,
                       [](const Entry& entry, uint16_t e) { return entry.expert < e; });
  if (at == entries_.end() || at->expert != expert) {
    at = entries_.insert(at, Entry{expert, 0});
  }
  at->count += count;
  total_ += count;
}

const CountRows::Row* CountRows::Find(uint64_t key) const {
  const auto it = rows_.find(key);
  return it == rows_.end() ? nullptr : &it->second;
}

void CountRows::Mix(uint64_t key, double weight, int num_experts, float* probs) const {
  const Row* row = Find(key);
  if (row == nullptr) return;
  const double all = static_cast<double>(row->total_) + weight;
  auto entry = row->entries_.begin();
  for (int e = 0; e < num_experts; ++e) {
    double count = 0;
    if (entry != row->entries_.end() && entry->expert == static_cast<uint64_t>(e)) {
      count = static_cast<double>(entry++->count);
    }
    probs[e] = static_cast<float>((count + weight * probs[e]) / all);
  }
}

void CountRows::Merge(const CountRows& other) {
  for (const auto& [key, row] : other.rows_) {
    Row* mine = Make(key);
    for (const Entry& entry : row.entries_) mine->Add(entry.expert, entry.count);
  }
}

void CountRows::Save(const std::string& name, Parameters* tensors) const {
  std::vector<uint64_t> keys;
  int64_t entries = 0;
  for (const auto& [key, row] : rows_) {
    keys.push_back(key);
    entries += static_cast<int64_t>(row.entries_.size());
  }
  std::sort(keys.begin(), keys.end());
  const auto rows = static_cast<int64_t>(keys.size());
  const auto key_tensor = at::empty({rows}, at::kLong), ends = at::empty_like(key_tensor),
             experts = at::empty({entries}, at::kLong), counts = at::empty_like(experts);
  int64_t at = 0;
  for (int64_t r = 0; r < rows; ++r) {
    const uint64_t key = keys[static_cast<size_t>(r)];
    for (const Entry& entry : rows_.at(key).entries_) {
      experts.data_ptr<int64_t>()[at] = static_cast<int64_t>(entry.expert);
      counts.data_ptr<int64_t>()[at++] = static_cast<int64_t>(entry.count);
    }
    key_tensor.data_ptr<int64_t>()[r] = static_cast<int64_t>(key);
    ends.data_ptr<int64_t>()[r] = at;
  }
  tensors->Add(name + ".keys", key_tensor);
  tensors->Add(name + ".ends", ends);
  tensors->Add(name + ".experts", experts);
  tensors->Add(name + ".counts", counts);
}

namespace {

// Rows of num_experts counts each, as files of version 1 have them.
CountRows LoadDense(const std::string& name, const at::Tensor& keys,
                    const at::Tensor& stored, int num_experts, const std::string& what,
                    const std::function<uint64_t(uint64_t)>& old_key) {
  const auto type = stored.scalar_type();
  if ((type != at::kFloat && type != at::kDouble) || stored.dim() != 2 ||
      stored.size(0) != keys.size(0) || stored.size(1) != num_experts) {
    Bad(what, name + ".counts");
  }
  const at::Tensor counts = stored.to(at::kDouble).contiguous();
  CountRows rows;
  for (int64_t r = 0; r < keys.size(0); ++r) {
    CountRows::Row* row =
        rows.Make(old_key(static_cast<uint64_t>(keys.data_ptr<int64_t>()[r])));
    for (int e = 0; e < num_experts; ++e) {
      const double count = counts.data_ptr<double>()[r * num_experts + e];
      if (!(count >= 0 && count <= double(kMostCount))) Bad(what, name + ".counts");
      if (count > 0) row->Add(static_cast<uint16_t>(e), static_cast<uint64_t>(count));
    }
  }
  return rows;
}

}  // namespace

CountRows CountRows::Load(const std::string& name, const Parameters& tensors,
                          int num_experts, const std::string& what,
                          const std::function<uint64_t(uint64_t)>& old_key) {
  const at::Tensor& keys = Integers(tensors, name + ".keys", what);
  if (!tensors.Has(name + ".ends")) {
    return LoadDense(name, keys, tensors.Get(name + ".counts"), num_experts, what,
                     old_key);
  }
  const at::Tensor& ends = Integers(tensors, name + ".ends", what);
  const at::Tensor& experts = Integers(tensors, name + ".experts", what);
  const at::Tensor& counts = Integers(tensors, name + ".counts", what);
  if (ends.size(0) != keys.size(0)) Bad(what, name + ".ends");
  if (counts.size(0) != experts.size(0)) Bad(what, name + ".counts");
  CountRows rows;
  int64_t at = 0;
  for (int64_t r = 0; r < keys.size(0); ++r) {
    const int64_t end = ends.data_ptr<int64_t>()[r];
    if (end < at || end > experts.size(0)) Bad(what, name + ".ends");
    const int64_t key = keys.data_ptr<int64_t>()[r];
    if (r > 0 && key <= keys.data_ptr<int64_t>()[r - 1]) Bad(what, name + ".keys");
    Row* row = rows.Make(static_cast<uint64_t>(key));
    for (int64_t last = -1; at < end; ++at) {
      const int64_t expert = experts.data_ptr<int64_t>()[at];
      const int64_t count = counts.data_ptr<int64_t>()[at];
      if (expert <= last || expert >= num_experts) Bad(what, name + ".experts");
      last = expert;
      if (count < 1 || count > kMostCount) Bad(what, name + ".counts");
      row->Add(static_cast<uint16_t>(expert), static_cast<uint64_t>(count));
    }
  }
  if (at != experts.size(0)) Bad(what, name + ".ends");
  return rows;
}

}  // namespace routecast
