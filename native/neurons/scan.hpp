// What both passes of the neuron scan share: the currents of a block, and how a potential charges and is reset.
#pragma once

#include "common/channels.hpp"
#include "common/simd.hpp"
#include "common/threads.hpp"

namespace spikeloom::SPIKELOOM_LEVEL {
namespace {

// Elements below which a scan runs on one core: its few operations an element are done before the others are awake.
constexpr int64_t MIN_PARALLEL_SCAN = 1 << 16;

// Where a row of currents u[t] comes from: the input; a row of floats that holds it, which of float32 is an input; or a
// normalisation of the input, factor x + shift (+ residual), computed where it is read.
enum class Source { input, row, normed, normed_residual };

template <class T>
struct Current {
  const T *x = nullptr, *residual = nullptr;
  const float *row = nullptr, *factor = nullptr, *shift = nullptr;

  template <Source source, class Lanes>
  ALWAYS_INLINE Vec get(int64_t i, Lanes lanes) const {
    if constexpr (source == Source::input) return lanes.get(x + i);
    if constexpr (source == Source::row) return lanes.get(row + i);
    const Vec normed = lanes.get(factor + i) * lanes.get(x + i) + lanes.get(shift + i);
    if constexpr (source == Source::normed_residual) return normed + lanes.get(residual + i);
    return normed;
  }
};

// The currents of the steps of a block.
template <class T>
class Currents {
 public:
  // A row of floats is written where the currents are read `several` times.
  Currents(const Scan& a, bool several, float* rows, int64_t block)
      : a_(a),
        block_(block),
        factor_(rows),
        shift_(rows + block),
        u_(rows + 2 * block),
        fixed_(a.factor && repeats(a.layout, block)),
        several_(several) {
    if (fixed_) fill(0, block);
  }

  static Source source_of(const Scan& a, bool several) {
    if (!a.factor) return Source::input;
    if (several) return std::is_same_v<T, float> ? Source::input : Source::row;
    return a.residual ? Source::normed_residual : Source::normed;
  }

  void enter(int64_t i0, int64_t n) {
    i0_ = i0, n_ = n;
    if (a_.factor && !fixed_) fill(i0, n);
  }

  Current<T> at(int64_t t) { return a_.factor && several_ ? as_row(t) : unread(t); }

  // u[t] in a row of floats.
  Current<T> as_row(int64_t t, void* sum = nullptr) {
    Current<T> whole;
    if constexpr (std::is_same_v<T, float>)
      whole.x = row(t, sum);
    else
      whole.row = row(t, sum);
    return whole;
  }
  // u[t] as a row of floats, and its copy in `sum`, whose rounding it then has.
  const float* row(int64_t t, void* sum = nullptr) {
    T* out = sum ? static_cast<T*>(sum) + t * a_.size + i0_ : nullptr;
    const Current<T> made = unread(t);
    if (a_.residual)
      fill_row<Source::normed_residual>(made, out);
    else
      fill_row<Source::normed>(made, out);
    return u_;
  }

  // What u[t] is made of, of this block or the next.
  void needed(int64_t t, bool next, PrefetchList<T>& prefetch) const {
    const int64_t i0 = next ? i0_ + block_ : i0_;
    prefetch.add(static_cast<const T*>(a_.x) + t * a_.x_stride + i0);
    if (a_.residual) prefetch.add(static_cast<const T*>(a_.residual) + t * a_.size + i0);
  }

 private:
  Current<T> unread(int64_t t) const {
    Current<T> made;
    made.x = static_cast<const T*>(a_.x) + t * a_.x_stride + i0_;
    if (a_.residual) made.residual = static_cast<const T*>(a_.residual) + t * a_.size + i0_;
    made.factor = factor_, made.shift = shift_;
    return made;
  }

  template <Source source>
  void fill_row(Current<T> made, T* out) {
    float* u = u_;
    each_vector(n_, PrefetchList<T>(), [=](int64_t i, auto lanes) ALWAYS_INLINE {
      Vec current = made.template get<source>(i, lanes);
      if (out) lanes.put(out + i, current), current = lanes.get(out + i);
      lanes.put(u + i, current);
    });
  }

  void fill(int64_t i0, int64_t n) {
    broadcast_channels(a_.layout, i0, n, a_.factor, factor_);
    broadcast_channels(a_.layout, i0, n, a_.shift, shift_);
  }

  const Scan& a_;
  int64_t block_;
  float *factor_, *shift_, *u_;
  bool fixed_, several_;
  int64_t i0_ = 0, n_ = 0;
};

constexpr int64_t CURRENT_ROWS = 3;

// Where a potential falls after a spike. Almost every neuron's rest is 0, which is less to compute; with a soft reset
// it is always 0.
enum class Reset { soft, zero, hard };

template <Reset reset>
ALWAYS_INLINE inline Vec charged(Vec v, Vec decay, Vec current, Vec rest) {
  if constexpr (reset == Reset::hard) return decay * (v - rest) + current + rest;
  return decay * v + current;
}

template <Reset reset>
ALWAYS_INLINE inline Vec after(Mask fires, Vec f, Vec threshold, Vec rest) {
  if constexpr (reset == Reset::soft) return select(fires, f - threshold, f);
  if constexpr (reset == Reset::zero) return select(fires, Vec{}, f);
  return select(fires, rest, f);
}

// n potentials of a state, or `value` where there is none.
inline void read_state(const float* state, float value, int64_t n, float* to) {
  if (state)
    std::memcpy(to, state, n * 4);
  else
    for (int64_t i = 0; i < n; i++) to[i] = value;
}

// Levels are taken K at a time, one at a time or the three of the papers' MLF neurons, whose loads and stores of the
// input, the output and its gradient are then shared. Runs body(j) for j in [0, K), unrolled.
template <int K, class Body>
ALWAYS_INLINE inline void each_level(const Body& body) {
  static_assert(K == 1 || K == 3);
  body(0);
  if constexpr (K == 3) body(1), body(2);
}

}  // namespace
}  // namespace spikeloom::SPIKELOOM_LEVEL
