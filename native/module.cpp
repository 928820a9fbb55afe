// Python bindings: addresses and sizes in, nothing of PyTorch's ABI. Callers check shapes and keep tensors alive.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <optional>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <vector>

#include "levels.hpp"
#include "team.hpp"

#ifdef _OPENMP
#include <omp.h>
#endif
#ifdef __linux__
#include <sys/mman.h>
#endif

namespace nb = nanobind;
using namespace spikeloom;

namespace {

void set_level(const std::string& name) {
  for (const Kernels* k : levels())
    if (name == k->level) {
      active() = k;
      return;
    }
  throw std::invalid_argument("this processor has no instruction level " + name);
}

void check(int code) {
  if (code == OUT_OF_MEMORY) throw std::bad_alloc();
  if (code != OK) throw std::logic_error("unknown kernel arguments");
}

constexpr const char* last_part(const char* path) {
  const char* last = path;
  for (const char* c = path; *c; c++)
    if (*c == '.') last = c + 1;
  return last;
}

template <class Field>
void set(void* field, nb::handle value) {
  if constexpr (std::is_pointer_v<Field>) {
    *static_cast<Field*>(field) = reinterpret_cast<Field>(nb::cast<uintptr_t>(value));
  } else if constexpr (std::is_enum_v<Field>) {
    *static_cast<Field*>(field) = static_cast<Field>(nb::cast<int>(value));
  } else {
    *static_cast<Field*>(field) = nb::cast<Field>(value);
  }
}

// A field that every call of a bound kernel sets.
struct Late {
  std::string name;
  void (*set)(void*, nb::handle) = nullptr;
  size_t offset = 0;
};

// Fills a struct from a dict; every field must be given or come late, and every argument and late name be a field's.
class Reader {
 public:
  Reader(const nb::dict& values, void* arguments, std::vector<Late>& late)
      : values_(values), arguments_(arguments), late_(late) {}

  // The name is an interned Python string.
  template <class Field>
  void operator()(PyObject* name, Field& field) {
    if (PyObject* found = PyDict_GetItemWithError(values_.ptr(), name)) {
      set<Field>(&field, found);
      used_++;
      if (names_) names_->push_back(nb::cast<std::string>(nb::handle(name)));
      return;
    }
    const auto text = nb::cast<std::string>(nb::handle(name));
    for (Late& one : late_)
      if (one.name == text) {
        one.set = &set<Field>;
        one.offset = static_cast<size_t>(reinterpret_cast<char*>(&field) - static_cast<char*>(arguments_));
        return;
      }
    throw std::invalid_argument("missing argument " + text);
  }

  // Whether every argument and late name was a field's.
  bool complete() const {
    bool known = used_ == values_.size();
    for (const Late& one : late_) known = known && one.set != nullptr;
    return known;
  }

  // Collects the names of the fields that are read.
  void collect(std::vector<std::string>& names) { names_ = &names; }

 private:
  const nb::dict& values_;
  void* arguments_;
  std::vector<Late>& late_;
  size_t used_ = 0;
  std::vector<std::string>* names_ = nullptr;
};

// A nested field's name in Python is its last part.
#define READ(field)                                                              \
  r([] {                                                                         \
    static PyObject* const name = PyUnicode_InternFromString(last_part(#field)); \
    return name;                                                                 \
  }(), a.field)

void read(Reader& r, Scan& a) {
  READ(dtype), READ(steps), READ(size), READ(chunk), READ(x), READ(x_stride), READ(layout.channels), READ(layout.inner);
  READ(factor), READ(shift), READ(residual), READ(v), READ(decay), READ(gain), READ(scale), READ(v_rest);
  READ(rectified), READ(hard), READ(levels), READ(threshold), READ(fire_at), READ(threads);
}
void read(Reader& r, ScanForward& a) {
  read(r, static_cast<Scan&>(a));
  READ(spikes), READ(sum), READ(add), READ(v_out), READ(potentials), READ(starts);
}
void read(Reader& r, ScanBackward& a) {
  read(r, static_cast<Scan&>(a));
  READ(grad_spikes), READ(grad_sum), READ(grad_v_out), READ(starts), READ(slope), READ(surrogate), READ(p), READ(q);
  READ(detach_reset), READ(grad_u), READ(sum_steps), READ(grad_v), READ(grad_constants), READ(grad_norm);
}
void read(Reader& r, Moments& a) {
  READ(dtype), READ(steps), READ(size), READ(x), READ(x_stride), READ(layout.channels), READ(layout.inner);
  READ(mean), READ(variance), READ(threads);
}
void read(Reader& r, Affine& a) {
  READ(dtype), READ(steps), READ(size), READ(x), READ(x_stride), READ(layout.channels), READ(layout.inner);
  READ(g), READ(a), READ(b), READ(c), READ(out), READ(threads);
}
void read(Reader& r, Psn& a) {
  READ(dtype), READ(steps), READ(size), READ(order), READ(sliding), READ(x), READ(x_stride), READ(weight), READ(bias);
  READ(threads);
}
void read(Reader& r, PsnForward& a) {
  read(r, static_cast<Psn&>(a));
  READ(spikes), READ(potentials);
}
void read(Reader& r, PsnBackward& a) {
  read(r, static_cast<Psn&>(a));
  READ(grad_spikes), READ(slope), READ(surrogate), READ(p), READ(q), READ(grad_x), READ(grad_weight), READ(grad_bias);
}
void read(Reader& r, Leaky& a) {
  READ(dtype), READ(steps), READ(size), READ(x), READ(x_stride), READ(alpha), READ(beta), READ(constant_stride);
  READ(state), READ(threads);
}
void read(Reader& r, LeakyForward& a) {
  read(r, static_cast<Leaky&>(a));
  READ(m), READ(state_out);
}
void read(Reader& r, LeakyBackward& a) {
  read(r, static_cast<Leaky&>(a));
  READ(grad_m), READ(grad_state_out), READ(grad_x), READ(grad_state), READ(grad_alpha), READ(grad_beta);
}
void read(Reader& r, FiringRule& a) { READ(map), READ(rule), READ(threshold), READ(seed), READ(before); }
void read(Reader& r, ParaLifForward& a) {
  read(r, static_cast<Leaky&>(a)), read(r, a.fire);
  READ(spikes), READ(state_out), READ(mapped_out);
}
void read(Reader& r, ParaLifBackward& a) {
  read(r, static_cast<Leaky&>(a)), read(r, a.fire);
  READ(grad_spikes), READ(grad_state_out), READ(grad_mapped_out), READ(surrogate), READ(p), READ(q), READ(grad_x);
  READ(grad_state), READ(grad_before), READ(grad_alpha), READ(grad_beta), READ(grad_threshold);
}
void read(Reader& r, Psu& a) {
  READ(dtype), READ(steps), READ(size), READ(x), READ(x_stride), READ(z), READ(integrate), READ(raw), READ(strict);
  READ(decay), READ(drop), READ(threshold), READ(state), READ(threads);
}
void read(Reader& r, PsuForward& a) {
  read(r, static_cast<Psu&>(a));
  READ(spikes), READ(potentials), READ(state_out);
}
void read(Reader& r, PsuBackward& a) {
  read(r, static_cast<Psu&>(a));
  READ(grad_spikes), READ(grad_state_out), READ(slope), READ(surrogate), READ(p), READ(q), READ(grad_x);
  READ(grad_z), READ(grad_state);
}
void read(Reader& r, Glif& a) {
  READ(steps), READ(size), READ(x), READ(x_stride), READ(layout.channels), READ(layout.inner), READ(open);
  READ(constants), READ(strict), READ(state), READ(threads);
}
void read(Reader& r, GlifForward& a) {
  read(r, static_cast<Glif&>(a));
  READ(spikes), READ(state_out);
}
void read(Reader& r, GlifBackward& a) {
  read(r, static_cast<Glif&>(a));
  READ(grad_spikes), READ(grad_state_out), READ(surrogate), READ(p), READ(q), READ(grad_x), READ(grad_state);
  READ(grad_open), READ(grad_constants);
}
void read(Reader& r, Convolution& a) {
  READ(dtype), READ(images), READ(height), READ(width), READ(in), READ(out), READ(kernel_height), READ(kernel_width);
  READ(stride), READ(padding), READ(x), READ(weight), READ(weight_out), READ(weight_in), READ(weight_row);
  READ(weight_column), READ(y), READ(grad_y), READ(grad_x), READ(grad_skip), READ(grad_weight), READ(threads);
}
void read(Reader& r, Depthwise& a) {
  READ(dtype), READ(images), READ(height), READ(width), READ(channels), READ(kernel_height), READ(kernel_width);
  READ(stride), READ(pad_height), READ(pad_width), READ(x), READ(weight), READ(y), READ(grad_y), READ(grad_x);
  READ(grad_weight), READ(threads);
}

void read(Reader& r, MaxPool& a) {
  READ(dtype), READ(images), READ(height), READ(width), READ(channels), READ(kernel), READ(stride), READ(padding);
  READ(x), READ(y), READ(winners), READ(grad_y), READ(grad_x), READ(threads);
}

void read(Reader& r, Epilogue& a) {
  READ(steps), READ(residual), READ(residual_spikes), READ(residual_stride), READ(sum), READ(spikes), READ(v);
  READ(decay), READ(gain), READ(v_rest), READ(hard), READ(levels), READ(threshold), READ(fire_at), READ(threads);
}
void read(Reader& r, EngineConv& a) {
  read(r, static_cast<Epilogue&>(a));
  READ(images), READ(height), READ(width), READ(in), READ(out), READ(kernel_height), READ(kernel_width), READ(stride);
  READ(padding_y), READ(padding_x), READ(depthwise), READ(binary), READ(x), READ(weight), READ(bias);
  READ(half), READ(shorts), READ(bytes), READ(scale), READ(widen);
}
void read(Reader& r, EnginePack& a) {
  READ(in), READ(out), READ(kernel_height), READ(kernel_width), READ(stride), READ(depthwise), READ(binary);
  READ(integers), READ(weight), READ(packed), READ(half), READ(counts);
}
void read(Reader& r, EngineFire& a) {
  read(r, static_cast<Epilogue&>(a));
  READ(size), READ(x_stride), READ(once), READ(x);
}
void read(Reader& r, EngineDirect& a) {
  read(r, static_cast<Epilogue&>(a));
  READ(x_steps), READ(images), READ(height), READ(width), READ(in), READ(out), READ(kernel_height), READ(kernel_width);
  READ(stride), READ(padding_y), READ(padding_x), READ(groups), READ(once), READ(x), READ(x_bytes), READ(weight);
  READ(bias);
}
void read(Reader& r, EnginePackDirect& a) {
  READ(in), READ(out), READ(kernel_height), READ(kernel_width), READ(groups), READ(weight), READ(packed), READ(count);
}
void read(Reader& r, EngineElements& a) {
  READ(element), READ(sizes), READ(strides), READ(y), READ(a), READ(b), READ(c), READ(y_bytes), READ(a_bytes);
  READ(b_bytes), READ(low), READ(high), READ(threads);
}
void read(Reader& r, EngineReduce& a) {
  READ(outer), READ(count), READ(inner), READ(mean), READ(x), READ(x_bytes), READ(y), READ(threads);
}
void read(Reader& r, EngineWindows& a) {
  READ(images), READ(height), READ(width), READ(channels), READ(out_height), READ(out_width), READ(kernel);
  READ(stride), READ(padding), READ(mean), READ(count_padding), READ(x), READ(x_bytes), READ(y), READ(threads);
}
void read(Reader& r, EnginePool& a) {
  READ(images), READ(height), READ(width), READ(channels), READ(kernel), READ(stride), READ(padding), READ(x), READ(y);
  READ(threads);
}
void read(Reader& r, EngineAttention& a) {
  READ(maps), READ(tokens), READ(channels), READ(heads), READ(scale), READ(q), READ(k), READ(v), READ(y), READ(threads);
}

#undef READ

template <class Arguments>
using Kernel = int (*Kernels::*)(const Arguments&);

template <class Arguments>
void run(Kernel<Arguments> kernel, Arguments& a) {
  if constexpr (requires { a.threads; }) {
    if (forked()) a.threads = 1;
  }
  nb::gil_scoped_release release;
  check((active()->*kernel)(a));
}

int openmp_threads() {
#ifdef _OPENMP
  return omp_get_max_threads();
#else
  return 0;
#endif
}

int (*set_mkl_threads)(int) = nullptr;  // returns the number before, or 0

// A block in which OpenMP shares the layers of PyTorch that this thread calls among so many threads, whatever
// `torch.set_num_threads` told OpenMP and MKL. (It would tell other threads too.)
class LayerThreads {
 public:
  explicit LayerThreads(int threads) : threads_(threads) {}
  void enter() {
    openmp_ = openmp_threads(), mkl_ = set_mkl_threads != nullptr ? set_mkl_threads(threads_) : 0;
    set_openmp(threads_);
  }
  void exit() {
    if (set_mkl_threads != nullptr) set_mkl_threads(mkl_);
    set_openmp(openmp_);
  }

 private:
  static void set_openmp([[maybe_unused]] int threads) {
#ifdef _OPENMP
    omp_set_num_threads(threads);
#endif
  }
  int threads_, openmp_ = 0, mkl_ = 0;
};

// A run of the engine. OpenMP's threads look for work for milliseconds after a layer, on the cores that the engine's
// threads want.
class AwakeBlock {
 public:
  explicit AwakeBlock(int threads) : threads_(forked() ? 1 : threads) {}
  void enter() { awake_.emplace(threads_), layers_.enter(); }
  void exit() { layers_.exit(), awake_.reset(); }

 private:
  int threads_;
  LayerThreads layers_{1};
  std::optional<Awake> awake_;
};

template <class Block>
void bind_block(nb::module_& m, const char* name, const char* doc) {
  nb::class_<Block>(m, name, doc)
      .def(nb::init<int>())
      .def("__enter__", &Block::enter)
      .def("__exit__", [](Block& block, const nb::args&) { block.exit(); });
}

// Reads once more, to say which argument or late name is no field's.
template <class Arguments>
[[noreturn]] void throw_unknown(const nb::dict& values, std::vector<Late>& late) {
  Arguments a;
  std::vector<std::string> known;
  Reader reader(values, &a, late);
  reader.collect(known);
  read(reader, a);
  for (const auto& [name, value] : values) {
    const auto text = nb::cast<std::string>(name);
    if (std::find(known.begin(), known.end(), text) == known.end())
      throw std::invalid_argument("unknown argument " + text);
  }
  for (const Late& one : late)
    if (one.set == nullptr) throw std::invalid_argument("unknown or repeated late argument " + one.name);
  throw std::invalid_argument("unknown argument");
}

template <class Arguments>
Arguments arguments(const nb::dict& values, std::vector<Late>& late) {
  Arguments a;
  Reader reader(values, &a, late);
  read(reader, a);
  if (!reader.complete()) throw_unknown<Arguments>(values, late);
  return a;
}

// How Python calls a kernel (kernels.def).
constexpr int CALL = 1, BIND = 2;

template <class Arguments>
void bind_call(nb::module_& m, const char* name, Kernel<Arguments> kernel) {
  m.def(name, [kernel](const nb::kwargs& values) {
    std::vector<Late> none;
    auto a = arguments<Arguments>(values, none);
    run(kernel, a);
  });
}

// For kernels of small layers, where reading forty arguments takes longer than the kernel: what stays the same from
// call to call is read once, and the function that comes back takes the rest in the order of `late`.
template <class Arguments>
void bind_late(nb::module_& m, const char* name, Kernel<Arguments> kernel) {
  m.def(name, [kernel](const nb::dict& values, const std::vector<std::string>& late) {
    std::vector<Late> rest;
    for (const std::string& one : late) rest.push_back({one});
    const auto fixed = arguments<Arguments>(values, rest);
    return nb::cpp_function([kernel, fixed, rest](const nb::args& given) {
      if (given.size() != rest.size())
        throw std::invalid_argument("a bound kernel takes its late arguments, all of them");
      Arguments a = fixed;
      size_t i = 0;
      for (const Late& one : rest) one.set(reinterpret_cast<char*>(&a) + one.offset, given[i++]);
      run(kernel, a);
    });
  });
}

}  // namespace

NB_MODULE(_native, m) {
  m.doc() = "Fused kernels of spikeloom.ops; arguments are the fields of native/kernels.hpp, addresses as integers.";
  nb::enum_<Dtype>(m, "Dtype", nb::is_arithmetic()).value("float32", Dtype::float32).value("bfloat16", Dtype::bfloat16);
  nb::enum_<Surrogate>(m, "Surrogate", nb::is_arithmetic())
      .value("rational", Surrogate::rational)
      .value("rectangle", Surrogate::rectangle)
      .value("triangle", Surrogate::triangle)
      .value("fast_sigmoid", Surrogate::fast_sigmoid)
      .value("sigmoid", Surrogate::sigmoid)
      .value("slope", Surrogate::slope);
  nb::enum_<Map>(m, "Map", nb::is_arithmetic())
      .value("identity", Map::identity)
      .value("sigmoid", Map::sigmoid)
      .value("tanh", Map::tanh)
      .value("relu_tanh", Map::relu_tanh);
  nb::enum_<Rule>(m, "Rule", nb::is_arithmetic())
      .value("threshold", Rule::threshold)
      .value("difference", Rule::difference)
      .value("bernoulli", Rule::bernoulli)
      .value("gumbel", Rule::gumbel);
  nb::enum_<Element>(m, "Element", nb::is_arithmetic())
      .value("copy", Element::copy)
      .value("relu", Element::relu)
      .value("sigmoid", Element::sigmoid)
      .value("clamp", Element::clamp)
      .value("scale", Element::scale)
      .value("shift", Element::shift)
      .value("complement", Element::complement)
      .value("add", Element::add)
      .value("mul", Element::mul)
      .value("divide", Element::divide)
      .value("largest", Element::largest)
      .value("affine", Element::affine);
  m.def("levels", [] {
    std::vector<std::string> names;
    for (const Kernels* k : levels()) names.emplace_back(k->level);
    return names;
  });
  m.def("level", [] { return std::string(active()->level); });
  m.def("set_level", &set_level);
  m.def("openmp_threads", &openmp_threads);
  m.def("use_mkl", [](uintptr_t function) { set_mkl_threads = reinterpret_cast<int (*)(int)>(function); });
  m.def("forked", &forked);
  bind_block<LayerThreads>(m, "LayerThreads", "A block whose layers of PyTorch are shared among so many threads.");
  bind_block<AwakeBlock>(m, "Awake", "A block whose kernels are shared among threads that stay awake; others are not.");
  m.def("advise_huge", [](uintptr_t p, size_t bytes) {
#ifdef __linux__
    // A fresh tensor of many megabytes costs more in page faults than the scan that fills it; with large pages, a
    // fraction of it. Only a hint: a system that does not grant it loses nothing.
    constexpr uintptr_t page = uintptr_t{2} << 20;
    const uintptr_t first = (p + page - 1) / page * page, last = (p + bytes) / page * page;
    if (last > first) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#endif
  });
#define KERNEL(function, arguments, calls)                                              \
  if constexpr ((calls) & CALL) bind_call<arguments>(m, #function, &Kernels::function); \
  if constexpr ((calls) & BIND) bind_late<arguments>(m, "bound_" #function, &Kernels::function);
#include "kernels.def"
#undef KERNEL
}
