// 3x3 convolutions without stride and their gradients, by minimal filtering F(4x4, 3x3) (Lavin and Gray 2016):
//
//   for n, oy, ox, ky, kx, c:  y[n, oy, ox, :] += x[n, oy + ky - padding, ox + kx - padding, c] w[:, c, ky, kx]
//
// A tile of 4x4 gradients of the output and the 6x6 inputs around it meet in 36 products instead of 144:
//   y = A' [(G w G') * (B' x B)] A,  so  dL/dw = G' [(A dy A') * (B' x B)] G,
// and dL/dx is the same convolution of dy with the filter turned around. The products over channels or tiles are 36
// small matrix products.
#include "common/prefetch.hpp"
#include "conv/convolution.hpp"
#include "conv/product.hpp"

namespace spikeloom::SPIKELOOM_LEVEL {
namespace {

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
constexpr float FILTER_SIDE[6][3] = {{1 / (A2 * B2), 0, 0},  {FA, FA * A1, FA * A2},  {FA, -FA * A1, FA * A2},
                                     {FB, FB * B1, FB * B2}, {FB, -FB * B1, FB * B2}, {0, 0, 1}};

// Points of the SIZE x SIZE block whose first pixel is (y, x), all channels; outside of the image there are `zeros`, as
// many as channels. Points of one channel lie `points` floats apart.
template <int SIZE, class T, class Side>
inline void block_points(const Side& side, const T* image, int64_t height, int64_t width, int64_t channels, int64_t y,
                         int64_t x, const T* zeros, float* to, int64_t points) {
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

// Images are taken `several` at a time, or in bands of rows of tiles: as many tiles as fit in the second cache beside
// the filters, and as few as use these often enough.
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

// The rows of pixels [first, first + count), over all images, of a band of rows or of whole images that a chunk begins
// with.
struct Lines {
  int64_t first, count;
};

Lines lines_of(const Tiles& t, int64_t images, int64_t height, int64_t chunk) {
  if (chunk >= t.chunks) return {0, 0};
  if (t.bands == 1) return {chunk * t.several * height, smaller(t.several, images - chunk * t.several) * height};
  const int64_t row = 4 * (chunk % t.bands * t.band);
  return {chunk / t.bands * height + row, smaller(4 * t.band, height - row)};
}

bool fits_winograd(const Convolution& a) {
  return a.stride == 1 && a.kernel_height == 3 && a.kernel_width == 3 && a.in % LANES == 0 && a.out % LANES == 0 &&
         a.padding <= 2;
}

// The convolution of x, or of dL/dy with the filter turned around (BACK).
template <class T, bool BACK>
int convolve(const Convolution& a) {
  if (!fits_winograd(a)) return UNSUPPORTED;
  const int64_t out_h = out_height(a), out_w = out_width(a), shift = BACK ? a.padding - 2 : -a.padding;
  const int64_t C = BACK ? a.in : a.out, O = BACK ? a.out : a.in;  // of what is written, and read
  const int64_t high = BACK ? out_h : a.height, wide = BACK ? out_w : a.width;
  const int64_t to_high = BACK ? a.height : out_h, to_wide = BACK ? a.width : out_w;
  const T* from = static_cast<const T*>(BACK ? a.grad_y : a.x);
  T* to = static_cast<T*>(BACK ? a.grad_x : a.y);
  float* filters = static_cast<float*>(std::aligned_alloc(64, POINTS * O * C * 4));
  if (filters == nullptr) return OUT_OF_MEMORY;
#ifdef _OPENMP
#pragma omp parallel for num_threads(a.threads) schedule(static) if (O * C > MIN_PARALLEL)
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
          put(filters + ((r * 6 + q) * O + o) * C + c,
              half[r][0] * FILTER_SIDE[q][0] + half[r][1] * FILTER_SIDE[q][1] + half[r][2] * FILTER_SIDE[q][2]);
    }
  const Tiles t = tiles_of(a.images, to_high, to_wide, C);
  const int64_t before = padded_stride(t.most * O), after = padded_stride(t.most * C);
  const bool non_temporal = exceeds_caches<T>(a.images * to_high * to_wide * C);
  const int failed = for_blocks(t.chunks, 1, (POINTS * (before + after) + 20 * C + O) * 4, a.threads, false,
                                [&](int64_t chunk, int64_t, float* scratch) {
    float *points = scratch, *products = points + POINTS * before, *tile = products + POINTS * after;
    T* whole = reinterpret_cast<T*>(tile + 16 * C);
    const T* zeros = static_cast<const T*>(std::memset(tile + 20 * C, 0, O * 4));
    const int64_t count = for_tiles(t, a.images, chunk, [&](int64_t n, int64_t r, int64_t q, int64_t i) {
      block_points<6>(input_side, from + n * high * wide * O, high, wide, O, 4 * r + shift, 4 * q + shift, zeros,
                      points + i * O, before);
    });
    const Lines next = lines_of(t, a.images, high, chunk + 1);
    for (int k = 0; k < POINTS; k++) {
      prefetch_part(from + next.first * wide * O, next.count * wide * O, k, POINTS);
      product<false>(count, C, O, points + k * before, 1, O, filters + k * O * C, products + k * after);
    }
    const T* skip = BACK ? static_cast<const T*>(a.grad_skip) : nullptr;
    for_tiles(t, a.images, chunk, [&](int64_t n, int64_t r, int64_t q, int64_t i) {
      const int64_t rows = smaller(4, to_high - 4 * r), columns = smaller(4, to_wide - 4 * q);
      const int64_t corner = ((n * to_high + 4 * r) * to_wide + 4 * q) * C, line = to_wide * C;
      if (skip) {  // addresses behind the row are harmless
        for (int64_t y = 0; y < rows; y++) prefetch_part(skip + corner + y * line + 8 * C, 4 * C, 0, 1);
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
        T* out = non_temporal ? whole : to + corner + y * line;
        for (int64_t j = 0; j < columns * C; j += LANES)
          put_floats(out + j, skip ? get(row + j) + get_floats(added + j) : get(row + j));
        if (non_temporal) store_non_temporal(to + corner + y * line, whole, columns * C);
      }
    });
    if (non_temporal) fence_non_temporal();
  });
  std::free(filters);
  return failed;
}

template <class T>
int weight_winograd(const Convolution& a) {
  if (!fits_winograd(a)) return UNSUPPORTED;
  const int64_t C = a.in, O = a.out, out_h = out_height(a), out_w = out_width(a), total = POINTS * C * O;
  const Tiles t = tiles_of(a.images, out_h, out_w, C);
  const int64_t groups = smaller(t.chunks, total * 4 > (1 << 18) ? a.threads : 32);
  float* sums = static_cast<float*>(std::aligned_alloc(64, groups * total * 4));
  if (sums == nullptr) return OUT_OF_MEMORY;
  const int64_t inputs = padded_stride(t.most * C), outputs = padded_stride(t.most * O);
  const int failed = for_groups(t.chunks, groups, (POINTS * (inputs + outputs) + larger(C, O)) * 4, a.threads, false,
                                [&](int64_t group, int64_t first, int64_t last, float* scratch) {
    float *mine = sums + group * total, *x_points = scratch, *g_points = scratch + POINTS * inputs;
    const T* zeros = static_cast<const T*>(std::memset(g_points + POINTS * outputs, 0, larger(C, O) * 4));
    std::memset(mine, 0, total * 4);
    for (int64_t chunk = first; chunk < last; chunk++) {
      const int64_t count = for_tiles(t, a.images, chunk, [&](int64_t n, int64_t r, int64_t q, int64_t i) {
        const T* x = static_cast<const T*>(a.x) + n * a.height * a.width * C;
        const T* g = static_cast<const T*>(a.grad_y) + n * out_h * out_w * O;
        block_points<6>(input_side, x, a.height, a.width, C, 4 * r - a.padding, 4 * q - a.padding, zeros,
                        x_points + i * C, inputs);
        block_points<4>(gradient_side, g, out_h, out_w, O, 4 * r, 4 * q, zeros, g_points + i * O, outputs);
      });
      const Lines next_x = lines_of(t, a.images, a.height, chunk + 1), next_g = lines_of(t, a.images, out_h, chunk + 1);
      for (int k = 0; k < POINTS; k++) {
        prefetch_part(static_cast<const T*>(a.x) + next_x.first * a.width * C, next_x.count * a.width * C, k, POINTS);
        prefetch_part(static_cast<const T*>(a.grad_y) + next_g.first * out_w * O, next_g.count * out_w * O, k, POINTS);
        product<true>(C, O, count, x_points + k * inputs, C, 1, g_points + k * outputs, mine + k * C * O);
      }
    }
  });
  if (failed == 0) reduce_partials(sums + total, groups - 1, total, total, sums);
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

}  // namespace

int conv_forward_winograd(const Convolution& a) {
  return a.dtype == Dtype::float32 ? convolve<float, false>(a) : convolve<bfloat16, false>(a);
}
int conv_weight_winograd(const Convolution& a) {
  return a.dtype == Dtype::float32 ? weight_winograd<float>(a) : weight_winograd<bfloat16>(a);
}
int conv_input_winograd(const Convolution& a) {
  return a.dtype == Dtype::float32 ? convolve<float, true>(a) : convolve<bfloat16, true>(a);
}

}  // namespace spikeloom::SPIKELOOM_LEVEL
