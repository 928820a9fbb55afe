// Values per channel, spread over the elements of a block and summed from them.
#pragma once

#include "common/math.hpp"

namespace spikeloom::SPIKELOOM_LEVEL {
namespace {

// The largest block of at most `block` elements in which every channel has the same places as in the first: a multiple
// of channels x inner, or `block` itself where that does not fit.
inline int64_t whole_periods(const Channels& layout, int64_t block) {
  const int64_t period = layout.channels * layout.inner;
  return period <= block ? block / period * period : block;
}

inline bool repeats(const Channels& layout, int64_t block) { return block % (layout.channels * layout.inner) == 0; }

// Runs body(channel, first, last) over the runs of one channel in the elements [i0, i0 + n), counted from i0.
template <class Body>
inline void for_runs(const Channels& layout, int64_t i0, int64_t n, const Body& body) {
  int64_t place = i0 % layout.inner, channel = i0 / layout.inner % layout.channels;
  for (int64_t i = 0; i < n;) {
    const int64_t last = smaller(n, i + layout.inner - place);
    body(channel, i, last);
    i = last, place = 0;
    channel = channel + 1 == layout.channels ? 0 : channel + 1;
  }
}

// A value a channel, spread over the elements [i0, i0 + n).
inline void broadcast_channels(const Channels& layout, int64_t i0, int64_t n, const float* values, float* row) {
  if (layout.inner == 1) {
    for (int64_t i = 0, c = i0 % layout.channels; i < n; c = 0) {
      const int64_t count = smaller(layout.channels - c, n - i);
      std::memcpy(row + i, values + c, count * 4);
      i += count;
    }
    return;
  }
  for_runs(layout, i0, n, [&](int64_t c, int64_t first, int64_t last) {
    const float value = values[c];
    for (int64_t i = first; i < last; i++) row[i] = value;
  });
}

// Adds a row of elements to a sum a channel, and clears the row.
inline void sum_by_channel(const Channels& layout, int64_t i0, int64_t n, float* row, double* sums) {
  if (layout.inner == 1) {
    for (int64_t i = 0, c = i0 % layout.channels; i < n; c = 0) {
      const int64_t count = smaller(layout.channels - c, n - i);
#pragma omp simd
      for (int64_t j = 0; j < count; j++) sums[c + j] += row[i + j];
      i += count;
    }
  } else {
    for_runs(layout, i0, n, [&](int64_t c, int64_t first, int64_t last) {
      float total = 0.f;
#pragma omp simd reduction(+ : total)
      for (int64_t i = first; i < last; i++) total += row[i];
      sums[c] += total;
    });
  }
  std::memset(row, 0, n * 4);
}

}  // namespace
}  // namespace spikeloom::SPIKELOOM_LEVEL
