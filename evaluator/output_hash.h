// The hash that shows that two runs put out the same bits: SHA-256 (OpenSSL) over the
// fp32 logits of every step and the chosen ids, in order. Thread rule: one thread.
#pragma once

#include <ATen/core/Tensor.h>

#include <functional>
#include <memory>
#include <string>
#include <utility>

namespace routecast {

class OutputHash {
 public:
  OutputHash();
  ~OutputHash();
  OutputHash(OutputHash&&) noexcept;
  OutputHash& operator=(OutputHash&&) noexcept;
  // Any dtype; moved to the CPU and hashed contiguously, after its shape.
  void Add(const at::Tensor& tensor);
  // Is shown what is added; empty: nobody is.
  void SetTap(std::function<void(const at::Tensor&)> tap) { tap_ = std::move(tap); }
  std::string Hex() const;  // of what was added so far; 64 digits

 private:
  struct Context;
  std::unique_ptr<Context> context_;
  std::function<void(const at::Tensor&)> tap_;
};

}  // namespace routecast
