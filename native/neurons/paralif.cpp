// Leaky integrators whose membrane fires without a reset (ParaLIF, SPSN):
//
//   for t:  i = alpha i + x[t],  m = beta m + (1 - beta) i,  y = map(m)
//           s[t] = y > threshold, y - y[t-1] > threshold, uniform < y or the Gumbel-softmax sample: by `rule`
//
// All steps of a block stay in cache; for the backward pass m and y are computed again from x.
#include "common/threads.hpp"
#include "neurons/leaky.hpp"

namespace spikeloom::SPIKELOOM_LEVEL {
namespace {

void map_row(Map map, int64_t n, const float* m, float* y) {
  switch (map) {
    case Map::identity: std::memcpy(y, m, n * 4); return;
    case Map::sigmoid:
#pragma omp simd
      for (int64_t i = 0; i < n; i++) y[i] = logistic(m[i]);
      return;
    case Map::tanh:
#pragma omp simd
      for (int64_t i = 0; i < n; i++) y[i] = hyperbolic(m[i]);
      return;
    case Map::relu_tanh:
#pragma omp simd
      for (int64_t i = 0; i < n; i++) y[i] = m[i] > 0.f ? hyperbolic(m[i]) : 0.f;
  }
}

// Multiplies a row of dL/dy by the map's derivative, from y.
void unmap_row(Map map, int64_t n, const float* y, float* grad) {
  if (map == Map::sigmoid) {
#pragma omp simd
    for (int64_t i = 0; i < n; i++) grad[i] *= y[i] * (1.f - y[i]);
  } else if (map == Map::tanh) {
#pragma omp simd
    for (int64_t i = 0; i < n; i++) grad[i] *= 1.f - y[i] * y[i];
  } else if (map == Map::relu_tanh) {
#pragma omp simd
    for (int64_t i = 0; i < n; i++) grad[i] = y[i] > 0.f ? grad[i] * (1.f - y[i] * y[i]) : 0.f;
  }
}

// The soft sample of the Gumbel-softmax over (m, -m) at temperature 1.
inline float soft_sample(float m, float u) {
  const float e = exp_negative(2.f * absolute(m)), v = 1.f - u;
  return m < 0.f ? u * e / (u * e + v) : u / (u + v * e);
}

template <class T>
int fire_forward(const ParaLifForward& a) {
  const int64_t block = 512;
  return for_blocks(a.size, block, 7 * block * 4, a.threads, a.steps * a.size < MIN_PARALLEL,
                    [&](int64_t i0, int64_t n, float* rows) {
    float *alpha = rows, *beta = rows + block, *syn = rows + 2 * block, *mem = rows + 3 * block;
    float *y = rows + 4 * block, *before = rows + 5 * block, *u = rows + 6 * block;
    const FiringRule& f = a.fire;
    enter(a, i0, n, alpha, beta, syn, mem);
    for (int64_t i = 0; i < n; i++) before[i] = f.before ? f.before[i0 + i] : 0.f;
    for (int64_t t = 0; t < a.steps; t++) {
      integrate(n, step_of<T>(a.x, t, a.x_stride, i0), alpha, beta, syn, mem, syn, mem);
      T* s = static_cast<T*>(a.spikes) + t * a.size + i0;
      if (f.rule == Rule::gumbel) {
        const uint32_t first = static_cast<uint32_t>(t * a.size + i0), seed = f.seed;
#pragma omp simd
        for (int64_t i = 0; i < n; i++)
          store(s, i, soft_sample(mem[i], uniform(seed, first + static_cast<uint32_t>(i))) > 0.5f ? 1.f : 0.f);
        continue;
      }
      const float* mapped = mem;
      if (f.map != Map::identity) map_row(f.map, n, mem, y), mapped = y;
      if (f.rule == Rule::bernoulli) {
        const uint32_t first = static_cast<uint32_t>(t * a.size + i0), seed = f.seed;
#pragma omp simd
        for (int64_t i = 0; i < n; i++)
          store(s, i, uniform(seed, first + static_cast<uint32_t>(i)) < mapped[i] ? 1.f : 0.f);
        continue;
      }
      const float threshold = f.threshold;
      if (f.rule == Rule::difference) {
#pragma omp simd
        for (int64_t i = 0; i < n; i++) u[i] = mapped[i] - before[i];
        std::memcpy(before, mapped, n * 4);
        mapped = u;
      }
#pragma omp simd
      for (int64_t i = 0; i < n; i++) store(s, i, mapped[i] > threshold ? 1.f : 0.f);
    }
    if (a.state_out) {
      std::memcpy(a.state_out + i0, syn, n * 4);
      std::memcpy(a.state_out + a.size + i0, mem, n * 4);
    }
    if (a.mapped_out) std::memcpy(a.mapped_out + i0, before, n * 4);
  });
}

template <class T>
int fire_backward(const ParaLifBackward& a) {
  const bool learn = a.grad_alpha != nullptr;
  const int64_t kept = a.steps + 1, rows_count = 11 + kept * (learn ? 2 : 1);
  const int64_t block = block_size(rows_count * 4, 192 << 10, 512);
  const int64_t blocks = (a.size + block - 1) / block;
  double* partial = static_cast<double*>(std::calloc(blocks + 1, sizeof(double)));
  if (partial == nullptr) return OUT_OF_MEMORY;
  const int failed = for_blocks(a.size, block, rows_count * block * 4, a.threads, a.steps * a.size < MIN_PARALLEL,
                                [&](int64_t i0, int64_t n, float* rows) {
    const FiringRule& f = a.fire;
    float *alpha = rows, *beta = alpha + block, *y = beta + block, *y_before = y + block, *u = y_before + block;
    float *grad = u + block, *later = grad + block, *grad_syn = later + block, *grad_mem = grad_syn + block;
    float *sum_alpha = grad_mem + block, *sum_beta = sum_alpha + block, *mem = sum_beta + block,
          *syn = mem + kept * block;
    // Without learned constants the synaptic current needs one row alone.
    enter(a, i0, n, alpha, beta, learn ? syn : u, mem);
    for (int64_t t = 0; t < a.steps; t++)
      integrate(n, step_of<T>(a.x, t, a.x_stride, i0), alpha, beta, learn ? syn + t * block : u, mem + t * block,
                learn ? syn + (t + 1) * block : u, mem + (t + 1) * block);
    double threshold_sum = 0;
    for (int64_t i = 0; i < n; i++) {
      grad_syn[i] = a.grad_state_out ? a.grad_state_out[i0 + i] : 0.f;
      grad_mem[i] = a.grad_state_out ? a.grad_state_out[a.size + i0 + i] : 0.f;
      later[i] = a.grad_mapped_out ? a.grad_mapped_out[i0 + i] : 0.f;
      sum_alpha[i] = sum_beta[i] = 0.f;
    }
    const bool difference = f.rule == Rule::difference;
    if (difference && a.steps > 0) map_row(f.map, n, mem + a.steps * block, y);
    for (int64_t t = a.steps - 1; t >= 0; t--) {
      const float* m = mem + (t + 1) * block;
      const T* grad_s = step_of<T>(a.grad_spikes, t, a.size, i0);
      T* grad_x = static_cast<T*>(a.grad_x) + t * a.size + i0;
      const uint32_t first = static_cast<uint32_t>(t * a.size + i0), seed = f.seed;
      if (f.rule == Rule::gumbel) {
#pragma omp simd
        for (int64_t i = 0; i < n; i++) {
          const float g = soft_sample(m[i], uniform(seed, first + static_cast<uint32_t>(i)));
          grad[i] = load(grad_s, i) * 2.f * g * (1.f - g);
        }
      } else if (f.rule == Rule::bernoulli) {
        map_row(f.map, n, m, y);
#pragma omp simd
        for (int64_t i = 0; i < n; i++) grad[i] = load(grad_s, i) * y[i];
        unmap_row(f.map, n, y, grad);
      } else {
        const float threshold = f.threshold;
        if (difference) {
          if (t > 0) {
            map_row(f.map, n, mem + t * block, y_before);
          } else {
            for (int64_t i = 0; i < n; i++) y_before[i] = f.before ? f.before[i0 + i] : 0.f;
          }
#pragma omp simd
          for (int64_t i = 0; i < n; i++) u[i] = y[i] - y_before[i] - threshold;
        } else {
          map_row(f.map, n, m, y);
#pragma omp simd
          for (int64_t i = 0; i < n; i++) u[i] = y[i] - threshold;
        }
        derivative_row(a.surrogate, n, u, a.p, a.q, grad);
        float total = 0.f;
#pragma omp simd reduction(+ : total)
        for (int64_t i = 0; i < n; i++) {
          grad[i] *= load(grad_s, i);
          total += grad[i];
        }
        threshold_sum -= total;
        if (difference) {
          // y[t] is also what step t + 1 rose from.
#pragma omp simd
          for (int64_t i = 0; i < n; i++) {
            const float du = grad[i];
            grad[i] = du + later[i];
            later[i] = -du;
          }
          unmap_row(f.map, n, y, grad);
          std::memcpy(y, y_before, n * 4);
        } else {
          unmap_row(f.map, n, y, grad);
        }
      }
      if (learn) {
        const float *syn0 = syn + t * block, *mem0 = mem + t * block, *syn1 = syn + (t + 1) * block;
#pragma omp simd
        for (int64_t i = 0; i < n; i++) {
          const float gm = grad[i] + grad_mem[i], gi = grad_syn[i] + (1.f - beta[i]) * gm;
          sum_beta[i] += gm * (mem0[i] - syn1[i]);
          sum_alpha[i] += gi * syn0[i];
        }
      }
#pragma omp simd
      for (int64_t i = 0; i < n; i++) {
        const float gm = grad[i] + grad_mem[i], gi = grad_syn[i] + (1.f - beta[i]) * gm;
        store(grad_x, i, gi);
        grad_mem[i] = beta[i] * gm;
        grad_syn[i] = alpha[i] * gi;
      }
    }
    if (a.grad_state) {
      std::memcpy(a.grad_state + i0, grad_syn, n * 4);
      std::memcpy(a.grad_state + a.size + i0, grad_mem, n * 4);
    }
    if (a.grad_before) std::memcpy(a.grad_before + i0, later, n * 4);
    if (learn) {
      std::memcpy(a.grad_alpha + i0, sum_alpha, n * 4);
      std::memcpy(a.grad_beta + i0, sum_beta, n * 4);
    }
    partial[i0 / block] = threshold_sum;
  });
  if (a.grad_threshold) {
    *a.grad_threshold = 0;
    reduce_partials(partial, blocks, 1, 1, a.grad_threshold);
  }
  std::free(partial);
  return failed;
}

}  // namespace

int paralif_forward(const ParaLifForward& a) {
  return a.dtype == Dtype::float32 ? fire_forward<float>(a) : fire_forward<bfloat16>(a);
}
int paralif_backward(const ParaLifBackward& a) {
  return a.dtype == Dtype::float32 ? fire_backward<float>(a) : fire_backward<bfloat16>(a);
}

}  // namespace spikeloom::SPIKELOOM_LEVEL
