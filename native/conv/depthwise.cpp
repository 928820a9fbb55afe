// Convolutions of every channel by its own filter, and their gradients:
//
//   for n, oy, ox, ky, kx:  y[n, oy, ox, :] += x[n, oy stride + ky - pad_height, ox stride + kx - pad_width, :] w[ky,
//   kx, :]
//
// Channels lie side by side, so each pass reads and writes whole vectors, and the few taps of a pixel are all the work
// there is.
#include "common/simd.hpp"
#include "common/threads.hpp"

namespace spikeloom::SPIKELOOM_LEVEL {
namespace {

inline int64_t out_height(const Depthwise& a) { return (a.height + 2 * a.pad_height - a.kernel_height) / a.stride + 1; }
inline int64_t out_width(const Depthwise& a) { return (a.width + 2 * a.pad_width - a.kernel_width) / a.stride + 1; }

// Sums of neighbouring channels in registers: NV vectors of them, or one (NV = 0).
template <int NV>
struct Lanes {
  Vec v[NV] = {};
  template <class T>
  void add(const T* x, const float* w) {
    for (int j = 0; j < NV; j++) v[j] += get_floats(x + j * LANES) * get(w + j * LANES);
  }
  template <class T>
  void add_both(const T* x, const T* g) {
    for (int j = 0; j < NV; j++) v[j] += get_floats(x + j * LANES) * get_floats(g + j * LANES);
  }
  template <class T>
  void write(T* to) const {
    for (int j = 0; j < NV; j++) put_floats(to + j * LANES, v[j]);
  }
  void add_to(float* to) const {
    for (int j = 0; j < NV; j++) put(to + j * LANES, get(to + j * LANES) + v[j]);
  }
};
template <>
struct Lanes<0> {
  float v = 0.f;
  template <class T>
  void add(const T* x, const float* w) {
    v += load(x, 0) * *w;
  }
  template <class T>
  void add_both(const T* x, const T* g) {
    v += load(x, 0) * load(g, 0);
  }
  template <class T>
  void write(T* to) const {
    store(to, 0, v);
  }
  void add_to(float* to) const { *to += v; }
};

// Runs body(sums of so many channels, first channel) over all channels.
template <class Body>
inline void by_sums(int64_t channels, const Body& body) {
  by_channels(channels, [&](auto vectors, int64_t c) { body(Lanes<decltype(vectors)::value>{}, c); });
}

template <class T>
int forward(const Depthwise& a) {
  const int64_t C = a.channels, H = out_height(a), W = out_width(a), KW = a.kernel_width;
  return for_blocks(a.images * H, 1, 64, a.threads, a.images * H * W * C < MIN_PARALLEL,
                    [&](int64_t line, int64_t, float*) {
    const int64_t n = line / H, top = line % H * a.stride - a.pad_height;
    const int64_t ky0 = larger(0, -top), ky1 = smaller(a.kernel_height, a.height - top);
    const T* image = static_cast<const T*>(a.x) + n * a.height * a.width * C;
    for (int64_t x = 0; x < W; x++) {
      const int64_t left = x * a.stride - a.pad_width, kx0 = larger(0, -left), kx1 = smaller(KW, a.width - left);
      T* to = static_cast<T*>(a.y) + (line * W + x) * C;
      by_sums(C, [&](auto sum, int64_t c) {
        for (int64_t ky = ky0; ky < ky1; ky++)
          for (int64_t kx = kx0; kx < kx1; kx++)
            sum.add(image + ((top + ky) * a.width + left + kx) * C + c, a.weight + (ky * KW + kx) * C + c);
        sum.write(to + c);
      });
    }
  });
}

template <class T>
int input_gradient(const Depthwise& a) {
  const int64_t C = a.channels, H = out_height(a), W = out_width(a), KW = a.kernel_width, s = a.stride;
  return for_blocks(a.images * a.height, 1, 64, a.threads, a.images * a.height * a.width * C < MIN_PARALLEL,
                    [&](int64_t line, int64_t, float*) {
    const int64_t n = line / a.height, y = line % a.height + a.pad_height;
    const T* grad = static_cast<const T*>(a.grad_y) + n * H * W * C;
    for (int64_t x = 0; x < a.width; x++) {
      const int64_t at = x + a.pad_width;
      T* to = static_cast<T*>(a.grad_x) + (line * a.width + x) * C;
      by_sums(C, [&](auto sum, int64_t c) {
        // The taps that meet this pixel: of those outputs that exist, every s-th.
        for (int64_t ky = y % s; ky < smaller(a.kernel_height, y + 1); ky += s) {
          const int64_t row = (y - ky) / s;
          if (row >= H) continue;
          for (int64_t kx = at % s; kx < smaller(KW, at + 1); kx += s) {
            const int64_t column = (at - kx) / s;
            if (column < W) sum.add(grad + (row * W + column) * C + c, a.weight + (ky * KW + kx) * C + c);
          }
        }
        sum.write(to + c);
      });
    }
  });
}

template <class T>
int weight_gradient(const Depthwise& a) {
  const int64_t C = a.channels, H = out_height(a), W = out_width(a), KW = a.kernel_width, s = a.stride;
  const int64_t taps = a.kernel_height * KW, groups = groups_of(a.images, false);
  float* partial = static_cast<float*>(std::calloc(groups * taps * C, sizeof(float)));
  if (partial == nullptr) return OUT_OF_MEMORY;
  const int failed = for_groups(a.images, groups, 64, a.threads, a.images * H * W * C < MIN_PARALLEL,
                                [&](int64_t group, int64_t first, int64_t last, float*) {
    float* mine = partial + group * taps * C;
    for (int64_t n = first; n < last; n++) {
      const T* image = static_cast<const T*>(a.x) + n * a.height * a.width * C;
      const T* grad = static_cast<const T*>(a.grad_y) + n * H * W * C;
      by_sums(C, [&](auto none, int64_t c) {
        for (int64_t ky = 0; ky < a.kernel_height; ky++) {
          const int64_t y0 = (larger(0, a.pad_height - ky) + s - 1) / s;
          const int64_t y1 = smaller(H, (a.height - 1 + a.pad_height - ky + s) / s);
          for (int64_t kx = 0; kx < KW; kx++) {
            const int64_t x0 = (larger(0, a.pad_width - kx) + s - 1) / s;
            const int64_t x1 = smaller(W, (a.width - 1 + a.pad_width - kx + s) / s);
            if (y0 >= y1 || x0 >= x1) continue;
            auto sum = none;
            for (int64_t y = y0; y < y1; y++) {
              const T* x = image + ((y * s + ky - a.pad_height) * a.width + kx - a.pad_width) * C + c;
              for (int64_t q = x0; q < x1; q++) sum.add_both(x + q * s * C, grad + (y * W + q) * C + c);
            }
            sum.add_to(mine + (ky * KW + kx) * C + c);
          }
        }
      });
    }
  });
  for (int64_t i = 0; failed == 0 && i < taps * C; i++) {
    float sum = 0.f;
    for (int64_t group = 0; group < groups; group++) sum += partial[group * taps * C + i];
    a.grad_weight[i] = sum;
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
