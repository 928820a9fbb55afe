// Parallel spiking neurons (PSN, masked and sliding PSN; Fang et al. 2023):
//
//   for t:  h = bias[t];  for j of t's terms:  h += w[t, j] x[j]
//           s[t] = h >= 0
//
// and backward, with g[t] = grad_spikes[t] surrogate'(h[t]):
//
//   for t, j:  grad_x[j] += w[t, j] g[t],  grad_weight[t, j] += g[t] x[j],  grad_bias[t] += g[t]
//
// A block of elements is read once, with all its steps; each output row is accumulated in registers.
#include "common/threads.hpp"

namespace spikeloom::SPIKELOOM_LEVEL {
namespace {

constexpr int64_t BLOCK = 64;  // elements whose sums stay in registers

struct Terms {
  int64_t first, last;  // j of the first and one past the last term
  const float* weight;  // of the first term
};

inline Terms terms(const Psn& a, int64_t t) {
  if (a.order == 0) return {0, a.steps, a.weight + t * a.steps};
  const int64_t first = t - a.order + 1 < 0 ? 0 : t - a.order + 1;
  if (a.sliding) return {first, t + 1, a.weight + a.order - 1 - (t - first)};
  return {first, t + 1, a.weight + t * a.steps + first};
}

inline float bias_of(const Psn& a, int64_t t) { return a.bias[a.sliding ? 0 : t]; }

template <class T>
void read_block(const Psn& a, int64_t i0, int64_t n, float* rows) {
  for (int64_t t = 0; t < a.steps; t++) {
    const T* x = static_cast<const T*>(a.x) + t * a.x_stride + i0;
    float* row = rows + t * BLOCK;
    for (int64_t i = 0; i < n; i++) row[i] = load(x, i);
    for (int64_t i = n; i < BLOCK; i++) row[i] = 0.f;
  }
}

inline void accumulate(float* __restrict sum, float w, const float* __restrict x) {
#pragma omp simd
  for (int64_t i = 0; i < BLOCK; i++) sum[i] += w * x[i];
}

inline void potential(const Psn& a, int64_t t, const float* x_rows, float* h) {
  const Terms r = terms(a, t);
  float sum[BLOCK];
  // The order of SpikingJelly's and PyTorch's addmm: the bias joins the finished product.
  for (int64_t i = 0; i < BLOCK; i++) sum[i] = 0.f;
  for (int64_t j = r.first; j < r.last; j++) accumulate(sum, r.weight[j - r.first], x_rows + j * BLOCK);
  const float bias = bias_of(a, t);
  for (int64_t i = 0; i < BLOCK; i++) h[i] = sum[i] + bias;
}

template <class T>
int forward(const PsnForward& a) {
  const int64_t scratch = a.steps * BLOCK * 4;
  return for_blocks(a.size, BLOCK, scratch, a.threads, a.steps * a.size < MIN_PARALLEL,
                    [&](int64_t i0, int64_t n, float* rows) {
    read_block<T>(a, i0, n, rows);
    for (int64_t t = 0; t < a.steps; t++) {
      float h[BLOCK];
      potential(a, t, rows, h);
      T* s = static_cast<T*>(a.spikes) + t * a.size + i0;
      for (int64_t i = 0; i < n; i++) store(s, i, h[i] >= 0.f ? 1.f : 0.f);
      if (a.potentials)
        for (int64_t i = 0; i < n; i++) a.potentials[t * a.size + i0 + i] = h[i];
    }
  });
}

template <class T>
int backward(const PsnBackward& a) {
  // A row of partial sums per step holds its terms alone; with an order these are the last `order` of `width` places.
  const int64_t width = a.order == 0 ? a.steps : a.order;
  const int64_t weights = a.sliding ? width : a.steps * width, biases = a.sliding ? 1 : a.steps;
  // A fixed number of groups of blocks, each with its own sums, added in order: the result does not depend on threads.
  const int64_t blocks = (a.size + BLOCK - 1) / BLOCK, groups = blocks == 0 ? 1 : smaller(blocks, 16);
  const int64_t per_group = (blocks + groups - 1) / groups;
  double* partial = static_cast<double*>(std::calloc(groups * (weights + biases), sizeof(double)));
  if (partial == nullptr) return OUT_OF_MEMORY;
  const int64_t scratch = a.steps * BLOCK * 4 * 2;
  const int failed = for_blocks(groups, 1, scratch, a.threads, a.steps * a.size < MIN_PARALLEL,
                                [&](int64_t g, int64_t, float* x_rows) {
    float* grad_rows = x_rows + a.steps * BLOCK;
    double *grad_weight = partial + g * (weights + biases), *grad_bias = grad_weight + weights;
    for (int64_t b = g * per_group; b < smaller(blocks, (g + 1) * per_group); b++) {
      const int64_t i0 = b * BLOCK, n = smaller(BLOCK, a.size - i0);
      read_block<T>(a, i0, n, x_rows);
      for (int64_t t = 0; t < a.steps; t++) {
        const T* grad_s = static_cast<const T*>(a.grad_spikes) + t * a.size + i0;
        float h[BLOCK], *grad = grad_rows + t * BLOCK;
        if (a.surrogate == Surrogate::slope) {
          std::memcpy(grad, a.slope + t * a.size + i0, n * 4);
        } else {
          potential(a, t, x_rows, h);
          derivative_row(a.surrogate, n, h, a.p, a.q, grad);
        }
        for (int64_t i = 0; i < n; i++) grad[i] *= load(grad_s, i);
        for (int64_t i = n; i < BLOCK; i++) grad[i] = 0.f;
        const Terms r = terms(a, t);
        float total = 0.f;
#pragma omp simd reduction(+ : total)
        for (int64_t i = 0; i < BLOCK; i++) total += grad[i];
        grad_bias[a.sliding ? 0 : t] += total;
        double* out = grad_weight + (a.sliding ? 0 : t * width) + (a.order == 0 ? 0 : width - (r.last - r.first));
        for (int64_t j = r.first; j < r.last; j++) {
          const float* x = x_rows + j * BLOCK;
          float dot = 0.f;
#pragma omp simd reduction(+ : dot)
          for (int64_t i = 0; i < BLOCK; i++) dot += grad[i] * x[i];
          out[j - r.first] += dot;
        }
      }
      // dL/dx[j] = sum_t w[t, j] dL/dh[t]: x is no longer needed, its rows take the sums.
      std::memset(x_rows, 0, a.steps * BLOCK * 4);
      for (int64_t t = 0; t < a.steps; t++) {
        const Terms r = terms(a, t);
        for (int64_t j = r.first; j < r.last; j++)
          accumulate(x_rows + j * BLOCK, r.weight[j - r.first], grad_rows + t * BLOCK);
      }
      for (int64_t t = 0; t < a.steps; t++) {
        T* grad_x = static_cast<T*>(a.grad_x) + t * a.size + i0;
        for (int64_t i = 0; i < n; i++) store(grad_x, i, x_rows[t * BLOCK + i]);
      }
    }
  });
  for (int64_t g = 0; g < groups; g++) {
    const double* from = partial + g * (weights + biases);
    if (a.sliding || a.order == 0) {
      for (int64_t w = 0; w < weights; w++) a.grad_weight[w] += from[w];
    } else {
      for (int64_t t = 0; t < a.steps; t++) {
        const Terms r = terms(a, t);
        for (int64_t j = r.first; j < r.last; j++)
          a.grad_weight[t * a.steps + j] += from[t * width + width - (t + 1 - j)];
      }
    }
    for (int64_t w = 0; w < biases; w++) a.grad_bias[w] += from[weights + w];
  }
  std::free(partial);
  return failed;
}

}  // namespace

int psn_forward(const PsnForward& a) { return a.dtype == Dtype::float32 ? forward<float>(a) : forward<bfloat16>(a); }

int psn_backward(const PsnBackward& a) {
  return a.dtype == Dtype::float32 ? backward<float>(a) : backward<bfloat16>(a);
}

}  // namespace spikeloom::SPIKELOOM_LEVEL
