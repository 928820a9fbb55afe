// Pieces of a layer's work, shared among threads, each with memory that lasts from call to call.
#pragma once

#include "common/math.hpp"
#include "team.hpp"

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

// Runs body(item, scratch) for all items, each where a core is free: they differ in spikes. Returns OK or
// OUT_OF_MEMORY.
template <class Body>
int for_items(int64_t items, size_t bytes, int threads, const Body& body) {
  int status = OK;
  const auto piece = [&](int64_t item) {
    float* scratch = bytes == 0 ? nullptr : scratch_of_thread.of(bytes);
    if (bytes != 0 && scratch == nullptr)
      __atomic_store_n(&status, OUT_OF_MEMORY, __ATOMIC_RELAXED);
    else
      body(item, scratch);
  };
  share(items, threads, [](const void* p, int64_t item) { (*static_cast<const decltype(piece)*>(p))(item); }, &piece);
  return status;
}

}  // namespace
}  // namespace spikeloom::SPIKELOOM_LEVEL
