// PyTorch's .bin files (torch.save of a state dict, PyTorch 1.6 and later): where each
// tensor lies in the file. No LibTorch. Format: a zip archive of stored entries,
// NAME/data.pkl (a pickle, common/pickle.h) and NAME/data/KEY (the raw bytes of storage
// KEY); a tensor is a view of a storage, and several may share one.
// Thread rule: free functions, safe from any thread on different files.
#pragma once

#include <vector>

#include "common/byte_file.h"
#include "common/tensor_entry.h"

namespace routecast {

// In the order of their bytes in the file. Throws DataError naming the rule that the file
// breaks; every size is checked against the file before memory is taken. Refused by name:
// files older than PyTorch 1.6, big-endian files, anything but a flat dictionary of
// tensors, views whose elements share bytes.
std::vector<TensorEntry> ReadTorchFileIndex(const ByteFile& file);

}  // namespace routecast
