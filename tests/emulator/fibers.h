// The threads of a kernel as fibers: scheduling, barriers and counters.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <numeric>
#include <random>
#include <string>
#include <vector>

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
  unsigned count() const { return x * y * z; }
};

#if defined(__SANITIZE_THREAD__)
#include <sanitizer/tsan_interface.h>
extern "C" void AnnotateIgnoreReadsBegin(const char*, int);
extern "C" void AnnotateIgnoreReadsEnd(const char*, int);
extern "C" void AnnotateIgnoreWritesBegin(const char*, int);
extern "C" void AnnotateIgnoreWritesEnd(const char*, int);
#define EMULATED_TSAN(...) __VA_ARGS__
#else
#define EMULATED_TSAN(...)
#endif

// _longjmp switches without the system call of swapcontext. The sanitizers do not follow it to another stack, and the
// checked one of _FORTIFY_SOURCE refuses to.
#if !defined(__SANITIZE_THREAD__) && !defined(__SANITIZE_ADDRESS__) && !defined(_FORTIFY_SOURCE)
#define EMULATED_LONGJMP 1
#endif

namespace emulated {

constexpr unsigned kWarp = 32;
constexpr size_t kStack = EMULATED_TSAN(4 *) 64 << 10;

// Hides the emulator's own data from ThreadSanitizer, which sees every fiber as a thread.
struct [[maybe_unused]] Unwatched {
  EMULATED_TSAN(Unwatched() { AnnotateIgnoreReadsBegin("", 0), AnnotateIgnoreWritesBegin("", 0); }
                ~Unwatched() { AnnotateIgnoreWritesEnd("", 0), AnnotateIgnoreReadsEnd("", 0); })
};

inline void release(char& tag) { EMULATED_TSAN(__tsan_release(&tag);) (void)tag; }
inline void acquire(char& tag) { EMULATED_TSAN(__tsan_acquire(&tag);) (void)tag; }

enum Order { kForward, kReverse, kShuffled };

// A point at which threads wait for each other: all at the same line, or the kernel is wrong.
struct Meeting {
  const char* file = "";
  int line = 0;
  unsigned expected = 0, arrived = 0, generation = 0;
  char tags[2] = {};
};

struct Warp {
  Meeting meeting;
  // Two sets that alternate: a lane may already write for the next exchange while others read from this one.
  alignas(16) unsigned char slots[2][kWarp][32];
};

struct Block {
  dim3 index;
  Meeting barrier;
  std::vector<Warp> warps;
  std::unique_ptr<unsigned char[]> shared;
  unsigned done = 0;
  char start = 0, end = 0;
};

struct Fiber {
  ucontext_t context;
  jmp_buf resume;
  bool started = false;
  std::unique_ptr<char[]> stack{new char[kStack]};
  Block* block = nullptr;
  dim3 index;
  unsigned linear = 0, generation = 0;
  const Meeting* at = nullptr;
  bool done = true;
  bool has_waited = false;  // for the launch before, which this one may overlap
  EMULATED_TSAN(void* thread = nullptr;)
  bool ready() const { return !done && (at == nullptr || at->generation != generation); }
};

struct Counters {
  int64_t read_bytes = 0, written_bytes = 0, launches = 0, switches = 0;
};

struct Machine {
  Order order = kForward;
  unsigned resident = 1;  // blocks that run at a time
  unsigned seed = 1;
  Counters counters;

  dim3 grid, block;
  size_t shared_bytes = 0;
  bool overlaps = false;  // the launch before this one
  std::function<void()> body;
  std::vector<std::unique_ptr<Fiber>> fibers;
  std::vector<Fiber*> turns;
  size_t turn = 0;
  Fiber* current = nullptr;
  ucontext_t main;
  jmp_buf main_resume;
  std::mt19937 random;
  std::string error;
  char fence = 0;
  EMULATED_TSAN(void* main_thread = nullptr;)
};

inline Machine& machine() {
  static Machine instance;
  return instance;
}
inline Fiber& me() { return *machine().current; }

inline void switch_fibers(Fiber* before, Fiber* next) {
  Machine& m = machine();
#ifdef EMULATED_LONGJMP
  if (_setjmp(before ? before->resume : m.main_resume) != 0) return;
  if (next == nullptr) _longjmp(m.main_resume, 1);
  if (next->started) _longjmp(next->resume, 1);
  next->started = true;
  setcontext(&next->context);
#else
  swapcontext(before ? &before->context : &m.main, next ? &next->context : &m.main);
#endif
}

inline void go(Fiber* next) {
  Machine& m = machine();
  Fiber* before = m.current;
  {
    Unwatched unwatched;
    if (next == before) return;
    ++m.counters.switches;
    m.current = next;
  }
  EMULATED_TSAN(__tsan_switch_to_fiber(next ? next->thread : m.main_thread, 1);)
  switch_fibers(before, next);
}

// The next thread that can run, each ready one once per round; null if all wait or are done.
inline Fiber* next() {
  Machine& m = machine();
  // The rest of this round and a whole one: the next round may have another order.
  for (size_t tried = 0; tried < 2 * m.turns.size(); ++tried) {
    if (m.turn == m.turns.size()) {
      m.turn = 0;
      if (m.order == kShuffled) std::shuffle(m.turns.begin(), m.turns.end(), m.random);
    }
    Fiber* fiber = m.turns[m.turn++];
    if (fiber->ready()) return fiber;
  }
  return nullptr;
}

[[noreturn]] inline void fail(const std::string& message) {
  Machine& m = machine();
  const dim3 b = me().block->index, t = me().index;
  const auto text = [](dim3 d) {
    return "(" + std::to_string(d.x) + ", " + std::to_string(d.y) + ", " + std::to_string(d.z) + ")";
  };
  m.error = message + ", thread " + text(t) + " of block " + text(b);
  me().done = true;
  go(nullptr);
  std::abort();
}

inline void meet(Meeting& meeting, const char* file, int line) {
  Unwatched unwatched;
  if (meeting.arrived == 0) meeting.file = file, meeting.line = line;
  if (meeting.line != line || std::strcmp(meeting.file, file) != 0) {
    fail("divergence: threads wait at lines " + std::to_string(meeting.line) + " and " + std::to_string(line));
  }
  const unsigned generation = meeting.generation;
  release(meeting.tags[generation & 1]);
  if (++meeting.arrived == meeting.expected) {
    meeting.arrived = 0;
    ++meeting.generation;
  } else {
    me().at = &meeting;
    me().generation = generation;
    go(next());
    me().at = nullptr;
  }
  acquire(meeting.tags[generation & 1]);
}

// At an access to what the launch before may still write or read.
inline void check_waited() {
  Unwatched unwatched;
  if (machine().overlaps && !me().has_waited) fail("memory of the launch before is used without waiting for it");
}

// At an access that other blocks may see: another thread may run first.
inline void maybe_switch(unsigned one_in) {
  Unwatched unwatched;
  Machine& m = machine();
  if (m.resident > 1 && (one_in == 1 || (m.order == kShuffled && m.random() % one_in == 0))) go(next());
}

inline void run_thread() {
  {
    Block& block = *me().block;
    acquire(block.start);
    machine().body();
    release(block.end);
  }
  Fiber* following;
  {
    Unwatched unwatched;
    Fiber& fiber = me();
    fiber.done = true;
    following = ++fiber.block->done == machine().block.count() ? nullptr : next();
  }
  // A thread must not end while it is hidden from ThreadSanitizer.
  go(following);
}

inline void start(Block& block, Fiber* const* fibers, unsigned number) {
  Machine& m = machine();
  block.index = dim3(number % m.grid.x, number / m.grid.x % m.grid.y, number / m.grid.x / m.grid.y);
  block.barrier = Meeting();
  block.barrier.expected = m.block.count();
  block.warps.assign(m.block.count() / kWarp, Warp());
  for (Warp& warp : block.warps) warp.meeting.expected = kWarp;
  block.shared.reset(new unsigned char[m.shared_bytes]);
  std::memset(block.shared.get(), 0xff, m.shared_bytes);  // NaN, and -1
  block.done = 0;
  for (unsigned i = 0; i < m.block.count(); ++i) {
    Fiber& fiber = *fibers[i];
    fiber.block = &block;
    fiber.linear = i;
    fiber.index = dim3(i % m.block.x, i / m.block.x % m.block.y, i / m.block.x / m.block.y);
    fiber.at = nullptr;
    fiber.done = false;
    fiber.started = false;
    fiber.has_waited = false;
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.get();
    fiber.context.uc_stack.ss_size = kStack;
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, run_thread, 0);
    EMULATED_TSAN(if (fiber.thread) __tsan_destroy_fiber(fiber.thread); fiber.thread = __tsan_create_fiber(0);)
  }
  release(block.start);
}

inline std::string stuck() {
  unsigned waiting = 0, gone = 0;
  const Meeting* at = nullptr;
  for (Fiber* fiber : machine().turns) {
    gone += fiber->done;
    if (fiber->at != nullptr && !fiber->done) ++waiting, at = fiber->at;
  }
  return "deadlock: " + std::to_string(waiting) + " threads wait, some at line " + std::to_string(at ? at->line : 0) +
         ", and " + std::to_string(gone) + " have left";
}

// Runs a grid; the error of the kernel, or an empty string.
inline std::string run(dim3 grid, dim3 block, size_t shared_bytes, bool overlaps, std::function<void()> body) {
  Unwatched unwatched;
  Machine& m = machine();
  ++m.counters.launches;
  if (block.count() % kWarp != 0 || block.count() > 1024) return "a block is up to 32 whole warps";
  if (shared_bytes > 99 << 10) return "more than 99 KB of shared memory";
  if (grid.count() == 0 || grid.y > 65535 || grid.z > 65535) return "invalid configuration of the grid";
  m.grid = grid, m.block = block, m.shared_bytes = shared_bytes, m.overlaps = overlaps;
  m.body = std::move(body), m.error.clear();
  m.random.seed(m.seed);
  EMULATED_TSAN(m.main_thread = __tsan_get_current_fiber();)
  std::vector<unsigned> waiting(grid.count());
  std::iota(waiting.rbegin(), waiting.rend(), 0);
  if (m.order == kReverse) std::reverse(waiting.begin(), waiting.end());
  if (m.order == kShuffled) std::shuffle(waiting.begin(), waiting.end(), m.random);

  std::vector<Block> blocks(std::min<size_t>(m.resident, waiting.size()));
  const size_t threads = block.count();
  while (m.fibers.size() < blocks.size() * threads) m.fibers.push_back(std::make_unique<Fiber>());
  m.turns.clear();
  for (size_t i = 0; i < blocks.size() * threads; ++i) m.turns.push_back(m.fibers[i].get());
  std::vector<Fiber*> fixed = m.turns;
  if (m.order == kReverse) std::reverse(m.turns.begin(), m.turns.end());
  m.turn = 0;
  for (size_t i = 0; i < blocks.size(); ++i) blocks[i].done = static_cast<unsigned>(threads);
  while (true) {
    for (size_t i = 0; i < blocks.size(); ++i) {
      if (blocks[i].done < threads) continue;
      acquire(blocks[i].end);
      if (waiting.empty()) continue;
      start(blocks[i], &fixed[i * threads], waiting.back());
      waiting.pop_back();
    }
    Fiber* fiber = next();
    const bool over = std::all_of(m.turns.begin(), m.turns.end(), [](Fiber* f) { return f->done; });
    if (fiber == nullptr && !over) m.error = stuck();
    if (fiber == nullptr || !m.error.empty()) break;
    go(fiber);
    if (!m.error.empty()) break;
  }
  // Interrupted threads must not leave a state for the next launch.
  if (!m.error.empty()) m.fibers.clear();
  return m.error;
}

}  // namespace emulated
