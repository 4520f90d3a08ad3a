// planted <case> <seed>: runs one kernel of this folder under the simulator and prints what it
// wrote, one line a launch, or "error: " and the message (then the exit status is 1).
#include <iostream>
#include <map>
#include <string>
#include <thread>
#include <vector>

#include "memory.cu"
#include "reductions.cu"
#include "waiting.cu"
#include "warps.cu"

namespace {

// An array on the simulated device.
template <typename T>
struct Array {
  int n;
  T* data;
  explicit Array(int size)
      : n(size), data(static_cast<T*>(simt::device_malloc(size * sizeof(T)))) {}
  Array(int size, T value) : Array(size) { std::fill(data, data + n, value); }
  ~Array() { simt::device_free(data); }
  Array(const Array&) = delete;
  void print() const {
    for (int i = 0; i < n; ++i) std::cout << (i ? " " : "") << data[i];
    std::cout << std::endl;
  }
};

template <typename... P, typename... A>
void run(void (*kernel)(P...), dim3 grid, dim3 block, size_t shared_bytes, A... args) {
  simt::launch(
      grid, block, shared_bytes, [&] { kernel(static_cast<P>(args)...); },
      reinterpret_cast<const void*>(kernel));
}

template <typename Kernel>
void sum(Kernel kernel) {
  const int n = 1000, threads = 256, blocks = 4;
  Array<unsigned> x(n), out(blocks);
  for (int i = 0; i < n; ++i) x.data[i] = static_cast<unsigned>(i);
  run(kernel, blocks, threads, threads * sizeof(unsigned), x.data, n, out.data);
  out.print();
}

void copy_case(int first, int last, int reads_end) {
  Array<float> x(100, 1.0f), out(100);
  run(copy, 1, 128, 0, x.data, out.data, first, last, reads_end);
  out.print();
}

template <typename T, typename Kernel, typename... A>
void show(int n, Kernel kernel, dim3 grid, dim3 block, A... args) {
  Array<T> out(n);
  run(kernel, grid, block, 0, args..., out.data);
  out.print();
}

void spin_case(unsigned releasing_thread) {
  Array<unsigned> flag(1, 0u);
  run(spin, 1, 64, 0, flag.data, releasing_thread);
  flag.print();
}

void atomics_case() {
  Array<int> i(8, 0);
  Array<unsigned> u(6, 0u);
  Array<unsigned long long> q(2, 0ull);
  Array<float> f(1, 0.0f);
  Array<double> d(1, 0.0);
  u.data[2] = u.data[5] = ~0u;
  run(atomics, 1, 20, 0, i.data, u.data, q.data, f.data, d.data);
  i.print(), u.print(), q.print(), f.print(), d.print();
}

const std::map<std::string, void (*)()> cases = {
    {"tree_sum", [] { sum(tree_sum<Bug::kNone>); }},
    {"tree_sum_without_barrier", [] { sum(tree_sum<Bug::kNoBarrier>); }},
    {"tree_sum_of_unwritten", [] { sum(tree_sum<Bug::kUnwritten>); }},
    {"warp_sum", [] { sum(warp_sum<Bug::kNone>); }},
    {"warp_sum_without_barrier", [] { sum(warp_sum<Bug::kNoBarrier>); }},
    {"warp_sum_of_unwritten", [] { sum(warp_sum<Bug::kUnwritten>); }},
    {"early_exit_before_barrier", [] { run(early_exit_before_barrier, 1, 64, 0, 60); }},
    {"no_early_exit_before_barrier", [] { run(early_exit_before_barrier, 1, 64, 0, 64); }},
    {"barriers_in_two_branches", [] { run(barriers_in_two_branches, 1, 64, 0); }},
    {"warp_waits_for_barrier", [] { run(warp_waits_for_barrier, dim3(1, 2), 64, 0); }},
    {"shuffles_in_two_branches", [] { show<int>(32, shuffles_in_two_branches, 1, 32); }},
    {"mask_without_caller", [] { run(mask_without_caller, 1, 32, 0); }},
    {"shuffle_width_of_12", [] { show<int>(1, shuffle_width_of_12, 1, 1); }},
    {"spin", [] { spin_case(63); }},
    {"spin_forever", [] { spin_case(64); }},
    {"predicates", [] { show<int>(192, predicates, 1, 64, 5); }},
    {"all_predicates", [] { show<int>(192, predicates, 1, 64, 64); }},
    {"no_predicates", [] { show<int>(192, predicates, 1, 64, 0); }},
    {"positions", [] { show<int>(8 * 24, positions, dim3(2, 2, 2), dim3(4, 3, 2)); }},
    {"order",
     [] {
       Array<unsigned> counter(1, 0u);
       show<int>(128, order, 2, 64, counter.data);
     }},
    {"recursion", [] { show<int>(2, recursion, 1, 2, 10); }},
    {"deep_recursion", [] { show<int>(2, recursion, 1, 2, 600); }},
    {"shuffles", [] { show<int>(32 * kShuffles, shuffles, 1, 32); }},
    {"shuffles_of_five_lanes", [] { show<int>(5 * kShuffles, shuffles, 1, 5); }},
    {"half_warps", [] { show<int>(32, half_warps, 1, 32); }},
    {"votes", [] { show<unsigned>(40 * kVotes, votes, 1, 40); }},
    {"atomics", atomics_case},
    {"bits", [] { show<int>(kBits, bits, 1, 1); }},
    {"copy", [] { copy_case(0, 100, 100); }},
    {"copy_of_too_few", [] { copy_case(0, 99, 99); }},
    {"store_behind", [] { copy_case(0, 101, 100); }},
    {"store_before", [] { copy_case(-1, 100, -1); }},
    {"copy_behind", [] { copy_case(0, 101, 101); }},
    {"load_behind",
     [] {
       Array<float> x(99, 1.0f), out(100);
       run(copy, 1, 128, 0, x.data, out.data, 0, 100, 100);
     }},
    {"dynamic_shared_store", [] { run(dynamic_shared_store, 1, 32, 128, 31); }},
    {"dynamic_shared_store_behind", [] { run(dynamic_shared_store, 1, 32, 128, 32); }},
    {"static_shared_store_behind", [] { show<float>(32, static_shared_store, 1, 32, 8); }},
    {"leftovers", [] { show<unsigned>(3, leftovers, 3, 32); }},
    {"vector_load", [] { show<float>(1, vector_load, 1, 1, Array<float>(8, 1.0f).data + 4); }},
    {"misaligned_load", [] { show<float>(1, vector_load, 1, 1, Array<float>(8, 1.0f).data + 1); }},
    {"misaligned_plain_load",
     [] { show<float>(1, plain_vector_load, 1, 1, Array<float>(8, 1.0f).data + 2); }},
    {"misaligned_store", [] { run(vector_store, 1, 1, 0, Array<float>(8).data + 1); }},
    {"wide_shift", [] { show<unsigned>(1, shift, 1, 1, 32u); }},
    {"too_many_threads", [] { run(mask_without_caller, 1, dim3(64, 32), 0); }},
    {"no_blocks", [] { run(mask_without_caller, 0, 32, 0); }},
    {"too_much_shared_memory", [] { run(dynamic_shared_store, 1, 32, 300000, 0); }},
    // After an error, and from another CPU thread, launches work as ever.
    {"recovery",
     [] {
       for (int i = 0; i < 3; ++i) {
         try {
           run(warp_waits_for_barrier, 1, 64, 0);
         } catch (const std::runtime_error&) {
         }
         sum(warp_sum<Bug::kNone>);
         std::thread([] { sum(tree_sum<Bug::kNone>); }).join();
       }
     }},
};

}  // namespace

int main(int, char** argv) {
  try {
    simt_set_seed(std::stoull(argv[2]));
    cases.at(argv[1])();
  } catch (const std::exception& e) {
    std::cout << "error: " << e.what() << std::endl;
    return 1;
  }
  return 0;
}
