// Parts of a convolution that fit in a cache: some rows of some images, and the neurons behind them.
#pragma once

#include "engine/epilogue.hpp"
#include "engine/index_lists.hpp"
#include "engine/items.hpp"

namespace spikeloom::SPIKELOOM_LEVEL {
namespace {

// Whether any of n bytes is not zero.
inline bool any_byte(const uint8_t* x, int64_t n) {
  uint64_t any = 0;
  for (int64_t i = 0; i < n && any == 0; i += 64) any = nonzero_bytes(x + i, smaller(64, n - i));
  return any != 0;
}

inline int64_t out_height(const EngineConv& a) { return (a.height + 2 * a.padding_y - a.kernel_height) / a.stride + 1; }
inline int64_t out_width(const EngineConv& a) { return (a.width + 2 * a.padding_x - a.kernel_width) / a.stride + 1; }

inline Window window(const EngineConv& a, int64_t rows) {
  return {a.in, a.out, a.kernel_height, a.kernel_width, a.stride, rows, out_width(a)};
}

// Some images, some rows of their outputs: enough positions to use a block of weights often, sums that stay in cache.
struct Part {
  int64_t images, rows, bands, chunks;
};

inline Part partition(const EngineConv& a, int64_t block, int64_t bytes = 192 << 10) {
  const int64_t row = a.steps * out_width(a), most = bytes / (block * 4);
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

// The images and rows of outputs of a chunk, and the rows of inputs that they see.
struct Band {
  int64_t n, images, y, rows, top, bottom;
};

inline Band band_of(const EngineConv& a, const Part& part, int64_t chunk) {
  Band b;
  b.n = chunk / part.bands * part.images, b.images = smaller(part.images, a.images - b.n);
  b.y = chunk % part.bands * part.rows, b.rows = smaller(part.rows, out_height(a) - b.y);
  const int64_t row = b.y * a.stride - a.padding_y;
  b.top = smaller(a.height, larger(0, row));
  b.bottom = larger(b.top, smaller(a.height, row + (b.rows - 1) * a.stride + a.kernel_height));
  return b;
}

// The i-th of a chunk's inputs [image, step].
inline const uint8_t* image_of(const EngineConv& a, const Band& band, int64_t i) {
  return a.x + (i % a.steps * a.images + band.n + i / a.steps) * a.height * a.width * a.in;
}

// Whether nothing reaches an image's neurons at any step, and they do the same at all places. is_silent(i) tells it of
// the i-th of a chunk's inputs.
template <class Silent>
bool stays_silent(const EngineConv& a, int64_t image, const Silent& is_silent) {
  bool silent = starts_alike(a);
  for (int64_t t = 0; t < a.steps; t++) silent = silent && is_silent(image * a.steps + t);
  return silent;
}

// The neurons of a block of channels from the first on, of a chunk, from sums [image, step, row, column, channel of the
// block].
template <int NV, class Silent>
void fire_block(const EngineConv& a, int64_t first_channel, const Band& band, const float* sums,
                const Silent& is_silent) {
  constexpr int64_t BLOCK = NV * LANES;
  const int64_t out_h = out_height(a), out_w = out_width(a), step = a.images * out_h * out_w * a.out;
  const int64_t area = band.rows * out_w, map_floats = area * BLOCK;
  const Epilogue fired = a;
  const int64_t out = a.out;
  Vec bias[NV];
  for (int j = 0; j < NV; j++) {
    const int64_t c = first_channel + j * LANES, n = smaller(LANES, out - c);
    bias[j] = n > 0 ? get_some(a.bias + c, n) : Vec{};
  }
  constexpr int V = NV < 4 ? NV : 4;
  for (int64_t image = 0; image < band.images; image++) {
    const bool silent = stays_silent(a, image, is_silent);
    const int64_t places = silent ? 1 : area;
    const float* sum = sums + image * a.steps * map_floats;
    const int64_t at = ((band.n + image) * out_h + band.y) * out_w * out + first_channel;
    int64_t done = 0;
    if (NV < 4 && out == BLOCK) {  // nothing lies between the places: four vectors of some of them
      Vec four[4];
      for (int j = 0; j < 4; j++) four[j] = bias[j % NV];
      done = places / (4 / NV) * (4 / NV);
      fire_rows<4>(fired, at, 4 * LANES, done * NV / 4, step, {sum, map_floats, 4 * LANES, four});
    }
    for (int j = 0; j < NV; j += V) {
      const int64_t c = first_channel + j * LANES, first = at + done * out + j * LANES;
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
    if (silent) repeat_first(fired, at, step, out, area, smaller(BLOCK, out - first_channel));
  }
}

}  // namespace
}  // namespace spikeloom::SPIKELOOM_LEVEL
