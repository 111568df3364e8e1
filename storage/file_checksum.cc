#include "storage/file_checksum.h"

#include <new>
#include <string>

#include "xxhash.h"

namespace routecast {
namespace {

// In every shard's manifest: it may not change.
constexpr char kName[] = "RoutecastXxh3_128";

class Xxh3Checksum final : public rocksdb::FileChecksumGenerator {
 public:
  Xxh3Checksum() : state_(XXH3_createState()) {
    if (!state_) throw std::bad_alloc();
    XXH3_128bits_reset(state_.get());
  }
  void Update(const char* data, size_t size) override {
    XXH3_128bits_update(state_.get(), data, size);
  }
  void Finalize() override {
    XXH128_canonical_t bytes;
    XXH128_canonicalFromHash(&bytes, XXH3_128bits_digest(state_.get()));
    sum_.assign(reinterpret_cast<const char*>(bytes.digest), sizeof bytes.digest);
  }
  std::string GetChecksum() const override { return sum_; }
  const char* Name() const override { return kName; }

 private:
  struct Free {
    void operator()(XXH3_state_t* state) const { XXH3_freeState(state); }
  };
  std::unique_ptr<XXH3_state_t, Free> state_;
  std::string sum_;
};

class Factory final : public rocksdb::FileChecksumGenFactory {
 public:
  std::unique_ptr<rocksdb::FileChecksumGenerator> CreateFileChecksumGenerator(
      const rocksdb::FileChecksumGenContext& context) override {
    const std::string& asked = context.requested_checksum_func_name;
    if (asked.empty() || asked == kName) return std::make_unique<Xxh3Checksum>();
    return of_older_stores_->CreateFileChecksumGenerator(context);
  }
  const char* Name() const override { return "RoutecastFileChecksums"; }

 private:
  const std::shared_ptr<rocksdb::FileChecksumGenFactory> of_older_stores_ =
      rocksdb::GetFileChecksumGenCrc32cFactory();
};

}  // namespace

std::shared_ptr<rocksdb::FileChecksumGenFactory> FileChecksums() {
  static const auto factory = std::make_shared<Factory>();
  return factory;
}

}  // namespace routecast
