// Products with a small or banded matrix over time, and the threshold behind them (PSN, masked and sliding PSN). A block
// of elements is read once, with all its steps; each output row is accumulated in registers.
#include "level.hpp"

namespace spikeloom {
namespace SPIKELOOM_LEVEL {
namespace {

constexpr int64_t LANES = 64;  // elements whose sums stay in registers

struct Rows {
  int64_t first, last;  // j of the first and one past the last term
  const float* weight;  // of the first term
};

inline Rows terms(const Band& a, int64_t t) {
  if (a.order == 0) return {0, a.steps, a.weight + t * a.steps};
  const int64_t first = t - a.order + 1 < 0 ? 0 : t - a.order + 1;
  if (a.sliding) return {first, t + 1, a.weight + a.order - 1 - (t - first)};
  return {first, t + 1, a.weight + t * a.steps + first};
}

inline float bias_of(const Band& a, int64_t t) { return a.bias[a.sliding ? 0 : t]; }

template <class T>
void read_block(const Band& a, int64_t i0, int64_t n, float* rows) {
  for (int64_t t = 0; t < a.steps; t++) {
    const T* x = static_cast<const T*>(a.x) + t * a.x_stride + i0;
    float* row = rows + t * LANES;
    for (int64_t i = 0; i < n; i++) row[i] = load(x, i);
    for (int64_t i = n; i < LANES; i++) row[i] = 0.f;
  }
}

inline void accumulate(float* __restrict sum, float w, const float* __restrict x) {
#pragma omp simd
  for (int64_t i = 0; i < LANES; i++) sum[i] += w * x[i];
}

inline void potential(const Band& a, int64_t t, const float* x_rows, float* h) {
  const Rows r = terms(a, t);
  float sum[LANES];
  // The order of SpikingJelly's and PyTorch's addmm: the bias joins the finished product.
  for (int64_t i = 0; i < LANES; i++) sum[i] = 0.f;
  for (int64_t j = r.first; j < r.last; j++) accumulate(sum, r.weight[j - r.first], x_rows + j * LANES);
  const float bias = bias_of(a, t);
  for (int64_t i = 0; i < LANES; i++) h[i] = sum[i] + bias;
}

template <class T>
int forward(const BandForward& a) {
  const int64_t scratch = a.steps * LANES * 4;
  return for_blocks(a.size, LANES, scratch, a.threads, a.steps * a.size < SMALL, [&](int64_t i0, int64_t n, float* rows) {
    read_block<T>(a, i0, n, rows);
    for (int64_t t = 0; t < a.steps; t++) {
      float h[LANES];
      potential(a, t, rows, h);
      T* s = static_cast<T*>(a.spikes) + t * a.size + i0;
      for (int64_t i = 0; i < n; i++) store(s, i, h[i] >= 0.f ? 1.f : 0.f);
      if (a.potentials)
        for (int64_t i = 0; i < n; i++) a.potentials[t * a.size + i0 + i] = h[i];
    }
  });
}

template <class T, Surrogate kind>
int backward(const BandBackward& a) {
  // A row of partial sums per step holds its terms alone; with an order these are the last `order` of `width` places.
  const int64_t width = a.order == 0 ? a.steps : a.order;
  const int64_t weights = a.sliding ? width : a.steps * width, biases = a.sliding ? 1 : a.steps;
  // A fixed number of groups of blocks, each with its own sums, added in order: the result does not depend on threads.
  const int64_t blocks = (a.size + LANES - 1) / LANES, groups = blocks == 0 ? 1 : smaller(blocks, 16);
  const int64_t per_group = (blocks + groups - 1) / groups;
  double* partial = static_cast<double*>(std::calloc(groups * (weights + biases), sizeof(double)));
  if (partial == nullptr) return -1;
  const int64_t scratch = a.steps * LANES * 4 * 2;
  const int failed = for_blocks(groups, 1, scratch, a.threads, a.steps * a.size < SMALL, [&](int64_t g, int64_t, float* x_rows) {
    float* grad_rows = x_rows + a.steps * LANES;
    double *grad_weight = partial + g * (weights + biases), *grad_bias = grad_weight + weights;
    for (int64_t b = g * per_group; b < smaller(blocks, (g + 1) * per_group); b++) {
      const int64_t i0 = b * LANES, n = smaller(LANES, a.size - i0);
      read_block<T>(a, i0, n, x_rows);
      for (int64_t t = 0; t < a.steps; t++) {
        const T* grad_s = static_cast<const T*>(a.grad_spikes) + t * a.size + i0;
        float h[LANES], *grad = grad_rows + t * LANES;
        if constexpr (kind == Surrogate::slope) {
          const float* slope = a.slope + t * a.size + i0;
          for (int64_t i = 0; i < n; i++) grad[i] = load(grad_s, i) * slope[i];
        } else {
          potential(a, t, x_rows, h);
          for (int64_t i = 0; i < n; i++) grad[i] = load(grad_s, i) * derivative<kind>(h[i], a.p, a.q);
        }
        for (int64_t i = n; i < LANES; i++) grad[i] = 0.f;
        const Rows r = terms(a, t);
        float total = 0.f;
#pragma omp simd reduction(+ : total)
        for (int64_t i = 0; i < LANES; i++) total += grad[i];
        grad_bias[a.sliding ? 0 : t] += total;
        double* out = grad_weight + (a.sliding ? 0 : t * width) + (a.order == 0 ? 0 : width - (r.last - r.first));
        for (int64_t j = r.first; j < r.last; j++) {
          const float* x = x_rows + j * LANES;
          float dot = 0.f;
#pragma omp simd reduction(+ : dot)
          for (int64_t i = 0; i < LANES; i++) dot += grad[i] * x[i];
          out[j - r.first] += dot;
        }
      }
      // dL/dx[j] = sum_t w[t, j] dL/dh[t]: x is no longer needed, its rows take the sums.
      std::memset(x_rows, 0, a.steps * LANES * 4);
      for (int64_t t = 0; t < a.steps; t++) {
        const Rows r = terms(a, t);
        for (int64_t j = r.first; j < r.last; j++)
          accumulate(x_rows + j * LANES, r.weight[j - r.first], grad_rows + t * LANES);
      }
      for (int64_t t = 0; t < a.steps; t++) {
        T* grad_x = static_cast<T*>(a.grad_x) + t * a.size + i0;
        for (int64_t i = 0; i < n; i++) store(grad_x, i, x_rows[t * LANES + i]);
      }
    }
  });
  for (int64_t g = 0; g < groups; g++) {
    const double* from = partial + g * (weights + biases);
    if (a.sliding || a.order == 0) {
      for (int64_t w = 0; w < weights; w++) a.grad_weight[w] += from[w];
    } else {
      for (int64_t t = 0; t < a.steps; t++) {
        const Rows r = terms(a, t);
        for (int64_t j = r.first; j < r.last; j++) a.grad_weight[t * a.steps + j] += from[t * width + width - (t + 1 - j)];
      }
    }
    for (int64_t w = 0; w < biases; w++) a.grad_bias[w] += from[weights + w];
  }
  std::free(partial);
  return failed;
}

template <class T>
int backward_of(const BandBackward& a) {
  switch (a.surrogate) {
    case Surrogate::rational: return backward<T, Surrogate::rational>(a);
    case Surrogate::rectangle: return backward<T, Surrogate::rectangle>(a);
    case Surrogate::triangle: return backward<T, Surrogate::triangle>(a);
    case Surrogate::fast_sigmoid: return backward<T, Surrogate::fast_sigmoid>(a);
    case Surrogate::sigmoid: return backward<T, Surrogate::sigmoid>(a);
    case Surrogate::slope: return backward<T, Surrogate::slope>(a);
  }
  return -2;
}

}  // namespace

int band_forward(const BandForward& a) {
  return a.dtype == Dtype::float32 ? forward<float>(a) : forward<bfloat16>(a);
}

int band_backward(const BandBackward& a) {
  return a.dtype == Dtype::float32 ? backward_of<float>(a) : backward_of<bfloat16>(a);
}

}  // namespace SPIKELOOM_LEVEL
}  // namespace spikeloom
