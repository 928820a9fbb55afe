// Neuron scans. One element's history never leaves the cache: a block of elements goes through all its steps
// before the next block starts, so memory sees each input and output once.
//
// Compiled once per instruction level; nothing here may be shared between levels (no inline functions of the
// standard library that a linker could merge), hence the unnamed namespace and malloc.
#include "kernels.hpp"

#include <cstdlib>
#include <cstring>

#ifdef _OPENMP
#include <omp.h>
#endif

namespace spikeloom {
namespace SPIKELOOM_LEVEL {
namespace {

struct bfloat16 {
  uint16_t bits;
};

inline float load(const float* p, int64_t i) { return p[i]; }
inline float load(const bfloat16* p, int64_t i) {
  const uint32_t bits = static_cast<uint32_t>(p[i].bits) << 16;
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

inline void store(float* p, int64_t i, float value) { p[i] = value; }
inline void store(bfloat16* p, int64_t i, float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  // Round to nearest, ties to even; a NaN stays one.
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  p[i].bits = static_cast<uint16_t>(value != value ? 0x7fc0u : rounded);
}

inline float absolute(float x) { return x < 0.f ? -x : x; }

// exp(-x) for x >= 0, to 2 units in the last place; written out so that it vectorises.
inline float exp_negative(float x) {
  x = x > 87.f ? 87.f : x;
  const float n = static_cast<float>(static_cast<int32_t>(x * 1.44269504f + 0.5f));
  const float r = (n * 0.693359375f - x) + n * -2.12194440e-4f;
  float poly = 1.9875691500e-4f;
  poly = poly * r + 1.3981999507e-3f;
  poly = poly * r + 8.3334519073e-3f;
  poly = poly * r + 4.1665795894e-2f;
  poly = poly * r + 1.6666665459e-1f;
  poly = poly * r + 5.0000001201e-1f;
  poly = poly * r * r + r + 1.f;
  const int32_t bits = (127 - static_cast<int32_t>(n)) << 23;
  float scale;
  std::memcpy(&scale, &bits, 4);
  return poly * scale;
}

template <Surrogate kind>
inline float derivative(float u, float p, float q) {
  if constexpr (kind == Surrogate::rational) {
    const float w = q * u;
    return p / (1.f + w * w);
  } else if constexpr (kind == Surrogate::rectangle) {
    return absolute(u) < q ? p : 0.f;
  } else if constexpr (kind == Surrogate::triangle) {
    const float y = p - q * absolute(u);
    return y > 0.f ? y : 0.f;
  } else if constexpr (kind == Surrogate::fast_sigmoid) {
    const float w = 1.f + q * absolute(u);
    return p / (w * w);
  } else {
    const float e = exp_negative(q * absolute(u)), w = 1.f + e;
    return p * e / (w * w);
  }
}

inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

// Elements of a block: `bytes` of scratch memory per element and core, in whole cache lines.
int64_t block_size(int64_t bytes_per_element, int64_t budget, int64_t most) {
  const int64_t n = budget / bytes_per_element / 64 * 64;
  return n < 64 ? 64 : smaller(n, most);
}

// Runs body(first, count, scratch) over blocks of [0, size), one scratch buffer a thread. Returns 0, or -1 without memory.
template <class Body>
int for_blocks(int64_t size, int64_t block, int64_t scratch_bytes, int threads, bool small, const Body& body) {
  int failed = 0;
  const int64_t blocks = (size + block - 1) / block;
#ifdef _OPENMP
#pragma omp parallel num_threads(threads) if (!small && blocks > 1)
#endif
  {
    void* scratch = std::aligned_alloc(64, (scratch_bytes + 63) / 64 * 64);
    if (scratch == nullptr) {
#ifdef _OPENMP
#pragma omp atomic write
#endif
      failed = -1;
    }
#ifdef _OPENMP
#pragma omp for schedule(static)
#endif
    for (int64_t b = 0; b < blocks; b++) {
      if (scratch != nullptr) body(b * block, smaller(block, size - b * block), static_cast<float*>(scratch));
    }
    std::free(scratch);
  }
  return failed;
}

constexpr int64_t SMALL = 1 << 14;  // elements below which waking the threads costs more than it gives

template <class T, bool hard>
int forward(const ScanForward& a) {
  const int64_t block = 1024;
  return for_blocks(a.size, block, block * 4, a.threads, a.steps * a.size < SMALL, [&](int64_t i0, int64_t n, float* v) {
    const float decay = a.decay, gain = a.gain, threshold = a.v_threshold, rest = a.v_rest;
    for (int64_t i = 0; i < n; i++) v[i] = a.v ? a.v[i0 + i] : rest;
    for (int64_t t = 0; t < a.steps; t++) {
      const T* x = static_cast<const T*>(a.x) + t * a.x_stride + i0;
      T* s = static_cast<T*>(a.spikes) + t * a.size + i0;
      float* potentials = a.potentials ? a.potentials + t * a.size + i0 : nullptr;
#pragma omp simd
      for (int64_t i = 0; i < n; i++) {
        const float h = decay * (v[i] - rest) + gain * load(x, i) + rest;
        const bool fired = h >= threshold;
        store(s, i, fired ? 1.f : 0.f);
        v[i] = fired ? (hard ? rest : h - threshold) : h;
        if (potentials) potentials[i] = h;
      }
    }
    if (a.v_out) std::memcpy(a.v_out + i0, v, n * 4);
  });
}

// The backward pass of every neuron here is a linear scan in reverse; h is computed again from x, in cache.
template <class T, Surrogate kind>
int backward(const ScanBackward& a) {
  // v after every step (steps + 1 rows) and the carried gradient: 4 bytes an element each.
  const int64_t block = block_size((a.steps + 2) * 4, 192 << 10, 2048);
  const int64_t scratch = block * (a.steps + 2) * 4;
  // One partial sum a block, added in order: the result does not depend on the number of threads.
  const int64_t blocks = (a.size + block - 1) / block;
  double* partial = a.grad_constants ? static_cast<double*>(std::malloc(blocks * 2 * sizeof(double))) : nullptr;
  if (a.grad_constants && partial == nullptr) return -1;
  const int failed = for_blocks(a.size, block, scratch, a.threads, a.steps * a.size < SMALL, [&](int64_t i0, int64_t n, float* h_rows) {
    const float decay = a.decay, gain = a.gain, threshold = a.v_threshold, rest = a.v_rest, p = a.p, q = a.q;
    const float hard = a.hard ? 1.f : 0.f, attached = a.detach_reset ? 0.f : 1.f;
    float* carried = h_rows + (a.steps + 1) * block;
    // Row t + 1 holds h[t]; row 0 holds a value whose reset is the initial potential.
    float* v0 = h_rows;
    for (int64_t i = 0; i < n; i++) v0[i] = a.v ? a.v[i0 + i] : rest;
    for (int64_t t = 0; t < a.steps; t++) {
      const T* x = static_cast<const T*>(a.x) + t * a.x_stride + i0;
      const float* last = h_rows + t * block;
      float* h = h_rows + (t + 1) * block;
      // The initial potential is not reset, however high: an infinite threshold for it.
      const float last_threshold = t == 0 ? __builtin_inff() : threshold;
#pragma omp simd
      for (int64_t i = 0; i < n; i++) {
        const float v = last[i] >= last_threshold ? (hard != 0.f ? rest : last[i] - threshold) : last[i];
        h[i] = decay * (v - rest) + gain * load(x, i) + rest;
      }
    }
    for (int64_t i = 0; i < n; i++) carried[i] = a.grad_v_out ? a.grad_v_out[i0 + i] : 0.f;
    double block_decay = 0, block_gain = 0;
    for (int64_t t = a.steps - 1; t >= 0; t--) {
      const T* grad_s = static_cast<const T*>(a.grad_spikes) + t * a.size + i0;
      T* grad_x = static_cast<T*>(a.grad_x) + t * a.size + i0;
      const float* slope = kind == Surrogate::slope ? a.slope + t * a.size + i0 : nullptr;
      const float* h = h_rows + (t + 1) * block;
      if (a.grad_constants == nullptr) {
#pragma omp simd
        for (int64_t i = 0; i < n; i++) {
          float d;
          if constexpr (kind == Surrogate::slope) d = slope[i]; else d = derivative<kind>(h[i] - threshold, p, q);
          const float keep = h[i] >= threshold ? 1.f - hard : 1.f;
          const float through_reset = attached * (hard * (rest - h[i]) - (1.f - hard) * threshold);
          const float grad_h = load(grad_s, i) * d + carried[i] * (keep + through_reset * d);
          store(grad_x, i, gain * grad_h);
          carried[i] = decay * grad_h;
        }
      } else {
        const T* x = static_cast<const T*>(a.x) + t * a.x_stride + i0;
        const float* last = h_rows + t * block;
        const float last_threshold = t == 0 ? __builtin_inff() : threshold;
        float row_decay = 0, row_gain = 0;
#pragma omp simd reduction(+ : row_decay, row_gain)
        for (int64_t i = 0; i < n; i++) {
          float d;
          if constexpr (kind == Surrogate::slope) d = slope[i]; else d = derivative<kind>(h[i] - threshold, p, q);
          const float keep = h[i] >= threshold ? 1.f - hard : 1.f;
          const float through_reset = attached * (hard * (rest - h[i]) - (1.f - hard) * threshold);
          const float grad_h = load(grad_s, i) * d + carried[i] * (keep + through_reset * d);
          const float v = last[i] >= last_threshold ? (hard != 0.f ? rest : last[i] - threshold) : last[i];
          row_decay += grad_h * (v - rest);
          row_gain += grad_h * load(x, i);
          store(grad_x, i, gain * grad_h);
          carried[i] = decay * grad_h;
        }
        block_decay += row_decay;
        block_gain += row_gain;
      }
    }
    if (a.grad_v) std::memcpy(a.grad_v + i0, carried, n * 4);
    if (partial) {
      partial[i0 / block * 2] = block_decay;
      partial[i0 / block * 2 + 1] = block_gain;
    }
  });
  if (a.grad_constants) {
    a.grad_constants[0] = a.grad_constants[1] = 0;
    for (int64_t b = 0; b < blocks; b++) {
      a.grad_constants[0] += partial[b * 2];
      a.grad_constants[1] += partial[b * 2 + 1];
    }
    std::free(partial);
  }
  return failed;
}

template <class T>
int backward_of(const ScanBackward& a) {
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

template <class T>
int forward_of(const ScanForward& a) { return a.hard ? forward<T, true>(a) : forward<T, false>(a); }

int scan_forward(const ScanForward& a) {
  return a.dtype == Dtype::float32 ? forward_of<float>(a) : forward_of<bfloat16>(a);
}

int scan_backward(const ScanBackward& a) {
  return a.dtype == Dtype::float32 ? backward_of<float>(a) : backward_of<bfloat16>(a);
}

#define SPIKELOOM_STRING_(x) #x
#define SPIKELOOM_STRING(x) SPIKELOOM_STRING_(x)

}  // namespace

extern const Kernels kernels{SPIKELOOM_STRING(SPIKELOOM_LEVEL), scan_forward, scan_backward};

}  // namespace SPIKELOOM_LEVEL
}  // namespace spikeloom
