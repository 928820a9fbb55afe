// Convolutions of every channel by its own filter, and their gradients:
//
//   for n, oy, ox, ky, kx:  y[n, oy, ox, :] += x[n, oy stride + ky - pad_height, ox stride + kx - pad_width, :] w[ky,
//   kx, :]
//
// A tap of a line is a product of two rows: of the line's pixels, channels side by side, from the tap's pixel on, and
// of the tap's weights, repeated. Both are read in whole vectors, however many channels there are.
#include "common/simd.hpp"
#include "common/threads.hpp"

namespace spikeloom::SPIKELOOM_LEVEL {
namespace {

constexpr int64_t CHUNK = 16;     // lines that one thread takes at a time
constexpr int64_t MOST_TAPS = 8;  // sums of the weights' gradient at a time

struct Shape {
  int64_t height, width, channels;
  int64_t pixels() const { return height * width; }
};
inline Shape input_shape(const Depthwise& a) { return {a.height, a.width, a.channels}; }
inline Shape output_shape(const Depthwise& a) {
  return {(a.height + 2 * a.pad_height - a.kernel_height) / a.stride + 1,
          (a.width + 2 * a.pad_width - a.kernel_width) / a.stride + 1, a.channels};
}

// Floats after which rows of weights repeat: whole vectors of whole pixels.
inline int64_t period_of(int64_t channels) {
  int64_t period = channels;
  while (period % LANES != 0) period *= 2;
  return period;
}

template <class T>
inline void to_floats(const T* from, int64_t n, float* to) {
  int64_t i = 0;
  for (; i + LANES <= n; i += LANES) put(to + i, get_floats(from + i));
  for (; i < n; i++) to[i] = load(from, i);
}
template <class T>
inline void from_floats(const float* from, int64_t n, T* to) {
  int64_t i = 0;
  for (; i + LANES <= n; i += LANES) put_floats(to + i, get(from + i));
  for (; i < n; i++) store(to, i, from[i]);
}

// The last lines of an image as floats. Pixel q of a line is number (q + before) % stride of its phase's pixels, which
// lie side by side with zeros around them.
template <class T>
class Lines {
 public:
  Lines(const Shape& shape, int64_t stride, int64_t before, int64_t columns, int64_t kept)
      : shape(shape),
        stride(stride),
        before(before),
        phase(round_up(columns * shape.channels, LANES) + LANES),
        kept(smaller(kept, shape.height)) {}

  int64_t bytes() const { return kept * stride * phase * 4; }

  void start(const T* from, int64_t first, float* memory) {
    image = from, next = first, slots = memory;
    std::memset(slots, 0, bytes());
  }

  // Pixel `column` of the phase of tap `tap` in line y. Lines are asked for in rising order.
  const float* at(int64_t y, int64_t tap_phase, int64_t column) {
    for (; next <= y; next++) spread(next);
    return slots + (y % kept * stride + tap_phase) * phase + column * shape.channels;
  }

 private:
  void spread(int64_t y) {
    const int64_t C = shape.channels;
    const T* line = image + y * shape.width * C;
    float* to = slots + y % kept * stride * phase;
    if (stride == 1) return to_floats(line, shape.width * C, to + before * C);
    for (int64_t q = 0; q < shape.width; q++) {
      const int64_t place = q + before;
      to_floats(line + q * C, C, to + place % stride * phase + place / stride * C);
    }
  }

  const Shape shape;
  const int64_t stride, before, phase, kept;
  const T* image = nullptr;
  int64_t next = 0;
  float* slots = nullptr;
};

// Of the inputs, what a line of outputs sees.
template <class T>
Lines<T> input_lines(const Depthwise& a) {
  const int64_t s = a.stride, seen = output_shape(a).width + (a.kernel_width - 1) / s;
  return {input_shape(a), s, a.pad_width, larger(seen, (a.width + a.pad_width - 1) / s + 1), a.kernel_height};
}

// Each tap's weights, repeated for a period.
class Tiles {
 public:
  explicit Tiles(const Depthwise& a)
      : period(period_of(a.channels)),
        values(static_cast<float*>(std::malloc(a.kernel_height * a.kernel_width * period * sizeof(float)))) {
    if (values == nullptr) return;
    for (int64_t tap = 0; tap < a.kernel_height * a.kernel_width; tap++)
      for (int64_t i = 0; i < period; i += a.channels)
        std::memcpy(values + tap * period + i, a.weight + tap * a.channels, a.channels * sizeof(float));
  }
  ~Tiles() { std::free(values); }
  Tiles(const Tiles&) = delete;
  Tiles& operator=(const Tiles&) = delete;

  bool failed() const { return values == nullptr; }
  const float* of(int64_t tap) const { return values + tap * period; }

  const int64_t period;

 private:
  float* const values;
};

// What meets in a pixel of the result: the first pixel of a line, and the weights of a tap.
struct Tap {
  const float *line, *weight;
};

// As sum_taps from element i on, U periods at a time, which share a read of the weights. Returns the first element
// that is left.
template <int U, class T>
inline int64_t sum_periods(const Tap* taps, int64_t count, int64_t i, int64_t n, int64_t period, T* to) {
  for (; i + U * period <= n; i += U * period) {
    for (int64_t place = 0; place < period; place += LANES) {
      Vec sums[U] = {};
      for (int64_t tap = 0; tap < count; tap++) {
        const float* line = taps[tap].line + i + place;
        const Vec weight = get(taps[tap].weight + place);
        for (int j = 0; j < U; j++) sums[j] = fused(get(line + j * period), weight, sums[j]);
      }
      for (int j = 0; j < U; j++) put_floats(to + i + j * period + place, sums[j]);
    }
  }
  return i;
}

// to[i] = sum over taps of line[i] weight[i % period], i < n.
template <class T>
inline void sum_taps(const Tap* taps, int64_t count, int64_t n, int64_t period, T* to) {
  int64_t i = sum_periods<8>(taps, count, 0, n, period, to);
  i = sum_periods<2>(taps, count, i, n, period, to);
  i = sum_periods<1>(taps, count, i, n, period, to);
  for (int64_t place = 0; i < n; i += LANES, place += LANES) {
    Vec sum = {};
    for (int64_t tap = 0; tap < count; tap++) sum = fused(get(taps[tap].line + i), get(taps[tap].weight + place), sum);
    float floats[LANES];
    put(floats, sum);
    from_floats(floats, smaller(LANES, n - i), to + i);
  }
}

template <class T>
int forward(const Depthwise& a) {
  const Shape in = input_shape(a), out = output_shape(a);
  const int64_t C = a.channels, s = a.stride, KH = a.kernel_height, KW = a.kernel_width;
  const int64_t chunks = (out.height + CHUNK - 1) / CHUNK;
  const Tiles tiles(a);
  if (tiles.failed()) return OUT_OF_MEMORY;
  const Lines<T> all = input_lines<T>(a);
  const int64_t taps_bytes = round_up(KH * KW * sizeof(Tap), 64);
  return for_blocks(a.images * chunks, 1, taps_bytes + all.bytes(), a.threads,
                    a.images * out.pixels() * C < MIN_PARALLEL, [&](int64_t item, int64_t, float* scratch) {
    const int64_t n = item / chunks, first = item % chunks * CHUNK, last = smaller(out.height, first + CHUNK);
    Tap* taps = reinterpret_cast<Tap*>(scratch);
    Lines<T> lines = all;
    lines.start(static_cast<const T*>(a.x) + n * in.pixels() * C, larger(0, first * s - a.pad_height),
                scratch + taps_bytes / 4);
    for (int64_t y = first; y < last; y++) {
      const int64_t top = y * s - a.pad_height;
      int64_t count = 0;
      for (int64_t ky = larger(0, -top); ky < smaller(KH, in.height - top); ky++)
        for (int64_t kx = 0; kx < KW; kx++)
          taps[count++] = {lines.at(top + ky, kx % s, kx / s), tiles.of(ky * KW + kx)};
      sum_taps(taps, count, out.width * C, tiles.period, static_cast<T*>(a.y) + (n * out.height + y) * out.width * C);
    }
  });
}

template <class T>
int input_gradient(const Depthwise& a) {
  const Shape in = input_shape(a), out = output_shape(a);
  const int64_t C = a.channels, s = a.stride, KH = a.kernel_height, KW = a.kernel_width, before = (KW - 1) / s;
  const int64_t chunks = (in.height + CHUNK - 1) / CHUNK;
  const Tiles tiles(a);
  if (tiles.failed()) return OUT_OF_MEMORY;
  // Pixel m s + phase - pad_width of a line meets the outputs m, m - 1, ... by the taps phase, phase + s, ...
  const int64_t columns = (in.width + a.pad_width - 1) / s + 1;
  Lines<T> all(out, 1, before, larger(out.width, columns) + before, (KH + s - 1) / s);
  const int64_t taps_bytes = round_up(KH * KW * sizeof(Tap), 64),
                row_bytes = s == 1 ? 0 : round_up(columns * C * 4, 64);
  return for_blocks(a.images * chunks, 1, taps_bytes + row_bytes + all.bytes(), a.threads,
                    a.images * in.pixels() * C < MIN_PARALLEL, [&](int64_t item, int64_t, float* scratch) {
    const int64_t n = item / chunks, first = item % chunks * CHUNK, last = smaller(in.height, first + CHUNK);
    Tap* taps = reinterpret_cast<Tap*>(scratch);
    float* row = scratch + taps_bytes / 4;
    Lines<T> lines = all;
    lines.start(static_cast<const T*>(a.grad_y) + n * out.pixels() * C, larger(0, (first + a.pad_height - KH + s) / s),
                row + row_bytes / 4);
    for (int64_t y = first; y < last; y++) {
      T* to = static_cast<T*>(a.grad_x) + (n * in.height + y) * in.width * C;
      const int64_t at = y + a.pad_height;
      for (int64_t phase = 0; phase < s; phase++) {
        const int64_t m0 = (larger(0, a.pad_width - phase) + s - 1) / s;
        const int64_t m1 = (in.width - 1 + a.pad_width - phase + s) / s;
        if (m0 >= m1) continue;
        int64_t count = 0;
        for (int64_t ky = at % s + (KH - 1 - at % s + s) / s * s - s; ky >= 0; ky -= s) {
          const int64_t line = (at - ky) / s;
          if (ky > at || line >= out.height) continue;
          for (int64_t kx = phase; kx < KW; kx += s)
            taps[count++] = {lines.at(line, 0, m0 + before - kx / s), tiles.of(ky * KW + kx)};
        }
        if (s == 1) {
          sum_taps(taps, count, in.width * C, tiles.period, to);
          continue;
        }
        sum_taps(taps, count, (m1 - m0) * C, tiles.period, row);
        for (int64_t m = m0; m < m1; m++) from_floats(row + (m - m0) * C, C, to + (m * s + phase - a.pad_width) * C);
      }
    }
  });
}

// sums[tap][i % period] += line[i] grad[i], i < n, of K taps. grad is zero up to a whole vector.
template <int K>
inline void add_products(const Tap* taps, const float* grad, int64_t n, int64_t period, float* sums) {
  for (int64_t place = 0; place < smaller(period, n); place += LANES) {
    Vec mine[K] = {};
    for (int64_t i = place; i < n; i += period) {
      const Vec g = get(grad + i);
      for (int k = 0; k < K; k++) mine[k] = fused(get(taps[k].line + i), g, mine[k]);
    }
    for (int k = 0; k < K; k++) put(sums + k * period + place, get(sums + k * period + place) + mine[k]);
  }
}

template <class T>
int weight_gradient(const Depthwise& a) {
  const Shape in = input_shape(a), out = output_shape(a);
  const int64_t C = a.channels, s = a.stride, KH = a.kernel_height, KW = a.kernel_width, n = out.width * C;
  const int64_t taps_count = KH * KW, period = period_of(C), groups = groups_of(a.images, false);
  float* partial = static_cast<float*>(std::calloc(groups * taps_count * period, sizeof(float)));
  if (partial == nullptr) return OUT_OF_MEMORY;
  const Lines<T> all = input_lines<T>(a);
  const int64_t grad_bytes = round_up(n * 4, 64);
  const int failed =
      for_groups(a.images, groups, grad_bytes + all.bytes(), a.threads, a.images * out.pixels() * C < MIN_PARALLEL,
                 [&](int64_t group, int64_t first, int64_t last, float* grad) {
    float* sums = partial + group * taps_count * period;
    Tap taps[MOST_TAPS];
    std::memset(grad, 0, grad_bytes);
    Lines<T> lines = all;
    for (int64_t image = first; image < last; image++) {
      lines.start(static_cast<const T*>(a.x) + image * in.pixels() * C, 0, grad + grad_bytes / 4);
      for (int64_t y = 0; y < out.height; y++) {
        const int64_t top = y * s - a.pad_height, ky0 = larger(0, -top), ky1 = smaller(KH, in.height - top);
        to_floats(static_cast<const T*>(a.grad_y) + (image * out.height + y) * n, n, grad);
        for (int64_t tap = ky0 * KW; tap < ky1 * KW;) {
          const int64_t count = smaller(MOST_TAPS, ky1 * KW - tap);
          for (int64_t k = 0; k < count; k++)
            taps[k] = {lines.at(top + (tap + k) / KW, (tap + k) % KW % s, (tap + k) % KW / s), nullptr};
          float* to = sums + tap * period;
          if (count == MOST_TAPS) {
            add_products<MOST_TAPS>(taps, grad, n, period, to), tap += MOST_TAPS;
          } else if (count >= 3) {
            add_products<3>(taps, grad, n, period, to), tap += 3;
          } else {
            add_products<1>(taps, grad, n, period, to), tap += 1;
          }
        }
      }
    }
  });
  for (int64_t tap = 0; failed == 0 && tap < taps_count; tap++) {
    for (int64_t c = 0; c < C; c++) {
      float sum = 0.f;
      for (int64_t group = 0; group < groups; group++)
        for (int64_t i = c; i < period; i += C) sum += partial[(group * taps_count + tap) * period + i];
      a.grad_weight[tap * C + c] = sum;
    }
  }
  std::free(partial);
  return failed;
}

}  // namespace

#define BY_TYPE(name, run) \
  int name(const Depthwise& a) { return a.dtype == Dtype::float32 ? run<float>(a) : run<bfloat16>(a); }
BY_TYPE(depthwise_forward, forward)
BY_TYPE(depthwise_input, input_gradient)
BY_TYPE(depthwise_weight, weight_gradient)

}  // namespace spikeloom::SPIKELOOM_LEVEL
