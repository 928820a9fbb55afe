// Gradients of the weights that leave the zeros of x out:
//
//   for n, y, x, c:  if x[n, y, x, c] = v is not zero:
//     for every output (oy, ox) that sees (y, x) through tap (ky, kx):  grad_weight[:, c, ky, kx] += v grad_y[n, oy,
//     ox, :]
//
// For one input channel, the sums of all taps and of a block of output channels stay in registers while the list of its
// active positions is read. With a stride, positions fall into classes (y + padding) % stride, (x + padding) % stride:
// each is a convolution without stride, of every stride-th tap. Positions are taken in chunks, bands of an image or
// several small ones, whose gradient is copied with a border of zeros and stays in cache.
#include "common/prefetch.hpp"
#include "conv/convolution.hpp"

namespace spikeloom::SPIKELOOM_LEVEL {
namespace {

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
void add_taps(int64_t rows, int64_t columns, const Entry* entry, int64_t count, const float* g, int64_t row,
              float* out) {
  if constexpr (NV > WIDE)
    return add_rows<1, 1, NV>(entry, count, g, row, out);
  else
    switch (rows * 4 + columns) {
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
  const int64_t left = floor_divide(p, s) - (taps_w - 1), columns = floor_divide(a.width - 1 + p, s) - left + 1;
  const auto rows_of = [&](int64_t y0, int64_t y1) {
    return floor_divide(y1 - 1 + p, s) - floor_divide(y0 + p, s) + taps_h;
  };
  // Chunks: bands of `band` rows, or `several` images.
  const int64_t budget = (blocks * BLOCK * C * KH * KW * 4 > (1 << 19) ? 96 << 10 : 22 << 10) / (columns * BLOCK * 4);
  int64_t band = a.height;
  while (band > s && rows_of(0, band) > budget) band -= s;
  const int64_t bands = (a.height + band - 1) / band;
  const int64_t several =
      bands > 1 ? 1 : smaller(a.images, budget / rows_of(0, band) < 1 ? 1 : budget / rows_of(0, band));
  const int64_t chunks = bands > 1 ? a.images * bands : (a.images + several - 1) / several;
  const int64_t classes = s * s, most = padded_stride(several * ((band + s - 1) / s) * ((a.width + s - 1) / s) * 2) / 2;
  const int64_t image_floats = rows_of(0, band + s) * columns * BLOCK, total = blocks * C * KH * KW * BLOCK;
  // Few groups where each has large sums of its own.
  const int64_t groups = smaller(chunks, total * 4 > (1 << 19) ? a.threads : 16);
  float* sums = static_cast<float*>(std::aligned_alloc(64, round_up(groups * total * 4, 64)));
  if (sums == nullptr) return OUT_OF_MEMORY;
  const int64_t list_bytes = round_up(classes * C * most * sizeof(Entry), 64),
                count_bytes = round_up(classes * C * 8, 64);
  const int64_t bytes = list_bytes + count_bytes + (several * image_floats + BLOCK) * 4;
  const int failed = for_groups(chunks, groups, bytes, a.threads, false,
                                [&](int64_t group, int64_t first, int64_t last, float* scratch) {
    float* mine = sums + group * total;
    std::memset(mine, 0, total * 4);
    float* g = scratch;
    Entry* lists = reinterpret_cast<Entry*>(g + several * image_floats + BLOCK);
    int64_t* counts = reinterpret_cast<int64_t*>(reinterpret_cast<char*>(lists) + list_bytes);
    for (int64_t chunk = first; chunk < last; chunk++) {
      const int64_t n0 = bands > 1 ? chunk / bands : chunk * several, y0 = bands > 1 ? chunk % bands * band : 0;
      const int64_t y1 = smaller(a.height, y0 + band), images = smaller(several, a.images - n0);
      const int64_t top = floor_divide(y0 + p, s) - (taps_h - 1), rows = rows_of(y0, y1);
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
              const T* from =
                  static_cast<const T*>(a.grad_y) + (((n0 + n) * out_h + y) * out_w + x) * a.out + o * BLOCK;
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
              prefetch_part(next_x, next * a.width * C, c, C);
              prefetch_part(next_g, next * out_w * a.out / s, c, C);
            }
            add_taps<NV>(lines_y, lines_x, lists + (k * C + c) * most, counts[k * C + c], g, columns * BLOCK,
                         out + c * lines_y * lines_x * BLOCK);
          }
          out += C * lines_y * lines_x * BLOCK;
        }
      }
    }
  });
  if (failed == 0) reduce_partials(sums + total, groups - 1, total, total, sums);
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
  if (a.kernel_height > 3 || a.kernel_width > 3) return UNSUPPORTED;
  if (a.kernel_height == 1 && a.kernel_width == 1 && a.out >= 8 * LANES) return weight_of<T, 8>(a);  // or sums wait
  return a.out <= LANES ? weight_of<T, 1>(a) : weight_of<T, WIDE>(a);
}

}  // namespace

int conv_weight_sparse(const Convolution& a) {
  return a.dtype == Dtype::float32 ? weight_gradient<float>(a) : weight_gradient<bfloat16>(a);
}

}  // namespace spikeloom::SPIKELOOM_LEVEL
