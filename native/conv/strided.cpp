// Gradients of convolutions with stride, every product of them:
//
//   for n, oy, ox, ky, kx, c with y = oy stride + ky - padding, x = ox stride + kx - padding:
//     grad_x[n, y, x, c] += grad_y[n, oy, ox, :] w[:, c, ky, kx]
//     grad_weight[:, c, ky, kx] += grad_y[n, oy, ox, :] x[n, y, x, c]
//
// As for the sparse gradient of the weights, positions of the input fall into classes by their place within a stride,
// each a convolution without stride. The gradient of the input is one small matrix product for each row of a class,
// each of its taps in that direction and each row of pixels, and so is the gradient of the weights, over positions.
#include "conv/convolution.hpp"
#include "conv/product.hpp"

namespace spikeloom::SPIKELOOM_LEVEL {
namespace {

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
  return a.stride > 1 && a.kernel_height <= 3 && a.kernel_width <= 3 && a.in % LANES == 0 && a.out % LANES == 0 &&
         a.padding <= 2;
}

template <class T>
int input_strided(const Convolution& a) {
  if (!strided(a)) return UNSUPPORTED;
  const int64_t s = a.stride, p = a.padding, KH = a.kernel_height, KW = a.kernel_width, C = a.in, O = a.out;
  const int64_t out_h = out_height(a), out_w = out_width(a), taps_h = (KH + s - 1) / s, taps_w = (KW + s - 1) / s;
  const auto lines = [s](int64_t kernel, int64_t at) { return (kernel - at + s - 1) / s; };  // taps of a class
  float* filters = static_cast<float*>(std::aligned_alloc(64, round_up(KH * KW * O * C * 4, 64)));
  if (filters == nullptr) return OUT_OF_MEMORY;
  // By class of rows, tap of those, class of columns; then the taps of those, in the order of the pixels that they
  // read.
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
  const int failed =
      for_blocks(a.images * bands, 1, bytes, a.threads, false, [&](int64_t block, int64_t, float* scratch) {
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
            put_floats(static_cast<T*>(a.grad_x) + at,
                       a.grad_skip ? sum + get_floats(static_cast<const T*>(a.grad_skip) + at) : sum);
          }
      }
    }
  });
  std::free(filters);
  return failed;
}

template <class T>
int weight_strided(const Convolution& a) {
  if (!strided(a)) return UNSUPPORTED;
  const int64_t s = a.stride, KH = a.kernel_height, KW = a.kernel_width, C = a.in, O = a.out, total = KH * KW * C * O;
  const int64_t out_h = out_height(a), out_w = out_width(a), wide = a.width + 2 * a.padding;
  // Bands of rows of the output, and the input that they read.
  const int64_t band = smaller(out_h, larger(1, (24 << 10) / (wide * C * s + out_w * O))),
                bands = (out_h + band - 1) / band;
  const int64_t blocks = a.images * bands, groups = smaller(blocks, total * 4 > (1 << 18) ? a.threads : 32);
  const int64_t inputs = round_up(((band - 1) * s + KH) * wide * C, 16);
  float* sums = static_cast<float*>(std::aligned_alloc(64, round_up(groups * total * 4, 64)));
  if (sums == nullptr) return OUT_OF_MEMORY;
  const int failed = for_groups(blocks, groups, (inputs + band * out_w * O) * 4, a.threads, false,
                                [&](int64_t group, int64_t first, int64_t last, float* scratch) {
    float *mine = sums + group * total, *outputs = scratch + inputs;
    std::memset(mine, 0, total * 4);
    for (int64_t block = first; block < last; block++) {
      const int64_t n = block / bands, y0 = block % bands * band, rows = smaller(band, out_h - y0);
      const Band x{y0 * s - a.padding, -a.padding, (rows - 1) * s + KH, wide}, g{y0, 0, rows, out_w};
      load_band(x, static_cast<const T*>(a.x) + n * a.height * a.width * C, a.height, a.width, C, scratch);
      load_band(g, static_cast<const T*>(a.grad_y) + n * out_h * out_w * O, out_h, out_w, O, outputs);
      for (int64_t k = 0; k < KH * KW; k++)
        for (int64_t r = 0; r < rows; r++)
          product<true>(C, O, out_w, scratch + ((r * s + k / KW) * wide + k % KW) * C, s * C, 1,
                        outputs + r * out_w * O, mine + k * C * O);
    }
  });
  if (failed == 0) reduce_partials(sums + total, groups - 1, total, total, sums);
  for (int64_t k = 0; failed == 0 && k < KH * KW; k++)
    for (int64_t c = 0; c < C; c++)
      for (int64_t o = 0; o < O; o++) a.grad_weight[place(a, o, c, k / KW, k % KW)] = sums[(k * C + c) * O + o];
  std::free(sums);
  return failed;
}

}  // namespace

int conv_weight_strided(const Convolution& a) {
  return a.dtype == Dtype::float32 ? weight_strided<float>(a) : weight_strided<bfloat16>(a);
}
int conv_input_strided(const Convolution& a) {
  return a.dtype == Dtype::float32 ? input_strided<float>(a) : input_strided<bfloat16>(a);
}

}  // namespace spikeloom::SPIKELOOM_LEVEL
