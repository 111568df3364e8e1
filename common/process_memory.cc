#include "common/process_memory.h"

#include <malloc.h>

#include <cstdlib>

namespace routecast {

void KeepFreedMemory() {
  mallopt(M_MMAP_THRESHOLD, 256 << 20);
  mallopt(M_TRIM_THRESHOLD, 512 << 20);
}

void KeepAllFreedMemory() { mallopt(M_TRIM_THRESHOLD, -1); }

void PreferLargePages() { ::setenv("THP_MEM_ALLOC_ENABLE", "1", /*overwrite=*/0); }

}  // namespace routecast
