// Memory ahead of its use: prefetches, and stores that go around the caches.
#pragma once

#include "common/math.hpp"

namespace spikeloom::SPIKELOOM_LEVEL {
namespace {

// Rows that will be read or written soon. A block of T steps is T rows far apart in each tensor: more streams than
// hardware prefetchers follow, so every row would begin with a cache miss.
template <class T>
class PrefetchList {
 public:
  void add(const T* row) { rows_[count_++] = row; }

  // Prefetches `count` elements of all rows from the i-th on. Addresses behind the rows are harmless: a prefetch never
  // faults.
  ALWAYS_INLINE void issue(int64_t i, int64_t count) const {
    constexpr int64_t line = 64 / sizeof(T);
    for (int r = 0; r < count_; r++)
      for (int64_t k = i; k < i + count; k += line) __builtin_prefetch(rows_[r] + k);
  }

 private:
  static constexpr int MOST = 6;
  const T* rows_[MOST];
  int count_ = 0;
};

// Prefetches the part-th of `parts` of memory that will be read soon, while there is something else to compute; into
// the first cache, or the second.
template <bool first_cache = true, class T>
inline void prefetch_part(const T* from, int64_t count, int64_t part, int64_t parts) {
  const int64_t last = count * (part + 1) / parts;
  for (int64_t i = count * part / parts; i < last; i += 64 / sizeof(T))
    __builtin_prefetch(from + i, 0, first_cache ? 3 : 2);
  // GCC takes a function that only prefetches for one without side effects, and would leave its calls out.
  __asm__ volatile("");
}

// Runs step(i) over [0, n), and prefetches a piece of the listed rows before each piece of as many elements: issued all
// at once, prefetches would fill the core's miss buffers and stall it.
template <int PIECE = 32, class T, class Body>
ALWAYS_INLINE inline void in_pieces(int64_t n, const PrefetchList<T>& prefetch, const Body& body) {
  int64_t i = 0;
  for (; i + PIECE <= n; i += PIECE) {
    prefetch.issue(i, PIECE);
    body(i, i + PIECE);
  }
  prefetch.issue(i, n - i);
  body(i, n);
}
template <class T, class Step>
ALWAYS_INLINE inline void each_in_pieces(int64_t n, const PrefetchList<T>& prefetch, const Step& step) {
  in_pieces(n, prefetch, [=](int64_t first, int64_t last) ALWAYS_INLINE {
#pragma omp simd
    for (int64_t i = first; i < last; i++) step(i);
  });
}

constexpr int64_t LAST_CACHE_BYTES = 4 << 20;  // a core's share of the last cache

// Whether a tensor is so large that its beginning leaves the caches before it is read again.
template <class T>
inline bool exceeds_caches(int64_t elements) {
  return elements * static_cast<int64_t>(sizeof(T)) >= LAST_CACHE_BYTES;
}

// Writes a row of such a tensor with non-temporal stores, which do not read what they overwrite. Whole lines only:
// partial ones are merged in few buffers. `fence_non_temporal` orders the stores before those that follow.
template <class T>
inline void store_non_temporal(T* to, const T* from, int64_t n) {
  int64_t i = 0;
#if defined(__AVX2__)
  constexpr int64_t LINE = 64, count = LINE / sizeof(T);
  i = smaller(n, static_cast<int64_t>(-reinterpret_cast<uintptr_t>(to) % LINE / sizeof(T)));
  std::memcpy(to, from, i * sizeof(T));
  for (; i + count <= n; i += count) {
#if defined(__AVX512F__)
    _mm512_stream_si512(reinterpret_cast<__m512i*>(to + i), _mm512_loadu_si512(from + i));
#else
    const __m256i* half = reinterpret_cast<const __m256i*>(from + i);
    const __m256i low = _mm256_loadu_si256(half), high = _mm256_loadu_si256(half + 1);
    _mm256_stream_si256(reinterpret_cast<__m256i*>(to + i), low);
    _mm256_stream_si256(reinterpret_cast<__m256i*>(to + i) + 1, high);
#endif
  }
#endif
  std::memcpy(to + i, from + i, (n - i) * sizeof(T));
}

inline void fence_non_temporal() {
#if defined(__AVX2__)
  _mm_sfence();
#endif
}

// Rows between the current one and the prefetched one: enough for it to arrive in time, and few enough for it to stay
// in cache until then.
inline int64_t prefetch_distance(int64_t steps) { return steps < 8 ? steps : 8; }

}  // namespace
}  // namespace spikeloom::SPIKELOOM_LEVEL
