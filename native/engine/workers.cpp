#include "engine/workers.hpp"

#include <atomic>
#include <chrono>
#include <mutex>
#include <system_error>
#include <thread>

namespace spikeloom {
namespace {

constexpr int MOST_CALLS = 32;     // at the same time; others run their pieces alone
constexpr int MOST_WORKERS = 255;  // threads beside the callers
constexpr int64_t MOST_PIECES = UINT16_MAX;
constexpr std::chrono::microseconds PATIENCE{
    50};  // that a thread looks for work, or for the end of it, before it sleeps

// The work of one call. Calls are never freed: a worker may look at one whose work has long been done.
struct alignas(64) Call {
  std::atomic<bool> taken{false};
  // Which work this is, the number of its pieces and of the next one: [32, 16, 16 bits]. A worker takes a piece by
  // counting up, which fails where the work is another one meanwhile. The fields below belong to whoever has a piece.
  std::atomic<uint64_t> ticket{0};
  std::atomic<int> helpers{0};  // the workers before this one may take pieces
  void (*run)(const void*, int64_t) = nullptr;
  const void* body = nullptr;
  alignas(64) std::atomic<uint32_t> done{0};
};

constexpr uint32_t pieces_of(uint64_t ticket) { return ticket >> 16 & MOST_PIECES; }
constexpr uint32_t next_of(uint64_t ticket) { return ticket & MOST_PIECES; }

struct alignas(64) Worker {
  std::atomic<uint32_t> posted{0};  // works that it may take pieces of, so far
};

Call calls[MOST_CALLS];
Worker workers[MOST_WORKERS];
std::atomic<int> calls_used{0}, workers_started{0};
std::mutex starting;

inline void relax() {
#if defined(__x86_64__) || defined(__i386__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// Waits for found() as long as patience allows.
template <class Found>
bool found_soon(const Found& found) {
  const auto end = std::chrono::steady_clock::now() + PATIENCE;
  do {
    for (int i = 0; i < 32; i++) {
      if (found()) return true;
      relax();
    }
  } while (std::chrono::steady_clock::now() < end);
  return false;
}

// Takes the next piece and runs it; false where nothing is left for the worker (-1: the caller).
bool run_next(Call& call, int worker) {
  uint64_t ticket = call.ticket.load(std::memory_order_acquire);
  do {
    if (next_of(ticket) == pieces_of(ticket) || call.helpers.load(std::memory_order_relaxed) <= worker) return false;
  } while (
      !call.ticket.compare_exchange_weak(ticket, ticket + 1, std::memory_order_acq_rel, std::memory_order_acquire));
  call.run(call.body, next_of(ticket));
  // With the last piece the caller may go on: from here on the call can be another one's.
  if (call.done.fetch_add(1, std::memory_order_acq_rel) + 1 == pieces_of(ticket)) call.done.notify_one();
  return true;
}

[[noreturn]] void work(int index) {
  Worker& self = workers[index];
  for (;;) {
    const uint32_t seen = self.posted.load();
    bool any = false;
    for (int i = 0; i < calls_used.load(std::memory_order_acquire); i++)
      while (run_next(calls[i], index)) any = true;
    if (any || found_soon([&] { return self.posted.load(std::memory_order_relaxed) != seen; })) continue;
    self.posted.wait(seen);
  }
}

void start_workers(int count) {
  if (workers_started.load(std::memory_order_acquire) >= count) return;
  const std::lock_guard lock(starting);
  try {
    for (int i = workers_started; i < count; i++) {
      std::thread(work, i).detach();
      workers_started.store(i + 1, std::memory_order_release);
    }
  } catch (const std::system_error&) {  // the system allows no more: those that there are do the work
  }
}

Call* free_call() {
  for (int i = 0; i < MOST_CALLS; i++) {
    if (calls[i].taken.exchange(true, std::memory_order_acquire)) continue;
    for (int used = calls_used; used <= i && !calls_used.compare_exchange_weak(used, i + 1);) {
    }
    return &calls[i];
  }
  return nullptr;
}

void share_some(Call& call, int64_t pieces, int helpers, void (*run)(const void*, int64_t), const void* body) {
  call.run = run, call.body = body;
  call.done.store(0, std::memory_order_relaxed);
  call.helpers.store(helpers, std::memory_order_relaxed);
  const uint64_t number = (call.ticket.load(std::memory_order_relaxed) >> 32) + 1;
  call.ticket.store(number << 32 | static_cast<uint64_t>(pieces) << 16, std::memory_order_release);
  for (int i = 0; i < helpers; i++) {
    workers[i].posted.fetch_add(1);
    workers[i].posted.notify_one();  // a look, where it does not sleep
  }
  while (run_next(call, -1)) {
  }
  const auto all_done = [&] { return call.done.load(std::memory_order_acquire) == pieces; };
  if (found_soon(all_done)) return;
  for (uint32_t done; (done = call.done.load(std::memory_order_acquire)) != pieces;)
    call.done.wait(done, std::memory_order_acquire);
}

}  // namespace

void share_pieces(int64_t pieces, int threads, void (*run)(const void*, int64_t), const void* body) {
  Call* const call = threads > 1 && pieces > 1 ? free_call() : nullptr;
  if (call == nullptr) {
    for (int64_t i = 0; i < pieces; i++) run(body, i);
    return;
  }
  const int64_t most = threads - 1 < MOST_WORKERS ? threads - 1 : MOST_WORKERS;
  start_workers(static_cast<int>(most));
  struct Part {
    void (*run)(const void*, int64_t);
    const void* body;
    int64_t first;
  };
  const auto run_part = [](const void* part, int64_t i) {
    const Part& of = *static_cast<const Part*>(part);
    of.run(of.body, of.first + i);
  };
  // As many at a time as a ticket counts.
  for (int64_t first = 0; first < pieces; first += MOST_PIECES) {
    const Part part{run, body, first};
    const int64_t some = pieces - first < MOST_PIECES ? pieces - first : MOST_PIECES;
    share_some(*call, some, static_cast<int>(some - 1 < most ? some - 1 : most), run_part, &part);
  }
  call->taken.store(false, std::memory_order_release);
}

}  // namespace spikeloom
