// Convolutions of channels-last images and their gradients: zeros left out, or by Winograd's minimal filtering.
#include "gather.hpp"

namespace spikeloom {
namespace SPIKELOOM_LEVEL {
namespace {

// Floats between rows that are used together: an odd number of cache lines, so that they spread over the cache.
inline int64_t apart(int64_t n) { return ((n + 15) / 16 | 1) * 16; }

// Floor of the quotient; the divisor is positive.
inline int64_t divide(int64_t n, int64_t unit) { return n >= 0 ? n / unit : -((-n + unit - 1) / unit); }

// Which of n <= 16 numbers are not zero, as bits.
inline uint32_t nonzeros(const float* x, int64_t n) {
#if defined(__AVX512F__)
  const __mmask16 valid = static_cast<__mmask16>((1u << n) - 1);
  return _mm512_mask_cmp_ps_mask(valid, _mm512_maskz_loadu_ps(valid, x), _mm512_setzero_ps(), _CMP_NEQ_UQ);
#else
  uint32_t bits = 0;
#if defined(__AVX2__)
  if (n == 16) {
    const auto of_eight = [](const float* from) {
      return static_cast<uint32_t>(_mm256_movemask_ps(_mm256_cmp_ps(_mm256_loadu_ps(from), _mm256_setzero_ps(), _CMP_NEQ_UQ)));
    };
    return of_eight(x) | of_eight(x + 8) << 8;
  }
#endif
  for (int64_t i = 0; i < n; i++) bits |= static_cast<uint32_t>(x[i] != 0.f) << i;
  return bits;
#endif
}
inline uint32_t nonzeros(const bfloat16* x, int64_t n) {
#if defined(__AVX512F__)
  const __mmask16 valid = static_cast<__mmask16>((1u << n) - 1);
  return _mm256_test_epi16_mask(_mm256_maskz_loadu_epi16(valid, x), _mm256_set1_epi16(0x7fff));
#else
  uint32_t bits = 0;
#if defined(__AVX2__)
  if (n == 16) {
    const __m256i magnitude = _mm256_and_si256(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(x)), _mm256_set1_epi16(0x7fff));
    const __m256i zero = _mm256_cmpeq_epi16(magnitude, _mm256_setzero_si256());
    // Sixteen halves to sixteen bytes, in order.
    const __m128i bytes = _mm_packs_epi16(_mm256_castsi256_si128(zero), _mm256_extracti128_si256(zero, 1));
    return ~static_cast<uint32_t>(_mm_movemask_epi8(bytes)) & 0xffffu;
  }
#endif
  for (int64_t i = 0; i < n; i++) bits |= static_cast<uint32_t>((x[i].bits & 0x7fffu) != 0) << i;
  return bits;
#endif
}

// Whole vectors first: pixels are short.
template <class Body>
inline void in_sixteens(int64_t n, const Body& body) {
  int64_t i = 0;
  for (; i + 16 <= n; i += 16) {
#pragma omp simd
    for (int64_t j = 0; j < 16; j++) body(i + j);
  }
  for (; i < n; i++) body(i);
}
template <class T>
inline void to_float(const T* from, int64_t n, float* to) {
  in_sixteens(n, [=](int64_t i) { to[i] = load(from, i); });
}
template <class T>
inline void from_float(const float* from, int64_t n, T* to) {
  in_sixteens(n, [=](int64_t i) { store(to, i, from[i]); });
}

// Where weight (out o, in c, row ky, column kx) lies.
inline int64_t place(const Convolution& a, int64_t o, int64_t c, int64_t ky, int64_t kx) {
  return o * a.weight_out + c * a.weight_in + ky * a.weight_row + kx * a.weight_column;
}

inline int64_t out_height(const Convolution& a) { return (a.height + 2 * a.padding - a.kernel_height) / a.stride + 1; }
inline int64_t out_width(const Convolution& a) { return (a.width + 2 * a.padding - a.kernel_width) / a.stride + 1; }

// --- forward --------------------------------------------------------------------------------------------------------------

inline Window window(const Convolution& a) {
  return {a.in, a.out, a.kernel_height, a.kernel_width, a.stride, out_height(a), out_width(a)};
}

template <class T, int COLS, int NV>
int forward_of(const Convolution& a) {
  const Window w = window(a);
  const Plan p = plan_gather(w, NV * LANES);
  float* packed = static_cast<float*>(std::aligned_alloc(64, round_up(packed_floats(w, p) * 4, 64)));
  if (packed == nullptr) return -1;
  pack_gather<COLS>(w, p, [&](int64_t o, int64_t c, int64_t ky, int64_t kx) { return a.weight[place(a, o, c, ky, kx)]; }, packed);
  const int64_t pixels = p.rows * p.columns, outputs = w.out_h * w.out_w;
  const int64_t chunk = smaller(a.images, (255 + outputs) / outputs);
  const int64_t bit_bytes = round_up(pixels * p.C / 8 + 16, 64), value_floats = apart(pixels * p.C + 64);
  const int64_t result_floats = round_up(outputs * p.block, 16);
  const bool direct = sizeof(T) == 4 && a.out % p.block == 0;
  const int64_t bytes = chunk * (bit_bytes + value_floats * 4 + (direct ? 0 : result_floats * 4));
  const T* images = static_cast<const T*>(a.x);
  const int64_t image = a.height * a.width * a.in;
  T* result = static_cast<T*>(a.y);
  const int failed = for_blocks(a.images, chunk, bytes, a.threads, false, [&](int64_t n0, int64_t count, float* scratch) {
    float* values = scratch;
    uint8_t* bits = reinterpret_cast<uint8_t*>(values + chunk * value_floats);
    float* sums = reinterpret_cast<float*>(bits + chunk * bit_bytes);
    std::memset(bits, 0, count * bit_bytes);
    for (int64_t n = 0; n < count; n++) {
      const T* x = images + (n0 + n) * image;
      for (int64_t row = 0; row < smaller(a.height, p.rows - a.padding); row++)
        for (int64_t column = 0; column < smaller(a.width, p.columns - a.padding); column++) {
          const T* pixel = x + (row * a.width + column) * a.in;
          const int64_t at = ((column + a.padding) * p.rows + row + a.padding) * p.C;
          to_float(pixel, a.in, values + n * value_floats + at);
          for (int64_t c = 0; c < a.in; c += 16) {
            const uint32_t found = nonzeros(pixel + c, smaller(16, a.in - c));
            std::memcpy(bits + n * bit_bytes + (at + c) / 8, &found, p.C - c < 16 ? 1 : 2);
          }
        }
    }
    for (int64_t o = 0; o < p.blocks; o++) {
      for (int64_t g = 0; g < p.groups; g++) {
        const uint64_t mask = group_mask(p, g);
        const float* weight = packed + (o * p.groups + g) * p.group * a.kernel_width * p.block;
        for (int64_t n = 0; n < count; n++)
          for (int64_t y = 0; y < w.out_h; y++) {
            const int64_t from = y * a.stride * p.C + g * p.group;
            float* out = direct ? reinterpret_cast<float*>(result) + ((n0 + n) * outputs + y * w.out_w) * a.out + o * p.block
                                : sums + n * result_floats + y * w.out_w * p.block;
            gather_row<COLS, NV>(w, p, bits + n * bit_bytes + from / 8, values + n * value_floats + from, weight, mask, g == 0, out, direct ? a.out : p.block);
          }
      }
      const int64_t width = smaller(p.block, a.out - o * p.block);
      for (int64_t n = 0; !direct && n < count; n++)
        for (int64_t i = 0; i < outputs; i++)
          from_float(sums + n * result_floats + i * p.block, width, result + ((n0 + n) * outputs + i) * a.out + o * p.block);
    }
  });
  std::free(packed);
  return failed;
}

template <class T>
int forward(const Convolution& a) {
  return by_shape(window(a), [&](auto columns, auto vectors) {
    return forward_of<T, decltype(columns)::value, decltype(vectors)::value>(a);
  });
}

// --- gradient of the weights: rows of the outputs' gradient, added up for every active input --------------------------
//
// For one input channel, the sums of all taps and of a block of output channels stay in registers while the list of its
// active positions is read. With a stride, positions fall into classes (y + padding) % stride, (x + padding) % stride:
// each is a convolution without stride, of every stride-th tap. Positions are taken in chunks, bands of an image or
// several small ones, whose gradient is copied with a border of zeros and stays in cache.

struct Entry {
  int32_t at;
  float value;
};

template <int ROWS, int COLS, int NV>
void add_rows(const Entry* entry, int64_t count, const float* g, int64_t row, float* out) {
  constexpr int N = COLS * NV;
  Vec sum[ROWS * N];
#pragma GCC unroll 32
  for (int j = 0; j < ROWS * N; j++) sum[j] = get(out + j * LANES);
  for (int64_t i = 0; i < count; i++) {
    const float* p = g + entry[i].at;
    const float v = entry[i].value;
#pragma GCC unroll 4
    for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 8
      for (int j = 0; j < N; j++) sum[r * N + j] += v * get(p + r * row + j * LANES);
  }
#pragma GCC unroll 32
  for (int j = 0; j < ROWS * N; j++) put(out + j * LANES, sum[j]);
}

template <int NV>
void add_taps(int64_t rows, int64_t columns, const Entry* entry, int64_t count, const float* g, int64_t row, float* out) {
  if constexpr (NV > WIDE) return add_rows<1, 1, NV>(entry, count, g, row, out);
  else switch (rows * 4 + columns) {
    case 5: return add_rows<1, 1, NV>(entry, count, g, row, out);
    case 6: return add_rows<1, 2, NV>(entry, count, g, row, out);
    case 7: return add_rows<1, 3, NV>(entry, count, g, row, out);
    case 9: return add_rows<2, 1, NV>(entry, count, g, row, out);
    case 10: return add_rows<2, 2, NV>(entry, count, g, row, out);
    case 11: return add_rows<2, 3, NV>(entry, count, g, row, out);
    case 13: return add_rows<3, 1, NV>(entry, count, g, row, out);
    case 14: return add_rows<3, 2, NV>(entry, count, g, row, out);
    default: return add_rows<3, 3, NV>(entry, count, g, row, out);
  }
}

template <class T, int NV>
int weight_of(const Convolution& a) {
  constexpr int64_t BLOCK = NV * LANES;
  const int64_t s = a.stride, p = a.padding, KH = a.kernel_height, KW = a.kernel_width, C = a.in;
  const int64_t out_h = out_height(a), out_w = out_width(a), blocks = (a.out + BLOCK - 1) / BLOCK;
  const int64_t taps_h = (KH + s - 1) / s, taps_w = (KW + s - 1) / s;  // most taps of a class
  const int64_t left = divide(p, s) - (taps_w - 1), columns = divide(a.width - 1 + p, s) - left + 1;
  const auto rows_of = [&](int64_t y0, int64_t y1) { return divide(y1 - 1 + p, s) - divide(y0 + p, s) + taps_h; };
  // Chunks: bands of `band` rows, or `several` images.
  const int64_t budget = (blocks * BLOCK * C * KH * KW * 4 > (1 << 19) ? 96 << 10 : 22 << 10) / (columns * BLOCK * 4);
  int64_t band = a.height;
  while (band > s && rows_of(0, band) > budget) band -= s;
  const int64_t bands = (a.height + band - 1) / band;
  const int64_t several = bands > 1 ? 1 : smaller(a.images, budget / rows_of(0, band) < 1 ? 1 : budget / rows_of(0, band));
  const int64_t chunks = bands > 1 ? a.images * bands : (a.images + several - 1) / several;
  const int64_t classes = s * s, most = apart(several * ((band + s - 1) / s) * ((a.width + s - 1) / s) * 2) / 2;
  const int64_t image_floats = rows_of(0, band + s) * columns * BLOCK, total = blocks * C * KH * KW * BLOCK;
  // Few groups where each has large sums of its own.
  const int64_t groups = smaller(chunks, total * 4 > (1 << 19) ? a.threads : 16);
  float* sums = static_cast<float*>(std::aligned_alloc(64, round_up(groups * total * 4, 64)));
  if (sums == nullptr) return -1;
  const int64_t list_bytes = round_up(classes * C * most * sizeof(Entry), 64), count_bytes = round_up(classes * C * 8, 64);
  const int64_t bytes = list_bytes + count_bytes + (several * image_floats + BLOCK) * 4;
  const int failed = for_groups(chunks, groups, bytes, a.threads, false, [&](int64_t group, int64_t first, int64_t last, float* scratch) {
    float* mine = sums + group * total;
    std::memset(mine, 0, total * 4);
    float* g = scratch;
    Entry* lists = reinterpret_cast<Entry*>(g + several * image_floats + BLOCK);
    int64_t* counts = reinterpret_cast<int64_t*>(reinterpret_cast<char*>(lists) + list_bytes);
    for (int64_t chunk = first; chunk < last; chunk++) {
      const int64_t n0 = bands > 1 ? chunk / bands : chunk * several, y0 = bands > 1 ? chunk % bands * band : 0;
      const int64_t y1 = smaller(a.height, y0 + band), images = smaller(several, a.images - n0);
      const int64_t top = divide(y0 + p, s) - (taps_h - 1), rows = rows_of(y0, y1);
      std::memset(counts, 0, classes * C * 8);
      for (int64_t n = 0; n < images; n++)
        for (int64_t y = y0; y < y1; y++) {
          const int64_t class_y = (y + p) % s, lines_y = (KH - class_y + s - 1) / s;
          const int64_t row = (y + p) / s - (lines_y - 1) - top;
          if (lines_y <= 0) continue;
          for (int64_t x = 0; x < a.width; x++) {
            const int64_t class_x = (x + p) % s, lines_x = (KW - class_x + s - 1) / s;
            if (lines_x <= 0) continue;
            const int64_t column = (x + p) / s - (lines_x - 1) - left;
            const int32_t at = static_cast<int32_t>(n * image_floats + (row * columns + column) * BLOCK);
            const T* pixel = static_cast<const T*>(a.x) + (((n0 + n) * a.height + y) * a.width + x) * C;
            const int64_t class_at = (class_y * s + class_x) * C;
            for (int64_t c0 = 0; c0 < C; c0 += 16)
              for (uint32_t found = nonzeros(pixel + c0, smaller(16, C - c0)); found != 0; found &= found - 1) {
                const int64_t c = c0 + __builtin_ctz(found);
                lists[(class_at + c) * most + counts[class_at + c]++] = Entry{at, load(pixel, c)};
              }
          }
        }
      // Rows that the next chunk reads.
      const int64_t read = (n0 + images - 1) * a.height + y1;
      const int64_t next = smaller(images * (y1 - y0), a.images * a.height - read) / s * s;
      const T* next_x = static_cast<const T*>(a.x) + read * a.width * C;
      const T* next_g = static_cast<const T*>(a.grad_y) + read / s * out_w * a.out;
      for (int64_t o = 0; o < blocks; o++) {
        const int64_t width = smaller(BLOCK, a.out - o * BLOCK);
        for (int64_t n = 0; n < images; n++)
          for (int64_t r = 0; r < rows; r++) {
            float* to = g + n * image_floats + r * columns * BLOCK;
            const int64_t y = top + r;
            if (y < 0 || y >= out_h) {
              std::memset(to, 0, columns * BLOCK * 4);
              continue;
            }
            for (int64_t q = 0; q < columns; q++) {
              const int64_t x = left + q;
              if (x < 0 || x >= out_w) {
                std::memset(to + q * BLOCK, 0, BLOCK * 4);
                continue;
              }
              const T* from = static_cast<const T*>(a.grad_y) + (((n0 + n) * out_h + y) * out_w + x) * a.out + o * BLOCK;
              if (width == BLOCK) {
                for (int j = 0; j < NV; j++) put(to + q * BLOCK + j * LANES, get_floats(from + j * LANES));
              } else {
                to_float(from, width, to + q * BLOCK);
                std::memset(to + q * BLOCK + width, 0, (BLOCK - width) * 4);
              }
            }
          }
        float* out = mine + o * C * KH * KW * BLOCK;
        for (int64_t k = 0; k < classes; k++) {
          const int64_t lines_y = (KH - k / s + s - 1) / s, lines_x = (KW - k % s + s - 1) / s;
          if (lines_y <= 0 || lines_x <= 0) continue;
          for (int64_t c = 0; c < C; c++) {
            if (o == 0 && k == 0) {
              ahead(next_x, next * a.width * C, c, C);
              ahead(next_g, next * out_w * a.out / s, c, C);
            }
            add_taps<NV>(lines_y, lines_x, lists + (k * C + c) * most, counts[k * C + c], g, columns * BLOCK, out + c * lines_y * lines_x * BLOCK);
          }
          out += C * lines_y * lines_x * BLOCK;
        }
      }
    }
  });
  if (failed == 0) add_groups(sums + total, groups - 1, total, total, sums);
  for (int64_t o = 0; failed == 0 && o < a.out; o++) {
    const float* block = sums + o / BLOCK * C * KH * KW * BLOCK + o % BLOCK;
    for (int64_t k = 0; k < classes; k++) {
      const int64_t lines_y = (KH - k / s + s - 1) / s, lines_x = (KW - k % s + s - 1) / s;
      if (lines_y <= 0 || lines_x <= 0) continue;
      for (int64_t c = 0; c < C; c++)
        for (int64_t r = 0; r < lines_y; r++)
          for (int64_t q = 0; q < lines_x; q++, block += BLOCK) {
            a.grad_weight[place(a, o, c, k / s + s * (lines_y - 1 - r), k % s + s * (lines_x - 1 - q))] = *block;
          }
    }
  }
  std::free(sums);
  return failed;
}

template <class T>
int weight_gradient(const Convolution& a) {
  if (a.kernel_height > 3 || a.kernel_width > 3) return -2;
  if (a.kernel_height == 1 && a.kernel_width == 1 && a.out >= 8 * LANES) return weight_of<T, 8>(a);  // or sums wait
  return a.out <= LANES ? weight_of<T, 1>(a) : weight_of<T, WIDE>(a);
}

// --- 3x3 convolutions without stride and their gradients, by minimal filtering F(4x4, 3x3) (Lavin and Gray 2016) --------------
//
// A tile of 4x4 gradients of the output and the 6x6 inputs around it meet in 36 products instead of 144:
//   y = A' [(G w G') * (B' x B)] A,  so  dL/dw = G' [(A dy A') * (B' x B)] G,
// and dL/dx is the same convolution of dy with the filter turned around. The products over channels or tiles are 36
// small matrix products.

constexpr int POINTS = 36;

// Of one axis: 0, a, -a, b, -b and infinity. With these the transforms' factors stay near 1, and rounding with them.
constexpr float A1 = 0.70710678f, B1 = 1.41421356f, A2 = A1 * A1, B2 = B1 * B1;

// B' of a column of six.
inline void input_side(const Vec* d, int step, Vec* to, int to_step) {
  const Vec d0 = d[0], d1 = d[step], d2 = d[2 * step], d3 = d[3 * step], d4 = d[4 * step], d5 = d[5 * step];
  const Vec even_a = d4 - B2 * d2, odd_a = A1 * (d3 - B2 * d1), even_b = d4 - A2 * d2, odd_b = B1 * (d3 - A2 * d1);
  to[0] = A2 * B2 * d0 - (A2 + B2) * d2 + d4;
  to[to_step] = even_a + odd_a;
  to[2 * to_step] = even_a - odd_a;
  to[3 * to_step] = even_b + odd_b;
  to[4 * to_step] = even_b - odd_b;
  to[5 * to_step] = A2 * B2 * d1 - (A2 + B2) * d3 + d5;
}

// A' of a column of six.
inline void output_side(const Vec* m, int step, Vec* to, int to_step) {
  const Vec sum_a = m[step] + m[2 * step], part_a = A1 * (m[step] - m[2 * step]);
  const Vec sum_b = m[3 * step] + m[4 * step], part_b = B1 * (m[3 * step] - m[4 * step]);
  to[0] = m[0] + sum_a + sum_b;
  to[to_step] = part_a + part_b;
  to[2 * to_step] = A2 * sum_a + B2 * sum_b;
  to[3 * to_step] = A2 * part_a + B2 * part_b + m[5 * step];
}

// A of a column of four.
inline void gradient_side(const Vec* g, int step, Vec* to, int to_step) {
  const Vec g0 = g[0], g1 = g[step], g2 = g[2 * step], g3 = g[3 * step];
  const Vec even_a = g0 + A2 * g2, odd_a = A1 * (g1 + A2 * g3), even_b = g0 + B2 * g2, odd_b = B1 * (g1 + B2 * g3);
  to[0] = g0;
  to[to_step] = even_a + odd_a;
  to[2 * to_step] = even_a - odd_a;
  to[3 * to_step] = even_b + odd_b;
  to[4 * to_step] = even_b - odd_b;
  to[5 * to_step] = g3;
}

constexpr float FA = 1 / (2 * A2 * (A2 - B2)), FB = 1 / (2 * B2 * (B2 - A2));
constexpr float FILTER_SIDE[6][3] = {{1 / (A2 * B2), 0, 0},     {FA, FA * A1, FA * A2}, {FA, -FA * A1, FA * A2},
                                     {FB, FB * B1, FB * B2}, {FB, -FB * B1, FB * B2}, {0, 0, 1}};

// Points of the SIZE x SIZE block whose first pixel is (y, x), all channels; outside of the image there are `zeros`, as
// many as channels. Points of one channel lie `points` floats apart.
template <int SIZE, class T, class Side>
inline void block_points(const Side& side, const T* image, int64_t height, int64_t width, int64_t channels, int64_t y, int64_t x, const T* zeros, float* to, int64_t points) {
  const T* pixels[SIZE * SIZE];
  const bool inside = y >= 0 && x >= 0 && y + SIZE <= height && x + SIZE <= width;
  const T* corner = image + (y * width + x) * channels;
  for (int r = 0; r < SIZE; r++)
    for (int q = 0; q < SIZE; q++) {
      const bool there = inside || (y + r >= 0 && y + r < height && x + q >= 0 && x + q < width);
      pixels[r * SIZE + q] = there ? corner + (r * width + q) * channels : zeros;
    }
  for (int64_t c = 0; c < channels; c += LANES) {
    Vec half[6 * SIZE], column[6];
#pragma GCC unroll 6
    for (int q = 0; q < SIZE; q++) {
#pragma GCC unroll 6
      for (int r = 0; r < SIZE; r++) column[r] = get_floats(pixels[r * SIZE + q] + c);
      side(column, 1, half + q, SIZE);
    }
#pragma GCC unroll 6
    for (int r = 0; r < 6; r++) {
      side(half + r * SIZE, 1, column, 1);
#pragma GCC unroll 6
      for (int q = 0; q < 6; q++) put(to + c + (r * 6 + q) * points, column[q]);
    }
  }
}

// c[i, :] (+)= sum_k a[k, i] b[k, :] for ROWS rows i (a_k and a_i apart) of NV vectors.
template <int ROWS, int NV, bool ADD>
inline void multiply(int64_t depth, const float* a, int64_t a_k, int64_t a_i, const float* b, int64_t b_k, float* c, int64_t c_i) {
  Vec sum[ROWS][NV];
#pragma GCC unroll 16
  for (int i = 0; i < ROWS; i++)
#pragma GCC unroll 4
    for (int j = 0; j < NV; j++) sum[i][j] = ADD ? get(c + i * c_i + j * LANES) : Vec{};
  for (int64_t k = 0; k < depth; k++) {
    Vec row[NV];
#pragma GCC unroll 4
    for (int j = 0; j < NV; j++) row[j] = get(b + k * b_k + j * LANES);
#pragma GCC unroll 16
    for (int i = 0; i < ROWS; i++) {
      const float factor = a[k * a_k + i * a_i];
#pragma GCC unroll 4
      for (int j = 0; j < NV; j++) sum[i][j] += factor * row[j];
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < ROWS; i++)
#pragma GCC unroll 4
    for (int j = 0; j < NV; j++) put(c + i * c_i + j * LANES, sum[i][j]);
}

template <int N>
struct Rows {
  static constexpr int count = N;
};

// The same for any number of rows and of whole vectors.
template <bool ADD>
void product(int64_t rows, int64_t columns, int64_t depth, const float* a, int64_t a_k, int64_t a_i, const float* b, float* c) {
  constexpr int MANY = LANES == 16 ? 12 : 6;  // with two vectors each, what the registers hold
  for (int64_t j = 0; j < columns;) {
    const bool two = columns - j >= 2 * LANES;
    for (int64_t i = 0; i < rows;) {
      const auto run = [&](auto part) {
        constexpr int R = decltype(part)::count;
        if (two) multiply<R, 2, ADD>(depth, a + i * a_i, a_k, a_i, b + j, columns, c + i * columns + j, columns);
        else multiply<R, 1, ADD>(depth, a + i * a_i, a_k, a_i, b + j, columns, c + i * columns + j, columns);
        i += R;
      };
      const int64_t left = rows - i;
      if (left >= MANY && left != MANY + 2) run(Rows<MANY>{});  // few rows at a time leave the processor waiting
      else if (left >= 4) run(Rows<4>{});
      else if (left >= 2) run(Rows<2>{});
      else run(Rows<1>{});
    }
    j += two ? 2 * LANES : LANES;
  }
}

// Images are taken `several` at a time, or in bands of rows of tiles: as many tiles as fit in the second cache beside the
// filters, and as few as use these often enough.
struct Tiles {
  int64_t down, across, band, several, bands, chunks, most;
};

Tiles tiles_of(int64_t images, int64_t height, int64_t width, int64_t channels) {
  const int64_t wanted = LANES == 16 ? 1536 / smaller(channels, 64) : larger(512 / channels, 24);
  Tiles t;
  t.down = (height + 3) / 4, t.across = (width + 3) / 4;
  t.band = smaller(t.down, wanted / t.across < 1 ? 1 : wanted / t.across);
  t.bands = (t.down + t.band - 1) / t.band;
  t.several = t.bands > 1 ? 1 : smaller(images, wanted / (t.down * t.across) < 1 ? 1 : wanted / (t.down * t.across));
  t.chunks = t.bands > 1 ? images * t.bands : (images + t.several - 1) / t.several;
  t.most = t.several * t.band * t.across;
  return t;
}

// Runs body(image, tile's row, tile's column, number in the chunk); returns the number of tiles.
template <class Body>
inline int64_t for_tiles(const Tiles& t, int64_t images, int64_t chunk, const Body& body) {
  const int64_t n0 = t.bands > 1 ? chunk / t.bands : chunk * t.several, r0 = t.bands > 1 ? chunk % t.bands * t.band : 0;
  int64_t i = 0;
  for (int64_t n = n0; n < smaller(images, n0 + t.several); n++)
    for (int64_t r = r0; r < smaller(t.down, r0 + t.band); r++)
      for (int64_t q = 0; q < t.across; q++) body(n, r, q, i++);
  return i;
}

// The rows of pixels [first, first + count), over all images, of a band of rows or of whole images that a chunk begins with.
struct Lines {
  int64_t first, count;
};

Lines lines_of(const Tiles& t, int64_t images, int64_t height, int64_t chunk) {
  if (chunk >= t.chunks) return {0, 0};
  if (t.bands == 1) return {chunk * t.several * height, smaller(t.several, images - chunk * t.several) * height};
  const int64_t row = 4 * (chunk % t.bands * t.band);
  return {chunk / t.bands * height + row, smaller(4 * t.band, height - row)};
}

bool minimal(const Convolution& a) {
  return a.stride == 1 && a.kernel_height == 3 && a.kernel_width == 3 && a.in % LANES == 0 && a.out % LANES == 0 && a.padding <= 2;
}

// The convolution of x, or of dL/dy with the filter turned around (BACK).
template <class T, bool BACK>
int convolve(const Convolution& a) {
  if (!minimal(a)) return -2;
  const int64_t out_h = out_height(a), out_w = out_width(a), shift = BACK ? a.padding - 2 : -a.padding;
  const int64_t C = BACK ? a.in : a.out, O = BACK ? a.out : a.in;  // of what is written, and read
  const int64_t high = BACK ? out_h : a.height, wide = BACK ? out_w : a.width;
  const int64_t to_high = BACK ? a.height : out_h, to_wide = BACK ? a.width : out_w;
  const T* from = static_cast<const T*>(BACK ? a.grad_y : a.x);
  T* to = static_cast<T*>(BACK ? a.grad_x : a.y);
  float* filters = static_cast<float*>(std::aligned_alloc(64, POINTS * O * C * 4));
  if (filters == nullptr) return -1;
#ifdef _OPENMP
#pragma omp parallel for num_threads(a.threads) schedule(static) if (O * C > SMALL)
#endif
  for (int64_t o = 0; o < O; o++)
    for (int64_t c = 0; c < C; c += LANES) {
      Vec w[9], half[6][3];
      for (int k = 0; k < 9; k++)
        for (int64_t i = 0; i < LANES; i++)
          w[k][i] = a.weight[BACK ? place(a, o, c + i, 2 - k / 3, 2 - k % 3) : place(a, c + i, o, k / 3, k % 3)];
      for (int r = 0; r < 6; r++)
        for (int kx = 0; kx < 3; kx++)
          half[r][kx] = FILTER_SIDE[r][0] * w[kx] + FILTER_SIDE[r][1] * w[3 + kx] + FILTER_SIDE[r][2] * w[6 + kx];
      for (int r = 0; r < 6; r++)
        for (int q = 0; q < 6; q++)
          put(filters + ((r * 6 + q) * O + o) * C + c, half[r][0] * FILTER_SIDE[q][0] + half[r][1] * FILTER_SIDE[q][1] + half[r][2] * FILTER_SIDE[q][2]);
    }
  const Tiles t = tiles_of(a.images, to_high, to_wide, C);
  const int64_t before = apart(t.most * O), after = apart(t.most * C);
  const bool past_caches = large<T>(a.images * to_high * to_wide * C);
  const int failed = for_blocks(t.chunks, 1, (POINTS * (before + after) + 20 * C + O) * 4, a.threads, false, [&](int64_t chunk, int64_t, float* scratch) {
    float *points = scratch, *products = points + POINTS * before, *tile = products + POINTS * after;
    T* whole = reinterpret_cast<T*>(tile + 16 * C);
    const T* zeros = static_cast<const T*>(std::memset(tile + 20 * C, 0, O * 4));
    const int64_t count = for_tiles(t, a.images, chunk, [&](int64_t n, int64_t r, int64_t q, int64_t i) {
      block_points<6>(input_side, from + n * high * wide * O, high, wide, O, 4 * r + shift, 4 * q + shift, zeros, points + i * O, before);
    });
    const Lines next = lines_of(t, a.images, high, chunk + 1);
    for (int k = 0; k < POINTS; k++) {
      ahead(from + next.first * wide * O, next.count * wide * O, k, POINTS);
      product<false>(count, C, O, points + k * before, 1, O, filters + k * O * C, products + k * after);
    }
    const T* skip = BACK ? static_cast<const T*>(a.grad_skip) : nullptr;
    for_tiles(t, a.images, chunk, [&](int64_t n, int64_t r, int64_t q, int64_t i) {
      const int64_t rows = smaller(4, to_high - 4 * r), columns = smaller(4, to_wide - 4 * q);
      const int64_t corner = ((n * to_high + 4 * r) * to_wide + 4 * q) * C, line = to_wide * C;
      if (skip) {  // memory behind the row may be asked for: it is not touched
        for (int64_t y = 0; y < rows; y++) ahead(skip + corner + y * line + 8 * C, 4 * C, 0, 1);
      }
      for (int64_t c = 0; c < C; c += LANES) {
        Vec column[6], half[24], side[4];
#pragma GCC unroll 6
        for (int k = 0; k < 6; k++) {
#pragma GCC unroll 6
          for (int r = 0; r < 6; r++) column[r] = get(products + (r * 6 + k) * after + i * C + c);
          output_side(column, 1, half + k, 6);
        }
#pragma GCC unroll 4
        for (int y = 0; y < 4; y++) {
          output_side(half + y * 6, 1, side, 1);
#pragma GCC unroll 4
          for (int z = 0; z < 4; z++) put(tile + (y * 4 + z) * C + c, side[z]);
        }
      }
      for (int64_t y = 0; y < rows; y++) {
        const float* row = tile + y * 4 * C;
        const T* added = skip ? skip + corner + y * line : nullptr;
        T* out = past_caches ? whole : to + corner + y * line;
        for (int64_t j = 0; j < columns * C; j += LANES) put_floats(out + j, skip ? get(row + j) + get_floats(added + j) : get(row + j));
        if (past_caches) stream(to + corner + y * line, whole, columns * C);
      }
    });
    if (past_caches) streamed();
  });
  std::free(filters);
  return failed;
}

template <class T>
int weight_minimal(const Convolution& a) {
  if (!minimal(a)) return -2;
  const int64_t C = a.in, O = a.out, out_h = out_height(a), out_w = out_width(a), total = POINTS * C * O;
  const Tiles t = tiles_of(a.images, out_h, out_w, C);
  const int64_t groups = smaller(t.chunks, total * 4 > (1 << 18) ? a.threads : 32);
  float* sums = static_cast<float*>(std::aligned_alloc(64, groups * total * 4));
  if (sums == nullptr) return -1;
  const int64_t inputs = apart(t.most * C), outputs = apart(t.most * O);
  const int failed = for_groups(t.chunks, groups, (POINTS * (inputs + outputs) + larger(C, O)) * 4, a.threads, false, [&](int64_t group, int64_t first, int64_t last, float* scratch) {
    float *mine = sums + group * total, *x_points = scratch, *g_points = scratch + POINTS * inputs;
    const T* zeros = static_cast<const T*>(std::memset(g_points + POINTS * outputs, 0, larger(C, O) * 4));
    std::memset(mine, 0, total * 4);
    for (int64_t chunk = first; chunk < last; chunk++) {
      const int64_t count = for_tiles(t, a.images, chunk, [&](int64_t n, int64_t r, int64_t q, int64_t i) {
        const T* x = static_cast<const T*>(a.x) + n * a.height * a.width * C;
        const T* g = static_cast<const T*>(a.grad_y) + n * out_h * out_w * O;
        block_points<6>(input_side, x, a.height, a.width, C, 4 * r - a.padding, 4 * q - a.padding, zeros, x_points + i * C, inputs);
        block_points<4>(gradient_side, g, out_h, out_w, O, 4 * r, 4 * q, zeros, g_points + i * O, outputs);
      });
      const Lines next_x = lines_of(t, a.images, a.height, chunk + 1), next_g = lines_of(t, a.images, out_h, chunk + 1);
      for (int k = 0; k < POINTS; k++) {
        ahead(static_cast<const T*>(a.x) + next_x.first * a.width * C, next_x.count * a.width * C, k, POINTS);
        ahead(static_cast<const T*>(a.grad_y) + next_g.first * out_w * O, next_g.count * out_w * O, k, POINTS);
        product<true>(C, O, count, x_points + k * inputs, C, 1, g_points + k * outputs, mine + k * C * O);
      }
    }
  });
  if (failed == 0) add_groups(sums + total, groups - 1, total, total, sums);
  for (int64_t c = 0; failed == 0 && c < C; c++)
    for (int64_t o = 0; o < O; o += LANES) {
      Vec half[3][6] = {};
      for (int k = 0; k < POINTS; k++) {
        const Vec sum = get(sums + (k * C + c) * O + o);
        for (int ky = 0; ky < 3; ky++) half[ky][k % 6] += FILTER_SIDE[k / 6][ky] * sum;
      }
      for (int k = 0; k < 9; k++) {
        Vec sum{};
        for (int q = 0; q < 6; q++) sum += half[k / 3][q] * FILTER_SIDE[q][k % 3];
        for (int64_t i = 0; i < LANES; i++) a.grad_weight[place(a, o + i, c, k / 3, k % 3)] = sum[i];
      }
    }
  std::free(sums);
  return failed;
}

// --- gradients of convolutions with stride, every product of them ---------------------------------------------------------
//
// As for the sparse gradient of the weights, positions of the input fall into classes by their place within a stride,
// each a convolution without stride. The gradient of the input is one small matrix product for each row of a class, each
// of its taps in that direction and each row of pixels, and so is the gradient of the weights, over positions.

// A band of rows of images, as floats with zeros around: rows from `top`, columns from `left`.
struct Band {
  int64_t top, left, rows, columns;
};

template <class T>
void load_band(const Band& band, const T* image, int64_t height, int64_t width, int64_t channels, float* to) {
  const int64_t first = larger(0, band.left), count = smaller(width, band.left + band.columns) - first;
  const int64_t before = (first - band.left) * channels, after = band.columns * channels - before - count * channels;
  for (int64_t r = 0; r < band.rows; r++, to += band.columns * channels) {
    const int64_t y = band.top + r;
    if (y < 0 || y >= height) {
      std::memset(to, 0, band.columns * channels * 4);
      continue;
    }
    std::memset(to, 0, before * 4);
    to_float(image + (y * width + first) * channels, count * channels, to + before);
    std::memset(to + before + count * channels, 0, after * 4);
  }
}

bool strided(const Convolution& a) {
  return a.stride > 1 && a.kernel_height <= 3 && a.kernel_width <= 3 && a.in % LANES == 0 && a.out % LANES == 0 && a.padding <= 2;
}

template <class T>
int input_strided(const Convolution& a) {
  if (!strided(a)) return -2;
  const int64_t s = a.stride, p = a.padding, KH = a.kernel_height, KW = a.kernel_width, C = a.in, O = a.out;
  const int64_t out_h = out_height(a), out_w = out_width(a), taps_h = (KH + s - 1) / s, taps_w = (KW + s - 1) / s;
  const auto lines = [s](int64_t kernel, int64_t at) { return (kernel - at + s - 1) / s; };  // taps of a class
  float* filters = static_cast<float*>(std::aligned_alloc(64, round_up(KH * KW * O * C * 4, 64)));
  if (filters == nullptr) return -1;
  // By class of rows, tap of those, class of columns; then the taps of those, in the order of the pixels that they read.
  const auto filter = [&](int64_t ky, int64_t class_x) {
    int64_t before = 0;
    for (int64_t k = 0; k < class_x; k++) before += larger(0, lines(KW, k));
    return filters + (ky * KW + before) * O * C;
  };
  for (int64_t ky = 0; ky < KH; ky++)
    for (int64_t kx = 0; kx < KW; kx++) {
      float* to = filter(ky, kx % s) + (lines(KW, kx % s) - 1 - kx / s) * O * C;
      for (int64_t o = 0; o < O; o++)
        for (int64_t c = 0; c < C; c++) to[o * C + c] = a.weight[place(a, o, c, ky, kx)];
    }
  Band whole;
  whole.left = p / s - (taps_w - 1), whole.columns = (a.width - 1 + p) / s - whole.left + 1;
  // Whole strides of rows, whose gradient stays in the second cache.
  const int64_t band = s * smaller((a.height + s - 1) / s, larger(1, (24 << 10) / (whole.columns * O)));
  const int64_t bands = (a.height + band - 1) / band;
  const int64_t most = band / s + taps_h, results = (a.width + s - 1) / s * C;
  const int64_t bytes = (most * whole.columns * O + results) * 4;
  const int failed = for_blocks(a.images * bands, 1, bytes, a.threads, false, [&](int64_t block, int64_t, float* scratch) {
    const int64_t n = block / bands, y0 = block % bands * band, y1 = smaller(a.height, y0 + band);
    Band g = whole;
    g.top = (y0 + p) / s - (taps_h - 1), g.rows = (y1 - 1 + p) / s - g.top + 1;
    load_band(g, static_cast<const T*>(a.grad_y) + n * out_h * out_w * O, out_h, out_w, O, scratch);
    float* result = scratch + most * whole.columns * O;
    for (int64_t y = y0; y < y1; y++) {
      const int64_t class_y = (y + p) % s, lines_y = lines(KH, class_y), row = (n * a.height + y) * a.width * C;
      for (int64_t x0 = 0; x0 < smaller(s, a.width); x0++) {
        const int64_t class_x = (x0 + p) % s, lines_x = lines(KW, class_x), count = (a.width - x0 + s - 1) / s;
        if (lines_y <= 0 || lines_x <= 0) std::memset(result, 0, count * C * 4);
        for (int64_t m = 0; m < lines_y && lines_x > 0; m++) {
          const int64_t from = ((y + p) / s - m - g.top) * g.columns + (x0 + p) / s - (lines_x - 1) - g.left;
          const float* w = filter(class_y + m * s, class_x);
          if (m == 0)
            product<false>(count, C, lines_x * O, scratch + from * O, 1, O, w, result);
          else
            product<true>(count, C, lines_x * O, scratch + from * O, 1, O, w, result);
        }
        for (int64_t j = 0; j < count; j++)
          for (int64_t c = 0; c < C; c += LANES) {
            const int64_t at = row + (x0 + j * s) * C + c;
            const Vec sum = get(result + j * C + c);
            put_floats(static_cast<T*>(a.grad_x) + at, a.grad_skip ? sum + get_floats(static_cast<const T*>(a.grad_skip) + at) : sum);
          }
      }
    }
  });
  std::free(filters);
  return failed;
}

template <class T>
int weight_strided(const Convolution& a) {
  if (!strided(a)) return -2;
  const int64_t s = a.stride, KH = a.kernel_height, KW = a.kernel_width, C = a.in, O = a.out, total = KH * KW * C * O;
  const int64_t out_h = out_height(a), out_w = out_width(a), wide = a.width + 2 * a.padding;
  // Bands of rows of the output, and the input that they read.
  const int64_t band = smaller(out_h, larger(1, (24 << 10) / (wide * C * s + out_w * O))), bands = (out_h + band - 1) / band;
  const int64_t blocks = a.images * bands, groups = smaller(blocks, total * 4 > (1 << 18) ? a.threads : 32);
  const int64_t inputs = round_up(((band - 1) * s + KH) * wide * C, 16);
  float* sums = static_cast<float*>(std::aligned_alloc(64, round_up(groups * total * 4, 64)));
  if (sums == nullptr) return -1;
  const int failed = for_groups(blocks, groups, (inputs + band * out_w * O) * 4, a.threads, false, [&](int64_t group, int64_t first, int64_t last, float* scratch) {
    float *mine = sums + group * total, *outputs = scratch + inputs;
    std::memset(mine, 0, total * 4);
    for (int64_t block = first; block < last; block++) {
      const int64_t n = block / bands, y0 = block % bands * band, rows = smaller(band, out_h - y0);
      const Band x{y0 * s - a.padding, -a.padding, (rows - 1) * s + KH, wide}, g{y0, 0, rows, out_w};
      load_band(x, static_cast<const T*>(a.x) + n * a.height * a.width * C, a.height, a.width, C, scratch);
      load_band(g, static_cast<const T*>(a.grad_y) + n * out_h * out_w * O, out_h, out_w, O, outputs);
      for (int64_t k = 0; k < KH * KW; k++)
        for (int64_t r = 0; r < rows; r++)
          product<true>(C, O, out_w, scratch + ((r * s + k / KW) * wide + k % KW) * C, s * C, 1, outputs + r * out_w * O, mine + k * C * O);
    }
  });
  if (failed == 0) add_groups(sums + total, groups - 1, total, total, sums);
  for (int64_t k = 0; failed == 0 && k < KH * KW; k++)
    for (int64_t c = 0; c < C; c++)
      for (int64_t o = 0; o < O; o++) a.grad_weight[place(a, o, c, k / KW, k % KW)] = sums[(k * C + c) * O + o];
  std::free(sums);
  return failed;
}

}  // namespace

#define BY_TYPE(name, run) \
  int name(const Convolution& a) { return a.dtype == Dtype::float32 ? run(float) : run(bfloat16); }
#define FORWARD(T) forward<T>(a)
#define FORWARD_MINIMAL(T) convolve<T, false>(a)
#define WEIGHT(T) weight_gradient<T>(a)
#define WEIGHT_MINIMAL(T) weight_minimal<T>(a)
#define INPUT_MINIMAL(T) convolve<T, true>(a)
#define WEIGHT_STRIDED(T) weight_strided<T>(a)
#define INPUT_STRIDED(T) input_strided<T>(a)
BY_TYPE(conv_forward_sparse, FORWARD)
BY_TYPE(conv_forward_minimal, FORWARD_MINIMAL)
BY_TYPE(conv_weight_sparse, WEIGHT)
BY_TYPE(conv_weight_minimal, WEIGHT_MINIMAL)
BY_TYPE(conv_input_minimal, INPUT_MINIMAL)
BY_TYPE(conv_weight_strided, WEIGHT_STRIDED)
BY_TYPE(conv_input_strided, INPUT_STRIDED)

}  // namespace SPIKELOOM_LEVEL
}  // namespace spikeloom
