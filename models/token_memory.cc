#include "models/token_memory.h"

#include <ATen/ATen.h>

#include <algorithm>
#include <bit>
#include <cstring>
#include <stdexcept>

namespace routecast {
namespace {

constexpr int64_t kLeastTokens = 16;  // of a store's room

bool Plain(const at::Tensor& rows) {
  return !rows.defined() || (rows.is_cpu() && rows.is_contiguous());
}

// A tensor [B,T,..] of the window: of each token's bytes the first `used`, or those of
// the token before it.
struct Column {
  const at::Tensor& rows;
  size_t used;
  int64_t shift = 0;
};

size_t BytesOf(const at::Tensor& rows_BT) {
  const int64_t tokens = rows_BT.size(0) * rows_BT.size(1);
  return tokens == 0 ? 0 : rows_BT.nbytes() / static_cast<size_t>(tokens);
}

std::vector<Column> ColumnsOf(const RoutingWindow& w) {
  std::vector<Column> columns;
  for (const at::Tensor* rows :
       {&w.valid_BT, &w.token_ids_BT, &w.hidden_BTD, &w.context_BTD, &w.gates_BTE}) {
    if (rows->defined()) columns.push_back({*rows, BytesOf(*rows)});
  }
  for (const at::Tensor* rows : {&w.experts_BTL, &w.others_BTLK}) {
    if (!rows->defined()) continue;
    const size_t all = BytesOf(*rows), layers = static_cast<size_t>(rows->size(2));
    const auto known = static_cast<size_t>(w.source_layer + 1);
    columns.push_back({*rows, layers == 0 ? 0 : all / layers * known});
    columns.push_back({*rows, all, /*shift=*/1});
  }
  return columns;
}

}  // namespace

void TokenMemory::Begin(int64_t known, int64_t fresh) {
  if (known == 0) stores_.clear();
  known_ = known;
  fresh_ = fresh;
  next_ = 0;
}

at::Tensor TokenMemory::Append(const at::Tensor& rows, int64_t dim) {
  if (next_ == stores_.size()) {
    if (known_ > 0) throw std::logic_error("a pass that asks for more than those before");
    stores_.push_back({at::Tensor(), dim, rows.size(dim) / fresh_});
  }
  Store& store = stores_[next_++];
  const int64_t used = known_ * store.rows_a_token, count = rows.size(dim);
  if (!store.room.defined() || store.room.size(dim) < used + count) {
    const auto tokens = static_cast<uint64_t>(std::max(kLeastTokens, known_ + fresh_));
    auto sizes = rows.sizes().vec();
    sizes[static_cast<size_t>(dim)] =
        static_cast<int64_t>(std::bit_ceil(tokens)) * store.rows_a_token;
    at::Tensor larger = at::empty(sizes, rows.options());
    if (used > 0) larger.narrow(dim, 0, used).copy_(store.room.narrow(dim, 0, used));
    store.room = larger;
  }
  store.room.narrow(dim, used, count).copy_(rows);
  return store.room.narrow(dim, 0, used + count);
}

at::Tensor TokenMemory::Newest() const {
  if (known_ == 0) return {};
  const Store& store = stores_.at(next_);
  return store.room.narrow(store.dim, (known_ - 1) * store.rows_a_token,
                           store.rows_a_token);
}

int64_t TokenMemory::bytes() const {
  int64_t all = 0;
  for (const Store& store : stores_) all += static_cast<int64_t>(store.room.nbytes());
  return all;
}

TokenRecord RecordOf(const RoutingWindow& w) {
  for (const at::Tensor* rows :
       {&w.valid_BT, &w.token_ids_BT, &w.experts_BTL, &w.others_BTLK, &w.hidden_BTD,
        &w.context_BTD, &w.gates_BTE}) {
    if (!Plain(*rows)) return {};
  }
  if (w.attention_entropy_BTA.defined()) return {};
  const int64_t B = w.token_ids_BT.size(0), T = w.token_ids_BT.size(1);
  const std::vector<Column> columns = ColumnsOf(w);
  TokenRecord record;
  record.sequences = B;
  for (const Column& c : columns) record.bytes_a_token += c.used * static_cast<size_t>(B);
  record.bytes.resize(record.bytes_a_token * static_cast<size_t>(T));
  std::byte* to = record.bytes.data();
  for (int64_t t = 0; t < T; ++t) {
    for (const Column& c : columns) {
      const auto* from = static_cast<const std::byte*>(c.rows.const_data_ptr());
      for (int64_t b = 0; b < B; ++b, to += c.used) {
        if (t < c.shift) continue;  // zeros
        std::copy_n(from + static_cast<size_t>(b * T + t - c.shift) * BytesOf(c.rows),
                    c.used, to);
      }
    }
  }
  return record;
}

int64_t CommonTokens(const TokenRecord& a, const TokenRecord& b) {
  if (a.bytes_a_token != b.bytes_a_token || a.sequences != b.sequences ||
      a.bytes_a_token == 0) {
    return 0;
  }
  const size_t shorter = std::min(a.bytes.size(), b.bytes.size());
  size_t at = 0;
  while (at < shorter &&
         std::memcmp(a.bytes.data() + at, b.bytes.data() + at, a.bytes_a_token) == 0) {
    at += a.bytes_a_token;
  }
  return static_cast<int64_t>(at / a.bytes_a_token);
}

}  // namespace routecast
