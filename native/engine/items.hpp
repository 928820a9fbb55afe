// Pieces of a layer's work, shared among threads, each with memory that lasts from call to call.
#pragma once

#include <atomic>

#include "common/math.hpp"
#include "engine/workers.hpp"

namespace spikeloom::SPIKELOOM_LEVEL {
namespace {

// Memory of one thread that lasts from call to call.
struct Scratch {
  void* memory = nullptr;
  size_t size = 0;
  ~Scratch() { std::free(memory); }
  float* of(size_t bytes) {
    if (bytes > size) {
      std::free(memory);
      memory = std::aligned_alloc(64, (bytes + 63) / 64 * 64);
      size = memory == nullptr ? 0 : bytes;
    }
    return static_cast<float*>(memory);
  }
};
thread_local Scratch scratch_of_thread;
thread_local Scratch lists_of_thread;  // that its call shares with other threads

// Runs body(item, scratch) for all items, each where a core is free: they differ in spikes. `a` has the kernel's
// threads. Returns OK or OUT_OF_MEMORY.
template <class Arguments, class Body>
int for_items(const Arguments& a, int64_t items, size_t bytes, const Body& body) {
  std::atomic<int> failed{OK};
  const auto run = [&](int64_t i) {
    float* scratch = bytes == 0 ? nullptr : scratch_of_thread.of(bytes);
    if (bytes != 0 && scratch == nullptr)
      failed = OUT_OF_MEMORY;
    else
      body(i, scratch);
  };
#ifdef _OPENMP
  if (a.openmp) {
#pragma omp parallel for num_threads(a.threads) schedule(dynamic) if (items > 1 && a.threads > 1)
    for (int64_t i = 0; i < items; i++) run(i);
    return failed;
  }
#endif
  const auto run_piece = [](const void* of, int64_t i) { (*static_cast<decltype(&run)>(of))(i); };
  share_pieces(items, a.threads, run_piece, &run);
  return failed;
}

}  // namespace
}  // namespace spikeloom::SPIKELOOM_LEVEL
