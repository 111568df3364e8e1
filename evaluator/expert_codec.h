// Compressed copies of experts: what a matrix becomes, and how it is read back. LOSSY.
// INT8: one scale a row (output channel); INT8_TENSOR: the same one in all rows, the
// largest. INT4: one scale a group of 128 neighbours in a
// row, two codes a byte, the even one low. Symmetric: w = code * scale, |code| <= 127 or
// 7. SPARSE: of every 32 neighbours in a row the 16 of the largest magnitudes, as bf16;
// the others are 0. Layout of a matrix [rows, columns]: fp32 scales by row (and group),
// then codes by row, each group of INT4 padded to 64 bytes; of SPARSE a u32 a group whose
// bit i says that weight i is kept, then the kept ones in order, room for 16 a group. All
// padded to 16 bytes. A blob is wi, then wo. Torch-free. Thread rule: pure functions.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <string>

namespace routecast {

enum class CopyKind : uint32_t {
  kLossless = 0,
  kInt8 = 1,
  kInt4 = 2,
  kSparse = 3,
  kInt8Tensor = 4
};
constexpr auto kLastCopyKind = static_cast<uint32_t>(CopyKind::kInt8Tensor);
// A code a byte and a scale a row.
inline bool IsInt8(CopyKind kind) {
  return kind == CopyKind::kInt8 || kind == CopyKind::kInt8Tensor;
}
enum class ExpertDtype : uint32_t { kFloat32 = 0, kBfloat16 = 1, kFloat16 = 2 };
constexpr auto kLastExpertDtype = static_cast<uint32_t>(ExpertDtype::kFloat16);

// lossless, int8, int4, sparse, int8_tensor; UsageError naming the nearest.
CopyKind ParseCopies(const std::string& name);
const char* CopyName(CopyKind kind);

constexpr uint64_t kInt4Group = 128, kSparseGroup = 32, kSparseKept = 16;
inline uint64_t DtypeBytes(ExpertDtype dtype) {
  return dtype == ExpertDtype::kFloat32 ? 4 : 2;
}
// `count` values of a type, to float and back; to 16 bits they round to nearest even.
void LoadWeights(const std::byte* from, uint64_t count, ExpertDtype dtype, float* to);
void StoreWeights(const float* from, uint64_t count, ExpertDtype dtype, std::byte* to);
// Groups of a row that share a scale, or a mask.
inline uint64_t CodeGroups(CopyKind kind, uint64_t columns) {
  if (IsInt8(kind)) return 1;
  const uint64_t group = kind == CopyKind::kInt4 ? kInt4Group : kSparseGroup;
  return (columns + group - 1) / group;
}
// Bytes of a compressed matrix. REQUIRES not kLossless.
inline uint64_t CodedBytes(CopyKind kind, uint64_t rows, uint64_t columns) {
  const uint64_t groups = CodeGroups(kind, columns);
  const uint64_t codes = kind == CopyKind::kInt4     ? groups * (kInt4Group / 2)
                         : kind == CopyKind::kSparse ? groups * kSparseKept * 2
                                                     : columns;
  return (rows * (groups * sizeof(float) + codes) + 15) / 16 * 16;
}

// `weights` [rows * columns] -> `coded` [CodedBytes]. Throws DataError where a weight is
// not finite.
void EncodeMatrix(CopyKind kind, std::span<const float> weights, uint64_t rows,
                  std::span<std::byte> coded);
// Back, into `weights` [rows * columns * DtypeBytes].
void DecodeMatrix(CopyKind kind, const std::byte* coded, uint64_t rows, uint64_t columns,
                  ExpertDtype dtype, std::byte* weights);

}  // namespace routecast
