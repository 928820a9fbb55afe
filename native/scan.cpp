// Neuron scans. One element's history never leaves the cache: a block of elements goes through all its steps, and all
// its levels, before the next block starts, so memory sees each input and output once. Where a normalisation stands
// before the neuron, its currents are made from the block's input on the way.
#include "level.hpp"

namespace spikeloom {
namespace SPIKELOOM_LEVEL {
namespace {

// The currents u[t] of a block with a normalisation or a residual: rows of coefficients, and the row of u.
template <class T>
class Currents {
 public:
  Currents(const Scan& a, float* rows, int64_t block)
      : a_(a), factor_(rows), shift_(rows + block), u_(rows + 2 * block), fixed_(a.factor && repeats(a.layout, block)) {
    if (fixed_) fill(0, block);
  }

  void enter(int64_t i0, int64_t n) {
    i0_ = i0, n_ = n;
    if (a_.factor && !fixed_) fill(i0, n);
  }

  // u[t], and its copy in `sum`, whose rounding it then has.
  const float* at(int64_t t, void* sum = nullptr) {
    const T* x = static_cast<const T*>(a_.x) + t * a_.x_stride + i0_;
    float* u = u_;
    if (a_.factor) {
      const float *factor = factor_, *shift = shift_;
#pragma omp simd
      for (int64_t i = 0; i < n_; i++) u[i] = factor[i] * load(x, i) + shift[i];
    } else {
      for (int64_t i = 0; i < n_; i++) u[i] = load(x, i);
    }
    if (a_.residual) {
      const T* residual = static_cast<const T*>(a_.residual) + t * a_.size + i0_;
#pragma omp simd
      for (int64_t i = 0; i < n_; i++) u[i] += load(residual, i);
    }
    if (sum) {
      T* out = static_cast<T*>(sum) + t * a_.size + i0_;
      for (int64_t i = 0; i < n_; i++) store(out, i, u[i]);
      for (int64_t i = 0; i < n_; i++) u[i] = load(out, i);
    }
    return u;
  }

 private:
  void fill(int64_t i0, int64_t n) {
    spread(a_.layout, i0, n, a_.factor, factor_);
    spread(a_.layout, i0, n, a_.shift, shift_);
  }

  const Scan& a_;
  float *factor_, *shift_, *u_;
  bool fixed_;
  int64_t i0_ = 0, n_ = 0;
};

constexpr int64_t CURRENT_ROWS = 3;

inline bool made(const Scan& a) { return a.factor || a.residual; }

// One step of one level on a block: new potentials in v, spikes handed to `out`.
template <bool hard, bool rectified, class S, class Out>
inline void fire(const Scan& a, int64_t k, int64_t n, const S* u, float* v, float* potentials, const Out& out) {
  const float decay = a.decay, gain = a.gain, scale = a.scale, rest = a.v_rest;
  const float threshold = a.threshold[k], fire_at = a.fire_at[k];
  // By value: a captured reference to a float could be one of those that are stored.
  const auto step = [=](int64_t i) {
    float h = decay * (v[i] - rest) + gain * load(u, i) + rest;
    if constexpr (rectified) {
      h = scale * h;
      h = h > 0.f ? h : 0.f;
    }
    const bool fired = h >= fire_at;
    v[i] = fired ? (hard ? rest : h - threshold) : h;
    out(i, fired ? 1.f : 0.f);
    return h;
  };
  if (potentials) {
#pragma omp simd
    for (int64_t i = 0; i < n; i++) potentials[i] = step(i);
  } else {
#pragma omp simd
    for (int64_t i = 0; i < n; i++) step(i);
  }
}

// All levels of one step: their spikes are summed in a row of floats before they are stored.
template <bool hard, bool rectified, class S, class T>
inline void fire_levels(const ScanForward& a, int64_t t, int64_t i0, int64_t n, const S* u, float* v, int64_t block, T* s) {
  float* total = v + a.levels * block;
  for (int64_t k = 0; k < a.levels; k++) {
    float* rows = v + k * block;
    float* potentials = a.potentials ? a.potentials + (k * a.steps + t) * a.size + i0 : nullptr;
    if (a.levels == 1) {
      fire<hard, rectified>(a, k, n, u, rows, potentials, [=](int64_t i, float fired) { store(s, i, fired); });
    } else if (k == 0) {
      fire<hard, rectified>(a, k, n, u, rows, potentials, [=](int64_t i, float fired) { total[i] = fired; });
    } else if (k < a.levels - 1) {
      fire<hard, rectified>(a, k, n, u, rows, potentials, [=](int64_t i, float fired) { total[i] += fired; });
    } else {
      fire<hard, rectified>(a, k, n, u, rows, potentials, [=](int64_t i, float fired) { store(s, i, total[i] + fired); });
    }
  }
}

template <class T, bool hard, bool rectified>
int forward(const ScanForward& a) {
  const int64_t levels = a.levels, block = a.factor ? whole_periods(a.layout, 2048) : 2048;
  const int64_t scratch = (levels + 1 + CURRENT_ROWS) * block * 4;
  const int64_t blocks = (a.size + block - 1) / block, groups = groups_of(blocks, a.factor != nullptr);
  return for_groups(blocks, groups, scratch, a.threads, a.steps * a.size < SMALL, [&](int64_t, int64_t first, int64_t last, float* rows) {
    Currents<T> currents(a, rows + (levels + 1) * block, block);
    for (int64_t i0 = first * block; i0 < smaller(last * block, a.size); i0 += block) {
      const int64_t n = smaller(block, a.size - i0);
      currents.enter(i0, n);
      for (int64_t k = 0; k < levels; k++)
        for (int64_t i = 0; i < n; i++) rows[k * block + i] = a.v ? a.v[k * a.size + i0 + i] : a.v_rest;
      for (int64_t t = 0; t < a.steps; t++) {
        T* s = static_cast<T*>(a.spikes) + t * a.size + i0;
        if (made(a)) {
          fire_levels<hard, rectified>(a, t, i0, n, currents.at(t, a.sum), rows, block, s);
        } else {
          const T* x = static_cast<const T*>(a.x) + t * a.x_stride + i0;
          fire_levels<hard, rectified>(a, t, i0, n, x, rows, block, s);
        }
        if (a.add) {
          const T* add = static_cast<const T*>(a.add) + t * a.size + i0;
#pragma omp simd
          for (int64_t i = 0; i < n; i++) store(s, i, load(s, i) + load(add, i));
        }
      }
      if (a.v_out)
        for (int64_t k = 0; k < levels; k++) std::memcpy(a.v_out + k * a.size + i0, rows + k * block, n * 4);
    }
  });
}

// The potentials of one level again: row t + 1 of `f` is f[t], row 0 the initial potential; `before` likewise holds h[t]
// where that differs.
template <bool rectified, class S>
inline void recompute(const Scan& a, int64_t k, int64_t t, int64_t n, const S* u, float* f_rows, float* h_rows, int64_t block) {
  const float decay = a.decay, gain = a.gain, scale = a.scale, rest = a.v_rest, threshold = a.threshold[k];
  // The initial potential is not reset, however high: an infinite threshold for it.
  const float last_fire_at = t == 0 ? __builtin_inff() : a.fire_at[k];
  const bool hard = a.hard;
  const float* last = f_rows + t * block;
  float *f = f_rows + (t + 1) * block, *before = h_rows + (t + 1) * block;
#pragma omp simd
  for (int64_t i = 0; i < n; i++) {
    const float v = last[i] >= last_fire_at ? (hard ? rest : last[i] - threshold) : last[i];
    const float h = decay * (v - rest) + gain * load(u, i) + rest;
    if constexpr (rectified) {
      before[i] = h;
      f[i] = scale * h > 0.f ? scale * h : 0.f;
    } else {
      f[i] = h;
    }
  }
}

// What the backward pass of one block needs, as rows of `block` floats.
struct BackwardRows {
  float *f, *h, *carried, *total, *pass, *pass_x, *over_steps, *currents;
  static int64_t count(const ScanBackward& a) {
    return (a.steps + 1) * (a.rectified ? 2 : 1) + 1 + (a.levels > 1 ? a.steps : 0) + 3 + CURRENT_ROWS;
  }
  BackwardRows(const ScanBackward& a, float* rows, int64_t block) {
    f = rows, rows += (a.steps + 1) * block;
    h = f;
    if (a.rectified) h = rows, rows += (a.steps + 1) * block;
    carried = rows, rows += block;
    total = rows;
    if (a.levels > 1) rows += a.steps * block;
    pass = rows, pass_x = rows + block, over_steps = rows + 2 * block, currents = rows + 3 * block;
  }
};

// Sums over a block, for the constants of the charge.
struct ConstantSums {
  double decay = 0, gain = 0, scale = 0;
};

// One step back of one level: dL/dh in, gradients of u and of the potential before out. `emit(i, g)` takes dL/du.
template <class T, Surrogate kind, bool rectified, bool learn, class S, class Emit>
inline void step_back(const ScanBackward& a, int64_t k, int64_t t, int64_t i0, int64_t n, const BackwardRows& rows,
                      int64_t block, const S* u, ConstantSums& sums, const Emit& emit) {
  const float decay = a.decay, gain = a.gain, scale = a.scale, rest = a.v_rest, p = a.p, q = a.q;
  const float hard = a.hard ? 1.f : 0.f, attached = a.detach_reset ? 0.f : 1.f;
  const float threshold = a.threshold[k], fire_at = a.fire_at[k], last_fire_at = t == 0 ? __builtin_inff() : fire_at;
  const T* grad_s = static_cast<const T*>(a.grad_spikes) + t * a.size + i0;
  const float* slope = kind == Surrogate::slope ? a.slope + (k * a.steps + t) * a.size + i0 : nullptr;
  const float *f = rows.f + (t + 1) * block, *before = rows.h + (t + 1) * block, *last = rows.f + t * block;
  float* carried = rows.carried;
  float row_decay = 0, row_gain = 0, row_scale = 0;
#pragma omp simd reduction(+ : row_decay, row_gain, row_scale)
  for (int64_t i = 0; i < n; i++) {
    float d;
    if constexpr (kind == Surrogate::slope) d = slope[i]; else d = derivative<kind>(f[i] - threshold, p, q);
    const float keep = f[i] >= fire_at ? 1.f - hard : 1.f;
    const float through_reset = attached * (hard * (rest - f[i]) - (1.f - hard) * threshold);
    float grad = load(grad_s, i) * d + carried[i] * (keep + through_reset * d);
    if constexpr (rectified) {
      grad = scale * before[i] > 0.f ? grad : 0.f;
      if constexpr (learn) row_scale += grad * before[i];
      grad *= scale;
    }
    if constexpr (learn) {
      const float v = last[i] >= last_fire_at ? (hard != 0.f ? rest : last[i] - threshold) : last[i];
      row_decay += grad * (v - rest);
      row_gain += grad * load(u, i);
    }
    carried[i] = decay * grad;
    emit(i, gain * grad);
  }
  if constexpr (learn) sums.decay += row_decay, sums.gain += row_gain, sums.scale += row_scale;
}

// The backward pass of every neuron here is a linear scan in reverse; potentials are computed again from x, in cache.
template <class T, Surrogate kind, bool rectified, bool learn>
int backward(const ScanBackward& a) {
  const int64_t levels = a.levels, rows_count = BackwardRows::count(a), C = a.layout.channels;
  // Several levels go over the rows several times: these then stay in the first cache.
  const int64_t budget = block_size(rows_count * 4, (levels > 1 ? 32 : 192) << 10, 2048);
  const int64_t block = a.factor ? whole_periods(a.layout, budget) : budget;
  const bool normed = a.grad_norm != nullptr, fixed = normed && repeats(a.layout, block);
  // A fixed number of groups of blocks, each with sums of its own, added in order: the result does not depend on the
  // number of threads.
  const int64_t blocks = (a.size + block - 1) / block, groups = groups_of(blocks, normed);
  const int64_t partial_size = (learn ? 3 : 0) + (normed ? 2 * C : 0);
  double* partial = partial_size ? static_cast<double*>(std::calloc(groups * partial_size, sizeof(double))) : nullptr;
  if (partial_size && partial == nullptr) return -1;
  const int failed = for_groups(
      blocks, groups, rows_count * block * 4, a.threads, a.steps * a.size < SMALL,
      [&](int64_t group, int64_t first, int64_t last, float* scratch) {
        const BackwardRows rows(a, scratch, block);
        Currents<T> currents(a, rows.currents, block);
        double* mine = partial ? partial + group * partial_size : nullptr;
        double* norm_sums = mine + (learn ? 3 : 0);
        if (normed) std::memset(rows.pass, 0, 2 * block * 4);
        ConstantSums sums;
        for (int64_t i0 = first * block; i0 < smaller(last * block, a.size); i0 += block) {
          const int64_t n = smaller(block, a.size - i0);
          currents.enter(i0, n);
          for (int64_t k = 0; k < levels; k++) {
            for (int64_t i = 0; i < n; i++) rows.f[i] = a.v ? a.v[k * a.size + i0 + i] : a.v_rest;
            for (int64_t t = 0; t < a.steps; t++) {
              if (made(a)) {
                recompute<rectified>(a, k, t, n, currents.at(t), rows.f, rows.h, block);
              } else {
                const T* x = static_cast<const T*>(a.x) + t * a.x_stride + i0;
                recompute<rectified>(a, k, t, n, x, rows.f, rows.h, block);
              }
            }
            for (int64_t i = 0; i < n; i++) rows.carried[i] = a.grad_v_out ? a.grad_v_out[k * a.size + i0 + i] : 0.f;
            for (int64_t t = a.steps - 1; t >= 0; t--) {
              T* out = static_cast<T*>(a.grad_u) + (a.sum_steps ? 0 : t * a.size) + i0;
              const T* x = static_cast<const T*>(a.x) + t * a.x_stride + i0;
              const T* grad_sum = a.grad_sum ? static_cast<const T*>(a.grad_sum) + t * a.size + i0 : nullptr;
              const auto back = [&](const auto& emit) {
                if (learn && made(a))
                  step_back<T, kind, rectified, learn>(a, k, t, i0, n, rows, block, currents.at(t), sums, emit);
                else
                  step_back<T, kind, rectified, learn>(a, k, t, i0, n, rows, block, x, sums, emit);
              };
              if (levels == 1 && !normed && !grad_sum && !a.sum_steps) {
                back([=](int64_t i, float g) { store(out, i, g); });
                continue;
              }
              // One level's gradient goes to a row that is in no other use by now: that of f[t].
              float* g_row = levels == 1 ? rows.f + (t + 1) * block : rows.total + t * block;
              if (k == 0)
                back([=](int64_t i, float g) { g_row[i] = g; });
              else
                back([=](int64_t i, float g) { g_row[i] += g; });
              if (k < levels - 1) continue;
              if (grad_sum)
                for (int64_t i = 0; i < n; i++) g_row[i] += load(grad_sum, i);
              if (normed) {
                float *pass = rows.pass, *pass_x = rows.pass_x;
#pragma omp simd
                for (int64_t i = 0; i < n; i++) {
                  pass[i] += g_row[i];
                  pass_x[i] += g_row[i] * load(x, i);
                }
              }
              if (!a.sum_steps) {
                for (int64_t i = 0; i < n; i++) store(out, i, g_row[i]);
              } else {
                float* sum = rows.over_steps;
                if (t == a.steps - 1)
                  for (int64_t i = 0; i < n; i++) sum[i] = g_row[i];
                else
                  for (int64_t i = 0; i < n; i++) sum[i] += g_row[i];
                if (t == 0)
                  for (int64_t i = 0; i < n; i++) store(out, i, sum[i]);
              }
            }
            if (a.grad_v) std::memcpy(a.grad_v + k * a.size + i0, rows.carried, n * 4);
          }
          if (normed && !fixed) {
            gather(a.layout, i0, n, rows.pass, norm_sums);
            gather(a.layout, i0, n, rows.pass_x, norm_sums + C);
          }
        }
        if (fixed) {
          gather(a.layout, 0, block, rows.pass, norm_sums);
          gather(a.layout, 0, block, rows.pass_x, norm_sums + C);
        }
        if (learn) mine[0] = sums.decay, mine[1] = sums.gain, mine[2] = sums.scale;
      });
  if (learn) std::memset(a.grad_constants, 0, 3 * sizeof(double));
  if (normed) std::memset(a.grad_norm, 0, 2 * C * sizeof(double));
  if (learn) add_groups(partial, groups, partial_size, 3, a.grad_constants);
  if (normed) add_groups(partial ? partial + (learn ? 3 : 0) : partial, groups, partial_size, 2 * C, a.grad_norm);
  std::free(partial);
  return failed;
}

template <class T, Surrogate kind>
int backward_of(const ScanBackward& a) {
  const bool learn = a.grad_constants != nullptr;
  if (a.rectified) return learn ? backward<T, kind, true, true>(a) : backward<T, kind, true, false>(a);
  return learn ? backward<T, kind, false, true>(a) : backward<T, kind, false, false>(a);
}

template <class T>
int backward_of(const ScanBackward& a) {
  switch (a.surrogate) {
    case Surrogate::rational: return backward_of<T, Surrogate::rational>(a);
    case Surrogate::rectangle: return backward_of<T, Surrogate::rectangle>(a);
    case Surrogate::triangle: return backward_of<T, Surrogate::triangle>(a);
    case Surrogate::fast_sigmoid: return backward_of<T, Surrogate::fast_sigmoid>(a);
    case Surrogate::sigmoid: return backward_of<T, Surrogate::sigmoid>(a);
    case Surrogate::slope: return backward_of<T, Surrogate::slope>(a);
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
  return a.dtype == Dtype::float32 ? backward_of<float>(a) : backward_of<bfloat16>(a);
}

}  // namespace SPIKELOOM_LEVEL
}  // namespace spikeloom
