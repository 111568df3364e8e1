// What a shard is written through. RocksDB 7.8 (mended by facebook/rocksdb#12042) asks a
// file that it takes in for its first and last key without asking whether they could be
// read: after a failed read it enters the file with wrong bounds and reports success.
// Here a file of which a read failed cannot be linked to: that comes after the keys are
// read and before anything is entered, so the ingestion ends with the read's own error.
#pragma once

#include <memory>

#include "rocksdb/env.h"

namespace routecast {

// The default environment otherwise. Thread rule: any threads. One a database, for its
// life: a failed read is not forgotten.
std::unique_ptr<rocksdb::Env> NewIngestEnv();

}  // namespace routecast
