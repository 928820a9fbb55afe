// Neurons behind layers, over all steps at once; and those behind a layer that was computed otherwise:
//
//   for t, i:  spikes[t, i] = neuron i of (x[t, i] + residual[t, i])
#include "engine/column_accumulate.hpp"
#include "engine/epilogue.hpp"
#include "engine/items.hpp"
#include "engine/partial.hpp"

namespace spikeloom::SPIKELOOM_LEVEL {
namespace {

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
template <class T>
struct Sums {
  const T* first;
  int64_t step, apart;
  const Vec *bias, *scale;
};

inline Vec sum_at(const float* p, Vec bias, const Vec*) { return get(p) + bias; }
template <class Integer>
inline Vec sum_at(const Integer* p, Vec bias, const Vec* scale) {
  return get_floats(p) * *scale + bias;
}

// n <= LANES neurons of one row. One function for all numbers: it is long, and they are a small part of what it does.
__attribute__((noinline, noclone)) void fire_few(const Epilogue& fired, int64_t at, int64_t step, int64_t n,
                                                 const void* sums, Number number, int64_t sums_step, Vec bias,
                                                 const Vec* scale) {
  const Epilogue a = fired;
  fire(a, at, step, n, [=](int64_t t) ALWAYS_INLINE {
    switch (number) {
      case Number::plain: return get_some(static_cast<const float*>(sums) + t * sums_step, n);
      case Number::floats: return sum_at(static_cast<const float*>(sums) + t * sums_step, bias, scale);
      case Number::shorts: return sum_at(static_cast<const int16_t*>(sums) + t * sums_step, bias, scale);
      default: return sum_at(static_cast<const int32_t*>(sums) + t * sums_step, bias, scale);
    }
  });
}

// Rows of V whole vectors, `apart` elements from one to the next, of neurons of K levels that rest at zero: a loop
// almost without branches.
template <int V, int K, class T>
void fire_resting_at_zero(const Epilogue& a, int64_t at, int64_t apart, int64_t rows, int64_t step,
                          const Sums<T>& sums) {
  // Copies: what is written through pointers to bytes could be anything.
  const Vec decay = all(a.decay), gain = all(a.gain);
  const IntVec to_zero = IntVec{} - (a.hard ? 1 : 0);
  const int64_t steps = a.steps, residual_step = a.residual_stride;
  uint8_t* const spikes = a.spikes + at;
  float *const state = a.v == nullptr ? nullptr : a.v + at, *const total = a.sum == nullptr ? nullptr : a.sum + at;
  const Sums<T> from = sums;
  constexpr bool scaled = !std::is_same_v<T, float>;
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
        for (int j = 0; apart > V * LANES && (shortcut || total != nullptr) && j < V * LANES; j += 16) {
          if constexpr (shortcut) __builtin_prefetch(residual + t * residual_step + (r + 2) * apart + j);
          if (total != nullptr) __builtin_prefetch(total + row + 2 * apart + j, 1);
        }
#pragma GCC unroll 4
        for (int j = 0; j < V; j++) {
          const T* const sum = from.first + t * from.step + r * from.apart + j * LANES;
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

// The same where no neurons are, and sums are all that is wanted.
template <int V, class T>
void sum_rows(const Epilogue& a, int64_t at, int64_t apart, int64_t rows, int64_t step, const Sums<T>& sums) {
  const float* const residual = a.residual == nullptr ? nullptr : a.residual + at;
  const uint8_t* const residual_spikes = a.residual_spikes == nullptr ? nullptr : a.residual_spikes + at;
  float* const total = a.sum + at;
  for (int64_t t = 0; t < a.steps; t++)
    for (int64_t r = 0; r < rows; r++)
      for (int j = 0; j < V; j++) {
        const int64_t place = r * apart + j * LANES;
        Vec u = sum_at(sums.first + t * sums.step + r * sums.apart + j * LANES, sums.bias[j], sums.scale + j);
        if (residual != nullptr) u += get(residual + t * a.residual_stride + place);
        if (residual_spikes != nullptr) u += get_some(residual_spikes + t * a.residual_stride + place, LANES);
        put(total + t * step + place, u);
      }
}

// The same of any neurons.
template <int V, class T>
void fire_rows(const Epilogue& a, int64_t at, int64_t apart, int64_t rows, int64_t step, const Sums<T>& sums) {
  const auto some = [&](int j) {
    return Sums<T>{sums.first + j * LANES, sums.step, sums.apart, sums.bias + j, sums.scale + j};
  };
  if (a.spikes == nullptr) return sum_rows<V>(a, at, apart, rows, step, sums);
  const bool plain = a.v_rest == 0.f;
  if (plain && a.levels == 1) return fire_resting_at_zero<V, 1>(a, at, apart, rows, step, sums);
  if (plain && a.levels == 3) {  // registers hold the potentials of two vectors
    constexpr int PAIR = V < 2 ? V : 2;
    for (int j = 0; j < V; j += PAIR) fire_resting_at_zero<PAIR, 3>(a, at + j * LANES, apart, rows, step, some(j));
    return;
  }
  for (int64_t r = 0; r < rows; r++)
    for (int j = 0; j < V; j++)
      fire_few(a, at + r * apart + j * LANES, step, LANES, some(j).first + r * sums.apart, number_of(sums.first),
               sums.step, sums.bias[j], sums.scale + j);
}

// Gives n neurons at other places, `apart` elements from one to the next, the spikes of those at the first.
void repeat_first(const Epilogue& a, int64_t at, int64_t step, int64_t apart, int64_t places, int64_t n) {
  for (int64_t t = 0; t < a.steps; t++) {
    uint8_t* const from = a.spikes + t * step + at;
    if (n == apart) {  // nothing lies between the places: twice as many at a time
      for (int64_t done = n, all = places * n; done < all; done *= 2)
        std::memcpy(from + done, from, smaller(done, all - done));
      continue;
    }
    for (int64_t place = 1; place < places; place++) std::memcpy(from + place * apart, from, n);
  }
}

// V vectors of a block of channels, as far as there are so many, at some places one behind the other.
template <int V, class T>
void fire_vectors(const EngineConv& a, int64_t channel, int64_t at, int64_t places, int64_t step, const Sums<T>& sums) {
  const int64_t left = a.out - channel;
  if (left >= V * LANES) return fire_rows<V>(a, at, a.out, places, step, sums);
  int64_t done = 0;
  if constexpr (V == 4)
    if (left >= 2 * LANES) fire_rows<2>(a, at, a.out, places, step, sums), done = 2;
  if constexpr (V == 2 && std::is_same_v<T, float>)
    if (left >= LANES) fire_rows<1>(a, at, a.out, places, step, sums), done = 1;
  for (int64_t place = 0; place < places; place++)
    for (int64_t k = done; k * LANES < left; k++)
      fire_few(a, at + place * a.out + k * LANES, step, smaller(LANES, left - k * LANES),
               sums.first + place * sums.apart + k * LANES, number_of(sums.first), sums.step, sums.bias[k],
               sums.scale + k);
}

template <class T>
void fire_images(const EngineConv& a, const Block& b, const T* sums) {
  const int64_t out_h = out_height(a), out_w = out_width(a), step = a.images * out_h * out_w * a.out;
  const int64_t width = b.vectors * LANES, area = b.rows * out_w, map_numbers = area * width;
  Vec bias[MOST_VECTORS], scale[MOST_VECTORS];  // once or several times, side by side
  for (int64_t j = 0; j < larger(b.vectors, 4); j++) {
    const int64_t c = b.channel + j % b.vectors * LANES, n = smaller(LANES, a.out - c);
    bias[j] = n > 0 ? get_some(a.bias + c, n) : Vec{};
    scale[j] = n > 0 && a.scale != nullptr ? get_some(a.scale + c, n) : Vec{};
  }
  for (int64_t image = 0; image < b.images; image++) {
    // Without spikes the sums of one place at one step are those of all, and where nothing else comes to the neurons,
    // so is what they do.
    const bool silent = stays_silent(a, b.active, image);
    const bool alike =
        silent && a.residual == nullptr && a.residual_spikes == nullptr && a.v == nullptr && a.sum == nullptr;
    const int64_t places = alike ? 1 : area, sums_step = silent ? 0 : map_numbers, sums_apart = silent ? 0 : width;
    const T* sum = sums + image * a.steps * map_numbers;
    const int64_t at = ((b.image + image) * out_h + b.row) * out_w * a.out + b.channel;
    int64_t done = 0;
    if (b.vectors < 4 && a.out == width) {  // nothing lies between the places: four vectors of some of them
      done = places * b.vectors / 4 * 4 / b.vectors;
      fire_rows<4>(a, at, 4 * LANES, done * b.vectors / 4, step,
                   Sums<T>{sum, sums_step, silent ? 0 : 4 * LANES, bias, scale});
    }
    for (int64_t j = 0; j < b.vectors && b.channel + j * LANES < a.out; j += 4) {
      const int64_t first = at + done * a.out + j * LANES;
      const Sums<T> from{sum + done * sums_apart + j * LANES, sums_step, sums_apart, bias + j, scale + j};
      if (b.vectors >= 4)
        fire_vectors<4>(a, b.channel + j * LANES, first, places - done, step, from);
      else if (b.vectors == 2)
        fire_vectors<2>(a, b.channel, first, places - done, step, from);
      else if constexpr (std::is_same_v<T, float>)  // of integers there are two at least
        fire_vectors<1>(a, b.channel, first, places - done, step, from);
    }
    if (alike) repeat_first(a, at, step, a.out, area, smaller(width, a.out - b.channel));
  }
}

}  // namespace

void fire_block(const EngineConv& a, const Block& block, const void* sums, Number number) {
  if (number == Number::shorts) return fire_images(a, block, static_cast<const int16_t*>(sums));
  if (number == Number::ints) return fire_images(a, block, static_cast<const int32_t*>(sums));
  fire_images(a, block, static_cast<const float*>(sums));
}

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
    fire_few(a, at + i, step, smaller(LANES, count - i), sums + i, Number::plain, sums_step, Vec{}, none);
  }
}

int engine_fire(const EngineFire& a) {
  if (a.levels > MOST_LEVELS) return UNSUPPORTED;
  constexpr int64_t BLOCK = 64 * LANES;
  return for_items((a.size + BLOCK - 1) / BLOCK, 0, a.threads, [&](int64_t item, float*) {
    const int64_t first = item * BLOCK;
    fire_span(a, first, smaller(BLOCK, a.size - first), a.size, a.x + first, a.x_stride, a.once);
  });
}

}  // namespace spikeloom::SPIKELOOM_LEVEL
