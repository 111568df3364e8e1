// Checksums over whole table files: XXH3, 128 bits. RocksDB's own is CRC-32C, which
// Debian's build computes by table: at a gigabyte a second, twice a file, that was most
// of what a write cost (docs/results). Files of older stores keep theirs.
#pragma once

#include <memory>

#include "rocksdb/file_checksum.h"

namespace routecast {

// For Options::file_checksum_gen_factory. Any thread.
std::shared_ptr<rocksdb::FileChecksumGenFactory> FileChecksums();

}  // namespace routecast
