// Neurons behind the layers that run by their spikes, over all steps at once (engine/fire.cpp).
#pragma once

#include "common/math.hpp"

namespace spikeloom::SPIKELOOM_LEVEL {

// `count` neurons side by side, the first at element `at`, on sums without a bias, `sums_step` apart (0: the same at
// all steps). `once`: so is what is added to them, and their total is written for one step.
void fire_span(const Epilogue& given, int64_t at, int64_t count, int64_t step, const float* sums, int64_t sums_step,
               bool once);

// What sums are made of. `plain`: floats without a bias, of which no more are there than neurons.
enum class Number { plain, floats, shorts, ints };
inline Number number_of(const float*) { return Number::floats; }
inline Number number_of(const int16_t*) { return Number::shorts; }
inline Number number_of(const int32_t*) { return Number::ints; }

// Sums of a block of channels, for some rows of some images: [image, step, row, column, channel of the block].
struct Block {
  int64_t channel, vectors;  // the first; how many vectors of them, at most MOST_VECTORS
  int64_t image, images, row, rows;
  const uint8_t* active;  // [image, step]: whether anything reaches the sums
};
constexpr int MOST_VECTORS = 16;

void fire_block(const EngineConv& a, const Block& block, const void* sums, Number number);

inline int64_t out_height(const EngineConv& a) { return (a.height + 2 * a.padding_y - a.kernel_height) / a.stride + 1; }
inline int64_t out_width(const EngineConv& a) { return (a.width + 2 * a.padding_x - a.kernel_width) / a.stride + 1; }

// Whether nothing reaches an image's sums at any step.
inline bool stays_silent(const EngineConv& a, const uint8_t* active, int64_t image) {
  bool silent = true;
  for (int64_t t = 0; t < a.steps; t++) silent = silent && !active[image * a.steps + t];
  return silent;
}

}  // namespace spikeloom::SPIKELOOM_LEVEL
