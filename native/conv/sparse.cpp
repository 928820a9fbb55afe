// Convolutions that leave the zeros of x out:
//
//   for n, oy, ox, ky, kx, c:  if x[n, oy stride + ky - padding, ox stride + kx - padding, c] = v is not zero:
//     y[n, oy, ox, :] += v w[:, c, ky, kx]
//
// Bits say which values are not zero; rows of weights are added up in registers (engine/column_accumulate.hpp).
#include "conv/convolution.hpp"
#include "engine/column_accumulate.hpp"

namespace spikeloom::SPIKELOOM_LEVEL {
namespace {

inline Window window(const Convolution& a) {
  return {a.in, a.out, a.kernel_height, a.kernel_width, a.stride, out_height(a), out_width(a)};
}

// Adds up a group of weights for all rows of an image; outputs lie `out_step` apart.
template <int COLS, int NV>
void gather_rows(const Window& window, const Plan& plan, const uint8_t* bits, const float* values, const float* weight,
                 int64_t g, float* out, int64_t out_step) {
  const Window w = window;  // sums that are stored could be part of the caller's
  const Plan p = plan;
  const uint64_t mask = group_mask(p, g);
  for (int64_t y = 0; y < w.out_h; y++) {
    const int64_t from = y * w.stride * p.C + g * p.group;
    gather_row<COLS, NV>(w, p, bits + from / 8, values + from, weight, mask, g == 0, out + y * w.out_w * out_step,
                         out_step);
  }
}

// How blocks of weights are added up, by their shape.
struct Gather {
  int columns, vectors;
  decltype(&gather_rows<1, 1>) run;
};

inline Gather gather_of(const Window& w) {
  return by_shape<float>(w, [](auto columns, auto vectors) {
    constexpr int COLS = decltype(columns)::value, NV = decltype(vectors)::value;
    return Gather{COLS, NV, gather_rows<COLS, NV>};
  });
}

template <class T>
int forward(const Convolution& a) {
  const Window w = window(a);
  const Gather gather = gather_of(w);
  const Plan p = plan_gather(w, gather.vectors * LANES);
  float* packed = static_cast<float*>(std::aligned_alloc(64, round_up(packed_floats(w, p) * 4, 64)));
  if (packed == nullptr) return OUT_OF_MEMORY;
  const auto weight_at = [&](int64_t o, int64_t c, int64_t ky, int64_t kx) { return a.weight[place(a, o, c, ky, kx)]; };
  pack_gather(w, p, gather.columns, weight_at, packed);
  const int64_t pixels = p.rows * p.columns, outputs = w.out_h * w.out_w;
  const int64_t chunk = smaller(a.images, (255 + outputs) / outputs);
  const int64_t bit_bytes = round_up(pixels * p.C / 8 + 16, 64), value_floats = padded_stride(pixels * p.C + 64);
  const int64_t result_floats = round_up(outputs * p.block, 16);
  const bool direct = sizeof(T) == 4 && a.out % p.block == 0;
  const int64_t bytes = chunk * (bit_bytes + value_floats * 4 + (direct ? 0 : result_floats * 4));
  const T* images = static_cast<const T*>(a.x);
  const int64_t image = a.height * a.width * a.in;
  T* result = static_cast<T*>(a.y);
  const int failed =
      for_blocks(a.images, chunk, bytes, a.threads, false, [&](int64_t n0, int64_t count, float* scratch) {
    float* values = scratch;
    uint8_t* bits = reinterpret_cast<uint8_t*>(values + chunk * value_floats);
    float* sums = reinterpret_cast<float*>(bits + chunk * bit_bytes);
    std::memset(bits, 0, count * bit_bytes);
    for (int64_t n = 0; n < count; n++) {
      const T* x = images + (n0 + n) * image;
      for (int64_t row = 0; row < smaller(a.height, p.rows - a.padding); row++)
        for (int64_t column = 0; column < smaller(a.width, p.columns - a.padding); column++) {
          const T* pixel = x + (row * a.width + column) * a.in;
          const int64_t at = ((column + a.padding) * p.rows + row + a.padding) * p.C;
          to_float(pixel, a.in, values + n * value_floats + at);
          for (int64_t c = 0; c < a.in; c += 16) {
            const uint32_t found = nonzeros(pixel + c, smaller(16, a.in - c));
            std::memcpy(bits + n * bit_bytes + (at + c) / 8, &found, p.C - c < 16 ? 1 : 2);
          }
        }
    }
    for (int64_t o = 0; o < p.blocks; o++) {
      for (int64_t g = 0; g < p.groups; g++) {
        const float* weight = packed + (o * p.groups + g) * p.group * a.kernel_width * p.block;
        for (int64_t n = 0; n < count; n++) {
          float* out = direct ? reinterpret_cast<float*>(result) + (n0 + n) * outputs * a.out + o * p.block
                              : sums + n * result_floats;
          gather.run(w, p, bits + n * bit_bytes, values + n * value_floats, weight, g, out, direct ? a.out : p.block);
        }
      }
      const int64_t width = smaller(p.block, a.out - o * p.block);
      for (int64_t n = 0; !direct && n < count; n++)
        for (int64_t i = 0; i < outputs; i++)
          from_float(sums + n * result_floats + i * p.block, width,
                     result + ((n0 + n) * outputs + i) * a.out + o * p.block);
    }
  });
  std::free(packed);
  return failed;
}

}  // namespace

int conv_forward_sparse(const Convolution& a) {
  return a.dtype == Dtype::float32 ? forward<float>(a) : forward<bfloat16>(a);
}

}  // namespace spikeloom::SPIKELOOM_LEVEL
