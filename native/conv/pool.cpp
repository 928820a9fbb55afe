// Max pooling of images, channels side by side, and its gradient:
//
//   for n, oy, ox:  y[n, oy, ox, :] = max over the window of x[n, iy, ix, :],  winners = the place of the maximum in it
//   for n, iy, ix:  grad_x[n, iy, ix, :] = sum of grad_y[n, oy, ox, :] over the windows whose winner (iy, ix) is
#include "common/simd.hpp"
#include "common/threads.hpp"

namespace spikeloom::SPIKELOOM_LEVEL {
namespace {

constexpr int64_t MOST = 256;  // places of a window

inline int64_t outputs(const MaxPool& a, int64_t size) { return (size + 2 * a.padding - a.kernel) / a.stride + 1; }

// What an output sees of the image, or an input of the outputs: elements at their first channel, and the place in the
// window of each.
struct Seen {
  int64_t count = 0, element[MOST];
  uint32_t place[MOST];
  void add(int64_t of, int64_t in_window) { element[count] = of, place[count++] = static_cast<uint32_t>(in_window); }
};

// The largest of one output's channels. Of equals the first wins, and NaN over whatever it meets, as in PyTorch.
template <int NV, class T>
inline void largest(const Seen& seen, const T* x, T* y, uint8_t* winners) {
  if constexpr (NV == 0) {
    float best = load(x + seen.element[0], 0);
    uint32_t winner = seen.place[0];
    for (int64_t k = 1; k < seen.count; k++) {
      const float value = load(x + seen.element[k], 0);
      if (value > best || value != value) best = value, winner = seen.place[k];
    }
    store(y, 0, best);
    if (winners) *winners = static_cast<uint8_t>(winner);
  } else {
    Vec best[NV];
    Words winner[NV];
    for (int j = 0; j < NV; j++)
      best[j] = get_floats(x + seen.element[0] + j * LANES), winner[j] = Words{} + seen.place[0];
    for (int64_t k = 1; k < seen.count; k++) {
      const T* from = x + seen.element[k];
      const Words place = Words{} + seen.place[k];
      for (int j = 0; j < NV; j++) {
        const Vec value = get_floats(from + j * LANES);
        const auto wins = (value > best[j]) | (value != value);
        best[j] = wins ? value : best[j];
        winner[j] = wins ? place : winner[j];
      }
    }
    for (int j = 0; j < NV; j++) {
      put_floats(y + j * LANES, best[j]);
      if (winners) put_bytes(winners + j * LANES, winner[j]);
    }
  }
}

template <class T>
int forward(const MaxPool& a) {
  const int64_t C = a.channels, H = outputs(a, a.height), W = outputs(a, a.width);
  return for_blocks(a.images * H, 1, 64, a.threads, a.images * H * W * C < MIN_PARALLEL,
                    [&](int64_t line, int64_t, float*) {
    const int64_t top = line % H * a.stride - a.padding;
    const T* image = static_cast<const T*>(a.x) + line / H * a.height * a.width * C;
    for (int64_t ox = 0; ox < W; ox++) {
      const int64_t left = ox * a.stride - a.padding, place = (line * W + ox) * C;
      Seen seen;
      for (int64_t ky = larger(0, -top); ky < smaller(a.kernel, a.height - top); ky++)
        for (int64_t kx = larger(0, -left); kx < smaller(a.kernel, a.width - left); kx++)
          seen.add(((top + ky) * a.width + left + kx) * C, ky * a.kernel + kx);
      by_channels(C, [&](auto vectors, int64_t c) {
        largest<decltype(vectors)::value>(seen, image + c, static_cast<T*>(a.y) + place + c,
                                          a.winners ? a.winners + place + c : nullptr);
      });
    }
  });
}

// The sum of the gradients of those outputs whose winner one input's channels are.
template <int NV, class T>
inline void won(const Seen& seen, const T* grad, const uint8_t* winners, T* out) {
  if constexpr (NV == 0) {
    float sum = 0.f;
    for (int64_t k = 0; k < seen.count; k++)
      if (winners[seen.element[k]] == seen.place[k]) sum += load(grad + seen.element[k], 0);
    store(out, 0, sum);
  } else {
    Vec sum[NV] = {};
    for (int64_t k = 0; k < seen.count; k++) {
      const Words place = Words{} + seen.place[k];
      for (int j = 0; j < NV; j++) {
        const Vec g = get_floats(grad + seen.element[k] + j * LANES);
        sum[j] += get_bytes(winners + seen.element[k] + j * LANES) == place ? g : Vec{};
      }
    }
    for (int j = 0; j < NV; j++) put_floats(out + j * LANES, sum[j]);
  }
}

template <class T>
int backward(const MaxPool& a) {
  const int64_t C = a.channels, H = outputs(a, a.height), W = outputs(a, a.width);
  // Windows [first, last] that see place i of an axis.
  const auto first_of = [&](int64_t i) { return larger(0, (i + a.padding - a.kernel + a.stride) / a.stride); };
  const auto last_of = [&](int64_t i, int64_t count) { return smaller(count - 1, (i + a.padding) / a.stride); };
  return for_blocks(a.images * a.height, 1, 64, a.threads, a.images * a.height * a.width * C < MIN_PARALLEL,
                    [&](int64_t line, int64_t, float*) {
    const int64_t iy = line % a.height, image = line / a.height * H;
    for (int64_t ix = 0; ix < a.width; ix++) {
      Seen seen;
      for (int64_t oy = first_of(iy); oy <= last_of(iy, H); oy++)
        for (int64_t ox = first_of(ix); ox <= last_of(ix, W); ox++)
          seen.add(((image + oy) * W + ox) * C,
                   (iy + a.padding - oy * a.stride) * a.kernel + ix + a.padding - ox * a.stride);
      by_channels(C, [&](auto vectors, int64_t c) {
        won<decltype(vectors)::value>(seen, static_cast<const T*>(a.grad_y) + c, a.winners + c,
                                      static_cast<T*>(a.grad_x) + (line * a.width + ix) * C + c);
      });
    }
  });
}

}  // namespace

int max_pool_forward(const MaxPool& a) { return a.dtype == Dtype::float32 ? forward<float>(a) : forward<bfloat16>(a); }
int max_pool_backward(const MaxPool& a) {
  return a.dtype == Dtype::float32 ? backward<float>(a) : backward<bfloat16>(a);
}

}  // namespace spikeloom::SPIKELOOM_LEVEL
