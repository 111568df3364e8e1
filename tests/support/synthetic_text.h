// Text for tests: documents of made-up words with a Zipf-like distribution, seeded.
#pragma once

#include <string>
#include <vector>

#include "common/files.h"
#include "common/random.h"

namespace routecast {

inline std::string SyntheticWord(uint64_t id) {
  static const char* const kOnset[] = {"b", "d", "f", "g", "k",  "l",  "m",  "n",  "p",
                                       "r", "s", "t", "v", "st", "tr", "pl", "sh", "ch"};
  static const char* const kVowel[] = {"a", "e", "i", "o", "u", "ai", "ou"};
  std::string word;
  uint64_t bits = Mix(id, 77);
  for (int syllables = 1 + int(bits % 3); syllables > 0; --syllables) {
    bits = Mix(bits);
    word += kOnset[bits % 18];
    word += kVowel[(bits >> 8) % 7];
  }
  return word;
}

// Blank-line-separated documents (text:FILE#blocks). The next word depends on the last
// one, so that there is something to learn.
inline std::string SyntheticText(int documents, int words, uint64_t seed) {
  std::string text;
  for (int d = 0; d < documents; ++d) {
    uint64_t last = 0;
    for (int w = 0; w < words; ++w) {
      const uint64_t bits = Mix(seed, uint64_t(d), uint64_t(w));
      const double u = ToUnit(bits);
      const uint64_t rank = uint64_t(4000 * u * u * u);
      last = (bits & 3) == 0 ? rank : (last * 7 + rank % 5 + 1) % 4000;
      text += SyntheticWord(last) + (w % 11 == 10 ? ". " : " ");
    }
    text += "\n\n";
  }
  return text;
}

inline fs::path WriteSyntheticText(const fs::path& folder, int documents = 400) {
  const fs::path file = folder / "text.txt";
  WriteFileAtomic(file, SyntheticText(documents, 80, 5));
  return file;
}

}  // namespace routecast
