// Neurons behind the layers that run by their spikes, over all steps at once.
#pragma once

#include "engine/column_accumulate.hpp"

namespace spikeloom::SPIKELOOM_LEVEL {
namespace {

typedef int32_t IntVec __attribute__((vector_size(LANES * 4)));
typedef uint8_t ByteVec __attribute__((vector_size(LANES)));

#if defined(__AVX512BW__)
inline __mmask16 first(int64_t n) { return static_cast<__mmask16>((1u << n) - 1); }
#endif

// The first n values, zeros behind them. Nothing behind the n-th is touched.
inline Vec get_some(const float* p, int64_t n) {
  if (n == LANES) return get(p);
#if defined(__AVX512BW__)
  return reinterpret_cast<Vec>(_mm512_maskz_loadu_ps(first(n), p));
#else
  Vec v{};
  n == 4 ? std::memcpy(&v, p, 16) : std::memcpy(&v, p, n * 4);
  return v;
#endif
}
inline Vec get_some(const uint8_t* p, int64_t n) {
  if (n == LANES) return __builtin_convertvector(reinterpret_cast<IntVec>(get_bytes(p)), Vec);
#if defined(__AVX512BW__)
  const Words wide = reinterpret_cast<Words>(_mm512_cvtepu8_epi32(_mm_maskz_loadu_epi8(first(n), p)));
  return __builtin_convertvector(reinterpret_cast<IntVec>(wide), Vec);
#else
  ByteVec v{};
  n == 4 ? std::memcpy(&v, p, 4) : std::memcpy(&v, p, n);
  return __builtin_convertvector(v, Vec);
#endif
}
inline void put_some(float* p, Vec v, int64_t n) {
#if defined(__AVX512BW__)
  if (n < LANES) return _mm512_mask_storeu_ps(p, first(n), reinterpret_cast<__m512>(v));
#endif
  if (n == LANES) return put(p, v);
  n == 4 ? std::memcpy(p, &v, 16) : std::memcpy(p, &v, n * 4);
}
inline void put_some(uint8_t* p, IntVec v, int64_t n) {
#if defined(__AVX512BW__)
  if (n < LANES) return _mm512_mask_cvtepi32_storeu_epi8(p, first(n), reinterpret_cast<__m512i>(v));
#endif
  if (n == LANES) return put_bytes(p, reinterpret_cast<Words>(v));
  const ByteVec bytes = __builtin_convertvector(v, ByteVec);
  n == 4 ? std::memcpy(p, &bytes, 4) : std::memcpy(p, &bytes, n);
}

// n neurons side by side over all steps, the first at element `at`; current(t) gives their sums. Rounds as `scan` does.
// `a` is a copy of the caller's own: bytes that are written here could else be part of it.
template <class Current>
ALWAYS_INLINE inline void fire(const Epilogue& a, int64_t at, int64_t step, int64_t n, const Current& current) {
  const auto input = [&](int64_t t) ALWAYS_INLINE {
    Vec u = current(t);
    if (a.residual != nullptr) u += get_some(a.residual + t * a.residual_stride + at, n);
    if (a.residual_spikes != nullptr) u += get_some(a.residual_spikes + t * a.residual_stride + at, n);
    return u;
  };
  if (a.spikes == nullptr) {
    for (int64_t t = 0; t < a.steps; t++) put_some(a.sum + t * step + at, input(t), n);
    return;
  }
  const Vec decay = all(a.decay), gain = all(a.gain), rest = all(a.v_rest);
  const bool at_zero = a.v_rest == 0.f;
  const auto advance = [&](Vec fire_at, Vec threshold, Vec v, Vec u, IntVec& fires) ALWAYS_INLINE {
    // A rest of zero adds nothing: two operations fewer.
    const Vec h = at_zero ? decay * v + gain * u : decay * (v - rest) + gain * u + rest;
    fires = h >= fire_at;
    return fires ? (a.hard ? rest : h - threshold) : h;
  };
  // As many levels as the papers have, in registers; else as many as there are.
  const auto run = [&](auto known) ALWAYS_INLINE {
    constexpr int K = decltype(known)::value, MOST = K == 0 ? MOST_LEVELS : K;
    const int levels = K == 0 ? a.levels : K;
    Vec v[MOST], fire_at[MOST], threshold[MOST];
#pragma GCC unroll 4
    for (int k = 0; k < levels; k++) {
      v[k] = a.v == nullptr ? rest : get_some(a.v + k * step + at, n);
      fire_at[k] = all(a.fire_at[k]), threshold[k] = all(a.threshold[k]);
    }
    for (int64_t t = 0; t < a.steps; t++) {
      const Vec u = input(t);
      if (a.sum != nullptr) put_some(a.sum + t * step + at, u, n);
      IntVec count{};
#pragma GCC unroll 4
      for (int k = 0; k < levels; k++) {
        IntVec fires;
        v[k] = advance(fire_at[k], threshold[k], v[k], u, fires);
        count -= fires;
      }
      put_some(a.spikes + t * step + at, count, n);
    }
    for (int k = 0; a.v != nullptr && k < levels; k++) put_some(a.v + k * step + at, v[k], n);
  };
  if (a.levels == 1)
    run(Constant<1>{});
  else if (a.levels == 3)
    run(Constant<3>{});
  else
    run(Constant<0>{});
}

// How many levels of a neuron fire, as bytes, of V vectors of minus that side by side.
template <int V>
inline void put_fires(uint8_t* p, const IntVec* fires) {
#if defined(__AVX2__) && !defined(__AVX512F__)
  if constexpr (V == 4) {
    const auto words = [&](int j) { return reinterpret_cast<__m256i>(fires[j]); };
    const __m256i low = _mm256_packs_epi32(words(0), words(1)), high = _mm256_packs_epi32(words(2), words(3));
    // Packing works on halves of registers: four bytes of each vector, then the other four.
    const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
    const __m256i bytes = _mm256_permutevar8x32_epi32(_mm256_packs_epi16(low, high), order);
    return _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm256_sub_epi8(_mm256_setzero_si256(), bytes));
  }
#endif
  for (int j = 0; j < V; j++) put_bytes(p + j * LANES, reinterpret_cast<Words>(-fires[j]));
}

// Sums of rows of neurons: steps and rows lie so many numbers apart; every vector of a row has a bias, and of integers
// a scale.
template <class Number>
struct Sums {
  const Number* first;
  int64_t step, apart;
  const Vec *bias, *scale;
};

inline Vec sum_at(const float* p, Vec bias, const Vec*) { return get(p) + bias; }
template <class Integer>
inline Vec sum_at(const Integer* p, Vec bias, const Vec* scale) {
  return get_floats(p) * *scale + bias;
}

// n <= LANES neurons of one row.
template <class Number>
void fire_few(const Epilogue& fired, int64_t at, int64_t step, int64_t n, const Number* sums, int64_t sums_step,
              Vec bias, const Vec* scale) {
  const Epilogue a = fired;
  fire(a, at, step, n, [=](int64_t t) ALWAYS_INLINE { return sum_at(sums + t * sums_step, bias, scale); });
}

// Rows of V whole vectors, `apart` elements from one to the next, of neurons of K levels that rest at zero: a loop
// almost without branches.
template <int V, int K, class Number>
void fire_resting_at_zero(const Epilogue& a, int64_t at, int64_t apart, int64_t rows, int64_t step,
                          const Sums<Number>& sums) {
  // Copies: what is written through pointers to bytes could be anything.
  const Vec decay = all(a.decay), gain = all(a.gain);
  const IntVec to_zero = IntVec{} - (a.hard ? 1 : 0);
  const int64_t steps = a.steps, residual_step = a.residual_stride;
  uint8_t* const spikes = a.spikes + at;
  float *const state = a.v == nullptr ? nullptr : a.v + at, *const total = a.sum == nullptr ? nullptr : a.sum + at;
  const Sums<Number> from = sums;
  constexpr bool scaled = !std::is_same_v<Number, float>;
  Vec bias[V], scale[scaled ? V : 1], fire_at[K], threshold[K];
  for (int j = 0; j < V; j++) bias[j] = from.bias[j];
  for (int j = 0; scaled && j < V; j++) scale[j] = from.scale[j];
  for (int k = 0; k < K; k++) fire_at[k] = all(a.fire_at[k]), threshold[k] = all(a.threshold[k]);
  const auto run = [=](const auto* residual) ALWAYS_INLINE {
    constexpr bool shortcut = !std::is_same_v<decltype(residual), const Ones*>;
    for (int64_t r = 0; r < rows; r++) {
      Vec v[V][K];
      for (int j = 0; j < V; j++)
        for (int k = 0; k < K; k++) v[j][k] = state == nullptr ? Vec{} : get(state + k * step + r * apart + j * LANES);
      for (int64_t t = 0; t < steps; t++) {
        const int64_t row = t * step + r * apart;
        IntVec fires[V];
        // Places lie far apart where the block is a part of the channels: no prefetcher of the processor's sees them
        // come.
        for (int j = 0; (shortcut || total != nullptr) && j < V * LANES; j += 16) {
          if constexpr (shortcut) __builtin_prefetch(residual + t * residual_step + (r + 2) * apart + j);
          if (total != nullptr) __builtin_prefetch(total + row + 2 * apart + j, 1);
        }
#pragma GCC unroll 4
        for (int j = 0; j < V; j++) {
          const Number* const sum = from.first + t * from.step + r * from.apart + j * LANES;
          Vec u = sum_at(sum, bias[j], scale + (scaled ? j : 0));
          if constexpr (shortcut) u += get_some(residual + t * residual_step + r * apart + j * LANES, LANES);
          if (total != nullptr) put(total + row + j * LANES, u);
          u *= gain;
#pragma GCC unroll 4
          for (int k = 0; k < K; k++) {
            const Vec h = decay * v[j][k] + u;
            const IntVec fired = h >= fire_at[k];
            v[j][k] = fired ? (to_zero ? Vec{} : h - threshold[k]) : h;
            fires[j] = k == 0 ? fired : fires[j] + fired;
          }
        }
        put_fires<V>(spikes + row, fires);
      }
      for (int j = 0; state != nullptr && j < V; j++)
        for (int k = 0; k < K; k++) put(state + k * step + r * apart + j * LANES, v[j][k]);
    }
  };
  if (a.residual != nullptr)
    run(a.residual + at);
  else if (a.residual_spikes != nullptr)
    run(a.residual_spikes + at);
  else
    run(static_cast<const Ones*>(nullptr));
}

// The same of any neurons.
template <int V, class Number>
void fire_rows(const Epilogue& a, int64_t at, int64_t apart, int64_t rows, int64_t step, const Sums<Number>& sums) {
  const auto some = [&](int j) {
    return Sums<Number>{sums.first + j * LANES, sums.step, sums.apart, sums.bias + j, sums.scale + j};
  };
  const bool plain = a.spikes != nullptr && a.v_rest == 0.f;
  if (plain && a.levels == 1) return fire_resting_at_zero<V, 1>(a, at, apart, rows, step, sums);
  if (plain && a.levels == 3) {  // registers hold the potentials of two vectors
    constexpr int PAIR = V < 2 ? V : 2;
    for (int j = 0; j < V; j += PAIR) fire_resting_at_zero<PAIR, 3>(a, at + j * LANES, apart, rows, step, some(j));
    return;
  }
  for (int64_t r = 0; r < rows; r++)
    for (int j = 0; j < V; j++)
      fire_few(a, at + r * apart + j * LANES, step, LANES, some(j).first + r * sums.apart, sums.step, sums.bias[j],
               sums.scale + j);
}

// `count` neurons side by side, the first at element `at`, on sums without a bias, `sums_step` apart (0: the same at
// all steps). `once`: so is what is added to them, and their total is written for one step.
void fire_span(const Epilogue& given, int64_t at, int64_t count, int64_t step, const float* sums, int64_t sums_step,
               bool once) {
  Epilogue a = given;
  if (once && a.sum != nullptr) {
    Epilogue total = given;
    total.steps = 1, total.spikes = nullptr;
    fire_span(total, at, count, step, sums, 0, false);
    if (a.spikes == nullptr) return;
    a.sum = nullptr;
  }
  const int64_t rows = count / (4 * LANES);
  const Vec none[4] = {};
  fire_rows<4>(a, at, 4 * LANES, rows, step, Sums<float>{sums, sums_step, 4 * LANES, none, none});
  for (int64_t i = rows * 4 * LANES; i < count; i += LANES) {
    const int64_t n = smaller(LANES, count - i);
    const float* const from = sums + i;
    fire(a, at + i, step, n, [=](int64_t t) ALWAYS_INLINE { return get_some(from + t * sums_step, n); });
  }
}

// Whether neurons that no input reaches do the same at all places.
inline bool starts_alike(const Epilogue& a) {
  return a.residual == nullptr && a.residual_spikes == nullptr && a.v == nullptr && a.sum == nullptr;
}

// Gives n neurons at other places, `apart` elements from one to the next, the spikes of those at the first.
void repeat_first(const Epilogue& a, int64_t at, int64_t step, int64_t apart, int64_t places, int64_t n) {
  for (int64_t t = 0; t < a.steps; t++) {
    uint8_t* const from = a.spikes + t * step + at;
    for (int64_t place = 1; place < places; place++) std::memcpy(from + place * apart, from, n);
  }
}

}  // namespace
}  // namespace spikeloom::SPIKELOOM_LEVEL
