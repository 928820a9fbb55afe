// Neurons behind a layer that was computed otherwise:
//
//   for t, i:  spikes[t, i] = neuron i of (x[t, i] + residual[t, i])                         (engine/epilogue.hpp)
#include "engine/epilogue.hpp"
#include "engine/items.hpp"

namespace spikeloom::SPIKELOOM_LEVEL {

int engine_fire(const EngineFire& a) {
  if (a.levels > MOST_LEVELS) return UNSUPPORTED;
  constexpr int64_t BLOCK = 64 * LANES;
  return for_items((a.size + BLOCK - 1) / BLOCK, 0, a.threads, [&](int64_t item, float*) {
    const Epilogue fired = a;
    const int64_t last = smaller(a.size, (item + 1) * BLOCK);
    const int64_t rows = (last - item * BLOCK) / (4 * LANES);
    const Vec none[4] = {};
    fire_rows<4>(fired, item * BLOCK, 4 * LANES, rows, a.size,
                 Sums<float>{a.x + item * BLOCK, a.x_stride, 4 * LANES, none, none});
    for (int64_t i = item * BLOCK + rows * 4 * LANES; i < last; i += LANES) {
      const int64_t n = smaller(LANES, last - i);
      fire(fired, i, a.size, n, [&](int64_t t) ALWAYS_INLINE { return get_some(a.x + t * a.x_stride + i, n); });
    }
  });
}

}  // namespace spikeloom::SPIKELOOM_LEVEL
