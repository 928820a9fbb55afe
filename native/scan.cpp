// Neuron scans. One element's history never leaves the cache: a block of elements goes through all its steps, and all
// its levels, before the next block starts, so memory sees each input and output once. Where a normalisation stands
// before the neuron, its currents are made from the block's input on the way.
#include <type_traits>

#include "level.hpp"

namespace spikeloom {
namespace SPIKELOOM_LEVEL {
namespace {

// Elements below which a scan runs on one core: its few operations an element are done before the others are awake.
constexpr int64_t FEW = 1 << 16;

// One row of currents, u = factor x + shift (+ residual), made where it is read.
template <class T, bool added>
struct Normed {
  const T *x, *residual;
  const float *factor, *shift;
};

template <class T, bool added>
ALWAYS_INLINE inline float load(const Normed<T, added>& u, int64_t i) {
  const float normed = u.factor[i] * load(u.x, i) + u.shift[i];
  if constexpr (added) return normed + load(u.residual, i);
  return normed;
}

// The currents u[t] of a block: its input, or what a normalisation and a residual make of it.
template <class T>
class Currents {
 public:
  Currents(const Scan& a, float* rows, int64_t block)
      : a_(a), block_(block), factor_(rows), shift_(rows + block), u_(rows + 2 * block), fixed_(a.factor && repeats(a.layout, block)) {
    if (fixed_) fill(0, block);
  }

  void enter(int64_t i0, int64_t n) {
    i0_ = i0, n_ = n;
    if (a_.factor && !fixed_) fill(i0, n);
  }

  // Runs body(u[t]): a row of floats where it is read several times.
  template <class Body>
  ALWAYS_INLINE void at(int64_t t, bool several, const Body& body) {
    const T* x = static_cast<const T*>(a_.x) + t * a_.x_stride + i0_;
    if (!a_.factor)
      body(x);
    else if (several)
      body(row(t));
    else if (a_.residual)
      body(Normed<T, true>{x, residual(t), factor_, shift_});
    else
      body(Normed<T, false>{x, nullptr, factor_, shift_});
  }

  // u[t] as a row of floats, and its copy in `sum`, whose rounding it then has.
  const float* row(int64_t t, void* sum = nullptr) {
    const T* x = static_cast<const T*>(a_.x) + t * a_.x_stride + i0_;
    T* out = sum ? static_cast<T*>(sum) + t * a_.size + i0_ : nullptr;
    if (a_.residual)
      fill_row(Normed<T, true>{x, residual(t), factor_, shift_}, out);
    else
      fill_row(Normed<T, false>{x, nullptr, factor_, shift_}, out);
    return u_;
  }

  // What u[t] is made of, of this block or the next.
  void needed(int64_t t, bool next, Soon<T>& soon) const {
    const int64_t i0 = next ? i0_ + block_ : i0_;
    soon.read(static_cast<const T*>(a_.x) + t * a_.x_stride + i0);
    if (a_.residual) soon.read(static_cast<const T*>(a_.residual) + t * a_.size + i0);
  }

 private:
  const T* residual(int64_t t) const { return static_cast<const T*>(a_.residual) + t * a_.size + i0_; }

  template <bool added>
  void fill_row(const Normed<T, added>& made, T* out) {
    float* u = u_;
    if (out) {
#pragma omp simd
      for (int64_t i = 0; i < n_; i++) {
        store(out, i, load(made, i));
        u[i] = load(out, i);
      }
    } else {
#pragma omp simd
      for (int64_t i = 0; i < n_; i++) u[i] = load(made, i);
    }
  }

  void fill(int64_t i0, int64_t n) {
    spread(a_.layout, i0, n, a_.factor, factor_);
    spread(a_.layout, i0, n, a_.shift, shift_);
  }

  const Scan& a_;
  int64_t block_;
  float *factor_, *shift_, *u_;
  bool fixed_;
  int64_t i0_ = 0, n_ = 0;
};

constexpr int64_t CURRENT_ROWS = 3;

// Where a potential falls after a spike. Almost every neuron's rest is 0, which is less to compute.
enum class Reset { soft, zero, hard };

template <Reset reset>
ALWAYS_INLINE inline float charged(float v, float decay, float current, float rest) {
  if constexpr (reset == Reset::hard) return decay * (v - rest) + current + rest;
  return decay * v + current;
}

template <Reset reset>
ALWAYS_INLINE inline float after(bool fires, float f, float threshold, float rest) {
  return !fires ? f : reset == Reset::soft ? f - threshold : reset == Reset::zero ? 0.f : rest;
}

// Levels are taken K at a time, one at a time or the three of the papers' MLF neurons, whose loads and stores of the
// input, the output and its gradient are then shared. Runs body(j) for j in [0, K), unrolled.
template <int K, class Body>
ALWAYS_INLINE inline void each_level(const Body& body) {
  static_assert(K == 1 || K == 3);
  body(0);
  if constexpr (K == 3) body(1), body(2);
}

// One step of K levels on a block: new potentials in the rows of v, the sum of their spikes handed to `out`.
template <int K, Reset reset, bool rectified, class S, class T, class Out>
inline void fire(const Scan& a, int64_t k, int64_t n, S u, float* v_rows, int64_t block, float* potentials, const Soon<T>& soon, const Out& out) {
  const float decay = a.decay, gain = a.gain, scale = a.scale, rest = a.v_rest;
  // By value: captured references to floats could be among those that are stored.
  float threshold[K], fire_at[K], *v[K];
  each_level<K>([&](int j) { threshold[j] = a.threshold[k + j], fire_at[j] = a.fire_at[k + j], v[j] = v_rows + j * block; });
  const auto step = [=](int64_t i) ALWAYS_INLINE {
    const float current = gain * load(u, i);
    float fired = 0.f, last = 0.f;
    each_level<K>([&](int j) ALWAYS_INLINE {
      float h = charged<reset>(v[j][i], decay, current, rest);
      if constexpr (rectified) {
        h = scale * h;
        h = h > 0.f ? h : 0.f;
      }
      const bool fires = h >= fire_at[j];
      v[j][i] = after<reset>(fires, h, threshold[j], rest);
      fired += fires ? 1.f : 0.f;
      last = h;
    });
    out(i, fired);
    return last;
  };
  if (K == 1 && std::is_pointer_v<S> && potentials)
    each_in_pieces(n, soon, [=](int64_t i) ALWAYS_INLINE { potentials[i] = step(i); });
  else
    each_in_pieces(n, soon, step);
}

// Whether the levels of a step are taken together, without their potentials being kept.
template <int K>
inline bool in_one_pass(const ScanForward& a) {
  return a.levels == K && !a.potentials;
}

// All levels of one step. The spikes of several passes are summed in a row of floats before they are stored.
template <int K, Reset reset, bool rectified, class S, class T>
inline void fire_levels(const ScanForward& a, int64_t t, int64_t i0, int64_t n, S u, float* v, int64_t block, const Soon<T>& soon, T* s) {
  const T* add = a.add ? static_cast<const T*>(a.add) + t * a.size + i0 : nullptr;
  const auto run = [=, &a, &soon](int64_t k, float* potentials, const auto& out) {
    fire<K, reset, rectified>(a, k, n, u, v + k * block, block, potentials, soon, out);
  };
  if (in_one_pass<K>(a) && add) return run(0, nullptr, [=](int64_t i, float fired) ALWAYS_INLINE { store(s, i, fired + load(add, i)); });
  if (in_one_pass<K>(a)) return run(0, nullptr, [=](int64_t i, float fired) ALWAYS_INLINE { store(s, i, fired); });
  // Currents that are read several times are a row of floats or the input itself.
  if constexpr (std::is_pointer_v<S>) {
    float *total = v + a.levels * block, *unwanted = total + block;
    std::memset(total, 0, n * 4);
    for (int64_t k = 0; k < a.levels; k += K)
      run(k, a.potentials ? a.potentials + (k * a.steps + t) * a.size + i0 : unwanted, [=](int64_t i, float fired) ALWAYS_INLINE { total[i] += fired; });
    for (int64_t i = 0; i < n; i++) store(s, i, total[i] + (add ? load(add, i) : 0.f));
  }
}

// Elements of a forward block, few enough that a block's rows stay in the first cache.
inline int64_t forward_block(const Scan& a) {
  const bool wide = a.factor && a.layout.channels * a.layout.inner > 512;
  const int64_t block = wide ? 2048 : 512;
  return a.factor ? whole_periods(a.layout, block) : even_block(a.size, block);
}

template <class T, int K, Reset reset, bool rectified>
int forward(const ScanForward& a) {
  const int64_t levels = a.levels, block = forward_block(a);
  const int64_t scratch = (levels + 3 + CURRENT_ROWS) * block * 4;
  const bool past_caches = large<T>(a.steps * a.size);
  const int64_t blocks = (a.size + block - 1) / block, groups = groups_of(blocks, a.factor != nullptr);
  const int64_t ahead = rows_ahead(a.steps);
  // What step t needs beside its currents.
  const auto needed = [&](int64_t t, int64_t i0, Soon<T>& soon) {
    const int64_t place = t * a.size + i0;
    if (!past_caches) soon.write(static_cast<const T*>(a.spikes) + place);
    if (a.sum) soon.write(static_cast<const T*>(a.sum) + place);
    if (a.add) soon.read(static_cast<const T*>(a.add) + place);
  };
  return for_groups(blocks, groups, scratch, a.threads, a.steps * a.size < FEW, [&](int64_t, int64_t first, int64_t last, float* rows) {
    Currents<T> currents(a, rows + (levels + 2) * block, block);
    T* row = reinterpret_cast<T*>(rows + (levels + 2 + CURRENT_ROWS) * block);
    for (int64_t i0 = first * block; i0 < smaller(last * block, a.size); i0 += block) {
      const int64_t n = smaller(block, a.size - i0);
      currents.enter(i0, n);
      for (int64_t k = 0; k < levels; k++)
        for (int64_t i = 0; i < n; i++) rows[k * block + i] = a.v ? a.v[k * a.size + i0 + i] : a.v_rest;
      for (int64_t t = 0; t < a.steps; t++) {
        T *to = static_cast<T*>(a.spikes) + t * a.size + i0, *s = past_caches ? row : to;
        Soon<T> soon;
        const bool next = t + ahead >= a.steps;
        const int64_t later = next ? t + ahead - a.steps : t + ahead;
        currents.needed(later, next, soon), needed(later, next ? i0 + block : i0, soon);
        const auto step = [&](auto u) { fire_levels<K, reset, rectified>(a, t, i0, n, u, rows, block, soon, s); };
        if (a.sum)
          step(currents.row(t, a.sum));
        else
          currents.at(t, !in_one_pass<K>(a), step);
        if (past_caches) stream(to, row, n);
        if (a.starts && (t + 1) % a.chunk == 0 && t + 1 < a.steps)
          for (int64_t k = 0; k < levels; k++)
            std::memcpy(a.starts + ((t / a.chunk) * levels + k) * a.size + i0, rows + k * block, n * 4);
      }
      if (a.v_out)
        for (int64_t k = 0; k < levels; k++) std::memcpy(a.v_out + k * a.size + i0, rows + k * block, n * 4);
    }
    streamed();
  });
}

// What the backward pass of one block needs, as rows of `block` floats. Potentials are computed again for a chunk of
// steps at a time: row r + 1 of a level's `f` is f of the chunk's step r, row 0 the potential with which the chunk
// begins; `h` likewise where that differs. Rows lie a cache line more than a block apart: at whole pages, what is stored
// in one would hold up loads from the next.
struct BackwardRows {
  int64_t block, stride, chunk, count = 0;
  float *f, *h, *carried, *total, *slope, *pass, *pass_x, *over_steps, *currents;

  BackwardRows(const ScanBackward& a, int64_t K, float* rows, int64_t block) : block(block), stride(spaced(block)), chunk(a.chunk) {
    const auto take = [&](bool wanted, int64_t n) {
      float* first = rows == nullptr ? nullptr : rows + (wanted ? count * stride : 0);  // null: only counted
      count += wanted ? n : 0;
      return first;
    };
    f = take(true, K * (chunk + 1));
    h = take(a.rectified, chunk + 1);
    carried = take(true, K);
    total = take(true, a.levels > K ? a.steps : 1);
    slope = take(true, K);
    pass = take(true, 1), pass_x = take(true, 1);
    over_steps = take(true, 1);
    currents = take(a.factor != nullptr, CURRENT_ROWS);
  }
  static int64_t spaced(int64_t block) { return block + 16; }
  float* potential(int level, int64_t row) const { return f + (level * (chunk + 1) + row) * stride; }
};

// The potentials of K levels again, those of the chunk's step r into row r + 1. Not inlined: once for all surrogates.
template <int K, Reset reset, bool rectified, class S, class T>
__attribute__((noinline)) void recompute_as(const Scan& a, int64_t k, int64_t r, int64_t n, S u, const BackwardRows& rows, const Soon<T>& soon) {
  const float decay = a.decay, gain = a.gain, scale = a.scale, rest = a.v_rest;
  float threshold[K], last_fire_at[K], *f[K];
  const float* last[K];
  each_level<K>([&](int j) {
    threshold[j] = a.threshold[k + j];
    // The potential of a beginning is not reset, however high: an infinite threshold for it.
    last_fire_at[j] = r == 0 ? __builtin_inff() : a.fire_at[k + j];
    last[j] = rows.potential(j, r), f[j] = rows.potential(j, r + 1);
  });
  float* before = rows.h + (r + 1) * rows.stride;
  const auto step = [=](int64_t i) ALWAYS_INLINE {
    const float current = gain * load(u, i);
    each_level<K>([&](int j) ALWAYS_INLINE {
      const float f_last = last[j][i], v = after<reset>(f_last >= last_fire_at[j], f_last, threshold[j], rest);
      const float h = charged<reset>(v, decay, current, rest);
      if constexpr (rectified) {
        before[i] = h;
        f[j][i] = scale * h > 0.f ? scale * h : 0.f;
      } else {
        f[j][i] = h;
      }
    });
  };
  each_in_pieces(n, soon, step);
}

template <int K, bool rectified, class S, class T>
inline void recompute(const Scan& a, int64_t k, int64_t r, int64_t n, S u, const BackwardRows& rows, const Soon<T>& soon) {
  if (!a.hard)
    recompute_as<K, Reset::soft, rectified>(a, k, r, n, u, rows, soon);
  else if (rectified || a.v_rest != 0.f)
    recompute_as<K, Reset::hard, rectified>(a, k, r, n, u, rows, soon);
  else
    recompute_as<K, Reset::zero, false>(a, k, r, n, u, rows, soon);
}

// dS/dF of one level and step: given, or of a surrogate that `step_back` does not compute itself, in a row.
__attribute__((noinline)) const float* slope_row(const ScanBackward& a, int64_t level, int64_t t, int64_t i0, int64_t n, const float* f, float* row) {
  if (a.surrogate == Surrogate::slope) return a.slope + (level * a.steps + t) * a.size + i0;
  const float threshold = a.threshold[level];
#pragma omp simd
  for (int64_t i = 0; i < n; i++) row[i] = f[i] - threshold;
  derivative_row(a.surrogate, n, row, a.p, a.q, row);
  return row;
}

// Sums over a block, for the constants of the charge.
struct ConstantSums {
  double decay = 0, gain = 0, scale = 0;
};

// How the gradient of a potential passes the reset behind it: as the settings say, or, with less arithmetic, a reset to 0
// and one that is no part of the gradient, where spikes cut what came from later and nothing else.
enum class Through { any, zero, cut };

// One step back of K levels: `carried` holds dL/dh of the step after (behind the last step dL/dV, which no decay has
// passed) and then of this one. `emit(i, g)` takes dL/du. The decay's gradient belongs to the step after, whose charge
// begins with the potential that is known here.
template <class T, Surrogate kind, bool rectified, bool learn, Through through, int K, class S, class Emit>
inline void step_back(const ScanBackward& a, int64_t k, int64_t t, int64_t r, int64_t i0, int64_t n, const BackwardRows& rows, S u, const Soon<T>& soon, ConstantSums& sums, const Emit& emit) {
  static_assert(K == 1 || !(rectified || learn));
  const bool ends = t == a.steps - 1;
  const float decay = ends ? 1.f : a.decay, gain = a.gain, scale = a.scale, rest = a.v_rest, p = a.p, q = a.q;
  const float hard = through != Through::any || a.hard ? 1.f : 0.f, attached = a.detach_reset ? 0.f : 1.f;
  // d(potential after the reset) / d(spike) is attached (hard (rest - f) - (1 - hard) threshold) = slope f + offset.
  const float reset_slope = -attached * hard;
  const T* grad_s = static_cast<const T*>(a.grad_spikes) + t * a.size + i0;
  float threshold[K], fire_at[K], reset_offset[K], *carried[K];
  const float *slope[K], *f[K];
  each_level<K>([&](int j) {
    threshold[j] = a.threshold[k + j], fire_at[j] = a.fire_at[k + j], carried[j] = rows.carried + j * rows.block;
    reset_offset[j] = attached * (hard * rest - (1.f - hard) * threshold[j]);
    f[j] = rows.potential(j, r + 1);
    if constexpr (kind == Surrogate::slope) slope[j] = slope_row(a, k + j, t, i0, n, f[j], rows.slope + j * rows.block);
  });
  const float* before = rows.h + (r + 1) * rows.stride;
  float row_decay = 0, row_gain = 0, row_scale = 0;
  // By value, as in `fire`.
  const auto step = [=](int64_t i, float& row_decay, float& row_gain, float& row_scale) ALWAYS_INLINE {
    const float g = load(grad_s, i);
    float grad_u = 0.f;
    each_level<K>([&](int j) ALWAYS_INLINE {
      float d;
      if constexpr (kind == Surrogate::slope) d = slope[j][i]; else d = derivative<kind>(f[j][i] - threshold[j], p, q);
      const float f_now = f[j][i];
      const bool fired = f_now >= fire_at[j];
      const float later = carried[j][i], grad_v = decay * later;
      float grad;
      if constexpr (through == Through::cut) {
        grad = fused(g, d, fired ? 0.f : grad_v);
      } else if constexpr (through == Through::zero) {
        grad = fused(d, fused(-f_now, grad_v, g), fired ? 0.f : grad_v);
      } else {
        const float through_reset = fused(reset_slope, f_now, reset_offset[j]), keep = fired ? 1.f - hard : 1.f;
        grad = fused(grad_v, fused(through_reset, d, keep), g * d);
      }
      if constexpr (learn) {
        const float v = fired ? (hard != 0.f ? rest : f_now - threshold[j]) : f_now;
        row_decay = fused(later, v - rest, row_decay);
      }
      if constexpr (rectified) {
        grad = scale * before[i] > 0.f ? grad : 0.f;
        if constexpr (learn) row_scale += grad * before[i];
        grad *= scale;
      }
      if constexpr (learn) row_gain = fused(grad, load(u, i), row_gain);
      carried[j][i] = grad;
      grad_u = j == 0 ? grad : grad_u + grad;
    });
    emit(i, gain * grad_u);
  };
  if constexpr (learn) {
    // Longer pieces: at the end of each, lanes are summed.
    in_pieces<256>(n, soon, [&](int64_t first, int64_t last) ALWAYS_INLINE {
      float decay_sum = 0, gain_sum = 0, scale_sum = 0;
#pragma omp simd reduction(+ : decay_sum, gain_sum, scale_sum)
      for (int64_t i = first; i < last; i++) step(i, decay_sum, gain_sum, scale_sum);
      row_decay += decay_sum, row_gain += gain_sum, row_scale += scale_sum;
    });
    sums.decay += ends ? 0.f : row_decay, sums.gain += row_gain, sums.scale += row_scale;
  } else {
    each_in_pieces(n, soon, [=](int64_t i) ALWAYS_INLINE {
      float none = 0;
      step(i, none, none, none);
    });
  }
}

// The backward pass of every neuron here is a linear scan in reverse; potentials are computed again from x, in cache.
template <class T, Surrogate kind, bool rectified, bool learn, Through through, int K>
int backward(const ScanBackward& a) {
  const int64_t levels = a.levels, rows_count = BackwardRows(a, K, nullptr, 0).count, C = a.layout.channels;
  // The rows of a block stay in the first cache; where they are many, in the second one, lest they get short: every row
  // begins in another page of memory.
  const int64_t near = block_size(rows_count * 4, (levels > 1 ? 64 : 32) << 10, 2048);
  const int64_t budget = near < 512 ? block_size(rows_count * 4, 320 << 10, 1024) : near;
  const int64_t block = a.factor ? whole_periods(a.layout, budget) : even_block(a.size, budget);
  const bool normed = a.grad_norm != nullptr, fixed = normed && repeats(a.layout, block);
  // A fixed number of groups of blocks, each with sums of its own, added in order: the result does not depend on the
  // number of threads.
  const int64_t blocks = (a.size + block - 1) / block, groups = groups_of(blocks, normed);
  const int64_t partial_size = (learn ? 3 : 0) + (normed ? 2 * C : 0);
  double* partial = partial_size ? static_cast<double*>(std::calloc(groups * partial_size, sizeof(double))) : nullptr;
  if (partial_size && partial == nullptr) return -1;
  const int64_t ahead = rows_ahead(a.chunk), last_start = (a.steps - 1) / a.chunk * a.chunk;
  const bool past_caches = !a.sum_steps && large<T>(a.steps * a.size);
  // What step t back needs.
  const auto needed = [&](int64_t t, int64_t i0, Soon<T>& soon) {
    const int64_t place = t * a.size + i0;
    soon.read(static_cast<const T*>(a.grad_spikes) + place);
    if (a.grad_sum) soon.read(static_cast<const T*>(a.grad_sum) + place);
    if (!a.sum_steps && !past_caches) soon.write(static_cast<const T*>(a.grad_u) + place);
  };
  const int failed = for_groups(
      blocks, groups, rows_count * BackwardRows::spaced(block) * 4, a.threads, a.steps * a.size < FEW,
      [&](int64_t group, int64_t first, int64_t last, float* scratch) {
        const BackwardRows rows(a, K, scratch, block);
        Currents<T> currents(a, rows.currents, block);
        double* mine = partial ? partial + group * partial_size : nullptr;
        double* norm_sums = mine + (learn ? 3 : 0);
        if (normed) std::memset(rows.pass, 0, block * 4), std::memset(rows.pass_x, 0, block * 4);
        ConstantSums sums;
        // Step t back of K levels from k on, in the chunk that begins with step t0.
        const auto back = [&](int64_t k, int64_t t, int64_t t0, int64_t i0, int64_t n) {
          Soon<T> soon;
          const int64_t later = ahead - 1 - (t - t0);
          if (later < 0)
            needed(t - ahead, i0, soon);
          else if (t0 > 0)
            currents.needed(t0 - a.chunk + later, false, soon);
          else
            currents.needed(smaller(last_start + later, a.steps - 1), true, soon);
          T* to = static_cast<T*>(a.grad_u) + (a.sum_steps ? 0 : t * a.size) + i0;
          T* out = past_caches ? reinterpret_cast<T*>(rows.over_steps) : to;
          const T* x = static_cast<const T*>(a.x) + t * a.x_stride + i0;
          const T* grad_sum = a.grad_sum ? static_cast<const T*>(a.grad_sum) + t * a.size + i0 : nullptr;
          const auto run = [&](const auto& emit) {
            const auto step = [&](auto u) { step_back<T, kind, rectified, learn, through, K>(a, k, t, t - t0, i0, n, rows, u, soon, sums, emit); };
            if (learn && a.factor)
              step(currents.row(t));
            else
              step(x);
          };
          float *pass = rows.pass, *pass_x = rows.pass_x;
          const auto summed = [=](int64_t i, float g) ALWAYS_INLINE {
            pass[i] += g;
            pass_x[i] += g * load(x, i);
          };
          if (levels == K && !a.sum_steps && !normed && !grad_sum) {
            run([=](int64_t i, float g) ALWAYS_INLINE { store(out, i, g); });
            if (past_caches) stream(to, out, n);
            return;
          }
          if (levels == K && !a.sum_steps && normed && !grad_sum) {
            run([=](int64_t i, float g) ALWAYS_INLINE { store(out, i, g), summed(i, g); });
            if (past_caches) stream(to, out, n);
            return;
          }
          float* g_row = rows.total + (levels == K ? 0 : t) * block;
          if (k == 0) std::memset(g_row, 0, n * 4);
          run([=](int64_t i, float g) ALWAYS_INLINE { g_row[i] += g; });
          if (k < levels - K) return;
          if (grad_sum)
            for (int64_t i = 0; i < n; i++) g_row[i] += load(grad_sum, i);
          if (normed) {
#pragma omp simd
            for (int64_t i = 0; i < n; i++) summed(i, g_row[i]);
          }
          if (!a.sum_steps) {
            for (int64_t i = 0; i < n; i++) store(out, i, g_row[i]);
            if (past_caches) stream(to, out, n);
          } else {
            float* sum = rows.over_steps;
            if (t == a.steps - 1)
              for (int64_t i = 0; i < n; i++) sum[i] = g_row[i];
            else
              for (int64_t i = 0; i < n; i++) sum[i] += g_row[i];
            if (t == 0)
              for (int64_t i = 0; i < n; i++) store(out, i, sum[i]);
          }
        };
        for (int64_t i0 = first * block; i0 < smaller(last * block, a.size); i0 += block) {
          const int64_t n = smaller(block, a.size - i0);
          currents.enter(i0, n);
          for (int64_t k = 0; k < levels; k += K) {
            each_level<K>([&](int j) {
              float* carried = rows.carried + j * block;
              const int64_t place = (k + j) * a.size + i0;
              for (int64_t i = 0; i < n; i++) carried[i] = a.grad_v_out ? a.grad_v_out[place + i] : 0.f;
            });
            for (int64_t t0 = last_start; t0 >= 0; t0 -= a.chunk) {
              const int64_t t1 = smaller(t0 + a.chunk, a.steps);
              each_level<K>([&](int j) {
                float* f = rows.potential(j, 0);
                const float* v = t0 > 0 ? a.starts + (t0 / a.chunk - 1) * levels * a.size : a.v;
                for (int64_t i = 0; i < n; i++) f[i] = v ? v[(k + j) * a.size + i0 + i] : a.v_rest;
              });
              for (int64_t t = t0; t < t1; t++) {
                Soon<T> soon;
                if (t + ahead < t1)
                  currents.needed(t + ahead, false, soon);
                else
                  needed(larger(2 * t1 - 1 - t - ahead, t0), i0, soon);
                currents.at(t, levels > K, [&](auto u) { recompute<K, rectified>(a, k, t - t0, n, u, rows, soon); });
              }
              const NoSubnormals none;
              for (int64_t t = t1 - 1; t >= t0; t--) back(k, t, t0, i0, n);
            }
            each_level<K>([&](int j) {
              const float *carried = rows.carried + j * block, decay = a.decay, rest = a.v_rest;
              const int64_t place = (k + j) * a.size + i0;
              if (learn && a.v) {
                double sum = 0;
                for (int64_t i = 0; i < n; i++) sum += carried[i] * (a.v[place + i] - rest);
                sums.decay += sum;
              }
              if (a.grad_v)
                for (int64_t i = 0; i < n; i++) a.grad_v[place + i] = decay * carried[i];
            });
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
        streamed();
        if (learn) mine[0] = sums.decay, mine[1] = sums.gain, mine[2] = sums.scale;
      });
  if (a.grad_constants) std::memset(a.grad_constants, 0, 3 * sizeof(double));
  if (normed) std::memset(a.grad_norm, 0, 2 * C * sizeof(double));
  if (a.grad_constants) add_groups(partial, groups, partial_size, 3, a.grad_constants);
  if (normed) add_groups(partial ? partial + (learn ? 3 : 0) : partial, groups, partial_size, 2 * C, a.grad_norm);
  std::free(partial);
  return failed;
}

template <class T, Surrogate kind>
int backward_of(const ScanBackward& a) {
  const bool cut = a.hard && a.detach_reset, zero = a.hard && !a.detach_reset && a.v_rest == 0.f;
  if (a.rectified) return backward<T, kind, true, true, Through::any, 1>(a);
  if (a.grad_constants)
    return cut ? backward<T, kind, false, true, Through::cut, 1>(a) : backward<T, kind, false, true, Through::any, 1>(a);
  if (a.levels == 3)
    return zero ? backward<T, kind, false, false, Through::zero, 3>(a) : backward<T, kind, false, false, Through::any, 3>(a);
  return cut ? backward<T, kind, false, false, Through::cut, 1>(a) : backward<T, kind, false, false, Through::any, 1>(a);
}

// The surrogates of the papers' neurons by themselves, all others by a row of derivatives.
template <class T>
int backward_of(const ScanBackward& a) {
  if (a.steps > a.chunk && a.size > 0 && a.starts == nullptr) return -2;
  switch (a.surrogate) {
    case Surrogate::rational: return backward_of<T, Surrogate::rational>(a);
    case Surrogate::rectangle: return backward_of<T, Surrogate::rectangle>(a);
    default: return backward_of<T, Surrogate::slope>(a);
  }
}

template <class T, Reset reset>
int forward_of(const ScanForward& a) {
  return a.levels == 3 && !a.potentials ? forward<T, 3, reset, false>(a) : forward<T, 1, reset, false>(a);
}

template <class T>
int forward_of(const ScanForward& a) {
  if (a.rectified) return a.hard ? forward<T, 1, Reset::hard, true>(a) : forward<T, 1, Reset::soft, true>(a);
  if (!a.hard) return forward_of<T, Reset::soft>(a);
  return a.v_rest == 0.f ? forward_of<T, Reset::zero>(a) : forward_of<T, Reset::hard>(a);
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
