// How this process takes memory from the system. Call at the start of main, before the
// first tensor and the first thread; for programs, not for libraries.
#pragma once

namespace routecast {

// A step allocates the same tensors as the one before it. By default the large ones go
// back to the kernel each time and come again as zeroed pages: a fifth of the time of a
// pre-training step with 20 M parameters.
void KeepFreedMemory();
// Half a gigabyte and more that is free at once still goes back; with this, nothing does.
// For trainings: a step of a large model or ensemble frees more than that at its end.
void KeepAllFreedMemory();

// LibTorch then asks for 2 MiB pages for tensors of that size and more. Decoding with a
// batch of one streams every weight once a token: 5 % to 9 % faster without the look-ups
// of small pages (docs/results). Leaves the user's own THP_MEM_ALLOC_ENABLE as it is.
void PreferLargePages();

}  // namespace routecast
