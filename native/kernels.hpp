// Interface between the Python module and the kernels, which are compiled once per instruction level.
#pragma once

#include <cstdint>

namespace spikeloom {

enum class Dtype : int { float32 = 0, bfloat16 = 1 };

// Derivatives of the surrogates, of u = potential - threshold; p and q are their constants.
// `slope` reads the derivative from a tensor instead, for a surrogate that is not built in.
enum class Surrogate : int { rational = 0, rectangle = 1, triangle = 2, fast_sigmoid = 3, sigmoid = 4, slope = 5 };

// A neuron with linear charge, a threshold and a reset:
//   h[t] = v_rest + decay (v[t-1] - v_rest) + gain x[t],  s[t] = h[t] >= v_threshold,
//   v[t] = s[t] ? (hard ? v_rest : h[t] - v_threshold) : h[t].
// Every step holds `size` elements in one dense block; steps of x lie `x_stride` elements apart (0: all the same).
struct Scan {
  Dtype dtype;
  int64_t steps, size;
  const void* x;
  int64_t x_stride;
  const float* v;  // initial potential [size], or null: v_rest
  float decay, gain, v_threshold, v_rest;
  bool hard;
  int threads;
};

struct ScanForward : Scan {
  void* spikes;
  float* v_out;       // [size], or null
  float* potentials;  // h [steps, size], or null
};

struct ScanBackward : Scan {
  const void* grad_spikes;
  const float* grad_v_out;  // [size], or null
  const float* slope;       // [steps, size] where surrogate == slope
  Surrogate surrogate;
  float p, q;
  bool detach_reset;
  void* grad_x;      // [steps, size]
  float* grad_v;     // [size], or null
  double* grad_constants;  // {decay, gain}, or null when these are fixed
};

struct Kernels {
  const char* level;
  int (*scan_forward)(const ScanForward&);
  int (*scan_backward)(const ScanBackward&);
};

namespace baseline { extern const Kernels kernels; }
namespace avx2 { extern const Kernels kernels; }
namespace avx512 { extern const Kernels kernels; }

}  // namespace spikeloom
