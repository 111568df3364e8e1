// The loops of token_groups.h, once for both devices (lane_group.h). A tile of tokens is
// counted by one group of lanes, one group adds up all tiles, then each tile's tokens are
// placed: a stable counting sort. Internal to token_groups*.
#pragma once

#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include "models/lane_group.h"

namespace routecast {

constexpr int64_t kTileTokens = 256;

struct SortArgs {
  const int64_t* ids;   // [tokens]
  const bool* dropped;  // [tokens], or null: none
  int64_t tokens, experts;
  // [tiles, experts + 1], zeros: tokens of each expert (the last column: dropped ones),
  // then the row of the next one.
  int* counts;
  int* order;        // [tokens]
  int* place;        // [tokens]
  int64_t* offsets;  // [experts + 1]
  ROUTECAST_LANES int64_t tiles() const {
    return (tokens + kTileTokens - 1) / kTileTokens;
  }
  ROUTECAST_LANES int64_t keys() const { return experts + 1; }
  ROUTECAST_LANES int64_t KeyOf(int64_t token) const {
    return dropped != nullptr && dropped[token] ? experts : ids[token];
  }
  ROUTECAST_LANES int64_t EndOf(int64_t tile) const {
    const int64_t end = (tile + 1) * kTileTokens;
    return end < tokens ? end : tokens;
  }
};

template <class Group>
ROUTECAST_LANES void CountTile(const Group& g, const SortArgs& a, int64_t tile) {
  int* counts = a.counts + tile * a.keys();
  const int64_t end = a.EndOf(tile);
  for (int64_t t = tile * kTileTokens; t < end; t += g.size()) {
    const int64_t i = t + g.lane();
    g.Claim(counts, i < end ? a.KeyOf(i) : -1);
  }
}

template <class Group>
ROUTECAST_LANES void ScanTiles(const Group& g, const SortArgs& a) {
  const int64_t keys = a.keys(), tiles = a.tiles();
  int64_t before = 0;
  for (int64_t k = 0; k < keys; k += g.size()) {
    const int64_t key = k + g.lane();
    int64_t mine = 0, all = 0;
    if (key < keys) {
      for (int64_t t = 0; t < tiles; ++t) mine += a.counts[t * keys + key];
    }
    int64_t row = before + g.SumBelow(mine, &all);
    before += all;
    if (key >= keys) continue;
    a.offsets[key] = row;
    for (int64_t t = 0; t < tiles; ++t) {
      const int count = a.counts[t * keys + key];
      a.counts[t * keys + key] = static_cast<int>(row);
      row += count;
    }
  }
}

template <class Group>
ROUTECAST_LANES void PlaceTile(const Group& g, const SortArgs& a, int64_t tile) {
  int* next = a.counts + tile * a.keys();
  const int64_t end = a.EndOf(tile);
  for (int64_t t = tile * kTileTokens; t < end; t += g.size()) {
    const int64_t i = t + g.lane();
    const int64_t key = i < end ? a.KeyOf(i) : -1;
    const int row = g.Claim(next, key);
    if (i >= end) continue;
    a.order[row] = static_cast<int>(i);
    a.place[i] = key == a.experts ? -1 : row;
  }
}

struct GatherArgs {
  const void* x;
  void* out;
  const int* order;
  int64_t rows, words;  // of a row, each of the word's size
};

template <class Word, class Group>
ROUTECAST_LANES void GatherRow(const Group& g, const GatherArgs& a, int64_t row) {
  const Word* from = static_cast<const Word*>(a.x) + a.order[row] * a.words;
  Word* to = static_cast<Word*>(a.out) + row * a.words;
  for (int64_t i = g.lane(); i < a.words; i += g.size()) to[i] = from[i];
}

struct ScatterArgs {
  const void *residual, *outputs;
  const float* gates;
  const int* place;
  void* out;
  int64_t rows, width;
};

template <class T, class Group>
ROUTECAST_LANES void ScatterRow(const Group& g, const ScatterArgs& a, int64_t row) {
  const T* residual = static_cast<const T*>(a.residual) + row * a.width;
  T* out = static_cast<T*>(a.out) + row * a.width;
  const int place = a.place[row];
  if (place < 0) {
    for (int64_t i = g.lane(); i < a.width; i += g.size()) out[i] = residual[i];
    return;
  }
  const T* expert = static_cast<const T*>(a.outputs) + place * a.width;
  const float gate = a.gates[row];
  for (int64_t i = g.lane(); i < a.width; i += g.size()) {
    const float scaled = static_cast<float>(T(static_cast<float>(expert[i]) * gate));
    out[i] = T(static_cast<float>(residual[i]) + scaled);
  }
}

// `type` counts fp32, bf16, fp16.
void SortCpu(const SortArgs& args);
void SortCuda(const SortArgs& args);
void GatherCpu(const GatherArgs& args);                   // words of one byte
void GatherCuda(const GatherArgs& args, int word_bytes);  // of 2, 4 or 16
void ScatterCpu(const ScatterArgs& args, int type);
void ScatterCuda(const ScatterArgs& args, int type);

}  // namespace routecast
