// Parallel spiking units (PSU, IPSU, RPSU): a leaky integration less an estimate of what past spikes took,
//
//   for t:  u = integrate ? decay u + (1 - decay) x[t] : x[t],  V = u - drop r,  s[t] = V >= threshold
//           r = decay r + (1 - decay) (raw ? z[t] : sigmoid(z[t] or u))
//
// All steps of a block stay in cache; for the backward pass u and r are computed again from x.
#include "common/threads.hpp"
#include "neurons/leaky.hpp"

namespace spikeloom::SPIKELOOM_LEVEL {
namespace {

// One step forward: u and r move on, v is V[t].
template <class T>
inline void psu_step(const Psu& a, int64_t t, int64_t i0, int64_t n, const float* u0, const float* r0, float* u1,
                     float* r1, float* v) {
  const float decay = a.decay, gain = 1.f - a.decay, drop = a.drop;
  const T *x = step_of<T>(a.x, t, a.x_stride, i0), *z = a.z ? step_of<T>(a.z, t, a.size, i0) : nullptr;
  if (a.integrate) {
#pragma omp simd
    for (int64_t i = 0; i < n; i++) u1[i] = decay * u0[i] + gain * load(x, i);
  } else {
#pragma omp simd
    for (int64_t i = 0; i < n; i++) u1[i] = load(x, i);
  }
#pragma omp simd
  for (int64_t i = 0; i < n; i++) v[i] = u1[i] - drop * r0[i];
  const auto move = [=](auto estimate) {
#pragma omp simd
    for (int64_t i = 0; i < n; i++) r1[i] = decay * r0[i] + gain * estimate(i);
  };
  if (a.raw && z)
    move([=](int64_t i) { return load(z, i); });
  else if (z)
    move([=](int64_t i) { return logistic(load(z, i)); });
  else
    move([=](int64_t i) { return logistic(u1[i]); });
}

template <class T>
int psu_forward(const PsuForward& a) {
  const int64_t block = 512;
  return for_blocks(a.size, block, 3 * block * 4, a.threads, a.steps * a.size < MIN_PARALLEL,
                    [&](int64_t i0, int64_t n, float* rows) {
    float *u = rows, *r = rows + block, *v = rows + 2 * block;
    for (int64_t i = 0; i < n; i++) {
      u[i] = a.state ? a.state[i0 + i] : 0.f;
      r[i] = a.state ? a.state[a.size + i0 + i] : 0.f;
    }
    const float threshold = a.threshold;
    for (int64_t t = 0; t < a.steps; t++) {
      psu_step<T>(a, t, i0, n, u, r, u, r, v);
      if (a.potentials) std::memcpy(a.potentials + t * a.size + i0, v, n * 4);
      if (!a.spikes) continue;
      T* s = static_cast<T*>(a.spikes) + t * a.size + i0;
      if (a.strict) {
#pragma omp simd
        for (int64_t i = 0; i < n; i++) store(s, i, v[i] > threshold ? 1.f : 0.f);
      } else {
#pragma omp simd
        for (int64_t i = 0; i < n; i++) store(s, i, v[i] >= threshold ? 1.f : 0.f);
      }
    }
    if (a.state_out) {
      std::memcpy(a.state_out + i0, u, n * 4);
      std::memcpy(a.state_out + a.size + i0, r, n * 4);
    }
  });
}

template <class T>
int psu_backward(const PsuBackward& a) {
  const int64_t rows_count = 2 * (a.steps + 1) + 5;
  const int64_t block = block_size(rows_count * 4, 192 << 10, 512);
  return for_blocks(a.size, block, rows_count * block * 4, a.threads, a.steps * a.size < MIN_PARALLEL,
                    [&](int64_t i0, int64_t n, float* rows) {
    float *v = rows, *grad = v + block, *grad_u = grad + block, *grad_r = grad_u + block, *delta = grad_r + block;
    float *u = delta + block, *r = u + (a.steps + 1) * block;
    const float decay = a.decay, gain = 1.f - a.decay, drop = a.drop, threshold = a.threshold;
    for (int64_t i = 0; i < n; i++) {
      u[i] = a.state ? a.state[i0 + i] : 0.f;
      r[i] = a.state ? a.state[a.size + i0 + i] : 0.f;
      grad_u[i] = a.grad_state_out ? a.grad_state_out[i0 + i] : 0.f;
      grad_r[i] = a.grad_state_out ? a.grad_state_out[a.size + i0 + i] : 0.f;
    }
    for (int64_t t = 0; t < a.steps; t++)
      psu_step<T>(a, t, i0, n, u + t * block, r + t * block, u + (t + 1) * block, r + (t + 1) * block, v);
    for (int64_t t = a.steps - 1; t >= 0; t--) {
      const float *u1 = u + (t + 1) * block, *r0 = r + t * block;
      const T* grad_s = step_of<T>(a.grad_spikes, t, a.size, i0);
      const T* z = a.z ? step_of<T>(a.z, t, a.size, i0) : nullptr;
      T *grad_x = static_cast<T*>(a.grad_x) + t * a.size + i0,
        *grad_z = a.grad_z ? static_cast<T*>(a.grad_z) + t * a.size + i0 : nullptr;
      if (a.surrogate == Surrogate::slope) {
        std::memcpy(grad, a.slope + t * a.size + i0, n * 4);
      } else {
#pragma omp simd
        for (int64_t i = 0; i < n; i++) v[i] = u1[i] - drop * r0[i] - threshold;
        derivative_row(a.surrogate, n, v, a.p, a.q, grad);
      }
      // grad_u and grad_r are gradients of what step t leaves; delta is that of its estimate's argument.
#pragma omp simd
      for (int64_t i = 0; i < n; i++) grad[i] *= load(grad_s, i);
      if (a.raw && z) {
#pragma omp simd
        for (int64_t i = 0; i < n; i++) delta[i] = gain * grad_r[i];
      } else if (z) {
#pragma omp simd
        for (int64_t i = 0; i < n; i++) {
          const float e = logistic(load(z, i));
          delta[i] = gain * grad_r[i] * e * (1.f - e);
        }
      } else {
#pragma omp simd
        for (int64_t i = 0; i < n; i++) {
          const float e = logistic(u1[i]);
          delta[i] = gain * grad_r[i] * e * (1.f - e);
        }
      }
      if (z) {
        for (int64_t i = 0; i < n; i++) store(grad_z, i, delta[i]);
        std::memset(delta, 0, n * 4);
      }
      const float through = a.integrate ? gain : 1.f, back = a.integrate ? decay : 0.f;
#pragma omp simd
      for (int64_t i = 0; i < n; i++) {
        const float gu = grad_u[i] + grad[i] + delta[i];
        store(grad_x, i, through * gu);
        grad_u[i] = back * gu;
        grad_r[i] = decay * grad_r[i] - drop * grad[i];
      }
    }
    if (a.grad_state) {
      std::memcpy(a.grad_state + i0, grad_u, n * 4);
      std::memcpy(a.grad_state + a.size + i0, grad_r, n * 4);
    }
  });
}

}  // namespace

int psu_forward(const PsuForward& a) {
  return a.dtype == Dtype::float32 ? psu_forward<float>(a) : psu_forward<bfloat16>(a);
}
int psu_backward(const PsuBackward& a) {
  return a.dtype == Dtype::float32 ? psu_backward<float>(a) : psu_backward<bfloat16>(a);
}

}  // namespace spikeloom::SPIKELOOM_LEVEL
