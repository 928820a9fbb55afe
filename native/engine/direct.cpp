// Convolutions of any inputs by multiplications, and the neurons behind them, over all steps at once:
//
//   for t, n, oy, ox, o:
//     u[t, n, oy, ox, o] = bias[o] + sum over ky, kx, c, in this order, of
//       x[t, n, oy stride + ky - padding_y, ox stride + kx - padding_x, c] w[o, c, ky, kx]
//   spikes = neurons(u + residual)                                                           (engine/fire.cpp)
//
// The order of the additions depends on nothing. They are fused with the multiplications where the processor can, so
// that levels with such instructions agree to the bit, and the baseline may round otherwise.
#include "engine/epilogue.hpp"
#include "engine/items.hpp"
#include "engine/partial.hpp"

namespace spikeloom::SPIKELOOM_LEVEL {
namespace {

constexpr int TILE = 6;                      // places whose sums are in registers together
constexpr int64_t BAND_BYTES = 192 << 10;    // of sums that are worked on together
constexpr int64_t PIECE = 256, WHOLE = 768;  // rows of weights that stay in the first cache, and that are not cut

// Vectors of a block of outputs: as many as registers hold the sums of, unless fewer leave less of the last one empty.
inline int vectors_of(int64_t out) {
  constexpr int most = LANES == 16 ? 4 : 2;
  if (out <= LANES) return 1;
  return round_up(out, 2 * LANES) < round_up(out, most * LANES) ? 2 : most;
}

struct Shape {
  int64_t inside, outside;  // channels of a group
  int64_t vectors, block, blocks, taps, block_floats, floats;
  bool depthwise;
};

template <class Arguments>
inline Shape shape_of(const Arguments& a) {
  Shape s;
  s.inside = a.in / a.groups, s.outside = a.out / a.groups;
  s.depthwise = a.groups > 1 && s.inside == 1 && s.outside == 1;
  s.vectors = s.depthwise ? 1 : vectors_of(s.outside);
  s.block = s.vectors * LANES;
  s.taps = a.kernel_height * a.kernel_width;
  s.blocks = s.depthwise ? (a.out + LANES - 1) / LANES : (s.outside + s.block - 1) / s.block;
  s.block_floats = s.taps * s.inside * s.block;
  s.floats = (s.depthwise ? 1 : a.groups) * s.blocks * s.block_floats;
  return s;
}

// What a window reads, from its first number on: rows, and in each of them pieces of numbers side by side.
struct Walk {
  int64_t rows, row_step, pieces, piece_step, piece;
};

// Adds the products of a window's numbers and rows of weights to the sums of X places, of which the first n are kept,
// and of their outputs the first `outs`. `begin`: sums begin at zero; a bias is added to those that end.
template <int X, int NV>
ALWAYS_INLINE inline void add_window(const float* const* windows, int64_t from, const Walk& walk, const float* weight,
                                     bool begin, const float* bias, float* sums, int64_t apart, int n, int64_t outs) {
  const float* x[X];
  for (int i = 0; i < X; i++) x[i] = windows[i < n ? i : 0] + from;
  Vec sum[X][NV] = {};
  const auto lanes = [&](int j) { return smaller(LANES, larger(0, outs - j * LANES)); };
  if (!begin)
#pragma GCC unroll 8
    for (int i = 0; i < X; i++)
      for (int j = 0; j < NV; j++)
        if (i < n) sum[i][j] = get_some(sums + i * apart + j * LANES, lanes(j));
  for (int64_t row = 0; row < walk.rows; row++)
    for (int64_t piece = 0; piece < walk.pieces; piece++) {
      const int64_t at = row * walk.row_step + piece * walk.piece_step;
      for (int64_t k = at; k < at + walk.piece; k++, weight += NV * LANES) {
        Vec w[NV];
        for (int j = 0; j < NV; j++) w[j] = get(weight + j * LANES);
#pragma GCC unroll 8
        for (int i = 0; i < X; i++) {
          const Vec value = all(x[i][k]);
          for (int j = 0; j < NV; j++) sum[i][j] = fused(value, w[j], sum[i][j]);
        }
      }
    }
  for (int j = 0; j < NV; j++) {
    const Vec more = bias == nullptr ? Vec{} : get_some(bias + j * LANES, lanes(j));
#pragma GCC unroll 8
    for (int i = 0; i < X; i++)  // adding a zero would turn -0 to 0
      if (i < n) put_some(sums + i * apart + j * LANES, bias == nullptr ? sum[i][j] : sum[i][j] + more, lanes(j));
  }
}

// Some rows of outputs of an image.
struct Rows {
  int64_t n, y, rows;
};

// Where windows read: numbers [row, column, channel], from the first window's first on.
struct Numbers {
  const float* first;
  int64_t row, column;  // from one to the next
};

// The sums of a block of outputs of all places.
template <int NV>
void add_block(const EngineDirect& a, const Shape& s, const Numbers& x, int64_t rows, int64_t out_w, int64_t channel,
               int64_t first, const float* weight, float* sums) {
  const int64_t places = rows * out_w, outs = s.outside - first;
  const int64_t at = channel / s.outside * s.inside;  // of the group's inputs
  const bool joined = a.groups == 1;
  const int64_t pieces = joined ? 1 : a.kernel_width, piece = joined ? a.kernel_width * a.in : s.inside;
  const auto every_tile = [&](int64_t from, const Walk& walk, const float* w, bool begin, bool end) {
    for (int64_t place = 0; place < places; place += TILE) {
      const int n = static_cast<int>(smaller(TILE, places - place));
      const float* windows[TILE];
      for (int i = 0; i < n; i++)
        windows[i] = x.first + (place + i) / out_w * a.stride * x.row + (place + i) % out_w * a.stride * x.column + at;
      float* to = sums + place * a.out + channel;
      const float* bias = end ? a.bias + channel : nullptr;
      if (n == 1)
        add_window<1, NV>(windows, from, walk, w, begin, bias, to, a.out, n, outs);
      else
        add_window<TILE, NV>(windows, from, walk, w, begin, bias, to, a.out, n, outs);
    }
  };
  if (s.taps * s.inside <= WHOLE)
    return every_tile(0, {a.kernel_height, x.row, pieces, x.column, piece}, weight, true, true);
  for (int64_t ky = 0; ky < a.kernel_height; ky++)
    for (int64_t kx = 0; kx < pieces; kx++)
      for (int64_t k = 0; k < piece; k += PIECE) {
        const int64_t count = smaller(PIECE, piece - k);
        const bool last = ky + 1 == a.kernel_height && kx + 1 == pieces && k + count == piece;
        every_tile(ky * x.row + kx * x.column + k, {1, 0, 1, 0, count}, weight, ky + kx + k == 0, last);
        weight += count * NV * LANES;
      }
}

// One filter a channel.
void add_depthwise(const EngineDirect& a, const Numbers& x, int64_t rows, int64_t out_w, float* sums) {
  for (int64_t place = 0; place < rows * out_w; place++, sums += a.out) {
    const float* window = x.first + place / out_w * a.stride * x.row + place % out_w * a.stride * x.column;
    const float* weight = a.weight;
    for (int64_t c = 0; c < a.out; c += LANES) {
      const int64_t n = smaller(LANES, a.out - c);
      Vec sum{};
      for (int64_t ky = 0; ky < a.kernel_height; ky++)
        for (int64_t kx = 0; kx < a.kernel_width; kx++, weight += LANES)
          sum = fused(get_some(window + ky * x.row + kx * x.column + c, n), get(weight), sum);
      put_some(sums + c, sum + get_some(a.bias + c, n), n);
    }
  }
}

void add_all(const EngineDirect& a, const Shape& s, const Numbers& x, int64_t rows, int64_t out_w, float* sums) {
  if (s.depthwise) return add_depthwise(a, x, rows, out_w, sums);
  const float* weight = a.weight;
  for (int64_t group = 0; group < a.groups; group++)
    for (int64_t first = 0; first < s.outside; first += s.block, weight += s.block_floats) {
      const int64_t channel = group * s.outside + first;
      if (s.vectors == 4)
        add_block<4>(a, s, x, rows, out_w, channel, first, weight, sums);
      else if (s.vectors == 2)
        add_block<2>(a, s, x, rows, out_w, channel, first, weight, sums);
      else
        add_block<1>(a, s, x, rows, out_w, channel, first, weight, sums);
    }
}

// What some rows of outputs see, as numbers with zeros around them.
void lay_out(const EngineDirect& a, int64_t map, int64_t top, int64_t rows, int64_t frame, float* to) {
  const int64_t C = a.in, before = smaller(frame, a.padding_x), columns = smaller(a.width, frame - before);
  for (int64_t row = top; row < top + rows; row++, to += frame * C) {
    if (row < 0 || row >= a.height) {
      std::memset(to, 0, frame * C * 4);
      continue;
    }
    std::memset(to, 0, before * C * 4);
    float* numbers = to + before * C;
    const int64_t first = (map * a.height + row) * a.width * C;
    if (a.x != nullptr) {
      std::memcpy(numbers, a.x + first, columns * C * 4);
    } else {
      for (int64_t i = 0; i < columns * C; i += LANES) {
        const int64_t n = smaller(LANES, columns * C - i);
        put_some(numbers + i, get_some(a.x_bytes + first + i, n), n);
      }
    }
    std::memset(numbers + columns * C, 0, (frame - before - columns) * C * 4);
  }
}

}  // namespace

int engine_pack_direct(const EnginePackDirect& a) {
  const Shape s = shape_of(a);
  *a.count = s.floats;
  if (a.packed == nullptr) return OK;
  std::memset(a.packed, 0, s.floats * 4);
  for (int64_t o = 0; o < a.out; o++)
    for (int64_t c = 0; c < s.inside; c++)
      for (int64_t k = 0; k < s.taps; k++) {
        const int64_t group = s.depthwise ? 0 : o / s.outside, lane = s.depthwise ? o : o % s.outside;
        const int64_t block = (group * s.blocks + lane / s.block) * s.block_floats;
        a.packed[block + (k * s.inside + c) * s.block + lane % s.block] = a.weight[(o * s.inside + c) * s.taps + k];
      }
  return OK;
}

int engine_direct(const EngineDirect& given) {
  if (given.levels > MOST_LEVELS) return UNSUPPORTED;
  EngineDirect a = given;
  if (a.kernel_height == 1 && a.kernel_width == 1 && a.stride == 1 && a.padding_y == 0 && a.padding_x == 0)
    a.height *= a.images * a.width, a.width = a.images = 1;  // places know nothing of each other
  const Shape s = shape_of(a);
  const int64_t out_h = (a.height + 2 * a.padding_y - a.kernel_height) / a.stride + 1;
  const int64_t out_w = (a.width + 2 * a.padding_x - a.kernel_width) / a.stride + 1;
  // Bands of rows whose sums stay in cache, and enough of them for all threads.
  int64_t rows = larger(1, smaller(out_h, BAND_BYTES / (a.x_steps * out_w * a.out * 4)));
  const int64_t wanted = (2 * a.threads + a.images - 1) / a.images;
  if (a.threads > 1) rows = smaller(rows, larger((out_h + wanted - 1) / wanted, (TILE + out_w - 1) / out_w));
  const int64_t bands = (out_h + rows - 1) / rows, size = a.images * out_h * out_w * a.out;
  const bool whole = a.x != nullptr && a.padding_y == 0 && a.padding_x == 0;  // windows can read the map itself
  const int64_t frame = whole ? a.width : (out_w - 1) * a.stride + a.kernel_width;
  const int64_t seen = (rows - 1) * a.stride + a.kernel_height;
  const int64_t numbers = whole ? 0 : round_up(seen * frame * a.in, 16), sums_step = rows * out_w * a.out;
  const size_t bytes = (numbers + a.x_steps * sums_step) * 4;
  return for_items(a.images * bands, bytes, a.threads, [&](int64_t item, float* scratch) {
    const Rows r{item / bands, item % bands * rows, smaller(rows, out_h - item % bands * rows)};
    const int64_t first = (r.n * out_h + r.y) * out_w * a.out;
    float* sums = scratch + numbers;
    for (int64_t t = 0; t < a.x_steps; t++) {
      const int64_t map = t * a.images + r.n, top = r.y * a.stride - a.padding_y;
      if (!whole) lay_out(a, map, top, (r.rows - 1) * a.stride + a.kernel_height, frame, scratch);
      const float* from = whole ? a.x + (map * a.height + top) * a.width * a.in : scratch;
      add_all(a, s, {from, frame * a.in, a.in}, r.rows, out_w, sums + t * sums_step);
    }
    fire_span(a, first, r.rows * out_w * a.out, size, sums, a.x_steps == 1 ? 0 : sums_step, a.once);
  });
}

}  // namespace spikeloom::SPIKELOOM_LEVEL
