#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime_api.h>

#include "common/errors.h"
#include "evaluator/expert_codec_cuda.h"

namespace routecast {
namespace {

constexpr int kThreads = 256;

__device__ void Put(float* to, float value) { *to = value; }
__device__ void Put(__nv_bfloat16* to, float value) { *to = __float2bfloat16_rn(value); }
__device__ void Put(__half* to, float value) { *to = __float2half_rn(value); }

// A thread a weight.
template <typename T>
__global__ void DecodeInt8(const float* scales, const int8_t* codes, uint64_t columns,
                           uint64_t count, T* weights) {
  const uint64_t i = uint64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (i >= count) return;
  Put(weights + i, scales[i / columns] * static_cast<float>(codes[i]));
}

template <typename T>
__global__ void DecodeInt4(const float* scales, const uint8_t* codes, uint64_t columns,
                           uint64_t groups, uint64_t count, T* weights) {
  const uint64_t i = uint64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (i >= count) return;
  const uint64_t row = i / columns, column = i % columns;
  const uint64_t group = row * groups + column / kInt4Group, in = column % kInt4Group;
  const int pair = codes[group * (kInt4Group / 2) + in / 2];
  const int code = ((in % 2 == 0) ? (pair & 15) : (pair >> 4)) - 8;
  Put(weights + i, scales[group] * static_cast<float>(code));
}

// The kept weights before this one in its group are those of the lower bits.
template <typename T>
__global__ void DecodeSparse(const uint32_t* masks, const __nv_bfloat16* kept,
                             uint64_t columns, uint64_t groups, uint64_t count,
                             T* weights) {
  const uint64_t i = uint64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (i >= count) return;
  const uint64_t row = i / columns, column = i % columns;
  const uint64_t group = row * groups + column / kSparseGroup;
  const uint32_t mask = masks[group], bit = uint32_t{1} << (column % kSparseGroup);
  const auto before = static_cast<uint64_t>(__popc(mask & (bit - 1)));
  const bool is_kept = (mask & bit) != 0 && before < kSparseKept;
  Put(weights + i,
      is_kept ? __bfloat162float(kept[group * kSparseKept + before]) : 0.0F);
}

template <typename T>
void Launch(CopyKind kind, const std::byte* coded, uint64_t rows, uint64_t columns,
            T* weights, cudaStream_t stream) {
  const uint64_t count = rows * columns, groups = CodeGroups(kind, columns);
  const auto blocks = static_cast<unsigned>((count + kThreads - 1) / kThreads);
  const auto* scales = reinterpret_cast<const float*>(coded);
  const std::byte* codes = coded + rows * groups * sizeof(float);
  if (IsInt8(kind)) {
    DecodeInt8<<<blocks, kThreads, 0, stream>>>(
        scales, reinterpret_cast<const int8_t*>(codes), columns, count, weights);
  } else if (kind == CopyKind::kSparse) {
    DecodeSparse<<<blocks, kThreads, 0, stream>>>(
        reinterpret_cast<const uint32_t*>(coded),
        reinterpret_cast<const __nv_bfloat16*>(codes), columns, groups, count, weights);
  } else {
    DecodeInt4<<<blocks, kThreads, 0, stream>>>(
        scales, reinterpret_cast<const uint8_t*>(codes), columns, groups, count, weights);
  }
}

}  // namespace

void DecodeMatrixOnDevice(CopyKind kind, const std::byte* coded, uint64_t rows,
                          uint64_t columns, ExpertDtype dtype, std::byte* weights,
                          void* stream) {
  const auto on = static_cast<cudaStream_t>(stream);
  if (dtype == ExpertDtype::kFloat32) {
    Launch(kind, coded, rows, columns, reinterpret_cast<float*>(weights), on);
  } else if (dtype == ExpertDtype::kBfloat16) {
    Launch(kind, coded, rows, columns, reinterpret_cast<__nv_bfloat16*>(weights), on);
  } else {
    Launch(kind, coded, rows, columns, reinterpret_cast<__half*>(weights), on);
  }
  const cudaError_t error = cudaGetLastError();
  if (error == cudaSuccess) return;
  throw EnvironmentError(ErrorText("experts cannot be decoded on the CUDA device",
                                   cudaGetErrorString(error),
                                   "use --copies=lossless, or another build"));
}

}  // namespace routecast
