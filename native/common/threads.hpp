// Work in blocks and groups of blocks, shared among threads.
#pragma once

#include "common/math.hpp"

namespace spikeloom::SPIKELOOM_LEVEL {
namespace {

// Elements of a block: `bytes` of scratch memory per element and core, in whole cache lines.
int64_t block_size(int64_t bytes_per_element, int64_t budget, int64_t most) {
  const int64_t n = budget / bytes_per_element / 64 * 64;
  return n < 64 ? 64 : smaller(n, most);
}

// The largest block of at most `most` elements, whole cache lines, of which as many make up `size` as 2 or 4 cores
// share evenly.
inline int64_t even_block(int64_t size, int64_t most) {
  const int64_t blocks = (size + most - 1) / most, even = (blocks + 3) / 4 * 4;
  return blocks < 3 ? most : smaller(most, (size + 32 * even - 1) / (32 * even) * 32);
}

// Runs body(first, count, scratch) over blocks of [0, size), one scratch buffer a thread. Returns OK or OUT_OF_MEMORY.
template <class Body>
int for_blocks(int64_t size, int64_t block, int64_t scratch_bytes, int threads, bool small, const Body& body) {
  int failed = 0;
  const int64_t blocks = (size + block - 1) / block;
#ifdef _OPENMP
#pragma omp parallel num_threads(threads) if (!small && blocks > 1)
#endif
  {
    void* scratch = std::aligned_alloc(64, (scratch_bytes + 63) / 64 * 64);
    if (scratch == nullptr) {
#ifdef _OPENMP
#pragma omp atomic write
#endif
      failed = OUT_OF_MEMORY;
    }
#ifdef _OPENMP
#pragma omp for schedule(static)
#endif
    for (int64_t b = 0; b < blocks; b++) {
      if (scratch != nullptr) body(b * block, smaller(block, size - b * block), static_cast<float*>(scratch));
    }
    std::free(scratch);
  }
  return failed;
}

// Groups of blocks, to share among cores: at most 64, and of at least 8 blocks (but two groups) where a group has rows
// of its own to prepare.
inline int64_t groups_of(int64_t blocks, bool prepared) {
  const int64_t groups = smaller(prepared ? blocks / 8 : blocks, 64);
  return groups < 2 ? smaller(blocks, 2) : groups;
}

// Runs body(group, first block, last block, scratch) over groups of blocks.
template <class Body>
int for_groups(int64_t blocks, int64_t groups, int64_t scratch_bytes, int threads, bool small, const Body& body) {
  return for_blocks(groups, 1, scratch_bytes, threads, small, [&](int64_t group, int64_t, float* scratch) {
    body(group, blocks * group / groups, blocks * (group + 1) / groups, scratch);
  });
}

// Adds the groups' values to out, in order, of rows `stride` apart.
template <class Number>
inline void reduce_partials(const Number* partial, int64_t groups, int64_t stride, int64_t count, Number* out) {
  for (int64_t g = 0; g < groups; g++) {
#pragma omp simd
    for (int64_t i = 0; i < count; i++) out[i] += partial[g * stride + i];
  }
}

constexpr int64_t MIN_PARALLEL = 1 << 14;  // elements below which waking the threads costs more than it gives

}  // namespace
}  // namespace spikeloom::SPIKELOOM_LEVEL
