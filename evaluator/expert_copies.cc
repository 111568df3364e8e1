#include "evaluator/expert_copies.h"

#include <cmath>
#include <cstring>
#include <fstream>

#include "common/errors.h"
#include "common/progress.h"
#include "common/stop.h"

namespace routecast {
namespace {

std::vector<float> ToFloats(const std::byte* bytes, uint64_t count, ExpertDtype dtype) {
  std::vector<float> values(count);
  LoadWeights(bytes, count, dtype, values.data());
  return values;
}

std::vector<std::byte> ReadBlob(const ExpertFile& file, std::ifstream* in,
                                ExpertKey key) {
  std::vector<std::byte> blob(file.spec().blob_bytes());
  in->seekg(static_cast<std::streamoff>(file.Offset(key)));
  in->read(reinterpret_cast<char*>(blob.data()),
           static_cast<std::streamsize>(blob.size()));
  if (!*in) throw EnvironmentError("cannot read " + file.path().string());
  file.Check(key, blob.data());
  return blob;
}

// Writes expert after expert. The blobs that are read are checked: a damaged expert must
// not become a sound copy.
void WriteCopy(const ExpertFile& file, const ExpertFileSpec& spec, const fs::path& path,
               bool quiet) {
  const uint64_t d = static_cast<uint64_t>(spec.geometry.d_model),
                 f = static_cast<uint64_t>(spec.d_ff), half = d * f;
  ExpertFileWriter writer(path, spec);
  std::ifstream in(file.path(), std::ios::binary);
  std::vector<std::byte> wi(CodedBytes(spec.copies, f, d)),
      wo(CodedBytes(spec.copies, d, f));
  Progress progress(std::string(CopyName(spec.copies)) + " copies", "experts",
                    static_cast<uint64_t>(file.count()), quiet);
  uint64_t done = 0;
  for (int i = 0; i < spec.geometry.num_keys(); ++i) {
    const ExpertKey key = ExpertKey::FromIndex(i, spec.geometry);
    if (!file.Contains(key)) continue;
    ThrowIfStopped("while compressing experts");
    const std::vector<std::byte> blob = ReadBlob(file, &in, key);
    const auto weights = ToFloats(blob.data(), 2 * half, spec.dtype);
    EncodeMatrix(spec.copies, std::span(weights).first(half), f, wi);
    EncodeMatrix(spec.copies, std::span(weights).subspan(half), d, wo);
    writer.Append(key, wi, wo);
    progress.Update(++done);
  }
  writer.Finish();
  progress.Finish();
}

}  // namespace

std::shared_ptr<const ExpertFile> CompressedCopy(
    const std::shared_ptr<const ExpertFile>& file, CopyKind kind, bool quiet) {
  ExpertFileSpec spec = file->spec();
  spec.copies = kind;
  fs::path path = file->path();
  path.replace_filename(path.stem().string() + "-" + CopyName(kind) +
                        path.extension().string());
  if (auto copy = OpenIfGood(path, spec, file->count())) return copy;
  WriteCopy(*file, spec, path, quiet);
  return std::make_shared<const ExpertFile>(path);
}

CopyFigures MeasureCopy(const ExpertFile& file, const ExpertFile& copy, int sample) {
  const ExpertFileSpec& spec = copy.spec();
  const uint64_t weights =
      2 * static_cast<uint64_t>(spec.geometry.d_model) * static_cast<uint64_t>(spec.d_ff);
  std::ifstream from(file.path(), std::ios::binary), to(copy.path(), std::ios::binary);
  const std::vector<ExpertKey> keys = file.keys();
  const size_t count = std::min(keys.size(), static_cast<size_t>(sample));
  std::vector<std::byte> decoded(spec.expert_bytes());
  double error = 0, scale = 0;
  for (size_t i = 0; i < count; ++i) {
    const ExpertKey key = keys[i * keys.size() / count];
    const auto exact = ToFloats(ReadBlob(file, &from, key).data(), weights, spec.dtype);
    DecodeExpert(spec, ReadBlob(copy, &to, key).data(), decoded.data());
    const auto lossy = ToFloats(decoded.data(), weights, spec.dtype);
    for (uint64_t w = 0; w < weights; ++w) {
      error += std::abs(static_cast<double>(lossy[w]) - exact[w]);
      scale += std::abs(static_cast<double>(exact[w]));
    }
  }
  const double all = static_cast<double>(count * weights);
  return {
      static_cast<double>(spec.expert_bytes()) / static_cast<double>(spec.blob_bytes()),
      error / all, scale / all};
}

void DecodeExpert(const ExpertFileSpec& spec, const std::byte* blob, std::byte* expert) {
  const uint64_t d = static_cast<uint64_t>(spec.geometry.d_model),
                 f = static_cast<uint64_t>(spec.d_ff);
  DecodeMatrix(spec.copies, blob, f, d, spec.dtype, expert);
  DecodeMatrix(spec.copies, blob + CodedBytes(spec.copies, f, d), d, f, spec.dtype,
               expert + spec.expert_bytes() / 2);
}

}  // namespace routecast
