#include "evaluator/expert_codec.h"

#include <algorithm>
#include <array>
#include <bit>
#include <cmath>
#include <cstring>
#include <numeric>
#include <vector>

#include "common/errors.h"
#include "common/routing.h"

namespace routecast {
namespace {

constexpr float kLargestCode[] = {0, 127, 7, 0, 127};
constexpr int kInt4Zero = 8;  // nibbles are unsigned: code + 8

void RequireFinite(const float* weights, uint64_t count) {
  if (std::all_of(weights, weights + count, [](float w) { return std::isfinite(w); })) {
    return;
  }
  throw DataError(ErrorText("a weight that is not finite cannot be compressed", "",
                            "use --copies=lossless"));
}

float ScaleOf(CopyKind kind, const float* weights, uint64_t count) {
  float largest = 0;
  for (uint64_t i = 0; i < count; ++i) {
    largest = std::max(largest, std::fabs(weights[i]));
  }
  return largest / kLargestCode[static_cast<int>(kind)];
}

int CodeOf(float weight, float scale, float largest) {
  if (scale == 0) return 0;
  return static_cast<int>(std::clamp(std::nearbyint(weight / scale), -largest, largest));
}

// Of magnitudes that are equal the first ones are kept.
void EncodeSparse(const float* weights, uint64_t count, std::byte* mask_to,
                  std::byte* kept_to) {
  std::array<uint32_t, kSparseGroup> order;
  std::iota(order.begin(), order.begin() + count, 0u);
  std::stable_sort(order.begin(), order.begin() + count, [&](uint32_t a, uint32_t b) {
    return std::fabs(weights[a]) > std::fabs(weights[b]);
  });
  const uint64_t kept = std::min(count, kSparseKept);
  std::sort(order.begin(), order.begin() + kept);
  uint32_t mask = 0;
  for (uint64_t k = 0; k < kept; ++k) {
    mask |= uint32_t{1} << order[k];
    const uint16_t bits = FloatToBf16(weights[order[k]]);
    std::memcpy(kept_to + 2 * k, &bits, sizeof bits);
  }
  std::memcpy(mask_to, &mask, sizeof mask);
}

void DecodeSparse(const std::byte* mask_from, const std::byte* kept_from, uint64_t count,
                  float* weights) {
  uint32_t mask;
  std::memcpy(&mask, mask_from, sizeof mask);
  uint64_t kept = 0;
  for (uint64_t i = 0; i < count; ++i) {
    weights[i] = 0;
    // A damaged mask has more bits than there is room for.
    if ((mask >> i & 1) == 0 || kept == kSparseKept) continue;
    uint16_t bits;
    std::memcpy(&bits, kept_from + 2 * kept++, sizeof bits);
    weights[i] = Bf16ToFloat(bits);
  }
}

}  // namespace

void LoadWeights(const std::byte* from, uint64_t count, ExpertDtype dtype, float* to) {
  if (dtype == ExpertDtype::kFloat32) {
    std::memcpy(to, from, count * sizeof(float));
    return;
  }
  for (uint64_t i = 0; i < count; ++i) {
    uint16_t bits;
    std::memcpy(&bits, from + 2 * i, sizeof bits);
    to[i] = dtype == ExpertDtype::kBfloat16
                ? Bf16ToFloat(bits)
                : static_cast<float>(std::bit_cast<_Float16>(bits));
  }
}

void StoreWeights(const float* from, uint64_t count, ExpertDtype dtype, std::byte* to) {
  if (dtype == ExpertDtype::kFloat32) {
    std::memcpy(to, from, count * sizeof(float));
    return;
  }
  for (uint64_t i = 0; i < count; ++i) {
    const uint16_t bits = dtype == ExpertDtype::kBfloat16
                              ? FloatToBf16(from[i])
                              : std::bit_cast<uint16_t>(static_cast<_Float16>(from[i]));
    std::memcpy(to + 2 * i, &bits, sizeof bits);
  }
}

CopyKind ParseCopies(const std::string& name) {
  return static_cast<CopyKind>(ParseChoice(
      "--copies", name, {"lossless", "int8", "int4", "sparse", "int8_tensor"}));
}

const char* CopyName(CopyKind kind) {
  constexpr const char* kNames[] = {"lossless", "int8", "int4", "sparse", "int8_tensor"};
  return kNames[static_cast<int>(kind)];
}

void EncodeMatrix(CopyKind kind, std::span<const float> weights, uint64_t rows,
                  std::span<std::byte> coded) {
  const uint64_t columns = weights.size() / rows, groups = CodeGroups(kind, columns);
  const uint64_t group = kind == CopyKind::kInt4     ? kInt4Group
                         : kind == CopyKind::kSparse ? kSparseGroup
                                                     : columns;
  RequireFinite(weights.data(), weights.size());
  std::fill(coded.begin(), coded.end(), std::byte{0});
  std::byte* codes = coded.data() + rows * groups * sizeof(float);
  const bool one_scale = kind == CopyKind::kInt8Tensor;
  const float whole = one_scale ? ScaleOf(kind, weights.data(), weights.size()) : 0;
  for (uint64_t r = 0; r < rows; ++r) {
    for (uint64_t g = 0; g < groups; ++g) {
      const float* from = weights.data() + r * columns + g * group;
      const uint64_t count = std::min(group, columns - g * group);
      if (kind == CopyKind::kSparse) {
        EncodeSparse(from, count, coded.data() + (r * groups + g) * sizeof(uint32_t),
                     codes + (r * groups + g) * kSparseKept * 2);
        continue;
      }
      const float scale = one_scale ? whole : ScaleOf(kind, from, count);
      const float largest = kLargestCode[static_cast<int>(kind)];
      std::memcpy(coded.data() + (r * groups + g) * sizeof scale, &scale, sizeof scale);
      for (uint64_t i = 0; i < count; ++i) {
        const int code = CodeOf(from[i], scale, largest);
        if (IsInt8(kind)) {
          codes[r * columns + i] = static_cast<std::byte>(code);
        } else {
          codes[(r * groups + g) * (kInt4Group / 2) + i / 2] |=
              static_cast<std::byte>((code + kInt4Zero) << (4 * (i % 2)));
        }
      }
    }
  }
}

void DecodeMatrix(CopyKind kind, const std::byte* coded, uint64_t rows, uint64_t columns,
                  ExpertDtype dtype, std::byte* weights) {
  const uint64_t groups = CodeGroups(kind, columns);
  const std::byte* codes = coded + rows * groups * sizeof(float);
  // Whole pairs are written: room for the code behind an odd last one.
  std::vector<float> row(columns + 1);
  for (uint64_t r = 0; r < rows; ++r) {
    for (uint64_t g = 0; g < groups; ++g) {
      if (kind == CopyKind::kSparse) {
        DecodeSparse(coded + (r * groups + g) * sizeof(uint32_t),
                     codes + (r * groups + g) * kSparseKept * 2,
                     std::min(kSparseGroup, columns - g * kSparseGroup),
                     row.data() + g * kSparseGroup);
        continue;
      }
      float scale;
      std::memcpy(&scale, coded + (r * groups + g) * sizeof scale, sizeof scale);
      if (IsInt8(kind)) {
        const auto* from = reinterpret_cast<const int8_t*>(codes + r * columns);
        for (uint64_t i = 0; i < columns; ++i)
          row[i] = scale * static_cast<float>(from[i]);
        continue;
      }
      const std::byte* from = codes + (r * groups + g) * (kInt4Group / 2);
      float* to = row.data() + g * kInt4Group;
      const uint64_t count = std::min(kInt4Group, columns - g * kInt4Group);
      for (uint64_t i = 0; i < count; i += 2) {
        const int pair = static_cast<int>(from[i / 2]);
        to[i] = scale * static_cast<float>((pair & 15) - kInt4Zero);
        to[i + 1] = scale * static_cast<float>((pair >> 4) - kInt4Zero);
      }
    }
    StoreWeights(row.data(), columns, dtype, weights + r * columns * DtypeBytes(dtype));
  }
}

}  // namespace routecast
