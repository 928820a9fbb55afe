// Convolutions of maps of spikes or small integers, and the neurons behind them, over all steps at once:
//
//   for t, n, oy, ox, ky, kx, c:
//     v = x[t, n, oy stride + ky - padding_y, ox stride + kx - padding_x, c]
//     if v is not zero:  u[t, n, oy, ox, :] += v w[:, c, ky, kx]
//   spikes = neurons(u scale + bias + residual)                                              (engine/fire.cpp)
//
// Weights of 8 bits are added up in 16, which move to 32 before any input could exceed them.
#include "engine/epilogue.hpp"
#include "engine/index_lists.hpp"
#include "engine/items.hpp"
#include "engine/partial.hpp"

namespace spikeloom::SPIKELOOM_LEVEL {
namespace {

// Whether any of n bytes is not zero.
inline bool any_byte(const uint8_t* x, int64_t n) {
  uint64_t any = 0;
  for (int64_t i = 0; i < n && any == 0; i += 64) any = nonzero_bytes(x + i, smaller(64, n - i));
  return any != 0;
}

constexpr int64_t SECOND_CACHE = 512 << 10;  // bytes that the smallest of today's keep of a layer's weights

inline Window window(const EngineConv& a, int64_t rows) {
  return {a.in, a.out, a.kernel_height, a.kernel_width, a.stride, rows, out_width(a)};
}

// Some images, some rows of their outputs: enough positions to use a block of weights often, sums that stay in cache.
struct Part {
  int64_t images, rows, bands, chunks;
};

inline Part partition(const EngineConv& a, int64_t block_bytes, int64_t bytes = 192 << 10) {
  const int64_t row = a.steps * out_width(a), most = bytes / block_bytes;
  Part p;
  p.rows = smaller(out_height(a), most / row < 1 ? 1 : most / row);
  p.bands = (out_height(a) + p.rows - 1) / p.rows;
  const int64_t fit = most / (row * p.rows);
  p.images = p.bands > 1 || fit < 1 ? 1 : smaller(a.images, fit);
  // Two cores with one image each, rather than one with both.
  if (p.images > 1) p.images = smaller(p.images, (a.images + a.threads - 1) / a.threads);
  p.chunks = (a.images + p.images - 1) / p.images * p.bands;
  return p;
}

// The images and rows of outputs of a chunk, and the rows of inputs that they see.
struct Band {
  int64_t n, images, y, rows, top, bottom;
};

inline Band band_of(const EngineConv& a, const Part& part, int64_t chunk) {
  Band b;
  b.n = chunk / part.bands * part.images, b.images = smaller(part.images, a.images - b.n);
  b.y = chunk % part.bands * part.rows, b.rows = smaller(part.rows, out_height(a) - b.y);
  const int64_t row = b.y * a.stride - a.padding_y;
  b.top = smaller(a.height, larger(0, row));
  b.bottom = larger(b.top, smaller(a.height, row + (b.rows - 1) * a.stride + a.kernel_height));
  return b;
}

// The i-th of a chunk's inputs [image, step].
inline const uint8_t* image_of(const EngineConv& a, const Band& band, int64_t i) {
  return a.x + (i % a.steps * a.images + band.n + i / a.steps) * a.height * a.width * a.in;
}

// Bits (and values, if any is above one) of what some rows of outputs see, laid out by columns; false where all is
// zero.
template <class Value>
bool lay_out(const EngineConv& a, const Plan& p, const uint8_t* image, int64_t first_row, uint8_t* bits,
             Value* values) {
  const int64_t from = first_row < 0 ? -first_row : 0, to = smaller(p.rows, a.height - first_row);
  if (to <= from || !any_byte(image + (first_row + from) * a.width * a.in, (to - from) * a.width * a.in)) return false;
  const int64_t columns = smaller(a.width, p.columns - a.padding_x), step = p.rows * p.C;
  // A row is read as it lies in memory, and narrow pixels several at a time.
  const auto lay = [&](auto known) ALWAYS_INLINE {
    constexpr int64_t NARROW = decltype(known)::value;  // channels, or 0
    for (int64_t row = from; row < to; row++) {
      const uint8_t* pixel = image + (first_row + row) * a.width * a.in;
      int64_t at = (a.padding_x * p.rows + row) * p.C;
      if constexpr (NARROW > 0) {
        for (int64_t column = 0; column < columns;) {
          const int64_t some = smaller(64 / NARROW, columns - column);
          uint64_t found = nonzero_bytes(pixel, some * NARROW);
          for (int64_t i = 0; i < some; i++, found >>= NARROW, at += step, pixel += NARROW) {
            std::memcpy(bits + at / 8, &found, NARROW / 8);
            if constexpr (!std::is_same_v<Value, Ones>) std::memcpy(values + at, pixel, NARROW);
          }
          column += some;
        }
      } else {
        for (int64_t column = 0; column < columns; column++, at += step, pixel += a.in) {
          for (int64_t c = 0; c < a.in; c += 64) {
            const uint64_t found = nonzero_bytes(pixel + c, smaller(64, a.in - c));
            if (a.in - c >= 64)
              std::memcpy(bits + (at + c) / 8, &found, 8);
            else
              std::memcpy(bits + (at + c) / 8, &found, (a.in - c + 7) / 8);
          }
          if constexpr (!std::is_same_v<Value, Ones>) std::memcpy(values + at, pixel, a.in);
        }
      }
    }
  };
  if (a.in == 16)
    lay(Constant<16>{});
  else if (a.in == 32)
    lay(Constant<32>{});
  else
    lay(Constant<0>{});
  return true;
}

// Clears what is read of the sums of images without spikes, whose places are all alike: those of a block, and of as
// many places as make up four vectors.
template <class Sum>
void clear_silent(const EngineConv& a, const Band& band, const uint8_t* active, int64_t block, Sum* sums) {
  const int64_t numbers = band.rows * out_width(a) * block, read = smaller(numbers, larger(block, 4 * LANES));
  for (int64_t image = 0; image < band.images; image++)
    if (stays_silent(a, active, image)) std::memset(sums + image * a.steps * numbers, 0, read * sizeof(Sum));
}

// Whether a group of weights begins sums anew.
inline bool begins(const EngineConv& a, int64_t g) { return g == 0 || (a.widen != nullptr && a.widen[g - 1]); }

// Sums of 16 bits, and the totals that they are added to. Of floats there are none.
template <class Sum>
struct Totals {
  int32_t* totals;
  bool any = false;

  static int64_t bytes(const EngineConv& a, int64_t n) {
    return std::is_same_v<Sum, float> || a.widen == nullptr ? 0 : n * int64_t{sizeof(int32_t)};
  }
  void add(const Sum* sums, int64_t n) {
    if constexpr (!std::is_same_v<Sum, float>) {
      if (!any) std::memset(totals, 0, n * sizeof *totals);
      for (int64_t i = 0; i < n; i++) totals[i] += sums[i];
      any = true;
    }
  }
  // The neurons of a block of n sums, or of the totals with them where there are some.
  void fire(const EngineConv& a, const Band& band, int64_t block, int64_t channel, const uint8_t* active,
            const Sum* sums, int64_t n) {
    const Block of{channel, block / LANES, band.n, band.images, band.y, band.rows, active};
    if (!any) return fire_block(a, of, sums, number_of(sums));
    add(sums, n);
    fire_block(a, of, totals, Number::ints);
  }
};

// What adding up groups of weights needs of a chunk's maps.
template <class Weight>
struct Maps {
  Window w;
  Plan p;
  Apart<Weight> apart;  // from map to map
  int64_t count, row_numbers, group_floats;
  const uint8_t *bits, *values;
  typename Added<Weight>::Number* sums;
};

// Adds up a group of weights for as many maps, from the i-th on, while some of the group behind it, if that is `far`,
// comes into the second cache.
template <class Value, int COLS, int NV, int MAPS, class Weight>
void gather_maps(const Maps<Weight>& maps, int64_t i, int64_t g, const Weight* weight, bool begin, bool far) {
  const Maps<Weight> m = maps;  // sums that are stored could be part of the caller's
  const int64_t rows = m.w.out_h, down = m.w.stride * m.p.C, value = std::is_same_v<Value, Ones> ? 0 : 1;
  const uint64_t mask = group_mask(m.p, g);
  for (int64_t y = 0; y < rows; y++) {
    if (far) prefetch_part<false>(weight + m.group_floats, m.group_floats, i * rows + y, m.count * rows);
    const int64_t from = y * down + g * m.p.group;
    gather_row<COLS, NV, MAPS>(m.w, m.p, m.bits + i * m.apart.bits + from / 8,
                               reinterpret_cast<const Value*>(m.values + i * m.apart.values + value * from), weight,
                               mask, begin, m.sums + i * m.apart.out + y * m.row_numbers, m.p.block, m.apart);
  }
}

// The functions for one shape of a block of weights.
template <class Weight>
struct Gather {
  int64_t block;
  int most;                                              // 2^most maps at once at most, as registers hold sums
  decltype(&gather_maps<Ones, 1, 1, 1, Weight>) run[3];  // of 1, 2 and 4 maps
};

template <class Value, int COLS, int NV, class Weight>
Gather<Weight> gather_of_shape() {
  constexpr int MOST = COLS * NV <= 3 ? 2 : COLS * NV <= 6 ? 1 : 0;
  Gather<Weight> found{NV * Added<Weight>::LANES_OF, MOST, {gather_maps<Value, COLS, NV, 1, Weight>}};
  if constexpr (MOST > 0) found.run[1] = gather_maps<Value, COLS, NV, 2, Weight>;
  if constexpr (MOST > 1) found.run[2] = gather_maps<Value, COLS, NV, 4, Weight>;
  return found;
}

template <class Weight>
Gather<Weight> gather_of(const Window& w, bool binary) {
  return by_shape<Weight>(w, [&](auto columns, auto vectors) {
    constexpr int COLS = decltype(columns)::value, NV = decltype(vectors)::value;
    return binary ? gather_of_shape<Ones, COLS, NV, Weight>() : gather_of_shape<uint8_t, COLS, NV, Weight>();
  });
}

template <class Weight>
int convolve(const EngineConv& a, const Weight* all_weights) {
  using Sum = typename Added<Weight>::Number;
  const Gather<Weight> gather = gather_of<Weight>(window(a, 1), a.binary);
  const int64_t BLOCK = gather.block, out_w = out_width(a);
  const Part part = partition(a, BLOCK * sizeof(Sum));
  const int64_t group = most_bits(!std::is_same_v<Sum, float>, a.binary);
  const Plan most = plan_gather(window(a, part.rows), BLOCK, group);
  // Maps that are worked on at once: steps of one image, whose lists are about as long.
  const int64_t maps = a.steps * part.images, pixels = most.rows * most.columns;
  const int64_t bit_bytes = round_up(pixels * most.C / 8 + 16, 64);
  const int64_t value_bytes = a.binary ? 0 : round_up(pixels * most.C, 64);
  const int64_t sums_numbers = part.rows * out_w * BLOCK;
  const int64_t totals_bytes = Totals<Sum>::bytes(a, maps * sums_numbers);
  const int64_t bytes = totals_bytes + maps * (1 + bit_bytes + value_bytes + sums_numbers * int64_t{sizeof(Sum)});
  // Weights that the second cache does not keep from image to image come while the group before them is worked on.
  const int64_t group_floats = most.group * a.kernel_width * BLOCK;
  const bool far = most.blocks * most.groups * group_floats * int64_t{sizeof(Weight)} > SECOND_CACHE;
  return for_items(part.chunks * most.blocks, bytes, a.threads, [&](int64_t item, float* scratch) {
    // All images by one block of weights, then the next: cores share weights, and no line of outputs.
    const int64_t o = item / part.chunks;
    const Band band = band_of(a, part, item % part.chunks);
    const int64_t last = a.steps * band.images, map_numbers = band.rows * out_w * BLOCK;
    const Window w = window(a, band.rows);
    const Plan p = plan_gather(w, BLOCK, group);
    // [image, step, row, column, channel of the block]
    Totals<Sum> totals{reinterpret_cast<int32_t*>(scratch)};
    Sum* sums = reinterpret_cast<Sum*>(reinterpret_cast<char*>(scratch) + totals_bytes);
    uint8_t* bits = reinterpret_cast<uint8_t*>(sums + maps * sums_numbers);
    uint8_t *values = bits + maps * bit_bytes, *active = values + maps * value_bytes;
    std::memset(bits, 0, last * bit_bytes);
    const Weight* weights = all_weights + o * p.groups * group_floats;
    for (int64_t i = 0; i < last; i++) {
      if (far) prefetch_part<false>(weights, group_floats, i, last);
      const uint8_t* image = image_of(a, band, i);
      const int64_t row = band.y * a.stride - a.padding_y;
      active[i] = a.binary ? lay_out(a, p, image, row, bits + i * bit_bytes, static_cast<Ones*>(nullptr))
                           : lay_out(a, p, image, row, bits + i * bit_bytes, values + i * value_bytes);
    }
    clear_silent(a, band, active, BLOCK, sums);
    for (int64_t i = 0; i < last; i++)
      if (!active[i] && !stays_silent(a, active, i / a.steps))
        std::memset(sums + i * map_numbers, 0, map_numbers * sizeof(Sum));
    const Maps<Weight> m{w,
                         p,
                         {bit_bytes, value_bytes, map_numbers, all_weights + weight_floats(w, p)},
                         last,
                         out_w * BLOCK,
                         group_floats,
                         bits,
                         values,
                         sums};
    for (int64_t g = 0; g < p.groups; g++) {
      for (int64_t i = 0, next; i < last; i = next) {
        int k = gather.most;
        while (i + (1 << k) > last) k--;
        bool any = false;
        for (next = i; next < i + (1 << k); next++) any |= active[next] != 0;
        if (any) gather.run[k](m, i, g, weights + g * group_floats, begins(a, g), far && g + 1 < p.groups);
      }
      if (g + 1 < p.groups && begins(a, g + 1)) totals.add(sums, last * map_numbers);
    }
    totals.fire(a, band, BLOCK, o * BLOCK, active, sums, last * map_numbers);
  });
}

// Memory in pieces that begin with a cache line.
class Pieces {
 public:
  explicit Pieces(void* from) : next_(reinterpret_cast<uintptr_t>(from)) {}
  template <class T>
  T* take(int64_t count) {
    T* piece = reinterpret_cast<T*>(next_);
    next_ += round_up(count * static_cast<int64_t>(sizeof(T)), 64);
    return piece;
  }
  size_t end() const { return next_; }

 private:
  uintptr_t next_;
};

// The lists of a chunk.
struct Lists {
  uint16_t* numbers;    // of all lists, one behind the other
  List* lists;          // [image, step, row of inputs, column, part]
  uint8_t* active;      // [image, step]: whether any list has a number
  Job* jobs;            // [group, place]
  int64_t* job_counts;  // [group]
  int64_t places;       // of outputs, of all images and steps
};

// The places of a group's lists: body(list, place) for all whose input is there and not silent, and for the others with
// an empty list if `all` are wanted; none of images without spikes.
template <class Body>
ALWAYS_INLINE inline void each_place(const EngineConv& a, const Band& band, const Parts& p, int64_t g, const Lists& m,
                                     bool all, const Body& body) {
  const int64_t out_w = out_width(a), kx = g / p.parts % a.kernel_width, ky = g / p.parts / a.kernel_width;
  // Outputs of a row whose inputs are there.
  const int64_t first = smaller(out_w, larger(0, (a.padding_x - kx + a.stride - 1) / a.stride));
  const int64_t last = larger(first, smaller(out_w, (a.width - 1 + a.padding_x - kx + a.stride) / a.stride));
  for (int64_t i = 0; i < a.steps * band.images; i++) {
    if (stays_silent(a, m.active, i / a.steps)) continue;
    for (int64_t y = 0; y < band.rows; y++) {
      const int64_t row = (band.y + y) * a.stride - a.padding_y + ky, to = (i * band.rows + y) * out_w;
      const bool there = row >= band.top && row < band.bottom && m.active[i];
      const int64_t seen = i * (band.bottom - band.top) + row - band.top;
      const List* list = m.lists + (seen * a.width + kx - a.padding_x) * p.parts + g % p.parts;
      for (int64_t x = there ? first : out_w; x < (there ? last : 0); x++) body(list[x * a.stride * p.parts], to + x);
      for (int64_t x = 0; all && x < (there ? first : out_w); x++) body(List{0, 0}, to + x);
      for (int64_t x = last; all && there && x < out_w; x++) body(List{0, 0}, to + x);
    }
  }
}

// Lists what a chunk's inputs hold, and sorts the lists of every group of weights; a row of these has 2^shift.
void make_lists(const EngineConv& a, const Band& band, const Parts& p, int shift, const Lists& m) {
  int64_t end = 0, made = 0;
  for (int64_t i = 0; i < a.steps * band.images; i++) {
    const int64_t before = end;
    const uint8_t* x = image_of(a, band, i) + band.top * a.width * a.in;
    for (int64_t pixel = 0; pixel < (band.bottom - band.top) * a.width; pixel++, x += a.in)
      for (int64_t c = 0; c < a.in; c += p.part) {
        const List list = list_bytes(x + c, smaller(p.part, a.in - c), shift, m.numbers, end);
        m.lists[made++] = list, end += list.count;
      }
    m.active[i] = end != before;
  }
  for (int64_t g = 0; g < p.groups; g++)
    m.job_counts[g] = sort_jobs([&](const auto& body) ALWAYS_INLINE {
      each_place(a, band, p, g, m, begins(a, g), body);
    }, m.jobs + g * m.places);
}

// By lists of single places, which serve all blocks of outputs.
template <class Weight>
int convolve_lists(const EngineConv& a, const Weight* all_weights) {
  using Sum = typename Added<Weight>::Number;
  const int vectors = vectors_of_block<Weight>(window(a, 1));
  const auto add = vectors == 1   ? add_sorted<1, Weight>
                   : vectors == 2 ? add_sorted<2, Weight>
                                  : add_sorted<32 / LANES, Weight>;
  const int64_t BLOCK = vectors * Added<Weight>::LANES_OF;
  const Part part = partition(a, BLOCK * sizeof(Sum));
  const Parts p = plan_parts(window(a, part.rows), BLOCK);
  const int64_t maps = a.steps * part.images, most = maps * part.rows * out_width(a);  // places
  const int64_t pixels = maps * a.width * smaller(a.height, (part.rows - 1) * a.stride + a.kernel_height);
  if (pixels * a.in + BEHIND > UINT32_MAX) return OUT_OF_MEMORY;
  // In pieces of one memory; counted only where there is none.
  const auto take = [&](void* memory, Sum*& sums, int32_t*& totals, Lists& m) {
    Pieces pieces(memory);
    sums = pieces.take<Sum>(most * BLOCK);
    totals = pieces.take<int32_t>(Totals<Sum>::bytes(a, most * BLOCK) / int64_t{sizeof(int32_t)});
    m.lists = pieces.take<List>(pixels * p.parts);
    m.active = pieces.take<uint8_t>(maps);
    m.jobs = pieces.take<Job>(p.groups * most);
    m.job_counts = pieces.take<int64_t>(p.groups);
    m.numbers = pieces.take<uint16_t>(pixels * a.in + BEHIND);
    return pieces.end();
  };
  Sum* no_sums;
  int32_t* no_totals;
  Lists none;
  const size_t bytes = take(nullptr, no_sums, no_totals, none);
  const bool far = p.floats() * int64_t{sizeof(Weight)} > SECOND_CACHE;
  // Who has made lists uses them for all blocks, unless cores would be left without work.
  const int64_t shares =
      part.chunks % a.threads == 0 || part.chunks >= 8 * a.threads ? 1 : smaller(p.blocks, a.threads);
  return for_items(part.chunks * shares, bytes, a.threads, [&](int64_t item, float* scratch) {
    const int64_t share = item % shares;
    const Band band = band_of(a, part, item / shares);
    Sum* sums;
    int32_t* totals_memory;
    Lists m;
    take(scratch, sums, totals_memory, m);
    m.places = a.steps * band.images * band.rows * out_width(a);
    make_lists(a, band, p, __builtin_ctzll(BLOCK), m);
    clear_silent(a, band, m.active, BLOCK, sums);
    for (int64_t o = p.blocks * share / shares; o < p.blocks * (share + 1) / shares; o++) {
      Totals<Sum> totals{totals_memory};
      for (int64_t g = 0; g < p.groups; g++) {
        const Weight* weight = all_weights + (o * p.groups + g) * p.group_floats;
        add(m.jobs + g * m.places, m.job_counts[g], m.numbers, weight, begins(a, g), sums,
            far ? weight + p.group_floats : nullptr, p.group_floats);
        if (g + 1 < p.groups && begins(a, g + 1)) totals.add(sums, m.places * BLOCK);
      }
      totals.fire(a, band, BLOCK, o * BLOCK, m.active, sums, m.places * BLOCK);
    }
  });
}

// Whether a layer runs by lists of single places: where these are long enough, and hold nothing but places. Else
// outputs share the column of a window that they see, and its values.
inline bool by_lists(const Window& w, bool binary) {
  return binary && w.in >= (w.kernel_height * w.kernel_width == 1 ? 128 : 256);
}

// The channels of a block as numbers, with zeros at both sides: [row, column, channel of the block].
template <int NV>
void to_numbers(const EngineConv& a, const Band& band, const uint8_t* image, int64_t c, int64_t frame, float* numbers) {
  constexpr int64_t BLOCK = NV * LANES;
  const uint8_t* const end = a.x + a.steps * a.images * a.height * a.width * a.in;
  for (int64_t row = band.top; row < band.bottom; row++, numbers += frame * BLOCK) {
    const uint8_t* x = image + row * a.width * a.in + c;
    float* to = numbers + a.padding_x * BLOCK;
    // What lies behind the channels counts for nothing, but must be there.
    const bool all = x + (a.width - 1) * a.in + BLOCK <= end;
    for (int64_t column = 0; column < a.width; column++, x += a.in, to += BLOCK)
      for (int j = 0; j < NV; j++)
        put(to + j * LANES, get_some(x + j * LANES, all ? LANES : smaller(LANES, a.in - c - j * LANES)));
  }
}

// The part of a filter that has inputs.
struct Taps {
  int64_t first_y, last_y, first_x, last_x;
};

// X outputs side by side with filters of one channel each; the first's window begins at `numbers`.
template <int X, int NV>
ALWAYS_INLINE inline void filter_places(const EngineConv& a, const Taps& taps, const float* numbers, int64_t frame,
                                        const float* weight, float* sums) {
  constexpr int64_t BLOCK = NV * LANES;
  const int64_t padded = round_up(a.in, LANES), apart = a.stride * BLOCK;
  Vec sum[X][NV] = {};
  for (int64_t ky = taps.first_y; ky < taps.last_y; ky++)
    for (int64_t kx = taps.first_x; kx < taps.last_x; kx++) {
      const float *w = weight + (ky * a.kernel_width + kx) * padded, *from = numbers + (ky * frame + kx) * BLOCK;
#pragma GCC unroll 8
      for (int x = 0; x < X; x++)
        for (int j = 0; j < NV; j++) sum[x][j] += get(w + j * LANES) * get(from + x * apart + j * LANES);
    }
#pragma GCC unroll 8
  for (int x = 0; x < X; x++)
    for (int j = 0; j < NV; j++) put(sums + x * BLOCK + j * LANES, sum[x][j]);
}

// One filter a channel, for a block of them. A step without spikes in the rows that it sees costs no sums.
template <int NV>
void filter_block(const EngineConv& a, const Band& band, int64_t c, const uint8_t* active, float* scratch) {
  constexpr int64_t BLOCK = NV * LANES;
  constexpr int X = 8 / NV;
  const int64_t out_w = out_width(a), map_floats = band.rows * out_w * BLOCK, frame = a.width + 2 * a.padding_x;
  float *sums = scratch, *numbers = sums + a.steps * band.images * map_floats;
  bool zeros = false;  // whether they stand beside the numbers
  clear_silent(a, band, active, BLOCK, sums);
  Taps taps;
  taps.first_x = larger(0, a.padding_x - (out_w - 1) * a.stride);
  taps.last_x = smaller(a.kernel_width, a.width + a.padding_x);
  for (int64_t i = 0; i < a.steps * band.images; i++) {
    float* sum = sums + i * map_floats;
    if (!active[i]) {
      if (!stays_silent(a, active, i / a.steps)) std::memset(sum, 0, map_floats * 4);
      continue;
    }
    if (!zeros) std::memset(numbers, 0, (band.bottom - band.top) * frame * BLOCK * 4), zeros = true;
    to_numbers<NV>(a, band, image_of(a, band, i), c, frame, numbers);
    for (int64_t y = 0; y < band.rows; y++) {
      const int64_t row = (band.y + y) * a.stride - a.padding_y;
      taps.first_y = larger(0, -row), taps.last_y = smaller(a.kernel_height, a.height - row);
      const float* from = numbers + (row - band.top) * frame * BLOCK;
      int64_t x = 0;
      for (; x + X <= out_w; x += X, sum += X * BLOCK)
        filter_places<X, NV>(a, taps, from + x * a.stride * BLOCK, frame, a.weight + c, sum);
      for (; x < out_w; x++, sum += BLOCK)
        filter_places<1, NV>(a, taps, from + x * a.stride * BLOCK, frame, a.weight + c, sum);
    }
  }
  fire_block(a, {c, NV, band.n, band.images, band.y, band.rows, active}, sums, Number::floats);
}

int convolve_depthwise(const EngineConv& a) {
  constexpr int64_t BLOCK = 4 * LANES;
  const Part part = partition(a, BLOCK * 4, 48 << 10);
  const int64_t blocks = (a.in + BLOCK - 1) / BLOCK, maps = a.steps * part.images;
  const int64_t frame = a.width + 2 * a.padding_x, rows = (part.rows - 1) * a.stride + a.kernel_height;
  const int64_t floats = (maps * part.rows * out_width(a) + rows * frame) * BLOCK;
  return for_items(part.chunks * blocks, floats * 4 + maps, a.threads, [&](int64_t item, float* scratch) {
    const Band band = band_of(a, part, item % part.chunks);
    uint8_t* active = reinterpret_cast<uint8_t*>(scratch + floats);
    for (int64_t i = 0; i < a.steps * band.images; i++)
      active[i] = any_byte(image_of(a, band, i) + band.top * a.width * a.in, (band.bottom - band.top) * a.width * a.in);
    // Channels in blocks of four, two and one vectors.
    int64_t c = item / part.chunks * BLOCK;
    if (a.in - c > 3 * LANES) return filter_block<4>(a, band, c, active, scratch);
    if (a.in - c > LANES) filter_block<2>(a, band, c, active, scratch), c += 2 * LANES;
    if (c < a.in) filter_block<1>(a, band, c, active, scratch);
  });
}

}  // namespace

int engine_pack(const EnginePack& a) {
  const Window w{a.in, a.out, a.kernel_height, a.kernel_width, a.stride, 1, 1};
  const int64_t taps = a.kernel_height * a.kernel_width;
  if (a.depthwise) {
    const int64_t padded = round_up(a.out, LANES);
    a.counts[0] = taps * padded, a.counts[1] = 1, a.counts[2] = taps, a.counts[3] = padded;
    if (a.packed == nullptr) return 0;
    std::memset(a.packed, 0, taps * padded * 4);
    for (int64_t c = 0; c < a.out; c++)
      for (int64_t k = 0; k < taps; k++) a.packed[k * padded + c] = a.weight[c * taps + k];
    return 0;
  }
  const auto weight = [&](int64_t o, int64_t c, int64_t ky, int64_t kx) {
    return a.weight[((o * a.in + c) * a.kernel_height + ky) * a.kernel_width + kx];
  };
  const int64_t lanes = a.integers ? SHORTS : LANES;
  int columns = 0, vectors = 0;
  if (by_lists(w, a.binary)) {
    columns = 1, vectors = a.integers ? vectors_of_block<int16_t>(w) : vectors_of_block<float>(w);
    const Parts p = plan_parts(w, vectors * lanes);
    a.counts[0] = p.floats(), a.counts[1] = p.groups, a.counts[2] = p.part, a.counts[3] = vectors * lanes;
    if (a.packed != nullptr) pack_parts(w, p, vectors * lanes, weight, a.packed);
  } else {
    const auto take = [&](auto of_columns, auto of_vectors) {
      columns = decltype(of_columns)::value, vectors = decltype(of_vectors)::value;
    };
    a.integers ? by_shape<int16_t>(w, take) : by_shape<float>(w, take);
    const Plan p = plan_gather(w, vectors * lanes, most_bits(a.integers, a.binary));
    a.counts[0] = packed_floats(w, p), a.counts[1] = p.groups;
    a.counts[2] = p.group * w.kernel_width, a.counts[3] = p.block;
    if (a.packed != nullptr) pack_gather(w, p, columns, weight, a.packed);
  }
  if (a.half != nullptr) halve(a.packed, a.counts[0], columns * vectors, a.half);
  return 0;
}

int engine_conv(const EngineConv& a) {
  if (a.levels > MOST_LEVELS) return UNSUPPORTED;
  if (a.depthwise) return convolve_depthwise(a);
  const bool lists = by_lists(window(a, 1), a.binary);
  const auto run = [&](const auto* weight) { return lists ? convolve_lists(a, weight) : convolve(a, weight); };
  if (a.bytes != nullptr) return run(a.bytes);
  if (a.shorts != nullptr) return run(a.shorts);
  return a.half != nullptr ? run(reinterpret_cast<const bfloat16*>(a.half)) : run(a.weight);
}

}  // namespace spikeloom::SPIKELOOM_LEVEL
