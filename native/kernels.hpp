// Interface between the Python module and the kernels, which are compiled once per instruction level.
#pragma once

#include <cstdint>

namespace spikeloom {

enum class Dtype : int { float32 = 0, bfloat16 = 1 };

// Derivatives of the surrogates, of u = potential - threshold; p and q are their constants.
// `slope` reads the derivative from a tensor instead, for a surrogate that is not built in.
enum class Surrogate : int { rational = 0, rectangle = 1, triangle = 2, fast_sigmoid = 3, sigmoid = 4, slope = 5 };

// How a step lies in memory: [outer, channels, inner], so element i belongs to channel (i / inner) % channels.
// inner == 1 is channels-last.
struct Channels {
  int64_t channels, inner;
};

// A neuron with linear charge, thresholds and a reset. For every level k, with its own potential:
//   h[t] = v_rest + decay (v[t-1] - v_rest) + gain u[t],    f[t] = relu(scale h[t]) if `rectified`, else h[t],
//   s[t] = f[t] >= fire_at[k],   v[t] = s[t] ? (hard ? v_rest : f[t] - threshold[k]) : f[t].
// The output is the sum of s over the levels. fire_at differs from threshold only in the last bit (strict firing).
// Every step holds `size` elements in one dense block; steps of x lie `x_stride` elements apart (0: all the same).
// Potentials are [levels, size].
//
// The current u[t] is x[t], or with `factor` that of a normalisation, factor[c] x[t] + shift[c], plus `residual`[t] if
// given.
struct Scan {
  Dtype dtype;
  int64_t steps, size;
  int64_t chunk;  // steps whose potentials backward computes again at a time
  const void* x;
  int64_t x_stride;
  Channels layout;
  const float *factor, *shift;  // [channels], or null
  const void* residual;         // [steps, size], or null; with a factor only
  const float* v;               // initial potentials, or null: v_rest
  float decay, gain, scale, v_rest;
  bool rectified, hard;
  int levels;
  const float *threshold, *fire_at;
  int threads;
};

struct ScanForward : Scan {
  void* spikes;
  void* sum;          // u [steps, size], or null
  const void* add;    // added to the spikes [steps, size], or null
  float* v_out;       // or null
  float* potentials;  // f [levels, steps, size], or null
  float* starts;      // v where a chunk begins, but the first [chunks - 1, levels, size], or null for one chunk
};

struct ScanBackward : Scan {
  const void* grad_spikes;
  const void* grad_sum;     // or null
  const float* grad_v_out;  // or null
  const float* starts;      // of the forward pass
  const float* slope;       // [levels, steps, size] where surrogate == slope
  Surrogate surrogate;
  float p, q;
  bool detach_reset;
  void* grad_u;  // [steps, size]; with `sum_steps` [size], summed over the steps
  bool sum_steps;
  float* grad_v;           // or null
  double* grad_constants;  // {decay, gain, scale}, or null when these are fixed
  double* grad_norm;       // sums over all but channels of grad_u and of grad_u x [2, channels], or null
};

// Mean and variance (divided by n) over all but channels.
struct Moments {
  Dtype dtype;
  int64_t steps, size;
  const void* x;
  int64_t x_stride;
  Channels layout;
  float *mean, *variance;  // [channels]
  int threads;
};

// out = a[c] g + b[c] x + c[c] for [steps, size] tensors; out may be g.
struct Affine {
  Dtype dtype;
  int64_t steps, size;
  const void* x;
  int64_t x_stride;
  Channels layout;
  const void* g;
  const float *a, *b, *c;
  void* out;
  int threads;
};

// A product with a matrix over time, then the threshold: h[t] = bias[t] + sum_j w[t, j] x[j], s[t] = h[t] >= 0.
// `order` 0: all j; k > 0: j from t - k + 1 to t. `sliding`: one row of k taps and one bias for all t, taps[k - 1]
// belonging to x[t].
struct Psn {
  Dtype dtype;
  int64_t steps, size, order;
  bool sliding;
  const void* x;
  int64_t x_stride;
  const float *weight, *bias;
  int threads;
};

struct PsnForward : Psn {
  void* spikes;
  float* potentials;  // [steps, size], or null
};

struct PsnBackward : Psn {
  const void* grad_spikes;
  const float* slope;
  Surrogate surrogate;
  float p, q;
  void* grad_x;
  double *grad_weight, *grad_bias;  // as weight and bias, zeroed by the caller
};

// Two leaky filters in a row: i[t] = alpha i[t-1] + x[t], m[t] = beta m[t-1] + (1 - beta) i[t].
// alpha and beta are scalars (constant_stride 0) or one value an element (1). The state is {i, m} [2, size].
struct Leaky {
  Dtype dtype;
  int64_t steps, size;
  const void* x;
  int64_t x_stride;
  const float *alpha, *beta;
  int64_t constant_stride;
  const float* state;  // or null: 0
  int threads;
};

struct LeakyForward : Leaky {
  void* m;
  float* state_out;  // or null
};

struct LeakyBackward : Leaky {
  const void* grad_m;
  const float* grad_state_out;  // or null
  void* grad_x;
  float* grad_state;              // or null
  float *grad_alpha, *grad_beta;  // [size], or null when these are fixed
};

// What becomes of a membrane m[t] (ParaLIF, SPSN): y = map(m), then
//   threshold   s = y > threshold                        difference  s = y - y[t-1] > threshold
//   bernoulli   s = uniform < y, and ds/dy := y          gumbel      s = g > 1/2, ds/dm = 2 g (1 - g),
// with g = u / (u + (1 - u) exp(-2 m)) and uniform numbers u(seed, t size + i), computed again where they are needed.
enum class Map : int { identity = 0, sigmoid = 1, tanh = 2, relu_tanh = 3 };
enum class Rule : int { threshold = 0, difference = 1, bernoulli = 2, gumbel = 3 };

struct FiringRule {
  Map map;
  Rule rule;
  float threshold;
  uint32_t seed;
  const float* before;  // y one step before the first [size], or null: 0
};

struct ParaLifForward : Leaky {
  FiringRule fire;
  void* spikes;
  float* state_out;   // or null
  float* mapped_out;  // the last y [size], or null
};

struct ParaLifBackward : Leaky {
  FiringRule fire;
  const void* grad_spikes;
  const float* grad_state_out;   // or null
  const float* grad_mapped_out;  // or null
  Surrogate surrogate;
  float p, q;
  void* grad_x;
  float* grad_state;              // or null
  float* grad_before;             // or null
  float *grad_alpha, *grad_beta;  // [size], or null when these are fixed
  double* grad_threshold;         // or null
};

// A leaky integration less an estimate of what past spikes took (PSU, IPSU, RPSU):
//   u[t] = integrate ? decay u[t-1] + (1 - decay) x[t] : x[t],    r[t] = decay r[t-1] + (1 - decay) e[t],
//   V[t] = u[t] - drop r[t-1],   s[t] = V[t] >= threshold (>: strict),
// with e = sigmoid(z), or z itself where `raw`; z is a tensor of its own, or u where null. The state is {u, r} [2,
// size].
struct Psu {
  Dtype dtype;
  int64_t steps, size;
  const void* x;
  int64_t x_stride;
  const void* z;  // [steps, size], or null
  bool integrate, raw, strict;
  float decay, drop, threshold;
  const float* state;  // or null: 0
  int threads;
};

struct PsuForward : Psu {
  void* spikes;       // or null
  float* potentials;  // V [steps, size], or null
  float* state_out;   // or null
};

struct PsuBackward : Psu {
  const void* grad_spikes;
  const float* grad_state_out;  // or null
  const float* slope;           // [steps, size] where surrogate == slope
  Surrogate surrogate;
  float p, q;
  void* grad_x;
  void* grad_z;       // or null
  float* grad_state;  // or null
};

// A gated neuron with constants of its own for every channel (GLIF):
//   u[t] = decay v[t-1] - drop s[t-1] - leak + open[t] x[t],   s[t] = u[t] > threshold (>= unless strict),
//   v[t] = u[t] (1 - gate s[t]).
struct Glif {
  int64_t steps, size;
  const float* x;
  int64_t x_stride;
  Channels layout;
  const float* open;       // [steps, channels]
  const float* constants;  // decay, drop, leak, gate, threshold: [5, channels]
  bool strict;
  const float* state;  // {u, s} of the step before [2, size], or null: 0
  int threads;
};

struct GlifForward : Glif {
  float *spikes, *state_out;
};

struct GlifBackward : Glif {
  const float* grad_spikes;
  const float* grad_state_out;  // gradient of the last {u, s}
  Surrogate surrogate;          // not slope
  float p, q;
  float* grad_x;           // [steps, size]
  float* grad_state;       // or null
  double* grad_open;       // [steps, channels]
  double* grad_constants;  // [5, channels]
};

// A convolution of channels-last images with a square stride and padding, and its gradients; what a kernel does not
// use is null. Weights and their gradient are float32 with the strides given.
struct Convolution {
  Dtype dtype;
  int64_t images, height, width, in, out, kernel_height, kernel_width, stride, padding;
  const void* x;  // [images, height, width, in]
  const float* weight;
  int64_t weight_out, weight_in, weight_row, weight_column;
  void* y;                // [images, out height, out width, out]
  const void* grad_y;     // as y
  void* grad_x;           // as x
  const void* grad_skip;  // as x, added to grad_x; null for none
  float* grad_weight;
  int threads;
};

// A convolution of every channel by its own filter, channels-last, and its gradients; what a kernel does not use is
// null. Weights and their gradient are float32 [kernel height, kernel width, channels].
struct Depthwise {
  Dtype dtype;
  int64_t images, height, width, channels, kernel_height, kernel_width, stride, pad_height, pad_width;
  const void* x;  // [images, height, width, channels]
  const float* weight;
  void* y;             // [images, out height, out width, channels]
  const void* grad_y;  // as y
  void* grad_x;        // as x
  float* grad_weight;
  int threads;
};

// The largest of windows of images [images, height, width, channels], and its gradient. kernel * kernel <= 256.
struct MaxPool {
  Dtype dtype;
  int64_t images, height, width, channels, kernel, stride, padding;
  const void* x;
  void* y;
  uint8_t* winners;  // the place in its window of each output's maximum; forward: or null
  const void* grad_y;
  void* grad_x;
  int threads;
};

// --- the engine: maps [steps, images, height, width, channels] of bytes (spikes or small integers) or of float32
// ---------------

constexpr int MOST_LEVELS = 16;

// What follows a layer's sums u [steps, elements of a step]: u plus a residual is written to `sum`, and where `spikes`
// is given the neurons of `Scan` fire on it.
struct Epilogue {
  int64_t steps;
  const float* residual;           // [steps, ...], or null
  const uint8_t* residual_spikes;  // or null; one of the two at most
  int64_t residual_stride;         // elements from one of its steps to the next (0: all the same)
  float* sum;                      // or null
  uint8_t* spikes;                 // or null
  float* v;                        // potentials [levels, ...] before and after, or null: v_rest
  float decay, gain, v_rest;
  bool hard;
  int levels;
  const float *threshold, *fire_at;
  int threads;
};

// A convolution with bias, of one group or of one filter a channel (`depthwise`). `binary`: no value is above one.
struct EngineConv : Epilogue {
  int64_t images, height, width, in, out, kernel_height, kernel_width, stride, padding_y, padding_x;
  bool depthwise, binary;
  const uint8_t* x;
  const float *weight, *bias;  // as `engine_pack` writes it; [out]
  // The weights in other numbers instead, or null; depthwise filters have none.
  const uint16_t* half;  // bfloat16
  const int16_t* shorts;
  const int8_t* bytes;
  // Of integers: what their sums are multiplied by [out]; and behind which groups of weights [groups of `engine_pack`]
  // sums move from 16 bits to 32, because with the next one some input could exceed 16 (null: none could).
  const float* scale;
  const uint8_t* widen;
};

// Weights [out, in, kernel_height, kernel_width], of depthwise filters [out, 1, ...], in the order in which
// `engine_conv` of the same instruction level and of inputs that are as `binary` reads them.
struct EnginePack {
  int64_t in, out, kernel_height, kernel_width, stride;
  bool depthwise, binary, integers;  // to be read as integers
  const float* weight;
  float* packed;    // or null
  uint16_t* half;   // or null: bfloat16 in another order, of weights that are bfloat16 already
  int64_t* counts;  // [4]: floats, groups that are added up one after the other, rows in a group, outputs in a block
};

// Neurons behind a layer that was computed otherwise: x [steps, size], its steps `x_stride` apart (0: all the same).
struct EngineFire : Epilogue {
  int64_t size, x_stride;
  bool once;  // `sum` has one step: x and the residual are the same at all of them
  const float* x;
};

// A convolution of any inputs, by multiplications. Its maps are [x_steps, images, ...], where x_steps is `steps`, or 1
// for an input that is the same at all of them.
struct EngineDirect : Epilogue {
  int64_t x_steps, images, height, width, in, out, kernel_height, kernel_width, stride, padding_y, padding_x, groups;
  bool once;       // as in EngineFire
  const float* x;  // or null, where it is bytes
  const uint8_t* x_bytes;
  const float *weight, *bias;  // as `engine_pack_direct` writes it; [out]
};

// Weights [out, in / groups, kernel_height, kernel_width] in the order of `engine_direct` of the same level.
struct EnginePackDirect {
  int64_t in, out, kernel_height, kernel_width, groups;
  const float* weight;
  float* packed;   // or null
  int64_t* count;  // [1]: floats
};

// y = f(a), f(a, b) or f(a, b, c) element by element. `strides` [4, 5] are those of y, a, b and c, 0 along the axes on
// which one is spread.
enum class Element : int {
  copy = 0,
  relu = 1,
  sigmoid = 2,
  clamp = 3,       // to low .. high
  scale = 4,       // a high
  shift = 5,       // a + high
  complement = 6,  // 1 - a
  add = 7,
  mul = 8,
  divide = 9,
  largest = 10,
  affine = 11,  // a b + c
};
struct EngineElements {
  Element element;
  const int64_t *sizes, *strides;  // [5], [4, 5]
  void* y;
  const void *a, *b;
  const float* c;
  bool y_bytes, a_bytes, b_bytes;
  float low, high;
  int threads;
};

// Sums over the middle axis of x [outer, count, inner], divided by count for a mean.
struct EngineReduce {
  int64_t outer, count, inner;
  bool mean;
  const float* x;  // or null, where it is bytes
  const uint8_t* x_bytes;
  float* y;
  int threads;
};

struct EnginePool {
  int64_t images, height, width, channels, kernel, stride, padding;
  const uint8_t* x;
  uint8_t* y;
  int threads;
};

// Maximum or mean of windows, of real results.
struct EngineWindows {
  int64_t images, height, width, channels, out_height, out_width, kernel, stride, padding;
  bool mean, count_padding;  // a mean counts zeros around the input, or does not
  const float* x;            // or null, where it is bytes
  const uint8_t* x_bytes;
  float* y;
  int threads;
};

// Q (K^T V) scale in every head: maps [maps, tokens, channels].
struct EngineAttention {
  int64_t maps, tokens, channels, heads;
  float scale;
  const uint8_t *q, *k, *v;
  float* y;
  int threads;
};

// What a kernel returns.
enum Status : int { OK = 0, OUT_OF_MEMORY = -1, UNSUPPORTED = -2 };

struct Kernels {
  const char* level;
#define KERNEL(function, arguments, calls) int (*function)(const arguments&);
#include "kernels.def"
#undef KERNEL
};

namespace baseline {
extern const Kernels kernels;
}
namespace avx2 {
extern const Kernels kernels;
}
namespace avx512 {
extern const Kernels kernels;
}

#ifdef SPIKELOOM_LEVEL
namespace SPIKELOOM_LEVEL {
#define KERNEL(function, arguments, calls) int function(const arguments&);
#include "kernels.def"
#undef KERNEL
}  // namespace SPIKELOOM_LEVEL
#endif

}  // namespace spikeloom
