// Random edits of bytes, for tests of parsers: a function of the seed alone.
#pragma once

#include <algorithm>
#include <string>
#include <vector>

#include "common/random.h"

namespace routecast {

struct MutationOptions {
  uint64_t most_edits = 8;
  uint64_t longest_stretch = 16;   // bytes removed or copied at once
  std::vector<std::string> words;  // what means something to the parser; not empty
};

// One edit or more: flipped bits, other bytes, words put over what was there, removed,
// copied and cut stretches.
inline std::string Mutate(std::string bytes, uint64_t seed,
                          const MutationOptions& options) {
  const uint64_t edits = 1 + ToRange(Mix(seed, 1), options.most_edits);
  for (uint64_t e = 0; e < edits && !bytes.empty(); ++e) {
    const auto draw = [&](uint64_t what, uint64_t n) {
      return ToRange(Mix(seed, e, what), n);
    };
    const size_t at = draw(2, bytes.size());
    const size_t length =
        std::min<size_t>(1 + draw(3, options.longest_stretch), bytes.size() - at);
    switch (draw(4, 6)) {
      case 0:
        bytes[at] = static_cast<char>(bytes[at] ^ (1 << draw(5, 8)));
        break;
      case 1:
        bytes[at] = static_cast<char>(draw(5, 256));
        break;
      case 2: {
        const std::string& word = options.words[draw(5, options.words.size())];
        bytes.replace(at, std::min(word.size(), bytes.size() - at), word);
        break;
      }
      case 3:
        bytes.erase(at, length);
        break;
      case 4:
        bytes.insert(draw(5, bytes.size()), bytes.substr(at, length));
        break;
      case 5:
        bytes.resize(at);
        break;
    }
  }
  return bytes;
}

}  // namespace routecast
