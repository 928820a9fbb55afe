// Glif neurons with constants of their own for every channel (GLIF):
//
//   for t:  u = decay v - drop s - leak + open[t] x[t],  s = u > threshold (>= unless strict),  v = u (1 - gate s)
//
// and backward, from the last step to the first, the chain rule of these three lines.
#include "common/channels.hpp"
#include "common/prefetch.hpp"
#include "common/threads.hpp"

namespace spikeloom::SPIKELOOM_LEVEL {
namespace {

constexpr int64_t CONSTANTS = 5;

// The constants of a block, spread from channels to elements, and the input gate of a step.
class GlifRows {
 public:
  static constexpr int64_t count = CONSTANTS + 1;

  GlifRows(const Glif& a, float* rows, int64_t block)
      : decay(rows),
        drop(rows + block),
        leak(rows + 2 * block),
        gate(rows + 3 * block),
        threshold(rows + 4 * block),
        a_(a),
        rows_(rows),
        open_(rows + CONSTANTS * block),
        block_(block),
        fixed_(repeats(a.layout, block)) {
    if (fixed_) fill(0, block);
  }

  void enter(int64_t i0, int64_t n) {
    i0_ = i0, n_ = n;
    if (!fixed_) fill(i0, n);
  }

  const float* open(int64_t t) {
    broadcast_channels(a_.layout, i0_, n_, a_.open + t * a_.layout.channels, open_);
    return open_;
  }

  const float *decay, *drop, *leak, *gate, *threshold;

 private:
  void fill(int64_t i0, int64_t n) {
    for (int64_t c = 0; c < CONSTANTS; c++)
      broadcast_channels(a_.layout, i0, n, a_.constants + c * a_.layout.channels, rows_ + c * block_);
  }

  const Glif& a_;
  float *rows_, *open_;
  int64_t block_;
  bool fixed_;
  int64_t i0_ = 0, n_ = 0;
};

// What one step does to a block: u and s, which may lie in other rows than those before them.
inline void glif_step(const Glif& a, int64_t t, int64_t i0, int64_t n, GlifRows& rows, const float* u0, const float* s0,
                      float* u1, float* s1) {
  const float *x = a.x + t * a.x_stride + i0, *open = rows.open(t);
  const float *decay = rows.decay, *drop = rows.drop, *leak = rows.leak, *gate = rows.gate, *threshold = rows.threshold;
  const bool strict = a.strict;
#pragma omp simd
  for (int64_t i = 0; i < n; i++) {
    const float v = u0[i] * (1.f - gate[i] * s0[i]);
    const float u = decay[i] * v - drop[i] * s0[i] - leak[i] + open[i] * x[i];
    u1[i] = u;
    s1[i] = (strict ? u > threshold[i] : u >= threshold[i]) ? 1.f : 0.f;
  }
}

int back(const GlifBackward& a) {
  // Rows of u and s from the state to the last step, gradients of both, sums, and one of products.
  const int64_t C = a.layout.channels, count = 2 * (a.steps + 1) + 2 + CONSTANTS + 1 + GlifRows::count;
  const int64_t block = whole_periods(a.layout, block_size(count * 4, 192 << 10, 512));
  const int64_t blocks = (a.size + block - 1) / block, partial_size = (a.steps + CONSTANTS) * C;
  // Each group has sums of its own, at most 32 MB in all; their number does not depend on that of the threads.
  const int64_t most = (4 << 20) / partial_size, wanted = groups_of(blocks, true);
  const int64_t groups = wanted < 2 ? wanted : smaller(wanted, most < 2 ? 2 : most);
  double* partial = static_cast<double*>(std::calloc(groups * partial_size + 1, sizeof(double)));
  if (partial == nullptr) return OUT_OF_MEMORY;
  const auto body = [&](int64_t group, int64_t first, int64_t last, float* u_rows) {
    float *s_rows = u_rows + (a.steps + 1) * block, *grad_u = s_rows + (a.steps + 1) * block, *grad_s = grad_u + block;
    float *sums = grad_s + block, *product = sums + CONSTANTS * block;
    GlifRows rows(a, product + block, block);
    double *open_sums = partial + group * partial_size, *constant_sums = open_sums + a.steps * C;
    std::memset(sums, 0, (CONSTANTS + 1) * block * 4);
    for (int64_t i0 = first * block; i0 < smaller(last * block, a.size); i0 += block) {
      const int64_t n = smaller(block, a.size - i0);
      rows.enter(i0, n);
      for (int64_t i = 0; i < n; i++) {
        u_rows[i] = a.state ? a.state[i0 + i] : 0.f;
        s_rows[i] = a.state ? a.state[a.size + i0 + i] : 0.f;
      }
      for (int64_t t = 0; t < a.steps; t++)
        glif_step(a, t, i0, n, rows, u_rows + t * block, s_rows + t * block, u_rows + (t + 1) * block,
                  s_rows + (t + 1) * block);
      std::memcpy(grad_u, a.grad_state_out + i0, n * 4);
      std::memcpy(grad_s, a.grad_state_out + a.size + i0, n * 4);
      for (int64_t t = a.steps - 1; t >= 0; t--) {
        const float *open = rows.open(t), *grad_out = a.grad_spikes + t * a.size + i0, *x = a.x + t * a.x_stride + i0;
        const float *u = u_rows + (t + 1) * block, *before = u_rows + t * block, *s = s_rows + t * block;
        const float *decay = rows.decay, *drop = rows.drop, *gate = rows.gate, *threshold = rows.threshold;
        float* grad_x = a.grad_x + t * a.size + i0;
        float *decays = sums, *drops = sums + block, *leaks = sums + 2 * block, *gates = sums + 3 * block,
              *thresholds = sums + 4 * block;
        // The row of products holds the surrogate's derivative first.
#pragma omp simd
        for (int64_t i = 0; i < n; i++) product[i] = u[i] - threshold[i];
        derivative_row(a.surrogate, n, product, a.p, a.q, product);
#pragma omp simd
        for (int64_t i = 0; i < n; i++) {
          const float from_spike = (grad_out[i] + grad_s[i]) * product[i];
          const float grad = grad_u[i] + from_spike, kept = before[i] * (1.f - gate[i] * s[i]),
                      through = grad * decay[i];
          grad_x[i] = grad * open[i];
          product[i] = grad * x[i];
          decays[i] += grad * kept;
          drops[i] -= grad * s[i];
          leaks[i] -= grad;
          gates[i] -= through * before[i] * s[i];
          thresholds[i] -= from_spike;
          grad_u[i] = through * (1.f - gate[i] * s[i]);
          grad_s[i] = -(through * before[i] * gate[i] + grad * drop[i]);
        }
        sum_by_channel(a.layout, i0, n, product, open_sums + t * C);
      }
      for (int64_t c = 0; c < CONSTANTS; c++) sum_by_channel(a.layout, i0, n, sums + c * block, constant_sums + c * C);
      if (a.grad_state) {
        std::memcpy(a.grad_state + i0, grad_u, n * 4);
        std::memcpy(a.grad_state + a.size + i0, grad_s, n * 4);
      }
    }
  };
  const int failed = for_groups(blocks, groups, count * block * 4, a.threads, a.steps * a.size < MIN_PARALLEL, body);
  std::memset(a.grad_open, 0, a.steps * C * sizeof(double));
  std::memset(a.grad_constants, 0, CONSTANTS * C * sizeof(double));
  reduce_partials(partial, groups, partial_size, a.steps * C, a.grad_open);
  reduce_partials(partial + a.steps * C, groups, partial_size, CONSTANTS * C, a.grad_constants);
  std::free(partial);
  return failed;
}

}  // namespace

int glif_forward(const GlifForward& a) {
  const int64_t block = whole_periods(a.layout, 512), blocks = (a.size + block - 1) / block;
  const int64_t scratch = (2 + GlifRows::count) * block * 4;
  const auto body = [&](int64_t, int64_t first, int64_t last, float* u) {
    float* s = u + block;
    GlifRows rows(a, s + block, block);
    for (int64_t i0 = first * block; i0 < smaller(last * block, a.size); i0 += block) {
      const int64_t n = smaller(block, a.size - i0);
      rows.enter(i0, n);
      for (int64_t i = 0; i < n; i++) {
        u[i] = a.state ? a.state[i0 + i] : 0.f;
        s[i] = a.state ? a.state[a.size + i0 + i] : 0.f;
      }
      for (int64_t t = 0; t < a.steps; t++) {
        glif_step(a, t, i0, n, rows, u, s, u, s);
        std::memcpy(a.spikes + t * a.size + i0, s, n * 4);
      }
      std::memcpy(a.state_out + i0, u, n * 4);
      std::memcpy(a.state_out + a.size + i0, s, n * 4);
    }
  };
  return for_groups(blocks, groups_of(blocks, true), scratch, a.threads, a.steps * a.size < MIN_PARALLEL, body);
}

int glif_backward(const GlifBackward& a) { return a.surrogate == Surrogate::slope ? UNSUPPORTED : back(a); }

}  // namespace spikeloom::SPIKELOOM_LEVEL
