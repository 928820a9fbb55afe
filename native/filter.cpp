// Linear recurrences in both directions (ParaLIF, PSU, leaky readouts), and the gated neuron (GLIF).
#include "filter.hpp"

namespace spikeloom {
namespace SPIKELOOM_LEVEL {
namespace {

template <class T>
int forward(const FilterForward& a) {
  const int64_t block = 512;
  return for_blocks(a.size, block, 4 * block * 4, a.threads, a.steps * a.size < SMALL, [&](int64_t i0, int64_t n, float* rows) {
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
int backward(const FilterBackward& a) {
  const bool learn = a.grad_alpha != nullptr;
  // Learned constants need the states again: two rows a step.
  const int64_t rows = 6 + (learn ? 2 * (a.steps + 1) : 0);
  const int64_t block = block_size(rows * 4, 192 << 10, 512);
  return for_blocks(a.size, block, rows * block * 4, a.threads, a.steps * a.size < SMALL, [&](int64_t i0, int64_t n, float* scratch) {
    float *alpha = scratch, *beta = alpha + block, *grad_syn = beta + block, *grad_mem = grad_syn + block;
    float *sum_alpha = grad_mem + block, *sum_beta = sum_alpha + block;
    float *syn = sum_beta + block, *mem = syn + (a.steps + 1) * block;
    // Without learned constants nobody needs the state: its rows are overwritten at once.
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

template <Surrogate kind>
int gated_back(const GatedBackward& a) {
  const int64_t rows = (a.steps + 1) + 2 + 5;
  const int64_t block = block_size(rows * 4, 192 << 10, 512);
  return for_blocks(a.size, block, rows * block * 4, a.threads, a.steps * a.size < SMALL, [&](int64_t i0, int64_t n, float* u_rows) {
    // Row t + 1 holds u[t]; the spike of the step before the first is part of the state.
    float *grad_u = u_rows + (a.steps + 1) * block, *grad_s = grad_u + block, *sums = grad_s + block;
    const float *decay = a.decay + i0, *drop = a.drop + i0, *leak = a.leak + i0, *gate = a.gate + i0, *threshold = a.threshold + i0;
    const float* first_spike = a.state ? a.state + a.size + i0 : nullptr;
    std::memset(sums, 0, 5 * block * 4);
    for (int64_t i = 0; i < n; i++) {
      u_rows[i] = a.state ? a.state[i0 + i] : 0.f;
      grad_u[i] = a.grad_state_out ? a.grad_state_out[i0 + i] : 0.f;
      grad_s[i] = a.grad_state_out ? a.grad_state_out[a.size + i0 + i] : 0.f;
    }
    const auto spike_before = [&](int64_t t, int64_t i) {
      const float u = u_rows[t * block + i];
      if (t == 0) return first_spike ? first_spike[i] : 0.f;
      return (a.strict ? u > threshold[i] : u >= threshold[i]) ? 1.f : 0.f;
    };
    for (int64_t t = 0; t < a.steps; t++) {
      const float* x = a.x + t * a.size + i0;
      for (int64_t i = 0; i < n; i++) {
        const float s = spike_before(t, i), v = u_rows[t * block + i] * (1.f - gate[i] * s);
        u_rows[(t + 1) * block + i] = decay[i] * v - drop[i] * s - leak[i] + x[i];
      }
    }
    for (int64_t t = a.steps - 1; t >= 0; t--) {
      const float* grad_out = a.grad_spikes + t * a.size + i0;
      float* grad_x = a.grad_x + t * a.size + i0;
      for (int64_t i = 0; i < n; i++) {
        const float u = u_rows[(t + 1) * block + i], s = spike_before(t, i), last = u_rows[t * block + i];
        float d;
        if constexpr (kind == Surrogate::slope) d = a.slope[t * a.size + i0 + i]; else d = derivative<kind>(u - threshold[i], a.p, a.q);
        const float from_spike = (grad_out[i] + grad_s[i]) * d, grad = grad_u[i] + from_spike;
        grad_x[i] = grad;
        sums[0 * block + i] += grad * last * (1.f - gate[i] * s);
        sums[1 * block + i] -= grad * s;
        sums[2 * block + i] -= grad;
        sums[3 * block + i] -= grad * decay[i] * last * s;
        sums[4 * block + i] -= from_spike;
        grad_u[i] = grad * decay[i] * (1.f - gate[i] * s);
        grad_s[i] = -grad * (decay[i] * last * gate[i] + drop[i]);
      }
    }
    for (int64_t c = 0; c < 5; c++) std::memcpy(a.grad_constants + c * a.size + i0, sums + c * block, n * 4);
    if (a.grad_state) {
      std::memcpy(a.grad_state + i0, grad_u, n * 4);
      std::memcpy(a.grad_state + a.size + i0, grad_s, n * 4);
    }
  });
}

}  // namespace

int filter_forward(const FilterForward& a) {
  return a.dtype == Dtype::float32 ? forward<float>(a) : forward<bfloat16>(a);
}

int filter_backward(const FilterBackward& a) {
  return a.dtype == Dtype::float32 ? backward<float>(a) : backward<bfloat16>(a);
}

int gated_forward(const GatedForward& a) {
  const int64_t block = 512;
  return for_blocks(a.size, block, 2 * block * 4, a.threads, a.steps * a.size < SMALL, [&](int64_t i0, int64_t n, float* rows) {
    float *u = rows, *s = rows + block;
    const float *decay = a.decay + i0, *drop = a.drop + i0, *leak = a.leak + i0, *gate = a.gate + i0, *threshold = a.threshold + i0;
    for (int64_t i = 0; i < n; i++) {
      u[i] = a.state ? a.state[i0 + i] : 0.f;
      s[i] = a.state ? a.state[a.size + i0 + i] : 0.f;
    }
    for (int64_t t = 0; t < a.steps; t++) {
      const float* x = a.x + t * a.size + i0;
      float* spikes = a.spikes + t * a.size + i0;
#pragma omp simd
      for (int64_t i = 0; i < n; i++) {
        const float v = u[i] * (1.f - gate[i] * s[i]);
        u[i] = decay[i] * v - drop[i] * s[i] - leak[i] + x[i];
        s[i] = (a.strict ? u[i] > threshold[i] : u[i] >= threshold[i]) ? 1.f : 0.f;
        spikes[i] = s[i];
      }
    }
    if (a.state_out) {
      std::memcpy(a.state_out + i0, u, n * 4);
      std::memcpy(a.state_out + a.size + i0, s, n * 4);
    }
  });
}

int gated_backward(const GatedBackward& a) {
  switch (a.surrogate) {
    case Surrogate::rational: return gated_back<Surrogate::rational>(a);
    case Surrogate::rectangle: return gated_back<Surrogate::rectangle>(a);
    case Surrogate::triangle: return gated_back<Surrogate::triangle>(a);
    case Surrogate::fast_sigmoid: return gated_back<Surrogate::fast_sigmoid>(a);
    case Surrogate::sigmoid: return gated_back<Surrogate::sigmoid>(a);
    case Surrogate::slope: return gated_back<Surrogate::slope>(a);
  }
  return -2;
}

}  // namespace SPIKELOOM_LEVEL
}  // namespace spikeloom
