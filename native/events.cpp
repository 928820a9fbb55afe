// Layers of a trained network that run by their spikes: maps of bytes, [steps, images, height, width, channels].
#include "gather.hpp"

namespace spikeloom {
namespace SPIKELOOM_LEVEL {
namespace {

typedef int32_t IntVec __attribute__((vector_size(LANES * 4)));
typedef uint8_t ByteVec __attribute__((vector_size(LANES)));

inline Vec all(float value) { return Vec{} + value; }

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
  std::memcpy(&v, p, n * 4);
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
  std::memcpy(&v, p, n);
  return __builtin_convertvector(v, Vec);
#endif
}
inline void put_some(float* p, Vec v, int64_t n) {
#if defined(__AVX512BW__)
  if (n < LANES) return _mm512_mask_storeu_ps(p, first(n), reinterpret_cast<__m512>(v));
#endif
  n == LANES ? put(p, v) : void(std::memcpy(p, &v, n * 4));
}
inline void put_some(uint8_t* p, IntVec v, int64_t n) {
#if defined(__AVX512BW__)
  if (n < LANES) return _mm512_mask_cvtepi32_storeu_epi8(p, first(n), reinterpret_cast<__m512i>(v));
#endif
  if (n == LANES) return put_bytes(p, reinterpret_cast<Words>(v));
  const ByteVec bytes = __builtin_convertvector(v, ByteVec);
  std::memcpy(p, &bytes, n);
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

// Whether any of n bytes is not zero.
inline bool any_byte(const uint8_t* x, int64_t n) {
  uint64_t any = 0;
  for (int64_t i = 0; i < n && any == 0; i += 64) any = nonzero_bytes(x + i, smaller(64, n - i));
  return any != 0;
}

constexpr int64_t SECOND_CACHE = 512 << 10;  // bytes that the smallest of today's keep of a layer's weights

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

// Runs body(item, scratch) for all items, each where a core is free: they differ in spikes. Returns 0, or -1 without
// memory.
template <class Body>
int for_items(int64_t items, size_t bytes, int threads, const Body& body) {
  int failed = 0;
#ifdef _OPENMP
#pragma omp parallel for num_threads(threads) schedule(dynamic) if (items > 1 && threads > 1)
#endif
  for (int64_t i = 0; i < items; i++) {
    float* scratch = bytes == 0 ? nullptr : scratch_of_thread.of(bytes);
    if (bytes != 0 && scratch == nullptr) {
#ifdef _OPENMP
#pragma omp atomic write
#endif
      failed = -1;
      continue;
    }
    body(i, scratch);
  }
  return failed;
}

// --- what follows the sums --------------------------------------------------------------------------------------------

// n neurons side by side over all steps, the first at element `at`; current(t) gives their sums. Rounds as `scan` does.
// `a` is a copy of the caller's own: bytes that are written here could else be part of it.
template <class Current>
ALWAYS_INLINE inline void fire(const Fired& a, int64_t at, int64_t step, int64_t n, const Current& current) {
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

// Bytes 1 where a neuron fires, of V vectors side by side.
template <int V>
inline void put_fires(uint8_t* p, const IntVec* fires) {
#if defined(__AVX2__) && !defined(__AVX512F__)
  if constexpr (V == 4) {
    const auto words = [&](int j) { return reinterpret_cast<__m256i>(fires[j]); };
    const __m256i low = _mm256_packs_epi32(words(0), words(1)), high = _mm256_packs_epi32(words(2), words(3));
    // Packing works on halves of registers: four bytes of each vector, then the other four.
    const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
    const __m256i bytes = _mm256_permutevar8x32_epi32(_mm256_packs_epi16(low, high), order);
    return _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm256_and_si256(bytes, _mm256_set1_epi8(1)));
  }
#endif
  for (int j = 0; j < V; j++) put_bytes(p + j * LANES, reinterpret_cast<Words>(-fires[j]));
}

// Sums of rows of neurons: steps and rows lie so many floats apart; every vector of a row has a bias.
struct Sums {
  const float* first;
  int64_t step, apart;
  const Vec* bias;
};

// n <= LANES neurons of one row.
void fire_few(const Fired& fired, int64_t at, int64_t step, int64_t n, const float* sums, int64_t sums_step, Vec bias) {
  const Fired a = fired;
  fire(a, at, step, n, [=](int64_t t) ALWAYS_INLINE { return get(sums + t * sums_step) + bias; });
}

// Rows of V whole vectors, `apart` elements from one to the next. Neurons of one level that rest at zero, which is nearly
// all, have a loop with hardly a question.
template <int V>
void fire_rows(const Fired& a, int64_t at, int64_t apart, int64_t rows, int64_t step, const Sums& sums) {
  if (a.spikes == nullptr || a.levels != 1 || a.v_rest != 0.f) {
    for (int64_t r = 0; r < rows; r++)
      for (int j = 0; j < V; j++)
        fire_few(a, at + r * apart + j * LANES, step, LANES, sums.first + r * sums.apart + j * LANES, sums.step, sums.bias[j]);
    return;
  }
  // Copies: what is written through pointers to bytes could be anything.
  const Vec decay = all(a.decay), gain = all(a.gain), fire_at = all(a.fire_at[0]), threshold = all(a.threshold[0]);
  const IntVec to_zero = IntVec{} - (a.hard ? 1 : 0);
  const int64_t steps = a.steps, residual_step = a.residual_stride;
  uint8_t* const spikes = a.spikes + at;
  float *const state = a.v == nullptr ? nullptr : a.v + at, *const total = a.sum == nullptr ? nullptr : a.sum + at;
  const Sums from = sums;
  Vec bias[V];
  for (int j = 0; j < V; j++) bias[j] = from.bias[j];
  const auto run = [=](const auto* residual) ALWAYS_INLINE {
    constexpr bool shortcut = !std::is_same_v<decltype(residual), const Ones*>;
    for (int64_t r = 0; r < rows; r++) {
      Vec v[V];
      for (int j = 0; j < V; j++) v[j] = state == nullptr ? Vec{} : get(state + r * apart + j * LANES);
      for (int64_t t = 0; t < steps; t++) {
        const int64_t row = t * step + r * apart;
        IntVec fires[V];
        // Places lie far apart where the block is a part of the channels: no prefetcher of the processor's sees them come.
        for (int j = 0; (shortcut || total != nullptr) && j < V * LANES; j += 16) {
          if constexpr (shortcut) __builtin_prefetch(residual + t * residual_step + (r + 2) * apart + j);
          if (total != nullptr) __builtin_prefetch(total + row + 2 * apart + j, 1);
        }
#pragma GCC unroll 4
        for (int j = 0; j < V; j++) {
          Vec u = get(from.first + t * from.step + r * from.apart + j * LANES) + bias[j];
          if constexpr (shortcut) u += get_some(residual + t * residual_step + r * apart + j * LANES, LANES);
          if (total != nullptr) put(total + row + j * LANES, u);
          const Vec h = decay * v[j] + gain * u;
          fires[j] = h >= fire_at;
          v[j] = fires[j] ? (to_zero ? Vec{} : h - threshold) : h;
        }
        put_fires<V>(spikes + row, fires);
      }
      for (int j = 0; state != nullptr && j < V; j++) put(state + r * apart + j * LANES, v[j]);
    }
  };
  if (a.residual != nullptr)
    run(a.residual + at);
  else if (a.residual_spikes != nullptr)
    run(a.residual_spikes + at);
  else
    run(static_cast<const Ones*>(nullptr));
}

// Whether neurons that no input reaches do the same at all places.
inline bool starts_alike(const Fired& a) {
  return a.residual == nullptr && a.residual_spikes == nullptr && a.v == nullptr && a.sum == nullptr;
}

// Gives n neurons at other places, `apart` elements from one to the next, the spikes of those at the first.
void repeat_first(const Fired& a, int64_t at, int64_t step, int64_t apart, int64_t places, int64_t n) {
  for (int64_t t = 0; t < a.steps; t++) {
    uint8_t* const from = a.spikes + t * step + at;
    for (int64_t place = 1; place < places; place++) std::memcpy(from + place * apart, from, n);
  }
}

// --- convolutions -----------------------------------------------------------------------------------------------------

inline int64_t out_height(const EventConv& a) { return (a.height + 2 * a.padding_y - a.kernel_height) / a.stride + 1; }
inline int64_t out_width(const EventConv& a) { return (a.width + 2 * a.padding_x - a.kernel_width) / a.stride + 1; }

inline Window window(const EventConv& a, int64_t rows) {
  return {a.in, a.out, a.kernel_height, a.kernel_width, a.stride, rows, out_width(a)};
}

// Some images, some rows of their outputs: enough positions to use a block of weights often, sums that stay in cache.
struct Part {
  int64_t images, rows, bands, chunks;
};

inline Part divide(const EventConv& a, int64_t block) {
  const int64_t row = a.steps * out_width(a), most = (192 << 10) / (block * 4);
  Part p;
  p.rows = smaller(out_height(a), most / row < 1 ? 1 : most / row);
  p.bands = (out_height(a) + p.rows - 1) / p.rows;
  const int64_t fit = most / (row * p.rows);
  p.images = p.bands > 1 || fit < 1 ? 1 : smaller(a.images, fit);
  // Two cores with one image each, rather than one with both.
  if (p.images > 1) p.images = smaller(p.images, (a.images + a.threads - 1) / a.threads);
  p.chunks = (a.images + p.images - 1) / p.images * p.bands;
  return p;
}

// Bits (and values, if any is above one) of what some rows of outputs see, laid out by columns; false where all is zero.
template <class Value>
bool lay_out(const EventConv& a, const Plan& p, const uint8_t* image, int64_t first_row, uint8_t* bits, Value* values) {
  const int64_t from = first_row < 0 ? -first_row : 0, to = smaller(p.rows, a.height - first_row);
  if (to <= from || !any_byte(image + (first_row + from) * a.width * a.in, (to - from) * a.width * a.in)) return false;
  const int64_t columns = smaller(a.width, p.columns - a.padding_x), step = p.rows * p.C;
  // A row is read as it lies in memory, and narrow pixels several at a time.
  const auto lay = [&](auto known) ALWAYS_INLINE {
    constexpr int64_t NARROW = decltype(known)::value;  // channels, or 0
    for (int64_t row = from; row < to; row++) {
      const uint8_t* pixel = image + (first_row + row) * a.width * a.in;
      int64_t at = (a.padding_x * p.rows + row) * p.C;
      if constexpr (NARROW > 0) {
        for (int64_t column = 0; column < columns;) {
          const int64_t some = smaller(64 / NARROW, columns - column);
          uint64_t found = nonzero_bytes(pixel, some * NARROW);
          for (int64_t i = 0; i < some; i++, found >>= NARROW, at += step, pixel += NARROW) {
            std::memcpy(bits + at / 8, &found, NARROW / 8);
            if constexpr (!std::is_same_v<Value, Ones>) std::memcpy(values + at, pixel, NARROW);
          }
          column += some;
        }
      } else {
        for (int64_t column = 0; column < columns; column++, at += step, pixel += a.in) {
          for (int64_t c = 0; c < a.in; c += 64) {
            const uint64_t found = nonzero_bytes(pixel + c, smaller(64, a.in - c));
            if (a.in - c >= 64) std::memcpy(bits + (at + c) / 8, &found, 8);
            else std::memcpy(bits + (at + c) / 8, &found, (a.in - c + 7) / 8);
          }
          if constexpr (!std::is_same_v<Value, Ones>) std::memcpy(values + at, pixel, a.in);
        }
      }
    }
  };
  if (a.in == 16) lay(Constant<16>{});
  else if (a.in == 32) lay(Constant<32>{});
  else lay(Constant<0>{});
  return true;
}

template <class Value, int COLS, int NV, class Weight>
int convolve(const EventConv& a, const Weight* all_weights) {
  constexpr int64_t BLOCK = NV * LANES;
  // Maps that are worked on at once, as registers hold sums: steps of one image, whose lists are about as long.
  constexpr int MAPS = COLS * NV <= 3 ? 4 : COLS * NV <= 6 ? 2 : 1;
  const int64_t out_h = out_height(a), out_w = out_width(a);
  const Part part = divide(a, BLOCK);
  const Plan most = plan_gather(window(a, part.rows), BLOCK);
  const int64_t maps = a.steps * part.images, pixels = most.rows * most.columns;
  const int64_t bit_bytes = round_up(pixels * most.C / 8 + 16, 64);
  const int64_t value_bytes = std::is_same_v<Value, Ones> ? 0 : round_up(pixels * most.C, 64);
  const int64_t sums_floats = part.rows * out_w * BLOCK;
  const int64_t bytes = maps * (bit_bytes + value_bytes + sums_floats * 4);
  const int64_t map = a.height * a.width * a.in, step = a.images * out_h * out_w * a.out;
  // Weights that the second cache does not keep from image to image come while the group before them is worked on.
  const int64_t group_floats = most.group * a.kernel_width * BLOCK;
  const bool far = most.blocks * most.groups * group_floats * int64_t{sizeof(Weight)} > SECOND_CACHE;
  return for_items(part.chunks * most.blocks, bytes, a.threads, [&](int64_t item, float* scratch) {
    // All images by one block of weights, then the next: cores share weights, and no line of outputs.
    const int64_t o = item / part.chunks, chunk = item % part.chunks, band = chunk % part.bands;
    const int64_t n0 = chunk / part.bands * part.images, count = smaller(part.images, a.images - n0);
    const int64_t y0 = band * part.rows, rows = smaller(part.rows, out_h - y0);
    const Window w = window(a, rows);
    const Plan p = plan_gather(w, BLOCK);
    const Apart<Weight> apart{bit_bytes, value_bytes, rows * out_w * BLOCK, all_weights + weight_floats(w, p)};
    float* sums = scratch;  // [image, step, row, column, channel of the block]
    uint8_t* bits = reinterpret_cast<uint8_t*>(sums + maps * sums_floats);
    uint8_t* values = bits + maps * bit_bytes;
    std::memset(bits, 0, a.steps * count * bit_bytes);
    const int64_t row_floats = out_w * BLOCK, map_floats = rows * row_floats;
    const Weight* weights = all_weights + o * p.groups * group_floats;
    for (int64_t i = 0; i < a.steps * count; i++) {
      const int64_t t = i % a.steps, n = n0 + i / a.steps;
      if (far) ahead<false>(weights, group_floats, i, a.steps * count);
      const bool any = lay_out(a, p, a.x + (t * a.images + n) * map, y0 * a.stride - a.padding_y, bits + i * bit_bytes,
                               reinterpret_cast<Value*>(values + i * value_bytes));
      // The last byte of a map's bits, behind all of them, says whether there is any.
      bits[(i + 1) * bit_bytes - 1] = any;
    }
    const auto is_silent = [&](int64_t i) { return bits[(i + 1) * bit_bytes - 1] == 0; };
    const auto stays_silent = [&](int64_t image) {
      bool silent = starts_alike(a);
      for (int64_t t = 0; t < a.steps; t++) silent = silent && is_silent(image * a.steps + t);
      return silent;
    };
    for (int64_t i = 0; i < a.steps * count; i++)
      if (is_silent(i)) std::memset(sums + i * map_floats, 0, (stays_silent(i / a.steps) ? BLOCK : map_floats) * 4);
    for (int64_t g = 0; g < p.groups; g++) {
      const uint64_t mask = group_mask(p, g);
      const Weight* weight = weights + g * group_floats;
      const bool more = far && g + 1 < p.groups;
      const auto gather = [&](int64_t i, auto together) {
        for (int64_t y = 0; y < rows; y++) {
          if (more) ahead<false>(weight + group_floats, group_floats, i * rows + y, a.steps * count * rows);
          const int64_t from = y * a.stride * p.C + g * p.group;
          gather_row<COLS, NV, decltype(together)::value>(
              w, p, bits + i * bit_bytes + from / 8,
              reinterpret_cast<const Value*>(values + i * value_bytes + (value_bytes ? from : 0)), weight, mask, g == 0,
              sums + i * map_floats + y * row_floats, BLOCK, apart);
        }
      };
      const auto run = [&](int64_t& i, auto together) {
        bool any = false;
        for (int k = 0; k < decltype(together)::value; k++) any |= !is_silent(i + k);
        if (any) gather(i, together);
        i += decltype(together)::value;
      };
      const int64_t last = a.steps * count;
      int64_t i = 0;
      while (i + MAPS <= last) run(i, Constant<MAPS>{});
      if (MAPS == 4 && i + 2 <= last) run(i, Constant<2>{});
      while (i < last) run(i, Constant<1>{});
    }
    const Fired fired = a;
    const int64_t out = a.out;
    Vec bias[NV];
    for (int j = 0; j < NV; j++) {
      const int64_t c = o * BLOCK + j * LANES, n = smaller(LANES, out - c);
      bias[j] = n > 0 ? get_some(a.bias + c, n) : Vec{};
    }
    constexpr int V = NV < 4 ? NV : 4;
    for (int64_t image = 0; image < count; image++) {
      const bool silent = stays_silent(image);
      const int64_t places = silent ? 1 : rows * out_w;
      const float* sum = sums + image * a.steps * map_floats;
      const int64_t at = ((n0 + image) * out_h + y0) * out_w * out + o * BLOCK;
      int64_t done = 0;
      if (NV < 4 && out == BLOCK) {  // nothing lies between the places: four vectors of some of them
        Vec four[4];
        for (int j = 0; j < 4; j++) four[j] = bias[j % NV];
        done = places / (4 / NV) * (4 / NV);
        fire_rows<4>(fired, at, 4 * LANES, done * NV / 4, step, {sum, map_floats, 4 * LANES, four});
      }
      for (int j = 0; j < NV; j += V) {
        const int64_t c = o * BLOCK + j * LANES, first = at + done * out + j * LANES;
        const float* from = sum + done * BLOCK + j * LANES;
        if (out - c >= V * LANES) {
          fire_rows<V>(fired, first, out, places - done, step, {from, map_floats, BLOCK, bias + j});
          continue;
        }
        for (int64_t place = 0; place < places - done; place++)
          for (int k = 0; k < V && c + k * LANES < out; k++)
            fire_few(fired, first + place * out + k * LANES, step, smaller(LANES, out - c - k * LANES),
                     from + place * BLOCK + k * LANES, map_floats, bias[j + k]);
      }
      if (silent) repeat_first(fired, at, step, out, rows * out_w, smaller(BLOCK, out - o * BLOCK));
    }
  });
}

// sum + the weights of n channels times their values; `binary` values are 0 or 1.
ALWAYS_INLINE inline Vec add_active(Vec sum, const uint8_t* values, const float* weight, int64_t n, bool binary) {
#if defined(__AVX512BW__)
  if (binary) {
    const __m128i bytes = _mm_maskz_loadu_epi8(first(n), values);
    const __m512 s = reinterpret_cast<__m512>(sum);
    return reinterpret_cast<Vec>(_mm512_mask_add_ps(s, _mm_test_epi8_mask(bytes, bytes), s, _mm512_loadu_ps(weight)));
  }
#endif
  return sum + get_some(values, n) * get(weight);
}

// One filter a channel: sums straight from the bytes. A step without spikes in the rows that it sees costs no sums.
int convolve_depthwise(const EventConv& a) {
  const int64_t out_h = out_height(a), out_w = out_width(a), C = a.in, padded = round_up(C, LANES);
  const int64_t row = a.width * C, map = a.height * row, step = a.images * out_h * out_w * C;
  return for_items(a.images * out_h, 0, a.threads, [&](int64_t item, float*) {
    const Fired fired = a;
    const int64_t n = item / out_h, y = item % out_h, top = y * a.stride - a.padding_y;
    const int64_t first_ky = larger(0, -top), last_ky = smaller(a.kernel_height, a.height - top);
    const uint8_t* seen = a.x + n * map + (top + first_ky) * row;
    uint64_t active = 0;  // of the first 64 steps
    for (int64_t t = 0; t < smaller(a.steps, 64); t++)
      active |= uint64_t{any_byte(seen + t * a.images * map, (last_ky - first_ky) * row)} << t;
    const bool silent = active == 0 && a.steps <= 64 && starts_alike(a);
    for (int64_t c = 0; c < C; c += LANES) {
      const int64_t lanes = smaller(LANES, C - c);
      const Vec bias = get_some(a.bias + c, lanes);
      for (int64_t x = 0; x < (silent ? 1 : out_w); x++) {
        const int64_t left = x * a.stride - a.padding_x;
        const int64_t first_kx = larger(0, -left), last_kx = smaller(a.kernel_width, a.width - left);
        fire(fired, ((n * out_h + y) * out_w + x) * C + c, step, lanes, [&](int64_t t) ALWAYS_INLINE {
          Vec sum{};
          if (t < 64 && (active >> t & 1) == 0) return sum + bias;
          const uint8_t* image = seen + t * a.images * map + left * C + c;
          for (int64_t ky = first_ky; ky < last_ky; ky++)
            for (int64_t kx = first_kx; kx < last_kx; kx++)
              sum = add_active(sum, image + (ky - first_ky) * row + kx * C,
                               a.weight + (ky * a.kernel_width + kx) * padded + c, lanes, a.binary);
          return sum + bias;
        });
      }
    }
    if (silent) repeat_first(fired, (n * out_h + y) * out_w * C, step, C, out_w, C);
  });
}

}  // namespace

int event_pack(const EventPack& a) {
  const Window w{a.in, a.out, a.kernel_height, a.kernel_width, a.stride, 1, 1};
  const int64_t taps = a.kernel_height * a.kernel_width;
  if (a.depthwise) {
    const int64_t padded = round_up(a.out, LANES);
    *a.floats = taps * padded;
    if (a.packed == nullptr) return 0;
    std::memset(a.packed, 0, taps * padded * 4);
    for (int64_t c = 0; c < a.out; c++)
      for (int64_t k = 0; k < taps; k++) a.packed[k * padded + c] = a.weight[c * taps + k];
    return 0;
  }
  return by_shape(w, [&](auto columns, auto vectors) {
    const Plan p = plan_gather(w, decltype(vectors)::value * LANES);
    *a.floats = packed_floats(w, p);
    const auto weight = [&](int64_t o, int64_t c, int64_t ky, int64_t kx) {
      return a.weight[((o * a.in + c) * a.kernel_height + ky) * a.kernel_width + kx];
    };
    constexpr int COLS = decltype(columns)::value, NV = decltype(vectors)::value;
    if (a.packed != nullptr) pack_gather<COLS>(w, p, weight, a.packed);
    if (a.half != nullptr) halve(a.packed, *a.floats, COLS * NV, a.half);
    return 0;
  });
}

int event_conv(const EventConv& a) {
  if (a.levels > MOST_LEVELS) return -2;
  if (a.depthwise) return convolve_depthwise(a);
  return by_shape(window(a, 1), [&](auto columns, auto vectors) {
    constexpr int COLS = decltype(columns)::value, NV = decltype(vectors)::value;
    const auto run = [&](const auto* weight) {
      return a.binary ? convolve<Ones, COLS, NV>(a, weight) : convolve<uint8_t, COLS, NV>(a, weight);
    };
    return a.half != nullptr ? run(reinterpret_cast<const bfloat16*>(a.half)) : run(a.weight);
  });
}

int event_fire(const EventFire& a) {
  if (a.levels > MOST_LEVELS) return -2;
  constexpr int64_t BLOCK = 64 * LANES;
  return for_items((a.size + BLOCK - 1) / BLOCK, 0, a.threads, [&](int64_t item, float*) {
    const Fired fired = a;
    const int64_t last = smaller(a.size, (item + 1) * BLOCK);
    const int64_t rows = (last - item * BLOCK) / (4 * LANES);
    const Vec none[4] = {};
    fire_rows<4>(fired, item * BLOCK, 4 * LANES, rows, a.size, {a.x + item * BLOCK, a.x_stride, 4 * LANES, none});
    for (int64_t i = item * BLOCK + rows * 4 * LANES; i < last; i += LANES) {
      const int64_t n = smaller(LANES, last - i);
      fire(fired, i, a.size, n, [&](int64_t t) ALWAYS_INLINE { return get_some(a.x + t * a.x_stride + i, n); });
    }
  });
}

int event_max_pool(const EventPool& a) {
  const int64_t out_h = (a.height + 2 * a.padding - a.kernel) / a.stride + 1;
  const int64_t out_w = (a.width + 2 * a.padding - a.kernel) / a.stride + 1, C = a.channels;
  return for_items(a.images * out_h, 0, a.threads, [&](int64_t item, float*) {
    const int64_t n = item / out_h, y = item % out_h;
    for (int64_t x = 0; x < out_w; x++) {
      uint8_t* out = a.y + ((n * out_h + y) * out_w + x) * C;
      std::memset(out, 0, C);
      for (int64_t ky = 0; ky < a.kernel; ky++)
        for (int64_t kx = 0; kx < a.kernel; kx++) {
          const int64_t row = y * a.stride - a.padding + ky, column = x * a.stride - a.padding + kx;
          if (row < 0 || row >= a.height || column < 0 || column >= a.width) continue;
          const uint8_t* in = a.x + ((n * a.height + row) * a.width + column) * C;
#pragma omp simd
          for (int64_t c = 0; c < C; c++) out[c] = in[c] > out[c] ? in[c] : out[c];
        }
    }
  });
}

int event_attention(const EventAttention& a) {
  const int64_t C = a.channels, d = C / a.heads, L = a.tokens, wide = round_up(d, LANES);
  return for_items(a.maps * a.heads, (d + 1) * wide * 4, a.threads, [&](int64_t item, float* scratch) {
    const int64_t map = item / a.heads, head = item % a.heads, first = map * L * C + head * d;
    const auto rows_of = [&](const uint8_t* token, const auto& body) {
      for (int64_t c = 0; c < d; c += 64)
        for (uint64_t word = nonzero_bytes(token + c, smaller(64, d - c)); word != 0; word &= word - 1) {
          const int64_t row = c + __builtin_ctzll(word);
          body(row, static_cast<float>(token[row]));
        }
    };
    float *state = scratch + wide, *sum = scratch;
    std::memset(scratch, 0, (d + 1) * wide * 4);
    for (int64_t l = 0; l < L; l++) {
      const uint8_t* v = a.v + first + l * C;
      rows_of(a.k + first + l * C, [&](int64_t row, float k) {
        for (int64_t c = 0; c < d; c += LANES) {
          float* to = state + row * wide + c;
          put(to, get(to) + k * get_some(v + c, smaller(LANES, d - c)));
        }
      });
    }
    for (int64_t l = 0; l < L; l++) {
      std::memset(sum, 0, wide * 4);
      rows_of(a.q + first + l * C, [&](int64_t row, float q) {
        for (int64_t c = 0; c < d; c += LANES) put(sum + c, get(sum + c) + q * get(state + row * wide + c));
      });
      for (int64_t c = 0; c < d; c++) a.y[first + l * C + c] = sum[c] * a.scale;
    }
  });
}

}  // namespace SPIKELOOM_LEVEL
}  // namespace spikeloom
