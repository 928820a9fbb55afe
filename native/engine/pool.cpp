// Max pooling of maps of bytes:
//
//   for n, oy, ox:  y[n, oy, ox, :] = max over the window of x[n, iy, ix, :]
#include "engine/items.hpp"

namespace spikeloom::SPIKELOOM_LEVEL {

int engine_max_pool(const EnginePool& a) {
  const int64_t out_h = (a.height + 2 * a.padding - a.kernel) / a.stride + 1;
  const int64_t out_w = (a.width + 2 * a.padding - a.kernel) / a.stride + 1, C = a.channels;
  return for_items(a.images * out_h, 0, a.threads, [&](int64_t item, float*) {
    const int64_t n = item / out_h, y = item % out_h;
    for (int64_t x = 0; x < out_w; x++) {
      uint8_t* out = a.y + ((n * out_h + y) * out_w + x) * C;
      std::memset(out, 0, C);
      for (int64_t ky = 0; ky < a.kernel; ky++)
        for (int64_t kx = 0; kx < a.kernel; kx++) {
          const int64_t row = y * a.stride - a.padding + ky, column = x * a.stride - a.padding + kx;
          if (row < 0 || row >= a.height || column < 0 || column >= a.width) continue;
          const uint8_t* in = a.x + ((n * a.height + row) * a.width + column) * C;
#pragma omp simd
          for (int64_t c = 0; c < C; c++) out[c] = in[c] > out[c] ? in[c] : out[c];
        }
    }
  });
}

}  // namespace spikeloom::SPIKELOOM_LEVEL
