// Steps of the engine that have no weights to speak of, on maps of bytes or of float32:
//
//   engine_elements   y[...] = f(a[...], b[...], c[...])
//   engine_reduce     y[o, i] = sum over k of x[o, k, i] (`cascade`), divided by their number for a mean
//   engine_windows    y[n, oy, ox, c] = maximum or mean over the window
#include "engine/items.hpp"
#include "engine/partial.hpp"

namespace spikeloom::SPIKELOOM_LEVEL {
namespace {

constexpr int AXES = 5, OPERANDS = 4;
constexpr int64_t TILE = 512;          // elements that are worked on together
constexpr int64_t PARALLEL = 1 << 15;  // below it, waking the threads costs more than they give

inline int threads_for(int64_t elements, int threads) { return elements < PARALLEL ? 1 : threads; }

// The axes without those of one place, neighbours joined where every operand lies as if they were one axis.
struct Axes {
  int count = 0;
  int64_t size[AXES], stride[AXES][OPERANDS];
};

inline Axes joined(const int64_t* sizes, const int64_t* strides) {
  Axes x;
  for (int axis = 0; axis < AXES; axis++) {
    if (sizes[axis] == 1) continue;
    bool joins = x.count > 0;
    for (int k = 0; k < OPERANDS && joins; k++)
      joins = x.stride[x.count - 1][k] == strides[k * AXES + axis] * sizes[axis];
    if (!joins) x.size[x.count++] = 1;
    x.size[x.count - 1] *= sizes[axis];
    for (int k = 0; k < OPERANDS; k++) x.stride[x.count - 1][k] = strides[k * AXES + axis];
  }
  if (x.count == 0) x.count = 1, x.size[0] = 1, std::memset(x.stride[0], 0, sizeof x.stride[0]);
  return x;
}

// n elements as numbers side by side: where they lie, or in `tile`.
inline const float* numbers(const void* p, bool bytes, int64_t at, int64_t stride, int64_t n, float* tile) {
  const float* floats = static_cast<const float*>(p) + (bytes ? 0 : at);
  const uint8_t* small = static_cast<const uint8_t*>(p) + (bytes ? at : 0);
  if (stride == 0) {
    const float value = bytes ? static_cast<float>(*small) : *floats;
    for (int64_t i = 0; i < n; i++) tile[i] = value;
    return tile;
  }
  if (!bytes && stride == 1) return floats;
  if (bytes && stride == 1) {
    for (int64_t i = 0; i < n; i += LANES) {
      const int64_t some = smaller(LANES, n - i);
      put_some(tile + i, get_some(small + i, some), some);
    }
    return tile;
  }
  for (int64_t i = 0; i < n; i++) tile[i] = bytes ? static_cast<float>(small[i * stride]) : floats[i * stride];
  return tile;
}

template <class Function>
ALWAYS_INLINE inline void each(int64_t n, float* y, const Function& f) {
#pragma omp simd
  for (int64_t i = 0; i < n; i++) y[i] = f(i);
}

// y may be none of the others.
void apply(const EngineElements& e, int64_t n, const float* a, const float* b, const float* c, float* y) {
  const float low = e.low, high = e.high;
  switch (e.element) {
    case Element::copy: return void(std::memcpy(y, a, n * 4));
    case Element::relu: return each(n, y, [=](int64_t i) ALWAYS_INLINE { return a[i] < 0.f ? 0.f : a[i]; });
    case Element::sigmoid: return each(n, y, [=](int64_t i) ALWAYS_INLINE { return logistic(a[i]); });
    case Element::clamp:
      return each(n, y, [=](int64_t i) ALWAYS_INLINE {
        const float above = a[i] < low ? low : a[i];
        return above > high ? high : above;
      });
    case Element::scale: return each(n, y, [=](int64_t i) ALWAYS_INLINE { return a[i] * high; });
    case Element::shift: return each(n, y, [=](int64_t i) ALWAYS_INLINE { return a[i] + high; });
    case Element::complement: return each(n, y, [=](int64_t i) ALWAYS_INLINE { return 1.f - a[i]; });
    case Element::add: return each(n, y, [=](int64_t i) ALWAYS_INLINE { return a[i] + b[i]; });
    case Element::mul: return each(n, y, [=](int64_t i) ALWAYS_INLINE { return a[i] * b[i]; });
    case Element::divide: return each(n, y, [=](int64_t i) ALWAYS_INLINE { return a[i] / b[i]; });
    case Element::largest: return each(n, y, [=](int64_t i) ALWAYS_INLINE { return a[i] > b[i] ? a[i] : b[i]; });
    case Element::affine: return each(n, y, [=](int64_t i) ALWAYS_INLINE { return a[i] * b[i] + c[i]; });
  }
}

void put_tile(void* y, bool bytes, int64_t at, int64_t stride, int64_t n, const float* from) {
  if (bytes) {
    uint8_t* to = static_cast<uint8_t*>(y) + at;
    for (int64_t i = 0; i < n; i++) to[i * stride] = static_cast<uint8_t>(static_cast<int32_t>(from[i]));
  } else {
    float* to = static_cast<float*>(y) + at;
    for (int64_t i = 0; i < n; i++) to[i * stride] = from[i];
  }
}

// n elements from those at the given places on.
void run_tile(const EngineElements& e, const int64_t* at, const int64_t* stride, int64_t n) {
  float tiles[OPERANDS][TILE];
  const float* a = numbers(e.a, e.a_bytes, at[1], stride[1], n, tiles[1]);
  const float* b = e.b == nullptr ? nullptr : numbers(e.b, e.b_bytes, at[2], stride[2], n, tiles[2]);
  const float* c = e.c == nullptr ? nullptr : numbers(e.c, false, at[3], stride[3], n, tiles[3]);
  if (!e.y_bytes && stride[0] == 1) return apply(e, n, a, b, c, static_cast<float*>(e.y) + at[0]);
  apply(e, n, a, b, c, tiles[0]);
  put_tile(e.y, e.y_bytes, at[0], stride[0], n, tiles[0]);
}

// Rows of n bytes, n from `most` to twice that: two moves, which may overlap.
template <int most>
void copy_short(uint8_t* y, const uint8_t* a, int64_t n, int64_t rows, int64_t y_step, int64_t a_step) {
  for (int64_t row = 0; row < rows; row++, y += y_step, a += a_step) {
    uint8_t first[most], second[most];
    std::memcpy(first, a, most), std::memcpy(second, a + n - most, most);
    std::memcpy(y, first, most), std::memcpy(y + n - most, second, most);
  }
}

void copy_rows(uint8_t* y, const uint8_t* a, int64_t n, int64_t rows, int64_t y_step, int64_t a_step) {
  if (n >= 8 && n <= 16) return copy_short<8>(y, a, n, rows, y_step, a_step);
  if (n > 16 && n <= 32) return copy_short<16>(y, a, n, rows, y_step, a_step);
  if (n > 32 && n <= 64) return copy_short<32>(y, a, n, rows, y_step, a_step);
  for (int64_t row = 0; row < rows; row++) std::memcpy(y + row * y_step, a + row * a_step, n);
}

// `rows` times n elements, each row `step` behind the one before it.
void run_rows(const EngineElements& e, int64_t* at, const int64_t* stride, int64_t n, const int64_t* step,
              int64_t rows) {
  if (e.element == Element::copy && stride[0] == 1 && stride[1] == 1 && e.y_bytes == e.a_bytes) {
    const int64_t size = e.y_bytes ? 1 : 4;
    return copy_rows(static_cast<uint8_t*>(e.y) + at[0] * size, static_cast<const uint8_t*>(e.a) + at[1] * size,
                     n * size, rows, step[0] * size, step[1] * size);
  }
  for (int64_t row = 0; row < rows; row++) {
    run_tile(e, at, stride, n);
    for (int k = 0; k < OPERANDS; k++) at[k] += step[k];
  }
}

// The sum of rows in groups of 16 (or more of many rows), groups of groups, and so on in four levels, so that errors do
// not grow with their number: PyTorch's order, where it takes whole vectors of channels.
template <class Row>
ALWAYS_INLINE inline Vec cascade(int64_t rows, const Row& row) {
  int power = 4;
  while (int64_t{1} << (4 * power + 3) < rows) power++;
  Vec sum[4] = {};
  int64_t k = 0;
  while (k + (int64_t{1} << power) <= rows) {
    for (const int64_t end = k + (int64_t{1} << power); k < end; k++) sum[0] += row(k);
    for (int j = 1; j < 4; j++) {
      sum[j] += sum[j - 1], sum[j - 1] = Vec{};
      if (k >> (j * power) & ((int64_t{1} << power) - 1)) break;
    }
  }
  for (; k < rows; k++) sum[0] += row(k);
  return sum[0] + sum[1] + sum[2] + sum[3];
}

}  // namespace

int engine_elements(const EngineElements& e) {
  constexpr int64_t SOME = 16 * TILE;  // elements of an item
  const Axes x = joined(e.sizes, e.strides);
  const int last = x.count - 1, middle = last > 0 ? last - 1 : 0;  // the axes of elements of a row, and of rows
  const int64_t alone[OPERANDS] = {}, *step = last > 0 ? x.stride[middle] : alone;
  const int64_t inner = x.size[last], all_rows = last > 0 ? x.size[middle] : 1;
  int64_t outer = 1;
  for (int axis = 0; axis < middle; axis++) outer *= x.size[axis];
  // A block is up to `most` rows of up to TILE elements, an item a group of blocks.
  const int64_t wide = smaller(inner, TILE), most = smaller(all_rows, larger(1, SOME / wide));
  const int64_t tiles = (inner + TILE - 1) / TILE, chunks = (all_rows + most - 1) / most;
  const int64_t blocks = outer * chunks * tiles, group = larger(1, smaller(256, SOME / (most * wide)));
  const int threads = threads_for(outer * all_rows * inner, e.threads);
  return for_items((blocks + group - 1) / group, 0, threads, [&](int64_t item, float*) {
    for (int64_t block = item * group; block < smaller(blocks, (item + 1) * group); block++) {
      const int64_t first = block / (outer * chunks) * TILE, row = block / outer % chunks * most;
      int64_t at[OPERANDS], place = block % outer;
      for (int k = 0; k < OPERANDS; k++) at[k] = first * x.stride[last][k] + row * step[k];
      for (int axis = middle - 1; axis >= 0; place /= x.size[axis], axis--)
        for (int k = 0; k < OPERANDS; k++) at[k] += place % x.size[axis] * x.stride[axis][k];
      run_rows(e, at, x.stride[last], smaller(TILE, inner - first), step, smaller(most, all_rows - row));
    }
  });
}

int engine_reduce(const EngineReduce& a) {
  const int64_t tiles = (a.inner + TILE - 1) / TILE;
  const int threads = threads_for(a.outer * a.count * a.inner, a.threads);
  return for_items(a.outer * tiles, 0, threads, [&](int64_t item, float*) {
    const int64_t outer = item / tiles, first = item % tiles * TILE;
    const float number = static_cast<float>(a.count);
    const auto sums = [&](const auto* x) {
      for (int64_t i = first; i < smaller(a.inner, first + TILE); i += LANES) {
        const int64_t n = smaller(LANES, smaller(a.inner, first + TILE) - i);
        const Vec sum = cascade(
            a.count, [&](int64_t k) ALWAYS_INLINE { return get_some(x + (outer * a.count + k) * a.inner + i, n); });
        put_some(a.y + outer * a.inner + i, a.mean ? sum / all(number) : sum, n);
      }
    };
    a.x != nullptr ? sums(a.x) : sums(a.x_bytes);
  });
}

int engine_windows(const EngineWindows& a) {
  const int threads = threads_for(a.images * a.height * a.width * a.channels, a.threads);
  return for_items(a.images * a.out_height, 0, threads, [&](int64_t item, float*) {
    const int64_t n = item / a.out_height, top = item % a.out_height * a.stride - a.padding, C = a.channels;
    const int64_t bottom = smaller(top + a.kernel, a.height + a.padding);
    const int64_t first_y = larger(0, top), last_y = smaller(bottom, a.height);
    for (int64_t x = 0; x < a.out_width; x++) {
      const int64_t left = x * a.stride - a.padding, right = smaller(left + a.kernel, a.width + a.padding);
      const int64_t first_x = larger(0, left), last_x = smaller(right, a.width);
      const int64_t inside = (last_y - first_y) * (last_x - first_x);
      const Vec counted = all(static_cast<float>(a.count_padding ? (bottom - top) * (right - left) : inside));
      float* y = a.y + (item * a.out_width + x) * C;
      const auto windows = [&](const auto* image) {
        for (int64_t c = 0; c < C; c += LANES) {
          const int64_t some = smaller(LANES, C - c);
          Vec found = a.mean ? Vec{} : all(-__builtin_inff());
          for (int64_t row = first_y; row < last_y; row++)
            for (int64_t column = first_x; column < last_x; column++) {
              const Vec value = get_some(image + ((n * a.height + row) * a.width + column) * C + c, some);
              // A maximum of something that is no number is none.
              found = a.mean ? found + value : (found >= value || found != found ? found : value);
            }
          put_some(y + c, a.mean ? found / counted : found, some);
        }
      };
      a.x != nullptr ? windows(a.x) : windows(a.x_bytes);
    }
  });
}

}  // namespace spikeloom::SPIKELOOM_LEVEL
