#include "evaluator/output_hash.h"

#include <ATen/ATen.h>
#include <openssl/evp.h>

#include <stdexcept>

namespace routecast {
namespace {
void Require(int ok) {
  if (ok != 1) throw std::logic_error("OpenSSL refuses SHA-256");
}
}  // namespace

struct OutputHash::Context {
  EVP_MD_CTX* digest = EVP_MD_CTX_new();
  ~Context() { EVP_MD_CTX_free(digest); }
};

OutputHash::OutputHash() : context_(std::make_unique<Context>()) {
  Require(EVP_DigestInit_ex(context_->digest, EVP_sha256(), nullptr));
}
OutputHash::~OutputHash() = default;
OutputHash::OutputHash(OutputHash&&) noexcept = default;
OutputHash& OutputHash::operator=(OutputHash&&) noexcept = default;

void OutputHash::Add(const at::Tensor& tensor) {
  if (tap_) tap_(tensor);
  const at::Tensor host = tensor.to(at::kCPU).contiguous();
  const int64_t dims = host.dim();
  Require(EVP_DigestUpdate(context_->digest, &dims, sizeof dims));
  Require(EVP_DigestUpdate(context_->digest, host.sizes().data(),
                           static_cast<size_t>(dims) * sizeof(int64_t)));
  Require(EVP_DigestUpdate(context_->digest, host.data_ptr(), host.nbytes()));
}

std::string OutputHash::Hex() const {
  Context copy;
  Require(EVP_MD_CTX_copy_ex(copy.digest, context_->digest));
  unsigned char bytes[EVP_MAX_MD_SIZE];
  unsigned int size = 0;
  Require(EVP_DigestFinal_ex(copy.digest, bytes, &size));
  std::string hex;
  for (unsigned int i = 0; i < size; ++i) {
    hex += "0123456789abcdef"[bytes[i] >> 4];
    hex += "0123456789abcdef"[bytes[i] & 15];
  }
  return hex;
}

}  // namespace routecast
