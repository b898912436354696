// The CPU: its kernels for the widest instruction set there is, its threads and its memory.
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#if __has_include(<unistd.h>)
#include <unistd.h>
#endif
#if defined(__linux__)
#include <sys/mman.h>
#endif
#if defined(SENET_ARM64)
#include <sys/auxv.h>
#endif

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <memory>
#include <string>
#include <vector>

#include "../host.h"
#include "host.h"

namespace senet {
namespace {

// ---- the instruction set ----

struct Kernels {
  const char* name;
  void (*forward)(const ForwardArgs&, const Runtime&);
  void (*backward)(const BackwardArgs&, const Runtime&);
};

// The widest set this processor has; SENET_KERNELS_ISA names another (for tests and bug reports).
const Kernels& kernels() {
  static const Kernels chosen = [] {
#if defined(SENET_ARM64)
    std::vector<Kernels> usable = {{"neon", neon::forward, neon::backward}};
    constexpr unsigned long kBf16 = 1ul << 14;  // HWCAP2_BF16, which old headers lack
    if (getauxval(AT_HWCAP2) & kBf16) {
      usable.push_back({"neon_bf16", neon_bf16::forward, neon_bf16::backward});
    }
#else
    std::vector<Kernels> usable = {{"baseline", baseline::forward, baseline::backward}};
#endif
#if defined(SENET_X86)
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
        __builtin_cpu_supports("f16c")) {
      usable.push_back({"avx2", avx2::forward, avx2::backward});
      if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
          __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq")) {
        usable.push_back({"avx512", avx512::forward, avx512::backward});
      }
    }
#endif
    const char* wanted = std::getenv("SENET_KERNELS_ISA");
    if (!wanted || !*wanted) return usable.back();
    for (const Kernels& k : usable) {
      if (std::string(wanted) == k.name) return k;
    }
    STD_TORCH_CHECK(false, "SENET_KERNELS_ISA: this processor does not run ", wanted);
    return usable.front();
  }();
  return chosen;
}

// ---- threads and scratch memory ----

// A growing buffer per calling thread: no allocation per call once warm. kFor tells one use from
// another, whose memory must live at the same time.
enum class For { kernels, saved };
template <For kFor>
void* scratch(size_t bytes) {
  struct Free {
    void operator()(void* p) const { std::free(p); }
  };
  thread_local std::unique_ptr<void, Free> buffer;
  thread_local size_t size = 0;
  if (bytes > size) {
    buffer.reset();
    size = 0;
    const size_t rounded = (bytes + 4095) / 4096 * 4096;
    buffer.reset(std::aligned_alloc(64, rounded));
    STD_TORCH_CHECK(buffer != nullptr, "out of memory: ", rounded, " bytes of scratch memory");
    size = rounded;
  }
  if (poisons()) std::memset(buffer.get(), 0xff, bytes);
  return buffer.get();
}

void parallel_for(int64_t n, void (*body)(int64_t, int64_t, void*), void* context) {
  torch::stable::parallel_for(0, n, 1,
                              [=](int64_t begin, int64_t end) { body(begin, end, context); });
}

int64_t core_cache() {
#if defined(_SC_LEVEL2_CACHE_SIZE)
  static const int64_t bytes = std::max<int64_t>(0, sysconf(_SC_LEVEL2_CACHE_SIZE));
  return bytes;
#else
  return 0;
#endif
}

// How many processors a list of Linux's names, as in 0-3,8-11; at least 1.
int64_t count_processors(const std::string& path) {
  std::ifstream file(path);
  int64_t first = 0, count = 0;
  for (char after = ','; after == ',' && file >> first;) {
    int64_t last = first;
    if (file.peek() == '-') file >> after >> last;
    count += last - first + 1;
    after = 0;
    file >> after;
  }
  return std::max<int64_t>(1, count);
}

// A cache after a core's own, and how many cores share it: what Linux says, for sysconf is far off
// on some virtual machines. No bytes where nothing says. SENET_KERNELS_LAST_CACHE says otherwise
// (for tests).
struct SharedCache {
  int64_t bytes = 0, cores = 1;
};
SharedCache read_shared_cache() {
  if (const char* bytes = std::getenv("SENET_KERNELS_LAST_CACHE"); bytes && *bytes) {
    return {std::atoll(bytes), 1 << 20};
  }
  const std::string processor = "/sys/devices/system/cpu/cpu0/",
                    cache = processor + "cache/index3/";
  SharedCache shared;
  char unit = 0;
  if (std::ifstream file(cache + "size"); file >> shared.bytes >> unit) {  // as in 32768K
    shared.bytes *= unit == 'K' ? 1 << 10 : unit == 'M' ? 1 << 20 : 1;
  }
  shared.cores =
      std::max<int64_t>(1, count_processors(cache + "shared_cpu_list") /
                               count_processors(processor + "topology/thread_siblings_list"));
  return shared;
}

int64_t last_cache(int64_t threads) {
  static const SharedCache cache = read_shared_cache();
  return cache.bytes * ((threads + cache.cores - 1) / cache.cores);
}

// Asks for a few pages of it: a large block is all from the system, or all used before.
bool is_untouched([[maybe_unused]] const void* p, [[maybe_unused]] int64_t bytes) {
#if defined(__linux__)
  static const uintptr_t page = static_cast<uintptr_t>(sysconf(_SC_PAGESIZE));
  for (int64_t eighth : {1, 3, 5, 7}) {
    const uintptr_t at =
        reinterpret_cast<uintptr_t>(p) + static_cast<uintptr_t>(bytes / 8 * eighth);
    unsigned char resident = 1;
    if (mincore(reinterpret_cast<void*>(at / page * page), page, &resident) != 0) return false;
    if (!(resident & 1)) return true;
  }
#endif
  return false;
}

Runtime runtime() {
  const int threads = static_cast<int>(torch::stable::get_num_threads());
  return {threads,      core_cache(), last_cache(threads),
          is_untouched, parallel_for, scratch<For::kernels>};
}

}  // namespace

std::string cpu_isa() { return kernels().name; }

const Host& cpu_host() {
  static const Host host = {
      "a CPU tensor",
      aoti_torch_device_type_cpu,
      [](const torch::stable::Tensor& t, int32_t) { return t.is_cpu(); },
      scratch<For::saved>,
      [](const ForwardArgs& args, int32_t) { kernels().forward(args, runtime()); },
      [](const BackwardArgs& args, int32_t) { kernels().backward(args, runtime()); },
      [](void* p, size_t bytes, int32_t) { std::memset(p, 0xff, bytes); }};
  return host;
}

}  // namespace senet
