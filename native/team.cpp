#include "team.hpp"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <mutex>
#include <new>
#include <system_error>
#include <thread>

namespace spikeloom {
namespace {

using Clock = std::chrono::steady_clock;

// How long helpers look for work before they sleep: between two layers, where the caller may be in Python, and between
// two calls.
constexpr Clock::duration BETWEEN_LAYERS = std::chrono::milliseconds(2), BETWEEN_CALLS = std::chrono::microseconds(100);

// The processor's hint that a loop waits.
inline void pause() {
#if defined(__x86_64__) || defined(__i386__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

constexpr int TURNS = 1024;  // of a waiting loop, before the core is offered to others

inline void wait_a_little(int turn) {
  if (turn % TURNS == TURNS - 1)
    std::this_thread::yield();
  else
    pause();
}

// A caller's helpers. The caller posts a layer, and everybody takes pieces by counting down how many are left.
class Crew {
 public:
  Crew* next = nullptr;  // of the idle ones

  void begin(int helpers);
  void end() { open_.store(false, std::memory_order_relaxed); }
  void run(int64_t items, Piece piece, const void* body);

 private:
  // Pieces that nobody has taken, or less than none. Who counts it down has a piece of the layer that is there then,
  // however long ago it looked.
  alignas(64) std::atomic<int64_t> left_{0};
  alignas(64) std::atomic<int64_t> done_{0};  // pieces, by helpers
  // The layer: written while no piece is left and none is worked on, read by those who have taken one.
  alignas(64) Piece piece_ = nullptr;
  const void* body_ = nullptr;
  int64_t items_ = 0;
  alignas(64) std::atomic<int> wanted_{0};  // helpers
  std::atomic<bool> open_{false};           // while a call runs
  std::atomic<uint32_t> calls_{0}, asleep_{0}, signal_{0};
  int started_ = 0;

  bool any_left() const { return left_.load(std::memory_order_relaxed) > 0; }
  bool wants(int number) const { return number < wanted_.load(std::memory_order_relaxed); }
  int64_t work();
  void help(int number);
  void sleep(int number, uint32_t call);
  void wake();
};

// Takes pieces while there are any; returns how many those were.
int64_t Crew::work() {
  int64_t taken = 0;
  while (any_left()) {
    const int64_t left = left_.fetch_sub(1, std::memory_order_acquire);
    if (left <= 0) break;
    piece_(body_, items_ - left);
    taken++;
  }
  return taken;
}

void Crew::run(int64_t items, Piece piece, const void* body) {
  piece_ = piece, body_ = body, items_ = items;
  done_.store(0, std::memory_order_relaxed);
  left_.store(items, std::memory_order_release);
  if (asleep_.load(std::memory_order_relaxed) != 0) wake();
  const int64_t own = work();
  for (int turn = 0; done_.load(std::memory_order_acquire) != items - own; turn++) wait_a_little(turn);
}

// A helper that falls asleep just now may miss it, and sleeps on until the next layer: nobody needs its help.
void Crew::wake() {
  signal_.fetch_add(1, std::memory_order_relaxed);
  signal_.notify_all();
}

void Crew::begin(int helpers) {
  wanted_.store(helpers, std::memory_order_relaxed), open_.store(true, std::memory_order_relaxed);
  calls_.fetch_add(1, std::memory_order_relaxed);
  try {
    for (; started_ < helpers; started_++) std::thread(&Crew::help, this, started_).detach();
  } catch (const std::system_error&) {  // as many as the system allows
  }
  if (asleep_.load(std::memory_order_relaxed) != 0) wake();
}

// Until there is work, or a call that began after the one that was seen.
void Crew::sleep(int number, uint32_t call) {
  asleep_.fetch_add(1, std::memory_order_relaxed);
  for (;;) {
    const uint32_t signal = signal_.load(std::memory_order_relaxed);
    if (wants(number) && (any_left() || calls_.load(std::memory_order_relaxed) != call)) break;
    signal_.wait(signal, std::memory_order_relaxed);
  }
  asleep_.fetch_sub(1, std::memory_order_relaxed);
}

void Crew::help(int number) {
  auto last = Clock::now();
  for (int turn = 0;; turn++) {
    if (wants(number) && any_left()) {
      if (const int64_t taken = work()) done_.fetch_add(taken, std::memory_order_release);
      last = Clock::now(), turn = 0;
    }
    wait_a_little(turn);
    if (turn % TURNS != 0) continue;
    const uint32_t call = calls_.load(std::memory_order_relaxed);
    const bool open = wants(number) && open_.load(std::memory_order_relaxed);
    if (Clock::now() - last > (open ? BETWEEN_LAYERS : BETWEEN_CALLS)) sleep(number, call), last = Clock::now();
  }
}

// Crews are never freed: a helper that has no core may look at one long after its call.
struct Crews {
  std::mutex lock;
  Crew* idle = nullptr;
  int busy = 0;  // helpers of running calls
};

Crews& crews() {
  static Crews& all = *new Crews;
  return all;
}

// Of the calling thread, while it is awake.
struct Caller {
  bool awake = false;
  Crew* crew = nullptr;
  int helpers = 0;
};
thread_local Caller caller;

// No more threads work at once than there are cores, or than one call wants: with several callers, one more thread of
// each would only take a core from another.
void take_crew(int wanted) {
  static const int cores = static_cast<int>(std::max(1u, std::thread::hardware_concurrency()));
  Crews& all = crews();
  const std::lock_guard<std::mutex> held(all.lock);
  caller.helpers = std::min(wanted, std::max(cores - 1, wanted) - all.busy);
  if (caller.helpers <= 0) return;
  caller.crew = all.idle != nullptr ? all.idle : new (std::nothrow) Crew;
  if (caller.crew == nullptr) return;
  if (caller.crew == all.idle) all.idle = caller.crew->next;
  all.busy += caller.helpers;
}

void give_crew_back() {
  Crews& all = crews();
  const std::lock_guard<std::mutex> held(all.lock);
  all.busy -= caller.helpers;
  caller.crew->next = all.idle, all.idle = caller.crew;
  caller.crew = nullptr;
}

}  // namespace

Awake::Awake(int threads) : outermost_(!caller.awake) {
  if (!outermost_) return;
  caller.awake = true;
  if (threads > 1) take_crew(threads - 1);
  if (caller.crew != nullptr) caller.crew->begin(caller.helpers);
}

Awake::~Awake() {
  if (!outermost_) return;
  caller.awake = false;
  if (caller.crew == nullptr) return;
  caller.crew->end();
  give_crew_back();
}

void share(int64_t items, int threads, Piece piece, const void* body) {
  if (threads > 1 && items > 1) {
    const Awake here(threads);
    if (caller.crew != nullptr) return caller.crew->run(items, piece, body);
  }
  for (int64_t i = 0; i < items; i++) piece(body, i);
}

}  // namespace spikeloom
