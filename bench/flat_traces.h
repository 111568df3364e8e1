// The plainest way to keep traces, for storage_bench: one file of planes as they lie, one
// of places. No checksums, no chunks, no keys. The Python side reads it, too.
//   flat.bin: a span's tokens u16 [T], ids u8 or u16 (more than 256 experts) [L*T], and,
//             unless only ids are kept, probs u16 bf16 [L*T], margins u16 bf16 [L*T],
//             drops u8 [L*T]
//   flat.idx: i64 [spans, 3]: offset, T, L
#pragma once

#include <fcntl.h>
#include <unistd.h>

#include <cstring>
#include <string>
#include <vector>

#include "common/byte_file.h"
#include "common/routing.h"

namespace routecast {

class FlatTraces {
 public:
  FlatTraces(fs::path folder, int num_experts, bool only_ids)
      : folder_(std::move(folder)), wide_(num_experts > 256), only_ids_(only_ids) {
    MakeFolder(folder_);
  }

  void Write(const std::vector<const RoutingSpan*>& spans) const {
    AtomicFileWriter data(folder_ / "flat.bin", 0);
    std::vector<int64_t> places;
    std::string bytes;
    for (const RoutingSpan* s : spans) {
      places.insert(places.end(),
                    {static_cast<int64_t>(data.written()), s->num_tokens, s->num_layers});
      bytes.clear();
      Append(std::vector<uint16_t>(s->token_ids.begin(), s->token_ids.end()), &bytes);
      if (wide_) {
        Append(s->expert_ids, &bytes);
      } else {
        Append(std::vector<uint8_t>(s->expert_ids.begin(), s->expert_ids.end()), &bytes);
      }
      if (!only_ids_) {
        Append(Halves(s->gate_probs), &bytes);
        Append(Halves(s->margins), &bytes);
        Append(s->dropped, &bytes);
      }
      data.Append(bytes.data(), bytes.size());
    }
    data.Commit();
    WriteFileAtomic(folder_ / "flat.idx", {reinterpret_cast<const char*>(places.data()),
                                           places.size() * sizeof(int64_t)});
  }
  uint64_t Bytes() const {
    return fs::file_size(folder_ / "flat.bin") + fs::file_size(folder_ / "flat.idx");
  }

  // Reads spans as our own store gives them: vectors of numbers.
  class Reader {
   public:
    explicit Reader(const FlatTraces& flat)
        : flat_(flat), data_(flat.folder_ / "flat.bin") {
      const std::string index = ReadFile(flat.folder_ / "flat.idx");
      places_.resize(index.size() / sizeof(int64_t));
      std::memcpy(places_.data(), index.data(), index.size());
    }
    size_t size() const { return places_.size() / 3; }
    RoutingSpan Read(size_t i) const {
      RoutingSpan s;
      s.num_tokens = static_cast<int>(places_[3 * i + 1]);
      s.num_layers = static_cast<int>(places_[3 * i + 2]);
      const size_t n = static_cast<size_t>(s.num_tokens) * s.num_layers;
      const size_t id_bytes = flat_.wide_ ? 2 : 1;
      const std::string bytes =
          data_.Read(static_cast<uint64_t>(places_[3 * i]),
                     2u * s.num_tokens + n * (id_bytes + (flat_.only_ids_ ? 0 : 5)));
      const char* at = bytes.data();
      std::vector<uint16_t> tokens;
      Take(&at, s.num_tokens, &tokens);
      s.token_ids.assign(tokens.begin(), tokens.end());
      if (flat_.wide_) {
        Take(&at, n, &s.expert_ids);
      } else {
        std::vector<uint8_t> narrow;
        Take(&at, n, &narrow);
        s.expert_ids.assign(narrow.begin(), narrow.end());
      }
      if (flat_.only_ids_) return s;
      TakeHalves(&at, n, &s.gate_probs);
      TakeHalves(&at, n, &s.margins);
      Take(&at, n, &s.dropped);
      return s;
    }

   private:
    template <typename T>
    static void Take(const char** at, size_t n, std::vector<T>* to) {
      to->resize(n);
      std::memcpy(to->data(), *at, n * sizeof(T));
      *at += n * sizeof(T);
    }
    static void TakeHalves(const char** at, size_t n, std::vector<float>* to) {
      std::vector<uint16_t> halves;
      Take(at, n, &halves);
      to->resize(n);
      for (size_t i = 0; i < n; ++i) (*to)[i] = Bf16ToFloat(halves[i]);
    }
    const FlatTraces& flat_;
    ByteFile data_;
    std::vector<int64_t> places_;
  };

 private:
  template <typename T>
  static void Append(const std::vector<T>& values, std::string* to) {
    to->append(reinterpret_cast<const char*>(values.data()), values.size() * sizeof(T));
  }
  static std::vector<uint16_t> Halves(const std::vector<float>& values) {
    std::vector<uint16_t> halves;
    halves.reserve(values.size());
    for (const float v : values) halves.push_back(FloatToBf16(v));
    return halves;
  }

  fs::path folder_;
  bool wide_, only_ids_;
};

}  // namespace routecast
