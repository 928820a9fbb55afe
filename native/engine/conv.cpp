// Convolutions of maps of spikes or small integers, and the neurons behind them, over all steps at once:
//
//   for t, n, oy, ox, ky, kx, c:
//     v = x[t, n, oy stride + ky - padding_y, ox stride + kx - padding_x, c]
//     if v is not zero:  u[t, n, oy, ox, :] += v w[:, c, ky, kx]
//   spikes = neurons(u scale + bias + residual)                                              (engine/epilogue.hpp)
//
// Weights of 8 bits are added up in 16, which move to 32 before any input could exceed them.
#include "engine/epilogue.hpp"
#include "engine/index_lists.hpp"
#include "engine/items.hpp"

namespace spikeloom::SPIKELOOM_LEVEL {
namespace {

// Whether any of n bytes is not zero.
inline bool any_byte(const uint8_t* x, int64_t n) {
  uint64_t any = 0;
  for (int64_t i = 0; i < n && any == 0; i += 64) any = nonzero_bytes(x + i, smaller(64, n - i));
  return any != 0;
}

constexpr int64_t SECOND_CACHE = 512 << 10;  // bytes that the smallest of today's keep of a layer's weights

inline int64_t out_height(const EngineConv& a) { return (a.height + 2 * a.padding_y - a.kernel_height) / a.stride + 1; }
inline int64_t out_width(const EngineConv& a) { return (a.width + 2 * a.padding_x - a.kernel_width) / a.stride + 1; }

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

// Whether nothing reaches an image's neurons at any step, and they do the same at all places. is_silent(i) tells it of
// the i-th of a chunk's inputs.
template <class Silent>
bool stays_silent(const EngineConv& a, int64_t image, const Silent& is_silent) {
  bool silent = starts_alike(a);
  for (int64_t t = 0; t < a.steps; t++) silent = silent && is_silent(image * a.steps + t);
  return silent;
}

// The neurons of a block of channels from the first on, of a chunk, from sums [image, step, row, column, channel of the
// block].
template <int NV, class Number, class Silent>
void fire_block(const EngineConv& a, int64_t first_channel, const Band& band, const Number* sums,
                const Silent& is_silent) {
  constexpr int64_t BLOCK = NV * LANES;
  const int64_t out_h = out_height(a), out_w = out_width(a), step = a.images * out_h * out_w * a.out;
  const int64_t area = band.rows * out_w, map_floats = area * BLOCK;
  const Epilogue fired = a;
  const int64_t out = a.out;
  Vec bias[NV], scale[NV];
  for (int j = 0; j < NV; j++) {
    const int64_t c = first_channel + j * LANES, n = smaller(LANES, out - c);
    bias[j] = n > 0 ? get_some(a.bias + c, n) : Vec{};
    scale[j] = n > 0 && a.scale != nullptr ? get_some(a.scale + c, n) : Vec{};
  }
  constexpr int V = NV < 4 ? NV : 4;
  for (int64_t image = 0; image < band.images; image++) {
    const bool silent = stays_silent(a, image, is_silent);
    const int64_t places = silent ? 1 : area;
    const Number* sum = sums + image * a.steps * map_floats;
    const int64_t at = ((band.n + image) * out_h + band.y) * out_w * out + first_channel;
    int64_t done = 0;
    if (NV < 4 && out == BLOCK) {  // nothing lies between the places: four vectors of some of them
      Vec four[4], scales[4];
      for (int j = 0; j < 4; j++) four[j] = bias[j % NV], scales[j] = scale[j % NV];
      done = places / (4 / NV) * (4 / NV);
      fire_rows<4>(fired, at, 4 * LANES, done * NV / 4, step, Sums<Number>{sum, map_floats, 4 * LANES, four, scales});
    }
    for (int j = 0; j < NV; j += V) {
      const int64_t c = first_channel + j * LANES, first = at + done * out + j * LANES;
      const Number* from = sum + done * BLOCK + j * LANES;
      if (out - c >= V * LANES) {
        fire_rows<V>(fired, first, out, places - done, step,
                     Sums<Number>{from, map_floats, BLOCK, bias + j, scale + j});
        continue;
      }
      for (int64_t place = 0; place < places - done; place++)
        for (int k = 0; k < V && c + k * LANES < out; k++)
          fire_few(fired, first + place * out + k * LANES, step, smaller(LANES, out - c - k * LANES),
                   from + place * BLOCK + k * LANES, map_floats, bias[j + k], scale + j + k);
    }
    if (silent) repeat_first(fired, at, step, out, area, smaller(BLOCK, out - first_channel));
  }
}

// Whether a group of weights begins sums anew.
inline bool begins(const EngineConv& a, int64_t g) { return g == 0 || (a.widen != nullptr && a.widen[g - 1]); }

// Sums of 16 bits, and the totals that they are added to. Of floats there are none.
template <class Number>
struct Totals {
  int32_t* totals;
  bool any = false;

  static int64_t bytes(const EngineConv& a, int64_t n) {
    return std::is_same_v<Number, float> || a.widen == nullptr ? 0 : n * int64_t{sizeof(int32_t)};
  }
  void add(const Number* sums, int64_t n) {
    if constexpr (!std::is_same_v<Number, float>) {
      if (!any) std::memset(totals, 0, n * sizeof *totals);
      for (int64_t i = 0; i < n; i++) totals[i] += sums[i];
      any = true;
    }
  }
};

// `fire_block` of sums, or of the totals with them where there are some.
template <int NV, class Number, class Silent>
void fire_totals(const EngineConv& a, int64_t first_channel, const Band& band, const Number* sums, int64_t n,
                 Totals<Number>& totals, const Silent& is_silent) {
  if (!totals.any) return fire_block<NV>(a, first_channel, band, sums, is_silent);
  totals.add(sums, n);
  if constexpr (!std::is_same_v<Number, float>) fire_block<NV>(a, first_channel, band, totals.totals, is_silent);
}

template <class Value, int COLS, int NV, class Weight>
int convolve(const EngineConv& a, const Weight* all_weights) {
  using Sum = Added<Weight>;
  using Number = typename Sum::Number;
  constexpr int64_t BLOCK = NV * Sum::LANES_OF;
  // Maps that are worked on at once, as registers hold sums: steps of one image, whose lists are about as long.
  constexpr int MAPS = COLS * NV <= 3 ? 4 : COLS * NV <= 6 ? 2 : 1;
  const int64_t out_w = out_width(a);
  const Part part = partition(a, BLOCK * sizeof(Number));
  constexpr int64_t BITS = most_bits<Weight>(std::is_same_v<Value, Ones>);
  const Plan most = plan_gather(window(a, part.rows), BLOCK, BITS);
  const int64_t maps = a.steps * part.images, pixels = most.rows * most.columns;
  const int64_t bit_bytes = round_up(pixels * most.C / 8 + 16, 64);
  const int64_t value_bytes = std::is_same_v<Value, Ones> ? 0 : round_up(pixels * most.C, 64);
  const int64_t sums_numbers = part.rows * out_w * BLOCK;
  const int64_t totals_bytes = Totals<Number>::bytes(a, maps * sums_numbers);
  const int64_t bytes = totals_bytes + maps * (bit_bytes + value_bytes + sums_numbers * int64_t{sizeof(Number)});
  // Weights that the second cache does not keep from image to image come while the group before them is worked on.
  const int64_t group_floats = most.group * a.kernel_width * BLOCK;
  const bool far = most.blocks * most.groups * group_floats * int64_t{sizeof(Weight)} > SECOND_CACHE;
  return for_items(part.chunks * most.blocks, bytes, a.threads, [&](int64_t item, float* scratch) {
    // All images by one block of weights, then the next: cores share weights, and no line of outputs.
    const int64_t o = item / part.chunks;
    const Band band = band_of(a, part, item % part.chunks);
    const int64_t rows = band.rows, last = a.steps * band.images;
    const Window w = window(a, rows);
    const Plan p = plan_gather(w, BLOCK, BITS);
    const Apart<Weight> apart{bit_bytes, value_bytes, rows * out_w * BLOCK, all_weights + weight_floats(w, p)};
    // [image, step, row, column, channel of the block]
    Totals<Number> totals{reinterpret_cast<int32_t*>(scratch)};
    Number* sums = reinterpret_cast<Number*>(reinterpret_cast<char*>(scratch) + totals_bytes);
    uint8_t* bits = reinterpret_cast<uint8_t*>(sums + maps * sums_numbers);
    uint8_t* values = bits + maps * bit_bytes;
    std::memset(bits, 0, last * bit_bytes);
    const int64_t row_floats = out_w * BLOCK, map_floats = rows * row_floats;
    const Weight* weights = all_weights + o * p.groups * group_floats;
    for (int64_t i = 0; i < last; i++) {
      if (far) prefetch_part<false>(weights, group_floats, i, last);
      const bool any = lay_out(a, p, image_of(a, band, i), band.y * a.stride - a.padding_y, bits + i * bit_bytes,
                               reinterpret_cast<Value*>(values + i * value_bytes));
      // The last byte of a map's bits, behind all of them, says whether there is any.
      bits[(i + 1) * bit_bytes - 1] = any;
    }
    const auto is_silent = [&](int64_t i) { return bits[(i + 1) * bit_bytes - 1] == 0; };
    for (int64_t i = 0; i < last; i++)
      if (is_silent(i))
        std::memset(sums + i * map_floats, 0,
                    (stays_silent(a, i / a.steps, is_silent) ? BLOCK : map_floats) * sizeof(Number));
    for (int64_t g = 0; g < p.groups; g++) {
      const uint64_t mask = group_mask(p, g);
      const Weight* weight = weights + g * group_floats;
      const bool more = far && g + 1 < p.groups;
      const auto gather = [&](int64_t i, auto together) {
        for (int64_t y = 0; y < rows; y++) {
          if (more) prefetch_part<false>(weight + group_floats, group_floats, i * rows + y, last * rows);
          const int64_t from = y * a.stride * p.C + g * p.group;
          gather_row<COLS, NV, decltype(together)::value>(
              w, p, bits + i * bit_bytes + from / 8,
              reinterpret_cast<const Value*>(values + i * value_bytes + (value_bytes ? from : 0)), weight, mask,
              begins(a, g), sums + i * map_floats + y * row_floats, BLOCK, apart);
        }
      };
      const auto run = [&](int64_t& i, auto together) {
        bool any = false;
        for (int k = 0; k < decltype(together)::value; k++) any |= !is_silent(i + k);
        if (any) gather(i, together);
        i += decltype(together)::value;
      };
      int64_t i = 0;
      while (i + MAPS <= last) run(i, Constant<MAPS>{});
      if (MAPS == 4 && i + 2 <= last) run(i, Constant<2>{});
      while (i < last) run(i, Constant<1>{});
      if (g + 1 < p.groups && begins(a, g + 1)) totals.add(sums, last * map_floats);
    }
    fire_totals<BLOCK / LANES>(a, o * BLOCK, band, sums, last * map_floats, totals, is_silent);
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

// What `convolve_lists` needs for some rows of some images.
template <class Number>
struct Listed {
  Number* sums;         // [image, step, row, column, channel of the block]
  int32_t* totals;      // the same, if there are some
  uint16_t* numbers;    // of all lists, one behind the other
  List* lists;          // [image, step, row of inputs, column, part]
  int64_t* ends;        // of the numbers of every image and step
  Job* jobs;            // [group, place]
  int64_t* job_counts;  // [group]
  size_t end;

  Listed(void* memory, const EngineConv& a, const Part& part, const Parts& p, int64_t block) {
    const int64_t maps = a.steps * part.images, places = maps * part.rows * out_width(a);
    const int64_t pixels = maps * a.width * smaller(a.height, (part.rows - 1) * a.stride + a.kernel_height);
    const int64_t most = pixels * a.in + BEHIND;
    Pieces pieces(memory);
    sums = pieces.take<Number>(places * block);
    totals = pieces.take<int32_t>(Totals<Number>::bytes(a, places * block) / int64_t{sizeof(int32_t)});
    lists = pieces.take<List>(pixels * p.parts);
    ends = pieces.take<int64_t>(maps + 1);
    jobs = pieces.take<Job>(p.groups * places);
    job_counts = pieces.take<int64_t>(p.groups);
    numbers = pieces.take<uint16_t>(most);
    end = most > UINT32_MAX ? 0 : pieces.end();
  }
};

// The places of a group's lists: body(list, place) for all whose input is there and not silent, and for the others with
// an empty list if `all` are wanted.
template <class Body>
ALWAYS_INLINE inline void each_place(const EngineConv& a, const Band& band, const Parts& p, int64_t g,
                                     const List* lists, const int64_t* ends, bool all, const Body& body) {
  const int64_t out_w = out_width(a), kx = g / p.parts % a.kernel_width, ky = g / p.parts / a.kernel_width;
  // Outputs of a row whose inputs are there.
  const int64_t first = smaller(out_w, larger(0, (a.padding_x - kx + a.stride - 1) / a.stride));
  const int64_t last = larger(first, smaller(out_w, (a.width - 1 + a.padding_x - kx + a.stride) / a.stride));
  for (int64_t i = 0; i < a.steps * band.images; i++)
    for (int64_t y = 0; y < band.rows; y++) {
      const int64_t row = (band.y + y) * a.stride - a.padding_y + ky, to = (i * band.rows + y) * out_w;
      const bool there = row >= band.top && row < band.bottom && ends[i] != ends[i + 1];
      const int64_t seen = i * (band.bottom - band.top) + row - band.top;
      const List* list = lists + (seen * a.width + kx - a.padding_x) * p.parts + g % p.parts;
      for (int64_t x = there ? first : out_w; x < (there ? last : 0); x++) body(list[x * a.stride * p.parts], to + x);
      for (int64_t x = 0; all && x < (there ? first : out_w); x++) body(List{0, 0}, to + x);
      for (int64_t x = last; all && there && x < out_w; x++) body(List{0, 0}, to + x);
    }
}

// By lists of single places, which serve all blocks of outputs.
template <int NV, class Weight>
int convolve_lists(const EngineConv& a, const Weight* all_weights) {
  using Sum = Added<Weight>;
  using Listed = Listed<typename Sum::Number>;
  constexpr int64_t BLOCK = NV * Sum::LANES_OF;
  const Part part = partition(a, BLOCK * sizeof(typename Sum::Number));
  const Parts p = plan_parts(window(a, part.rows), BLOCK);
  const size_t bytes = Listed(nullptr, a, part, p, BLOCK).end;
  if (bytes == 0) return OUT_OF_MEMORY;
  const bool far = p.floats() * int64_t{sizeof(Weight)} > SECOND_CACHE;
  // Who has made lists uses them for all blocks, unless cores would be left without work.
  const int64_t shares =
      part.chunks % a.threads == 0 || part.chunks >= 8 * a.threads ? 1 : smaller(p.blocks, a.threads);
  return for_items(part.chunks * shares, bytes, a.threads, [&](int64_t item, float* scratch) {
    const int64_t share = item % shares;
    const Band band = band_of(a, part, item / shares);
    const Listed m(scratch, a, part, p, BLOCK);
    int64_t end = 0, made = 0;
    for (int64_t i = 0; i < a.steps * band.images; i++) {
      m.ends[i] = end;
      const uint8_t* x = image_of(a, band, i) + band.top * a.width * a.in;
      for (int64_t pixel = 0; pixel < (band.bottom - band.top) * a.width; pixel++, x += a.in)
        for (int64_t c = 0; c < a.in; c += p.part) {
          const List list = list_bytes<BLOCK>(x + c, smaller(p.part, a.in - c), m.numbers, end);
          m.lists[made++] = list, end += list.count;
        }
    }
    m.ends[a.steps * band.images] = end;
    const int64_t places = a.steps * band.images * band.rows * out_width(a);
    for (int64_t g = 0; g < p.groups; g++)
      m.job_counts[g] = sort_jobs([&](const auto& body) ALWAYS_INLINE {
        each_place(a, band, p, g, m.lists, m.ends, begins(a, g), body);
      }, m.jobs + g * places);
    for (int64_t o = p.blocks * share / shares; o < p.blocks * (share + 1) / shares; o++) {
      Totals<typename Sum::Number> totals{m.totals};
      for (int64_t g = 0; g < p.groups; g++) {
        const Weight* weight = all_weights + (o * p.groups + g) * p.group_floats;
        add_sorted<NV>(m.jobs + g * places, m.job_counts[g], m.numbers, weight, begins(a, g), m.sums,
                       far ? weight + p.group_floats : nullptr, p.group_floats);
        if (g + 1 < p.groups && begins(a, g + 1)) totals.add(m.sums, places * BLOCK);
      }
      fire_totals<BLOCK / LANES>(a, o * BLOCK, band, m.sums, places * BLOCK, totals,
                                 [&](int64_t i) { return m.ends[i] == m.ends[i + 1]; });
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
  std::memset(numbers, 0, (band.bottom - band.top) * frame * BLOCK * 4);
  Taps taps;
  taps.first_x = larger(0, a.padding_x - (out_w - 1) * a.stride);
  taps.last_x = smaller(a.kernel_width, a.width + a.padding_x);
  for (int64_t i = 0; i < a.steps * band.images; i++) {
    float* sum = sums + i * map_floats;
    if (!active[i]) {
      std::memset(sum, 0, map_floats * 4);
      continue;
    }
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
  fire_block<NV>(a, c, band, sums, [&](int64_t i) { return !active[i]; });
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
  const auto pack = [&](auto number) {
    using Weight = decltype(number);
    constexpr int STEP = Added<Weight>::LANES_OF;
    if (by_lists(w, a.binary))
      return by_block<Weight>(w, [&](auto vectors) {
        constexpr int NV = decltype(vectors)::value;
        const Parts p = plan_parts(w, NV * STEP);
        a.counts[0] = p.floats(), a.counts[1] = p.groups, a.counts[2] = p.part, a.counts[3] = NV * STEP;
        if (a.packed != nullptr) pack_parts(w, p, NV * STEP, weight, a.packed);
        if (a.half != nullptr) halve(a.packed, a.counts[0], NV, a.half);
        return 0;
      });
    return by_shape<Weight>(w, [&](auto columns, auto vectors) {
      const Plan p = plan_gather(w, decltype(vectors)::value * STEP, most_bits<Weight>(a.binary));
      a.counts[0] = packed_floats(w, p), a.counts[1] = p.groups;
      a.counts[2] = p.group * w.kernel_width, a.counts[3] = p.block;
      constexpr int COLS = decltype(columns)::value, NV = decltype(vectors)::value;
      if (a.packed != nullptr) pack_gather<COLS>(w, p, weight, a.packed);
      if (a.half != nullptr) halve(a.packed, a.counts[0], COLS * NV, a.half);
      return 0;
    });
  };
  return a.integers ? pack(int16_t{}) : pack(0.f);
}

int engine_conv(const EngineConv& a) {
  if (a.levels > MOST_LEVELS) return UNSUPPORTED;
  if (a.depthwise) return convolve_depthwise(a);
  const Window w = window(a, 1);
  const auto run = [&](const auto* weight) {
    using Weight = std::remove_cv_t<std::remove_pointer_t<decltype(weight)>>;
    if (by_lists(w, a.binary))
      return by_block<Weight>(w, [&](auto vectors) { return convolve_lists<decltype(vectors)::value>(a, weight); });
    return by_shape<Weight>(w, [&](auto columns, auto vectors) {
      constexpr int COLS = decltype(columns)::value, NV = decltype(vectors)::value;
      return a.binary ? convolve<Ones, COLS, NV>(a, weight) : convolve<uint8_t, COLS, NV>(a, weight);
    });
  };
  if (a.bytes != nullptr) return run(a.bytes);
  if (a.shorts != nullptr) return run(a.shorts);
  return a.half != nullptr ? run(reinterpret_cast<const bfloat16*>(a.half)) : run(a.weight);
}

}  // namespace spikeloom::SPIKELOOM_LEVEL
