// Convolutions of one filter a channel (the equation stands in engine/conv.cpp).
#pragma once

#include "engine/parts.hpp"

namespace spikeloom::SPIKELOOM_LEVEL {
namespace {

// The channels of a block as numbers, with zeros at both sides: [row, column, channel of the block].
template <int NV>
void to_numbers(const EngineConv& a, const Band& band, const uint8_t* image, int64_t c, int64_t frame, float* numbers) {
  constexpr int64_t BLOCK = NV * LANES;
  const uint8_t* const end = a.x + a.steps * a.images * a.height * a.width * a.in;
  for (int64_t row = band.top; row < band.bottom; row++, numbers += frame * BLOCK) {
    const uint8_t* x = image + row * a.width * a.in + c;
    float* to = numbers + a.padding_x * BLOCK;
    // What lies behind the channels counts for nothing, but must be there.
    const bool all = x + (a.width - 1) * a.in + BLOCK <= end;
    for (int64_t column = 0; column < a.width; column++, x += a.in, to += BLOCK)
      for (int j = 0; j < NV; j++)
        put(to + j * LANES, get_some(x + j * LANES, all ? LANES : smaller(LANES, a.in - c - j * LANES)));
  }
}

// The part of a filter that has inputs.
struct Taps {
  int64_t first_y, last_y, first_x, last_x;
};

// X outputs side by side with filters of one channel each; the first's window begins at `numbers`.
template <int X, int NV>
ALWAYS_INLINE inline void filter_places(const EngineConv& a, const Taps& taps, const float* numbers, int64_t frame,
                                        const float* weight, float* sums) {
  constexpr int64_t BLOCK = NV * LANES;
  const int64_t padded = round_up(a.in, LANES), apart = a.stride * BLOCK;
  Vec sum[X][NV] = {};
  for (int64_t ky = taps.first_y; ky < taps.last_y; ky++)
    for (int64_t kx = taps.first_x; kx < taps.last_x; kx++) {
      const float *w = weight + (ky * a.kernel_width + kx) * padded, *from = numbers + (ky * frame + kx) * BLOCK;
#pragma GCC unroll 8
      for (int x = 0; x < X; x++)
        for (int j = 0; j < NV; j++) sum[x][j] += get(w + j * LANES) * get(from + x * apart + j * LANES);
    }
#pragma GCC unroll 8
  for (int x = 0; x < X; x++)
    for (int j = 0; j < NV; j++) put(sums + x * BLOCK + j * LANES, sum[x][j]);
}

// One filter a channel, for a block of them. A step without spikes in the rows that it sees costs no sums.
template <int NV>
void filter_block(const EngineConv& a, const Band& band, int64_t c, const uint8_t* active, float* scratch) {
  constexpr int64_t BLOCK = NV * LANES;
  constexpr int X = 8 / NV;
  const int64_t out_w = out_width(a), map_floats = band.rows * out_w * BLOCK, frame = a.width + 2 * a.padding_x;
  float *sums = scratch, *numbers = sums + a.steps * band.images * map_floats;
  std::memset(numbers, 0, (band.bottom - band.top) * frame * BLOCK * 4);
  Taps taps;
  taps.first_x = larger(0, a.padding_x - (out_w - 1) * a.stride);
  taps.last_x = smaller(a.kernel_width, a.width + a.padding_x);
  for (int64_t i = 0; i < a.steps * band.images; i++) {
    float* sum = sums + i * map_floats;
    if (!active[i]) {
      std::memset(sum, 0, map_floats * 4);
      continue;
    }
    to_numbers<NV>(a, band, image_of(a, band, i), c, frame, numbers);
    for (int64_t y = 0; y < band.rows; y++) {
      const int64_t row = (band.y + y) * a.stride - a.padding_y;
      taps.first_y = larger(0, -row), taps.last_y = smaller(a.kernel_height, a.height - row);
      const float* from = numbers + (row - band.top) * frame * BLOCK;
      int64_t x = 0;
      for (; x + X <= out_w; x += X, sum += X * BLOCK)
        filter_places<X, NV>(a, taps, from + x * a.stride * BLOCK, frame, a.weight + c, sum);
      for (; x < out_w; x++, sum += BLOCK)
        filter_places<1, NV>(a, taps, from + x * a.stride * BLOCK, frame, a.weight + c, sum);
    }
  }
  fire_block<NV>(a, c, band, sums, [&](int64_t i) { return !active[i]; });
}

int convolve_depthwise(const EngineConv& a) {
  constexpr int64_t BLOCK = 4 * LANES;
  const Part part = partition(a, BLOCK, 48 << 10);
  const int64_t blocks = (a.in + BLOCK - 1) / BLOCK, maps = a.steps * part.images;
  const int64_t frame = a.width + 2 * a.padding_x, rows = (part.rows - 1) * a.stride + a.kernel_height;
  const int64_t floats = (maps * part.rows * out_width(a) + rows * frame) * BLOCK;
  return for_items(a, part.chunks * blocks, floats * 4 + maps, [&](int64_t item, float* scratch) {
    const Band band = band_of(a, part, item % part.chunks);
    uint8_t* active = reinterpret_cast<uint8_t*>(scratch + floats);
    for (int64_t i = 0; i < a.steps * band.images; i++)
      active[i] = any_byte(image_of(a, band, i) + band.top * a.width * a.in, (band.bottom - band.top) * a.width * a.in);
    // Channels in blocks of four, two and one vectors.
    int64_t c = item / part.chunks * BLOCK;
    if (a.in - c > 3 * LANES) return filter_block<4>(a, band, c, active, scratch);
    if (a.in - c > LANES) filter_block<2>(a, band, c, active, scratch), c += 2 * LANES;
    if (c < a.in) filter_block<1>(a, band, c, active, scratch);
  });
}

}  // namespace
}  // namespace spikeloom::SPIKELOOM_LEVEL
