// Lists of the inputs of a place that are not zero, added up in the order of their lengths.
//
// A loop over a short list ends in a branch that the processor guesses wrongly, which costs as much as ten vectors of
// weights. Between lists of one length it guesses right, and several of them go through the loop together.
#pragma once

#include "engine/column_accumulate.hpp"

namespace spikeloom::SPIKELOOM_LEVEL {
namespace {

constexpr int64_t LISTED = 256;  // inputs of a list: their weights for a block of outputs are 32 KB at most

// Weights as [block of outputs, row of the filter, column, part of the channels, channel of the part, output of the
// block].
struct Parts {
  int64_t parts, part, groups, blocks, group_floats;
  int64_t floats() const { return blocks * groups * group_floats; }
};

inline Parts plan_parts(const Window& w, int64_t block) {
  Parts p;
  p.parts = (w.in + LISTED - 1) / LISTED;
  p.part = (w.in + p.parts - 1) / p.parts;
  p.groups = w.kernel_height * w.kernel_width * p.parts;
  p.blocks = (w.out + block - 1) / block;
  p.group_floats = p.part * block;
  return p;
}

// weight(o, c, ky, kx) reads one.
template <class Weight>
void pack_parts(const Window& w, const Parts& p, int64_t block, const Weight& weight, float* packed) {
  std::memset(packed, 0, p.floats() * 4);
  for (int64_t o = 0; o < w.out; o++)
    for (int64_t ky = 0; ky < w.kernel_height; ky++)
      for (int64_t kx = 0; kx < w.kernel_width; kx++)
        for (int64_t c = 0; c < w.in; c++) {
          const int64_t g = (ky * w.kernel_width + kx) * p.parts + c / p.part;
          packed[((o / block * p.groups + g) * p.part + c % p.part) * block + o % block] = weight(o, c, ky, kx);
        }
}

// The vectors of a block of outputs: at most 32 outputs, and 64 of 16 bits.
template <class Weight>
inline int vectors_of_block(const Window& w) {
  constexpr int MOST = 32 / LANES, lanes = Added<Weight>::LANES_OF;
  return w.out <= lanes ? 1 : w.out <= 2 * lanes ? 2 : MOST;
}

// Which of n <= 64 bytes are not zero, as bits.
inline uint64_t nonzero_bytes(const uint8_t* x, int64_t n) {
#if defined(__AVX512BW__)
  const __mmask64 valid = n == 64 ? ~uint64_t{0} : (uint64_t{1} << n) - 1;
  const __m512i v = _mm512_maskz_loadu_epi8(valid, x);
  return _mm512_test_epi8_mask(v, v);
#elif defined(__AVX2__)
  const auto of_half = [](const uint8_t* from) ALWAYS_INLINE {
    const __m256i v = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
    return static_cast<uint32_t>(~_mm256_movemask_epi8(_mm256_cmpeq_epi8(v, _mm256_setzero_si256())));
  };
  if (n == 64) return of_half(x) | uint64_t{of_half(x + 32)} << 32;
  if (n == 32) return of_half(x);
  if (n == 16) {
    const __m128i v = _mm_loadu_si128(reinterpret_cast<const __m128i*>(x));
    return ~static_cast<uint32_t>(_mm_movemask_epi8(_mm_cmpeq_epi8(v, _mm_setzero_si128()))) & 0xffffu;
  }
  alignas(32) uint8_t padded[64] = {};
  std::memcpy(padded, x, n);
  return of_half(padded) | uint64_t{of_half(padded + 32)} << 32;
#else
  uint64_t bits = 0;
  for (int64_t i = 0; i < n; i++) bits |= static_cast<uint64_t>(x[i] != 0) << i;
  return bits;
#endif
}

// Where the weights of a place's active inputs are in a group: some of a row of numbers.
struct List {
  uint32_t first, count;
};

// A list and the place whose sums it is added to.
struct Job {
  uint32_t first, count, to;
};

// Which of eight bits are set, one after the other.
struct Eights {
  uint16_t places[256][8];
  constexpr Eights() : places() {
    for (int byte = 0; byte < 256; byte++)
      for (int bit = 0, n = 0; bit < 8; bit++)
        if (byte >> bit & 1) places[byte][n++] = static_cast<uint16_t>(bit);
  }
};
constexpr Eights EIGHTS;

constexpr int64_t BEHIND = 8;  // numbers that are written behind a list

// Writes the list of n bytes, with rows of 2^shift weights, from the first-th number on.
inline List list_bytes(const uint8_t* x, int64_t n, int shift, uint16_t* numbers, int64_t first) {
  typedef uint16_t Eight __attribute__((vector_size(16)));
  int64_t end = first;
  for (int64_t c = 0; c < n; c += 64) {
    uint64_t word = nonzero_bytes(x + c, smaller(64, n - c));
    if (word == 0) continue;
    const int64_t count = __builtin_popcountll(word);
    uint16_t* to = numbers + end;
    // The same number of steps for any few, or any many: how many there are is a branch that cannot be guessed.
    if (count <= 4) {
#pragma GCC unroll 4
      for (int k = 0; k < 4; k++, word &= word - 1)
        to[k] = static_cast<uint16_t>((c + (word == 0 ? 0 : __builtin_ctzll(word))) << shift);
    } else {
      Eight base = Eight{} + static_cast<uint16_t>(c);
#pragma GCC unroll 8
      for (int byte = 0; byte < 8; byte++, word >>= 8) {
        Eight eight;
        std::memcpy(&eight, EIGHTS.places[word & 255], sizeof eight);
        eight = (eight + base) << shift;
        std::memcpy(to, &eight, sizeof eight);
        to += __builtin_popcountll(word & 255);
        base += 8;
      }
    }
    end += count;
  }
  return {static_cast<uint32_t>(first), static_cast<uint32_t>(end - first)};
}

// Jobs in the order of their lengths. each(body) runs body(list, place) for all of them, the same at every call.
// Returns how many there are.
template <class Each>
inline int64_t sort_jobs(const Each& each, Job* jobs) {
  uint32_t next[LISTED + 1] = {}, all = 0;
  each([&](List list, int64_t) ALWAYS_INLINE { next[list.count]++; });
  for (uint32_t& first : next) {
    const uint32_t count = first;
    first = all, all += count;
  }
  each([&](List list, int64_t to)
           ALWAYS_INLINE { jobs[next[list.count]++] = {list.first, list.count, static_cast<uint32_t>(to)}; });
  return all;
}

// Adds the weights of ROWS lists, the shortest first, to the sums of their places, or to zero.
template <int NV, int ROWS, class Weight>
ALWAYS_INLINE inline void add_lists(const Job* jobs, const uint16_t* numbers, const Weight* weight, bool to_zero,
                                    typename Added<Weight>::Number* sums) {
  using Sum = Added<Weight>;
  constexpr int STEP = Sum::LANES_OF;
  typename Sum::Vector sum[ROWS][NV];
  const uint16_t* list[ROWS];
  typename Sum::Number* to[ROWS];
  int64_t count[ROWS];
#pragma GCC unroll 4
  for (int r = 0; r < ROWS; r++) {
    const Job job = jobs[r];
    list[r] = numbers + job.first, count[r] = job.count, to[r] = sums + job.to * int64_t{NV * STEP};
    for (int j = 0; j < NV; j++) sum[r][j] = to_zero ? typename Sum::Vector{} : Sum::get(to[r] + j * STEP);
  }
  for (int64_t k = 0; k < count[0]; k++) {
#pragma GCC unroll 4
    for (int r = 0; r < ROWS; r++) add_weights<NV>(sum[r], weight + list[r][k]);
  }
#pragma GCC unroll 4
  for (int r = 1; r < ROWS; r++)
    for (int64_t k = count[0]; k < count[r]; k++) add_weights<NV>(sum[r], weight + list[r][k]);
#pragma GCC unroll 4
  for (int r = 0; r < ROWS; r++)
    for (int j = 0; j < NV; j++) Sum::put(to[r] + j * STEP, sum[r][j]);
}

// The same for jobs in the order of their lengths, while some of the weights that are `next` come into the second
// cache.
template <int NV, class Weight>
inline void add_sorted(const Job* job, int64_t jobs, const uint16_t* numbers, const Weight* weight, bool to_zero,
                       typename Added<Weight>::Number* sums, const Weight* next, int64_t next_floats) {
  constexpr int ROWS = NV >= 8 ? 1 : NV >= 4 ? 2 : 4;  // registers hold their sums
  const Job* const last = job + jobs;
  while (!to_zero && job < last && job->count == 0) job++;
  const int64_t turns = (last - job) / ROWS;
  for (int64_t turn = 0; turn < turns; turn++, job += ROWS) {
    if (next != nullptr) prefetch_part<false>(next, next_floats, turn, turns);
    add_lists<NV, ROWS>(job, numbers, weight, to_zero, sums);
  }
  for (; job < last; job++) add_lists<NV, 1>(job, numbers, weight, to_zero, sums);
}

}  // namespace
}  // namespace spikeloom::SPIKELOOM_LEVEL
