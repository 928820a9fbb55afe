// The forward pass of every neuron with linear charge, thresholds and a reset:
//
//   for k, i:  v[k, i] = v_rest                                  (or the potential given)
//     for t:   h = v_rest + decay (v[k, i] - v_rest) + gain u[t, i]
//              f = relu(scale h) if rectified, else h
//              s[t, i] += f >= fire_at[k]
//              v[k, i] = f >= fire_at[k] ? (hard ? v_rest : f - threshold[k]) : f
//
// with u = x, or what a normalisation and a residual make of it. A block of elements goes through all its steps, and
// all its levels, before the next block starts: its potentials stay in cache, and memory sees each input and output
// once.
#include "neurons/scan.hpp"

namespace spikeloom::SPIKELOOM_LEVEL {
namespace {

// One step of some levels of a block: n elements, potentials `block` floats apart, of levels from `level` on.
template <class T>
struct FireStep {
  int64_t level, n, block;
  Current<T> u;
  float* v;
  T* spikes;
  const T* add;               // added to the spikes, or null
  float *total, *potentials;  // where the levels take several passes: the sum of their spikes, or null, and f
  const PrefetchList<T>& prefetch;
};

// With a row of sums spikes are added to it, and the potentials kept; else they are stored.
template <class T, int K, Reset reset, bool rectified, Source source>
__attribute__((noinline)) void fire(const Scan& a, const FireStep<T>& at) {
  const Vec decay = all(a.decay), gain = all(a.gain), scale = all(a.scale), rest = all(a.v_rest);
  // By value: captured references to floats could be among those that are stored.
  Vec threshold[K], fire_at[K];
  float* v[K];
  each_level<K>([&](int j) {
    threshold[j] = all(a.threshold[at.level + j]), fire_at[j] = all(a.fire_at[at.level + j]);
    v[j] = at.v + j * at.block;
  });
  const Current<T> u = at.u;
  T* const spikes = at.spikes;
  const T* const add = at.add;
  float *const sums = at.total, *const potentials = at.potentials;
  const bool plain = !sums && !add;
  each_vector(at.n, at.prefetch, [=](int64_t i, auto lanes) ALWAYS_INLINE {
    const Vec current = gain * u.template get<source>(i, lanes);
    Vec fired{};
    each_level<K>([&](int j) ALWAYS_INLINE {
      Vec h = charged<reset>(lanes.get(v[j] + i), decay, current, rest);
      if constexpr (rectified) {
        h = scale * h;
        h = select(below(Vec{}, h), h, Vec{});
      }
      const Mask fires = at_least(h, fire_at[j]);
      lanes.put(v[j] + i, after<reset>(fires, h, threshold[j], rest));
      const Vec spike = select(fires, all(1.f), Vec{});
      fired = j == 0 ? spike : fired + spike;
      if constexpr (K == 1)
        if (!plain && sums) lanes.put(potentials + i, h);
    });
    if (plain)
      lanes.put_integers(spikes + i, fired);
    else if (K == 1 && sums)
      lanes.put(sums + i, lanes.get(sums + i) + fired);
    else
      lanes.put(spikes + i, fired + lanes.get(add + i));
  });
}

template <class T>
using Fire = void (*)(const Scan&, const FireStep<T>&);

template <class T, int K, Reset reset, bool rectified>
Fire<T> fire_of(Source source) {
  if constexpr (!std::is_same_v<T, float>)
    if (source == Source::row) return fire<T, K, reset, rectified, Source::row>;
  if (source == Source::normed) return fire<T, K, reset, rectified, Source::normed>;
  if (source == Source::normed_residual) return fire<T, K, reset, rectified, Source::normed_residual>;
  return fire<T, K, reset, rectified, Source::input>;
}

template <class T, Reset reset>
Fire<T> fire_of(int levels_at_once, Source source) {
  return levels_at_once == 3 ? fire_of<T, 3, reset, false>(source) : fire_of<T, 1, reset, false>(source);
}

template <class T>
Fire<T> fire_of(const Scan& a, int levels_at_once, Source source) {
  if (a.rectified && a.hard) return fire_of<T, 1, Reset::hard, true>(source);
  if (a.rectified) return fire_of<T, 1, Reset::soft, true>(source);
  if (!a.hard) return fire_of<T, Reset::soft>(levels_at_once, source);
  return a.v_rest == 0.f ? fire_of<T, Reset::zero>(levels_at_once, source)
                         : fire_of<T, Reset::hard>(levels_at_once, source);
}

// Elements of a block, few enough that its rows stay in the first cache.
inline int64_t forward_block(const Scan& a) {
  const bool wide = a.factor && a.layout.channels * a.layout.inner > 512;
  const int64_t block = wide ? 2048 : 512;
  return a.factor ? whole_periods(a.layout, block) : even_block(a.size, block);
}

template <class T>
class Forward {
 public:
  explicit Forward(const ScanForward& a)
      : a_(a),
        block_(forward_block(a)),
        non_temporal_(exceeds_caches<T>(a.steps * a.size)),
        distance_(prefetch_distance(a.steps)),
        at_once_(a.levels == 3 && !a.potentials && !a.rectified ? 3 : 1),
        total_(a.potentials || a.levels != at_once_),
        several_(a.sum || total_),
        fire_(fire_of<T>(a, at_once_, Currents<T>::source_of(a, several_))) {}

  int run() const {
    const int64_t levels = a_.levels, rows_count = levels + 3 + CURRENT_ROWS;
    const int64_t blocks = (a_.size + block_ - 1) / block_, groups = groups_of(blocks, a_.factor != nullptr);
    const auto body = [&](int64_t, int64_t first, int64_t last, float* rows) {
      Currents<T> currents(a_, several_, rows + (levels + 2) * block_, block_);
      for (int64_t i0 = first * block_; i0 < smaller(last * block_, a_.size); i0 += block_)
        run_block(i0, smaller(block_, a_.size - i0), currents, rows);
      fence_non_temporal();
    };
    return for_groups(blocks, groups, rows_count * block_ * 4, a_.threads, a_.steps * a_.size < MIN_PARALLEL_SCAN,
                      body);
  }

 private:
  // All steps of the elements [i0, i0 + n). Rows: potentials of the levels, sums of spikes, unwanted potentials, what
  // `currents` needs, and spikes that are then written with non-temporal stores.
  void run_block(int64_t i0, int64_t n, Currents<T>& currents, float* rows) const {
    T* row = reinterpret_cast<T*>(rows + (a_.levels + 2 + CURRENT_ROWS) * block_);
    currents.enter(i0, n);
    for (int64_t k = 0; k < a_.levels; k++)
      read_state(a_.v ? a_.v + k * a_.size + i0 : nullptr, a_.v_rest, n, rows + k * block_);
    for (int64_t t = 0; t < a_.steps; t++) {
      T* to = static_cast<T*>(a_.spikes) + t * a_.size + i0;
      run_step(t, i0, n, currents, rows, non_temporal_ ? row : to);
      if (non_temporal_) store_non_temporal(to, row, n);
      if (a_.starts && (t + 1) % a_.chunk == 0 && t + 1 < a_.steps)
        for (int64_t k = 0; k < a_.levels; k++)
          std::memcpy(a_.starts + ((t / a_.chunk) * a_.levels + k) * a_.size + i0, rows + k * block_, n * 4);
    }
    if (a_.v_out)
      for (int64_t k = 0; k < a_.levels; k++) std::memcpy(a_.v_out + k * a_.size + i0, rows + k * block_, n * 4);
  }

  // All levels of one step. The spikes of several passes are summed in a row of floats before they are stored.
  void run_step(int64_t t, int64_t i0, int64_t n, Currents<T>& currents, float* rows, T* spikes) const {
    PrefetchList<T> prefetch;
    const bool next = t + distance_ >= a_.steps;
    const int64_t later = next ? t + distance_ - a_.steps : t + distance_;
    currents.needed(later, next, prefetch), needed(later, next ? i0 + block_ : i0, prefetch);
    const Current<T> u = a_.sum ? currents.as_row(t, a_.sum) : currents.at(t);  // a sum is of a normalisation
    const T* add = a_.add ? static_cast<const T*>(a_.add) + t * a_.size + i0 : nullptr;
    float *total = rows + a_.levels * block_, *unwanted = total + block_;
    FireStep<T> step{0, n, block_, u, rows, spikes, add, total_ ? total : nullptr, unwanted, prefetch};
    if (!total_) return fire_(a_, step);
    std::memset(total, 0, n * 4);
    for (int64_t k = 0; k < a_.levels; k++) {
      step.level = k, step.v = rows + k * block_;
      if (a_.potentials) step.potentials = a_.potentials + (k * a_.steps + t) * a_.size + i0;
      fire_(a_, step);
    }
    for (int64_t i = 0; i < n; i++) store(spikes, i, total[i] + (add ? load(add, i) : 0.f));
  }

  // What step t needs beside its currents.
  void needed(int64_t t, int64_t i0, PrefetchList<T>& prefetch) const {
    const int64_t place = t * a_.size + i0;
    if (!non_temporal_) prefetch.add(static_cast<const T*>(a_.spikes) + place);
    if (a_.sum) prefetch.add(static_cast<const T*>(a_.sum) + place);
    if (a_.add) prefetch.add(static_cast<const T*>(a_.add) + place);
  }

  const ScanForward& a_;
  const int64_t block_;
  const bool non_temporal_;
  const int64_t distance_;
  const int at_once_;
  const bool total_, several_;
  const Fire<T> fire_;
};

}  // namespace

int scan_forward(const ScanForward& a) {
  return a.dtype == Dtype::float32 ? Forward<float>(a).run() : Forward<bfloat16>(a).run();
}

}  // namespace spikeloom::SPIKELOOM_LEVEL
