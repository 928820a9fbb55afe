// Neuron scans. One element's history never leaves the cache: a block of elements goes through all its steps, and all
// its levels, before the next block starts, so memory sees each input and output once.
#include "level.hpp"

namespace spikeloom {
namespace SPIKELOOM_LEVEL {
namespace {

// Spikes of several levels are summed in a row of floats before they are stored.
template <class T, bool hard, bool rectified>
int forward(const ScanForward& a) {
  const int64_t block = 1024, levels = a.levels;
  const int64_t scratch = (levels + 1) * block * 4;
  return for_blocks(a.size, block, scratch, a.threads, a.steps * a.size < SMALL, [&](int64_t i0, int64_t n, float* rows) {
    const float decay = a.decay, gain = a.gain, scale = a.scale, rest = a.v_rest;
    float* sum = rows + levels * block;
    for (int64_t k = 0; k < levels; k++)
      for (int64_t i = 0; i < n; i++) rows[k * block + i] = a.v ? a.v[k * a.size + i0 + i] : rest;
    for (int64_t t = 0; t < a.steps; t++) {
      const T* x = static_cast<const T*>(a.x) + t * a.x_stride + i0;
      T* s = static_cast<T*>(a.spikes) + t * a.size + i0;
      for (int64_t k = 0; k < levels; k++) {
        const float threshold = a.threshold[k], fire_at = a.fire_at[k];
        const bool first = k == 0, last = k == levels - 1;
        float* v = rows + k * block;
        float* potentials = a.potentials ? a.potentials + (k * a.steps + t) * a.size + i0 : nullptr;
        const auto step = [&](int64_t i) {
          float h = decay * (v[i] - rest) + gain * load(x, i) + rest;
          if constexpr (rectified) {
            h = scale * h;
            h = h > 0.f ? h : 0.f;
          }
          const bool fired = h >= fire_at;
          v[i] = fired ? (hard ? rest : h - threshold) : h;
          if (potentials) potentials[i] = h;
          return fired ? 1.f : 0.f;
        };
        if (first && last) {
#pragma omp simd
          for (int64_t i = 0; i < n; i++) store(s, i, step(i));
        } else if (first) {
#pragma omp simd
          for (int64_t i = 0; i < n; i++) sum[i] = step(i);
        } else if (!last) {
#pragma omp simd
          for (int64_t i = 0; i < n; i++) sum[i] += step(i);
        } else {
#pragma omp simd
          for (int64_t i = 0; i < n; i++) store(s, i, sum[i] + step(i));
        }
      }
    }
    if (a.v_out)
      for (int64_t k = 0; k < levels; k++) std::memcpy(a.v_out + k * a.size + i0, rows + k * block, n * 4);
  });
}

// The backward pass of every neuron here is a linear scan in reverse; potentials are computed again from x, in cache.
template <class T, Surrogate kind, bool rectified>
int backward(const ScanBackward& a) {
  const int64_t levels = a.levels;
  // Rows of floats per element: f[t] (and h[t] if rectified) with the initial potential before them, the carried
  // gradient, and with several levels the sum of their gradients.
  const int64_t kept = a.steps + 1, rows = kept * (rectified ? 2 : 1) + 1 + (levels > 1 ? a.steps : 0);
  const int64_t block = block_size(rows * 4, 192 << 10, 2048);
  // One partial sum a block, added in order: the result does not depend on the number of threads.
  const int64_t blocks = (a.size + block - 1) / block;
  double* partial = a.grad_constants ? static_cast<double*>(std::malloc((blocks * 3 + 1) * sizeof(double))) : nullptr;
  if (a.grad_constants && partial == nullptr) return -1;
  const int failed = for_blocks(
      a.size, block, rows * block * 4, a.threads, a.steps * a.size < SMALL, [&](int64_t i0, int64_t n, float* scratch) {
        const float decay = a.decay, gain = a.gain, scale = a.scale, rest = a.v_rest, p = a.p, q = a.q;
        const float hard = a.hard ? 1.f : 0.f, attached = a.detach_reset ? 0.f : 1.f;
        float* f_rows = scratch;                                        // row t + 1: f[t]; row 0: the initial potential
        float* h_rows = rectified ? scratch + kept * block : f_rows;    // before the rectification
        float* carried = scratch + kept * (rectified ? 2 : 1) * block;
        float* total = carried + block;
        double block_decay = 0, block_gain = 0, block_scale = 0;
        for (int64_t k = 0; k < levels; k++) {
          const float threshold = a.threshold[k], fire_at = a.fire_at[k];
          for (int64_t i = 0; i < n; i++) f_rows[i] = a.v ? a.v[k * a.size + i0 + i] : rest;
          for (int64_t t = 0; t < a.steps; t++) {
            const T* x = static_cast<const T*>(a.x) + t * a.x_stride + i0;
            const float* last = f_rows + t * block;
            float *f = f_rows + (t + 1) * block, *before = h_rows + (t + 1) * block;
            // The initial potential is not reset, however high: an infinite threshold for it.
            const float last_fire_at = t == 0 ? __builtin_inff() : fire_at;
#pragma omp simd
            for (int64_t i = 0; i < n; i++) {
              const float v = last[i] >= last_fire_at ? (hard != 0.f ? rest : last[i] - threshold) : last[i];
              const float h = decay * (v - rest) + gain * load(x, i) + rest;
              if constexpr (rectified) {
                before[i] = h;
                f[i] = scale * h > 0.f ? scale * h : 0.f;
              } else {
                f[i] = h;
              }
            }
          }
          for (int64_t i = 0; i < n; i++) carried[i] = a.grad_v_out ? a.grad_v_out[k * a.size + i0 + i] : 0.f;
          for (int64_t t = a.steps - 1; t >= 0; t--) {
            const T* grad_s = static_cast<const T*>(a.grad_spikes) + t * a.size + i0;
            T* grad_x = static_cast<T*>(a.grad_x) + t * a.size + i0;
            const T* x = static_cast<const T*>(a.x) + t * a.x_stride + i0;
            const float* slope = kind == Surrogate::slope ? a.slope + (k * a.steps + t) * a.size + i0 : nullptr;
            const float *f = f_rows + (t + 1) * block, *before = h_rows + (t + 1) * block, *last = f_rows + t * block;
            const float last_fire_at = t == 0 ? __builtin_inff() : fire_at;
            float* sum = total + t * block;
            // dL/df at one element.
            const auto grad_of = [&](int64_t i) {
              float d;
              if constexpr (kind == Surrogate::slope) d = slope[i]; else d = derivative<kind>(f[i] - threshold, p, q);
              const float keep = f[i] >= fire_at ? 1.f - hard : 1.f;
              const float through_reset = attached * (hard * (rest - f[i]) - (1.f - hard) * threshold);
              return load(grad_s, i) * d + carried[i] * (keep + through_reset * d);
            };
            float row_decay = 0, row_gain = 0, row_scale = 0;
            if (a.grad_constants != nullptr) {
#pragma omp simd reduction(+ : row_decay, row_gain, row_scale)
              for (int64_t i = 0; i < n; i++) {
                float grad = grad_of(i);
                if constexpr (rectified) {
                  grad = scale * before[i] > 0.f ? grad : 0.f;
                  row_scale += grad * before[i];
                  grad *= scale;
                }
                const float v = last[i] >= last_fire_at ? (hard != 0.f ? rest : last[i] - threshold) : last[i];
                row_decay += grad * (v - rest);
                row_gain += grad * load(x, i);
              }
              block_decay += row_decay;
              block_gain += row_gain;
              block_scale += row_scale;
            }
            const bool first_level = k == 0, last_level = k == levels - 1;
#pragma omp simd
            for (int64_t i = 0; i < n; i++) {
              float grad = grad_of(i);
              if constexpr (rectified) grad = scale * before[i] > 0.f ? grad * scale : 0.f;
              carried[i] = decay * grad;
              if (first_level && last_level) {
                store(grad_x, i, gain * grad);
              } else {
                const float added = first_level ? gain * grad : sum[i] + gain * grad;
                sum[i] = added;
                if (last_level) store(grad_x, i, added);
              }
            }
          }
          if (a.grad_v) std::memcpy(a.grad_v + k * a.size + i0, carried, n * 4);
        }
        if (partial) {
          double* mine = partial + i0 / block * 3;
          mine[0] = block_decay, mine[1] = block_gain, mine[2] = block_scale;
        }
      });
  if (a.grad_constants) {
    for (int c = 0; c < 3; c++) a.grad_constants[c] = 0;
    for (int64_t b = 0; b < blocks * 3; b++) a.grad_constants[b % 3] += partial[b];
    std::free(partial);
  }
  return failed;
}

template <class T, bool rectified>
int backward_of(const ScanBackward& a) {
  switch (a.surrogate) {
    case Surrogate::rational: return backward<T, Surrogate::rational, rectified>(a);
    case Surrogate::rectangle: return backward<T, Surrogate::rectangle, rectified>(a);
    case Surrogate::triangle: return backward<T, Surrogate::triangle, rectified>(a);
    case Surrogate::fast_sigmoid: return backward<T, Surrogate::fast_sigmoid, rectified>(a);
    case Surrogate::sigmoid: return backward<T, Surrogate::sigmoid, rectified>(a);
    case Surrogate::slope: return backward<T, Surrogate::slope, rectified>(a);
  }
  return -2;
}

template <class T>
int forward_of(const ScanForward& a) {
  if (a.rectified) return a.hard ? forward<T, true, true>(a) : forward<T, false, true>(a);
  return a.hard ? forward<T, true, false>(a) : forward<T, false, false>(a);
}

}  // namespace

int scan_forward(const ScanForward& a) {
  return a.dtype == Dtype::float32 ? forward_of<float>(a) : forward_of<bfloat16>(a);
}

int scan_backward(const ScanBackward& a) {
  if (a.dtype == Dtype::float32) return a.rectified ? backward_of<float, true>(a) : backward_of<float, false>(a);
  return a.rectified ? backward_of<bfloat16, true>(a) : backward_of<bfloat16, false>(a);
}

}  // namespace SPIKELOOM_LEVEL
}  // namespace spikeloom
