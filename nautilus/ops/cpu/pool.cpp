#include "pool.h"

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

namespace {

// Neighbouring items that one thread takes from the front, some at a time while many are left, and others, once they have
// none of their own, one by one from the back.
struct alignas(64) Share {
  std::atomic<uint64_t> span;  // first item, and the end in the upper half

  // Items from `item` to before `last`. To take waits for all loads under way, memory then for the next ones.
  bool take(bool front, int64_t& item, int64_t& last) {
    uint64_t now = span.load(std::memory_order_relaxed);
    for (;;) {
      uint64_t first = now & UINT32_MAX, end = now >> 32;
      if (first >= end) return false;
      uint64_t some = front ? std::clamp<uint64_t>((end - first) / 16, 1, 4) : 1;
      item = static_cast<int64_t>(front ? first : end - 1);
      last = item + static_cast<int64_t>(some);
      uint64_t left = front ? now + some : now - (uint64_t{1} << 32);
      if (span.compare_exchange_weak(now, left, std::memory_order_relaxed)) return true;
    }
  }
};

// Each thread goes through neighbours, so that what it reads of memory is one stream: a processor fetches what follows.
struct Job {
  static constexpr int64_t MOST = 64;
  Piece piece;
  void* context;
  int64_t count;
  Share shares[MOST];

  Job(Piece does, void* with, int64_t items, int threads) : piece(does), context(with), count(threads < MOST ? threads : MOST) {
    for (uint64_t i = 0, n = static_cast<uint64_t>(items), parts = static_cast<uint64_t>(count); i < parts; i++)
      shares[i].span.store(n * i / parts | n * (i + 1) / parts << 32, std::memory_order_relaxed);
  }

  void work(int thread) {
    for (int64_t i = 0, item = 0, last = 0; i < count; i++)
      while (shares[(thread + i) % count].take(i == 0, item, last))
        for (; item < last; item++) piece(context, item, thread);
  }
};

// ----- threads of our own --------------------------------------------------------------------------------------------

// Waiting threads spin for about this many pauses (some 30 us) before they sleep: calls come in bursts.
constexpr int SPINS = 4000;

inline void pause_briefly() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

inline void wait_a_little(int spins) { spins < SPINS ? pause_briefly() : std::this_thread::yield(); }

// What each of some threads does, given its number.
using Member = void (*)(void* context, int number);

class Pool {
 public:
  void run(int threads, Member member, void* context) {
    std::lock_guard<std::mutex> one_caller(calling_);
    while (static_cast<int>(workers_.size()) < threads - 1) {
      int number = static_cast<int>(workers_.size()) + 1;
      // A new thread knows which turns are over: it would take part in the last one again.
      workers_.emplace_back([this, number, seen = turn_.load()] { serve(number, seen); });
    }
    member_ = member;
    context_ = context;
    wanted_ = threads;
    busy_.store(static_cast<int>(workers_.size()), std::memory_order_relaxed);
    {
      std::lock_guard<std::mutex> lock(sleep_);
      turn_.fetch_add(1, std::memory_order_release);
    }
    wake_.notify_all();
    member(context, 0);
    for (int spins = 0; busy_.load(std::memory_order_acquire) > 0; spins++) wait_a_little(spins);
  }

  ~Pool() {
    {
      std::lock_guard<std::mutex> lock(sleep_);
      stop_ = true;
      turn_.fetch_add(1, std::memory_order_release);
    }
    wake_.notify_all();
    for (std::thread& worker : workers_) worker.join();
  }

 private:
  void serve(int number, int64_t seen) {
    for (;;) {
      for (int spins = 0; turn_.load(std::memory_order_acquire) == seen && spins < SPINS; spins++) pause_briefly();
      if (turn_.load(std::memory_order_acquire) == seen) {
        std::unique_lock<std::mutex> lock(sleep_);
        wake_.wait(lock, [&] { return turn_.load(std::memory_order_acquire) != seen; });
      }
      seen = turn_.load(std::memory_order_acquire);
      if (stop_) return;
      if (number < wanted_) member_(context_, number);
      busy_.fetch_sub(1, std::memory_order_release);
    }
  }

  std::mutex calling_, sleep_;
  std::condition_variable wake_;
  std::vector<std::thread> workers_;
  std::atomic<int64_t> turn_{0};
  std::atomic<int> busy_{0};
  Member member_ = nullptr;
  void* context_ = nullptr;
  int wanted_ = 0;
  bool stop_ = false;
};

// ----- a borrowed team -----------------------------------------------------------------------------------------------

using Parallel = void (*)(void (*)(void*), void*, unsigned, unsigned);
using ThreadNumber = int (*)();
Parallel borrowed_parallel = nullptr;
ThreadNumber borrowed_number = nullptr;

// Each of `threads` threads, the caller as number 0, does its part; back when all have.
void everyone(int threads, Member member, void* context) {
  if (borrowed_parallel) {
    struct Part {
      Member member;
      void* context;
    } part{member, context};
    auto join_in = [](void* it) { static_cast<Part*>(it)->member(static_cast<Part*>(it)->context, borrowed_number()); };
    return borrowed_parallel(join_in, &part, static_cast<unsigned>(threads), 0);
  }
  // Never destroyed: at exit other threads may still be inside.
  static Pool* pool = new Pool;
  pool->run(threads, member, context);
}

// ----- a team that stays ---------------------------------------------------------------------------------------------

// Threads that spin between one call and the next, where calls follow each other within microseconds. One that comes late
// to a job (the machine is doing something else) is not waited for: the others have taken its share.
class Team {
 public:
  void run(Job& job) {
    job_ = &job;
    state_.fetch_add(TURN, std::memory_order_release);
    job.work(0);
    state_.fetch_add(TURN, std::memory_order_acquire);
    for (int spins = 0; state_.load(std::memory_order_acquire) % TURN; spins++) wait_a_little(spins);
  }
  void serve(int number) {
    uint64_t seen = 0;
    for (int spins = 0;; spins++) {
      uint64_t now = state_.load(std::memory_order_acquire), turn = now / TURN;
      if (now & OVER) return;
      bool open = turn % 2 && turn != seen;
      if (open && state_.compare_exchange_weak(now, now + 1, std::memory_order_acquire)) {
        seen = turn;
        if (number < job_->count) job_->work(number);
        state_.fetch_sub(1, std::memory_order_release);
        spins = 0;
      } else if (!open) {
        wait_a_little(spins);
      }
    }
  }
  void dismiss() { state_.fetch_or(OVER, std::memory_order_release); }

 private:
  // Threads inside a job are counted below TURN; of turns every odd one has a job.
  static constexpr uint64_t TURN = 1 << 16, OVER = uint64_t{1} << 63;
  alignas(64) std::atomic<uint64_t> state_{0};
  Job* job_ = nullptr;
};

thread_local Team* staying = nullptr;

}  // namespace

void borrow_team(void* parallel, void* thread_number) {
  borrowed_parallel = reinterpret_cast<Parallel>(parallel);
  borrowed_number = reinterpret_cast<ThreadNumber>(thread_number);
}

void run_pieces(int threads, int64_t items, Piece piece, void* context) {
  if (items < threads) threads = static_cast<int>(items);
  if (threads <= 1) {
    for (int64_t item = 0; item < items; item++) piece(context, item, 0);
    return;
  }
  Job job(piece, context, items, threads);
  if (staying) return staying->run(job);
  everyone(threads, [](void* it, int number) { static_cast<Job*>(it)->work(number); }, &job);
}

void stay_together(int threads, void (*body)(void*), void* context) {
  if (threads <= 1 || staying) return body(context);
  struct Stay {
    Team team;
    void (*body)(void*);
    void* context;
  } stay{{}, body, context};
  everyone(
      threads,
      [](void* it, int number) {
        auto* stay = static_cast<Stay*>(it);
        if (number > 0) return stay->team.serve(number);
        staying = &stay->team;
        stay->body(stay->context);
        staying = nullptr;
        stay->team.dismiss();
      },
      &stay);
}
