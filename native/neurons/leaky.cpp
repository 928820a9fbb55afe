// Two leaky integrators in a row (readouts, and the first half of ParaLIF):
//
//   for t:  i = alpha i + x[t],  m = beta m + (1 - beta) i,  out[t] = m
//
// and backward, from the last step to the first:
//
//   gm = grad_m[t] + gm',  gi = gi' + (1 - beta) gm,  grad_x[t] = gi,  gm' = beta gm,  gi' = alpha gi
//   grad_beta += gm (m[t-1] - i[t]),  grad_alpha += gi i[t-1]
#include "neurons/leaky.hpp"
#include "common/threads.hpp"

namespace spikeloom::SPIKELOOM_LEVEL {
namespace {

template <class T>
int forward(const LeakyForward& a) {
  const int64_t block = 512;
  return for_blocks(a.size, block, 4 * block * 4, a.threads, a.steps * a.size < MIN_PARALLEL,
                    [&](int64_t i0, int64_t n, float* rows) {
    float *syn = rows, *mem = rows + block, *alpha = rows + 2 * block, *beta = rows + 3 * block;
    enter(a, i0, n, alpha, beta, syn, mem);
    for (int64_t t = 0; t < a.steps; t++) {
      const T* x = static_cast<const T*>(a.x) + t * a.x_stride + i0;
      T* m = static_cast<T*>(a.m) + t * a.size + i0;
#pragma omp simd
      for (int64_t i = 0; i < n; i++) {
        syn[i] = alpha[i] * syn[i] + load(x, i);
        mem[i] = beta[i] * mem[i] + (1.f - beta[i]) * syn[i];
        store(m, i, mem[i]);
      }
    }
    if (a.state_out) {
      std::memcpy(a.state_out + i0, syn, n * 4);
      std::memcpy(a.state_out + a.size + i0, mem, n * 4);
    }
  });
}

template <class T>
int backward(const LeakyBackward& a) {
  const bool learn = a.grad_alpha != nullptr;
  // Learned constants need the states again: two rows a step.
  const int64_t rows = 6 + (learn ? 2 * (a.steps + 1) : 0);
  const int64_t block = block_size(rows * 4, 192 << 10, 512);
  return for_blocks(a.size, block, rows * block * 4, a.threads, a.steps * a.size < MIN_PARALLEL,
                    [&](int64_t i0, int64_t n, float* scratch) {
    float *alpha = scratch, *beta = alpha + block, *grad_syn = beta + block, *grad_mem = grad_syn + block;
    float *sum_alpha = grad_mem + block, *sum_beta = sum_alpha + block;
    float *syn = sum_beta + block, *mem = syn + (a.steps + 1) * block;
    // Without learned constants the states are not read: these rows are overwritten at once.
    enter(a, i0, n, alpha, beta, learn ? syn : grad_syn, learn ? mem : grad_mem);
    for (int64_t i = 0; i < n; i++) {
      grad_syn[i] = a.grad_state_out ? a.grad_state_out[i0 + i] : 0.f;
      grad_mem[i] = a.grad_state_out ? a.grad_state_out[a.size + i0 + i] : 0.f;
      sum_alpha[i] = sum_beta[i] = 0.f;
    }
    for (int64_t t = 0; learn && t < a.steps; t++)
      integrate(n, static_cast<const T*>(a.x) + t * a.x_stride + i0, alpha, beta, syn + t * block, mem + t * block,
                syn + (t + 1) * block, mem + (t + 1) * block);
    for (int64_t t = a.steps - 1; t >= 0; t--) {
      const T* grad_m = static_cast<const T*>(a.grad_m) + t * a.size + i0;
      T* grad_x = static_cast<T*>(a.grad_x) + t * a.size + i0;
      const float *syn0 = syn + t * block, *mem0 = mem + t * block, *syn1 = syn + (t + 1) * block;
      // grad_mem and grad_syn arrive as gradients of the states that step t leaves.
      if (learn) {
#pragma omp simd
        for (int64_t i = 0; i < n; i++) {
          const float gm = load(grad_m, i) + grad_mem[i], gi = grad_syn[i] + (1.f - beta[i]) * gm;
          sum_beta[i] += gm * (mem0[i] - syn1[i]);
          sum_alpha[i] += gi * syn0[i];
        }
      }
#pragma omp simd
      for (int64_t i = 0; i < n; i++) {
        const float gm = load(grad_m, i) + grad_mem[i], gi = grad_syn[i] + (1.f - beta[i]) * gm;
        store(grad_x, i, gi);
        grad_mem[i] = beta[i] * gm;
        grad_syn[i] = alpha[i] * gi;
      }
    }
    if (a.grad_state) {
      std::memcpy(a.grad_state + i0, grad_syn, n * 4);
      std::memcpy(a.grad_state + a.size + i0, grad_mem, n * 4);
    }
    if (learn) {
      std::memcpy(a.grad_alpha + i0, sum_alpha, n * 4);
      std::memcpy(a.grad_beta + i0, sum_beta, n * 4);
    }
  });
}

}  // namespace

int leaky_forward(const LeakyForward& a) {
  return a.dtype == Dtype::float32 ? forward<float>(a) : forward<bfloat16>(a);
}

int leaky_backward(const LeakyBackward& a) {
  return a.dtype == Dtype::float32 ? backward<float>(a) : backward<bfloat16>(a);
}

}  // namespace spikeloom::SPIKELOOM_LEVEL
