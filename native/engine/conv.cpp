// Convolutions of maps of spikes or small integers, and the neurons behind them, over all steps at once:
//
//   for t, n, oy, ox, ky, kx, c:
//     v = x[t, n, oy stride + ky - padding_y, ox stride + kx - padding_x, c]
//     if v is not zero:  u[t, n, oy, ox, :] += v w[:, c, ky, kx]
//   spikes = neurons(u + bias + residual)                                                    (engine/epilogue.hpp)
#include "engine/depthwise.hpp"
#include "engine/parts.hpp"

namespace spikeloom::SPIKELOOM_LEVEL {
namespace {

constexpr int64_t SECOND_CACHE = 512 << 10;  // bytes that the smallest of today's keep of a layer's weights

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

template <class Value, int COLS, int NV, class Weight>
int convolve(const EngineConv& a, const Weight* all_weights) {
  constexpr int64_t BLOCK = NV * LANES;
  // Maps that are worked on at once, as registers hold sums: steps of one image, whose lists are about as long.
  constexpr int MAPS = COLS * NV <= 3 ? 4 : COLS * NV <= 6 ? 2 : 1;
  const int64_t out_w = out_width(a);
  const Part part = partition(a, BLOCK);
  const Plan most = plan_gather(window(a, part.rows), BLOCK);
  const int64_t maps = a.steps * part.images, pixels = most.rows * most.columns;
  const int64_t bit_bytes = round_up(pixels * most.C / 8 + 16, 64);
  const int64_t value_bytes = std::is_same_v<Value, Ones> ? 0 : round_up(pixels * most.C, 64);
  const int64_t sums_floats = part.rows * out_w * BLOCK;
  const int64_t bytes = maps * (bit_bytes + value_bytes + sums_floats * 4);
  // Weights that the second cache does not keep from image to image come while the group before them is worked on.
  const int64_t group_floats = most.group * a.kernel_width * BLOCK;
  const bool far = most.blocks * most.groups * group_floats * int64_t{sizeof(Weight)} > SECOND_CACHE;
  return for_items(a, part.chunks * most.blocks, bytes, [&](int64_t item, float* scratch) {
    // All images by one block of weights, then the next: cores share weights, and no line of outputs.
    const int64_t o = item / part.chunks;
    const Band band = band_of(a, part, item % part.chunks);
    const int64_t rows = band.rows, last = a.steps * band.images;
    const Window w = window(a, rows);
    const Plan p = plan_gather(w, BLOCK);
    const Apart<Weight> apart{bit_bytes, value_bytes, rows * out_w * BLOCK, all_weights + weight_floats(w, p)};
    float* sums = scratch;  // [image, step, row, column, channel of the block]
    uint8_t* bits = reinterpret_cast<uint8_t*>(sums + maps * sums_floats);
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
        std::memset(sums + i * map_floats, 0, (stays_silent(a, i / a.steps, is_silent) ? BLOCK : map_floats) * 4);
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
              reinterpret_cast<const Value*>(values + i * value_bytes + (value_bytes ? from : 0)), weight, mask, g == 0,
              sums + i * map_floats + y * row_floats, BLOCK, apart);
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
    }
    fire_block<NV>(a, o * BLOCK, band, sums, is_silent);
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

// The lists of some rows of some images.
struct Listed {
  uint16_t* numbers;    // of all lists, one behind the other
  List* lists;          // [image, step, row of inputs, column, part]
  int64_t* ends;        // of the numbers of every image and step
  Job* jobs;            // [group, place]
  int64_t* job_counts;  // [group]
  size_t end;

  Listed(void* memory, const EngineConv& a, const Part& part, const Parts& p) {
    const int64_t maps = a.steps * part.images, places = maps * part.rows * out_width(a);
    const int64_t pixels = maps * a.width * smaller(a.height, (part.rows - 1) * a.stride + a.kernel_height);
    const int64_t most = pixels * a.in + BEHIND;
    Pieces pieces(memory);
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

// Lists the inputs of some rows of some images, and sorts the lists of every group.
template <int64_t BLOCK>
void list_inputs(const EngineConv& a, const Band& band, const Parts& p, const Listed& m) {
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
      each_place(a, band, p, g, m.lists, m.ends, g == 0, body);
    }, m.jobs + g * places);
}

// By lists of single places, which serve all blocks of outputs.
template <int NV, class Weight>
int convolve_lists(const EngineConv& a, const Weight* all_weights) {
  constexpr int64_t BLOCK = NV * LANES;
  const Part part = partition(a, BLOCK);
  const Parts p = plan_parts(window(a, part.rows), BLOCK);
  const size_t list_memory = round_up(Listed(nullptr, a, part, p).end, 64);
  if (list_memory == 0) return OUT_OF_MEMORY;
  const size_t sum_memory = round_up(a.steps * part.images * part.rows * out_width(a) * BLOCK * 4, 64);
  const bool far = p.floats() * int64_t{sizeof(Weight)} > SECOND_CACHE;
  // One block of a chunk's outputs; the same thread is likely to run the `next` one after it.
  const auto run_block = [&](const Band& band, const Listed& m, int64_t o, int64_t next, float* sums) {
    const int64_t places = a.steps * band.images * band.rows * out_width(a);
    for (int64_t g = 0; g < p.groups; g++) {
      const Weight* weight = all_weights + (o * p.groups + g) * p.group_floats;
      const Weight* then = g + 1 < p.groups ? weight + p.group_floats : all_weights + next * p.groups * p.group_floats;
      add_sorted<NV>(m.jobs + g * places, m.job_counts[g], m.numbers, weight, g == 0, sums, far ? then : nullptr,
                     p.group_floats);
    }
    fire_block<NV>(a, o * BLOCK, band, sums, [&](int64_t i) { return m.ends[i] == m.ends[i + 1]; });
  };
  if (a.threads == 1 || part.chunks >= 8 * a.threads)  // who has made lists uses them for all blocks
    return for_items(a, part.chunks, list_memory + sum_memory, [&](int64_t chunk, float* scratch) {
      const Band band = band_of(a, part, chunk);
      const Listed m(scratch + sum_memory / 4, a, part, p);
      list_inputs<BLOCK>(a, band, p, m);
      for (int64_t o = 0; o < p.blocks; o++) run_block(band, m, o, o + 1, scratch);
    });
  // Small pieces: the lists of all chunks, then their blocks.
  char* const memory = reinterpret_cast<char*>(lists_of_thread.of(part.chunks * list_memory));
  if (memory == nullptr) return OUT_OF_MEMORY;
  const auto listed = [&](int64_t chunk) { return Listed(memory + chunk * list_memory, a, part, p); };
  const int status = for_items(a, part.chunks, 0, [&](int64_t chunk, float*) {
    list_inputs<BLOCK>(a, band_of(a, part, chunk), p, listed(chunk));
  });
  if (status != OK) return status;
  return for_items(a, part.chunks * p.blocks, sum_memory, [&](int64_t item, float* sums) {
    const int64_t chunk = item / p.blocks, o = item % p.blocks;
    run_block(band_of(a, part, chunk), listed(chunk), o, (o + a.threads) % p.blocks, sums);
  });
}

// Whether a layer runs by lists of single places: where these are long enough, and hold nothing but places. Else
// outputs share the column of a window that they see, and its values.
inline bool by_lists(const Window& w, bool binary) {
  return binary && w.in >= (w.kernel_height * w.kernel_width == 1 ? 128 : 256);
}

}  // namespace

int engine_pack(const EnginePack& a) {
  const Window w{a.in, a.out, a.kernel_height, a.kernel_width, a.stride, 1, 1};
  const int64_t taps = a.kernel_height * a.kernel_width;
  if (a.depthwise) {
    const int64_t padded = round_up(a.out, LANES);
    *a.floats = taps * padded;
    if (a.packed == nullptr) return 0;
    std::memset(a.packed, 0, taps * padded * 4);
    for (int64_t c = 0; c < a.out; c++)
      for (int64_t k = 0; k < taps; k++) a.packed[k * padded + c] = a.weight[c * taps + k];
    return 0;
  }
  const auto weight = [&](int64_t o, int64_t c, int64_t ky, int64_t kx) {
    return a.weight[((o * a.in + c) * a.kernel_height + ky) * a.kernel_width + kx];
  };
  if (by_lists(w, a.binary))
    return by_block(w, [&](auto vectors) {
      constexpr int NV = decltype(vectors)::value;
      const Parts p = plan_parts(w, NV * LANES);
      *a.floats = p.floats();
      if (a.packed != nullptr) pack_parts(w, p, NV * LANES, weight, a.packed);
      if (a.half != nullptr) halve(a.packed, *a.floats, NV, a.half);
      return 0;
    });
  return by_shape(w, [&](auto columns, auto vectors) {
    const Plan p = plan_gather(w, decltype(vectors)::value * LANES);
    *a.floats = packed_floats(w, p);
    constexpr int COLS = decltype(columns)::value, NV = decltype(vectors)::value;
    if (a.packed != nullptr) pack_gather<COLS>(w, p, weight, a.packed);
    if (a.half != nullptr) halve(a.packed, *a.floats, COLS * NV, a.half);
    return 0;
  });
}

int engine_conv(const EngineConv& a) {
  if (a.levels > MOST_LEVELS) return UNSUPPORTED;
  if (a.depthwise) return convolve_depthwise(a);
  const Window w = window(a, 1);
  const auto by_weight = [&](const auto& run) {
    return a.half != nullptr ? run(reinterpret_cast<const bfloat16*>(a.half)) : run(a.weight);
  };
  if (by_lists(w, a.binary))
    return by_block(w, [&](auto vectors) {
      return by_weight([&](const auto* weight) { return convolve_lists<decltype(vectors)::value>(a, weight); });
    });
  return by_shape(w, [&](auto columns, auto vectors) {
    constexpr int COLS = decltype(columns)::value, NV = decltype(vectors)::value;
    return by_weight([&](const auto* weight) {
      return a.binary ? convolve<Ones, COLS, NV>(a, weight) : convolve<uint8_t, COLS, NV>(a, weight);
    });
  });
}

}  // namespace spikeloom::SPIKELOOM_LEVEL
