// Threads that work through many short stages together.
//
// Waking a thread takes about 0.1 ms, longer than most layers of a small model. So all stages of a token run in one
// parallel region. The first thread runs the program and publishes each stage as a number of pieces; every thread takes
// the next free piece. If the system suspends a thread, the others wait for it only if it has started a piece.

#pragma once

#include <ATen/Parallel.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <exception>
#include <type_traits>

#if defined(__unix__) || defined(__APPLE__)
#include <sched.h>
#endif

namespace lbllm {

inline void pause_a_little(int& spins) {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#endif
#if defined(__unix__) || defined(__APPLE__)
  // After about 20 microseconds of waiting, give the core to another thread.
  if (++spins > 500) sched_yield();
#endif
}

class Team {
 public:
  explicit Team(bool alone) : alone_(alone) {}

  // Calls work(begin, end) for the pieces of [0, total), normally of `size` or less, and returns when all are done.
  // Only the first thread calls this.
  template <class Work>
  void share(int64_t total, int64_t size, const Work& work) {
    const int64_t pieces = std::min<int64_t>((total + size - 1) / size, MOST);
    if (alone_ || pieces <= 1) return work(static_cast<int64_t>(0), total);
    call_ = [](const void* context, int64_t begin, int64_t end) { (*static_cast<const Work*>(context))(begin, end); };
    context_ = &work;
    total_ = total;
    size_ = (total + pieces - 1) / pieces;
    done_.store(0, std::memory_order_relaxed);
    stage_ = (stage_ + 1) & 0xffffffffu;
    state_.store(stage_ << 32 | static_cast<uint64_t>(pieces) << 16, std::memory_order_release);
    while (take()) {
    }
    int spins = 0;
    while (done_.load(std::memory_order_acquire) < pieces) pause_a_little(spins);
  }

  // Every other thread runs this.
  void help() {
    int spins = 0;
    while (!over_.load(std::memory_order_acquire))
      if (take())
        spins = 0;
      else
        pause_a_little(spins);
  }

  void end() { over_.store(true, std::memory_order_release); }

 private:
  static constexpr int64_t MOST = 0xffff;

  // Takes a piece of the current stage and runs it. Returns false if no piece is left.
  bool take() {
    uint64_t state = state_.load(std::memory_order_acquire);
    do {
      if ((state & MOST) >= (state >> 16 & MOST)) return false;
    } while (!state_.compare_exchange_weak(state, state + 1, std::memory_order_acq_rel, std::memory_order_acquire));
    // The stage can't end, and the next one can't begin, before this piece counts as done.
    const int64_t begin = static_cast<int64_t>(state & MOST) * size_, end = std::min(total_, begin + size_);
    if (begin < end) call_(context_, begin, end);
    done_.fetch_add(1, std::memory_order_release);
    return true;
  }

  const bool alone_;
  std::atomic<uint64_t> state_{0};  // stage << 32 | number of pieces << 16 | pieces taken
  std::atomic<int64_t> done_{0};
  std::atomic<bool> over_{false};
  uint64_t stage_ = 0;
  void (*call_)(const void*, int64_t, int64_t) = nullptr;
  const void* context_ = nullptr;
  int64_t total_ = 0, size_ = 1;
};

// Runs program(team) on this thread, with PyTorch's other threads as helpers.
template <class Program>
void with_team(const Program& program) {
  const int64_t threads = at::in_parallel_region() ? 1 : at::get_num_threads();
  Team team(threads == 1);
  std::exception_ptr failure;
  at::parallel_for(0, threads, 1, [&](int64_t first, int64_t) {
    if (first > 0) return team.help();
    try {
      program(team);
    } catch (...) {
      failure = std::current_exception();
    }
    team.end();
  });
  if (failure) std::rethrow_exception(failure);
}

}  // namespace lbllm
