// The simulated devices, their launches, and what the tests set and ask.
#include <cuda_runtime.h>
#include <cxxabi.h>
#include <dlfcn.h>

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>
#include <set>
#include <string>
#include <utility>

#include "scheduler.h"

namespace simt {
namespace {

// Of each kind one. A plan for one must not be taken for another, as on a machine with several.
constexpr Device kDevices[] = {
    {"sm_90", 9, 0, 132, 227 << 10, 228 << 10, 2048, 16, 50 << 20},
    {"sm_80", 8, 0, 108, 163 << 10, 164 << 10, 2048, 1, 40 << 20},
    {"sm_75", 7, 5, 40, 64 << 10, 64 << 10, 1024, 1, 4 << 20},
    {"sm_120", 12, 0, 84, 99 << 10, 100 << 10, 1536, 8, 64 << 20},
    // Small ones: several images and waves per block with few threads to simulate.
    {"sm_90 with 5 multiprocessors", 9, 0, 5, 227 << 10, 228 << 10, 2048, 8, 1 << 20},
    {"sm_80 with 3 multiprocessors", 8, 0, 3, 163 << 10, 164 << 10, 2048, 1, 1 << 20},
    // As under an MPS limit or in a green context, of which the attributes say nothing.
    {"sm_80 that refuses cooperation", 8, 0, 3, 163 << 10, 164 << 10, 2048, 1, 1 << 20, true},
};
constexpr int kCount = static_cast<int>(std::size(kDevices));

struct Attributes {
  size_t shared_bytes = 48 << 10;
  bool large_clusters = false;
};
std::mutex guard;  // of what follows
std::map<std::pair<int, const void*>, Attributes> attributes;
std::set<std::pair<int, const void*>> loaded;
std::string launches, loads, refusals, accesses;
std::atomic<bool> records_accesses{false};

// Gives what is executed in place of a kernel on a device of that capability, or an error.
using Finder = const char* (*)(const char* kernel, int capability, Translated* found);
Finder finder = nullptr;

thread_local cudaError_t last_error = cudaSuccess;
thread_local std::string message;

// Tensors, and the streams that go with them, are on one device. Which one is current is a matter
// of each thread, and of this runtime alone.
struct Chosen {
  int of_tensors = 0, current = 0;
  unsigned times = 0;  // a test has chosen; threads then begin anew
};
Chosen chosen;
int& current_device() {
  thread_local unsigned times = 0;
  thread_local int device = 0;
  if (times != chosen.times) {
    times = chosen.times;
    device = chosen.current;
  }
  return device;
}

// Whether a stream is captured, and whether the driver then loads kernels: for a thread that has
// said that it does not care what is captured, or for nobody.
enum class Capture : int { none, loads, loads_nothing };
Capture capture = Capture::none;
bool capture_is_valid = true;
thread_local cudaStreamCaptureMode capture_mode = cudaStreamCaptureModeGlobal;

cudaError_t report(cudaError_t error, std::string why) {
  last_error = error;
  message = std::move(why);
  return error;
}

std::string name_of(const void* kernel) {
  Dl_info info{};
  if (!dladdr(kernel, &info) || !info.dli_sname) return "kernel";
  int status = 0;
  char* readable = abi::__cxa_demangle(info.dli_sname, nullptr, nullptr, &status);
  std::string name = readable ? readable : info.dli_sname;
  std::free(readable);
  return name.substr(0, name.rfind('('));
}

Attributes attributes_of(const void* kernel) {
  const std::lock_guard lock(guard);
  const auto found = attributes.find({current_device(), kernel});
  return found == attributes.end() ? Attributes{} : found->second;
}

unsigned cluster_of(const cudaLaunchConfig_t& config) {
  for (unsigned i = 0; i < config.numAttrs; ++i) {
    if (config.attrs[i].id == cudaLaunchAttributeClusterDimension) {
      return config.attrs[i].val.clusterDim.x;
    }
  }
  return 1;
}

int blocks_per_multiprocessor(int threads, size_t shared_bytes) {
  const Device& d = device();
  const int by_shared = d.shared_per_multiprocessor / static_cast<int>(shared_bytes + 1024);
  return std::min({d.threads_per_multiprocessor / (threads + 31) * 32 / 32, by_shared, 24});
}

}  // namespace

const Device& device() { return kDevices[current_device()]; }

// Kernels are loaded when they are first asked for.
cudaError_t load(const void* kernel) {
  const std::lock_guard lock(guard);
  if (loaded.count({current_device(), kernel})) return cudaSuccess;
  const bool legal = capture == Capture::none ||
                     (capture == Capture::loads && capture_mode == cudaStreamCaptureModeRelaxed);
  if (!legal) {
    capture_is_valid = false;
    return report(cudaErrorStreamCaptureUnsupported, "operation not permitted in a capture");
  }
  loaded.insert({current_device(), kernel});
  loads += std::to_string(current_device()) + " " + name_of(kernel) + "\n";
  return cudaSuccess;
}

cudaError_t set_attribute(const void* kernel, cudaFuncAttribute attribute, int value) {
  if (const cudaError_t error = load(kernel)) return error;
  const std::lock_guard lock(guard);
  Attributes& a = attributes[{current_device(), kernel}];
  if (attribute == cudaFuncAttributeMaxDynamicSharedMemorySize) {
    if (value < 0 || value > device().shared_per_block) {
      return report(cudaErrorInvalidValue, "more shared memory than the device has per block");
    }
    a.shared_bytes = static_cast<size_t>(value);
  } else if (attribute == cudaFuncAttributeNonPortableClusterSizeAllowed) {
    if (device().major < 9) return report(cudaErrorInvalidValue, "the device has no clusters");
    a.large_clusters = value != 0;
  }
  return cudaSuccess;
}

cudaError_t occupancy(int* blocks, const void* kernel, int threads, size_t shared_bytes) {
  if (const cudaError_t error = load(kernel)) return error;
  if (threads < 1 || threads > 1024) return report(cudaErrorInvalidValue, "threads per block");
  *blocks = blocks_per_multiprocessor(threads, shared_bytes);
  return cudaSuccess;
}

cudaError_t occupancy_of_clusters(int* clusters, const void* kernel,
                                  const cudaLaunchConfig_t& config) {
  if (const cudaError_t error = load(kernel)) return error;
  const unsigned cluster = cluster_of(config);
  const Device& d = device();
  if (d.major < 9) return report(cudaErrorNotSupported, "the device has no clusters");
  const unsigned most = attributes_of(kernel).large_clusters ? 16 : 8;
  if (cluster > most) return report(cudaErrorInvalidConfiguration, "cluster too large");
  // Whole clusters in groups of 16 multiprocessors, as far as the device has so large ones.
  const int blocks =
      blocks_per_multiprocessor(static_cast<int>(config.blockDim.x), config.dynamicSmemBytes);
  int total = 0;
  for (int left = d.multiprocessors; left > 0; left -= 16) {
    total += std::min(left, d.largest_cluster) * blocks / static_cast<int>(cluster) *
             (std::min(left, 16) / std::max(1, std::min(left, d.largest_cluster)));
  }
  *clusters = total;
  return cudaSuccess;
}

cudaError_t launch(const cudaLaunchConfig_t& config, const void* kernel,
                   const std::function<void()>& body) {
  if (current_device() != chosen.of_tensors) {
    return report(cudaErrorInvalidResourceHandle, "the stream is of another device");
  }
  if (const cudaError_t error = load(kernel)) return error;
  const Device& d = device();
  Launch l;
  l.grid = {config.gridDim.x, config.gridDim.y, config.gridDim.z};
  l.block = {config.blockDim.x, config.blockDim.y, config.blockDim.z};
  l.shared_bytes = config.dynamicSmemBytes;
  l.kernel = name_of(kernel);
  for (unsigned i = 0; i < config.numAttrs; ++i) {
    const cudaLaunchAttribute& a = config.attrs[i];
    if (a.id == cudaLaunchAttributeCooperative) l.cooperative = a.val.cooperative != 0;
    if (a.id == cudaLaunchAttributeClusterDimension) {
      const auto& c = a.val.clusterDim;
      if (c.x == 0 || c.y != 1 || c.z != 1) {
        return report(cudaErrorInvalidConfiguration, "clusters are along x here");
      }
      l.cluster = c.x;
    }
  }
  const auto invalid = [&](const std::string& why) {
    return report(cudaErrorInvalidConfiguration, l.kernel + ": invalid launch: " + why);
  };
  for (const auto& extent : {l.grid, l.block}) {
    if (!extent[0] || !extent[1] || !extent[2]) return invalid("an extent of 0");
  }
  const uint64_t threads = uint64_t{l.block[0]} * l.block[1] * l.block[2];
  if (threads > 1024 || l.block[2] > 64) return invalid("too many threads per block");
  if (l.grid[0] > 0x7fffffffu || l.grid[1] > 65535 || l.grid[2] > 65535) return invalid("the grid");
  const Attributes a = attributes_of(kernel);
  if (l.shared_bytes > a.shared_bytes) {
    return invalid(std::to_string(l.shared_bytes) + " bytes of shared memory, and the kernel's " +
                   "attribute allows " + std::to_string(a.shared_bytes));
  }
  if (l.cluster > 1) {
    const unsigned most = std::min(a.large_clusters ? 16 : 8, d.largest_cluster);
    if (l.cluster > most) return invalid("a cluster of " + std::to_string(l.cluster) + " blocks");
    if (l.grid[0] % l.cluster) return invalid("a grid that clusters do not divide");
  }
  const uint64_t blocks = uint64_t{l.grid[0]} * l.grid[1] * l.grid[2];
  if (l.cooperative) {
    const int each = blocks_per_multiprocessor(static_cast<int>(threads), l.shared_bytes);
    const uint64_t room = static_cast<uint64_t>(each) * static_cast<uint64_t>(d.multiprocessors);
    if (blocks > room || d.refuses_cooperation) {
      const std::lock_guard lock(guard);
      refusals += l.kernel + "\n";
      return report(cudaErrorCooperativeLaunchTooLarge,
                    l.kernel + ": a cooperative launch of more blocks than fit at a time");
    }
  }
  {
    const std::lock_guard lock(guard);
    launches += l.kernel + " grid=" + std::to_string(blocks) +
                " threads=" + std::to_string(threads) + " cluster=" + std::to_string(l.cluster) +
                " shared=" + std::to_string(l.shared_bytes) +
                (l.cooperative ? " cooperative" : "") + "\n";
  }
  const std::string error = run(l, body);
  return error.empty() ? cudaSuccess : report(cudaErrorLaunchFailure, error);
}

cudaError_t find_translated(const void* kernel, Translated* found) {
  if (!finder) return cudaSuccess;
  Dl_info info{};
  if (!dladdr(kernel, &info) || !info.dli_sname) {
    return report(cudaErrorInvalidDeviceFunction, "a kernel without a name");
  }
  const char* error = finder(info.dli_sname, 10 * device().major + device().minor, found);
  return error ? report(cudaErrorInvalidDeviceFunction, error) : cudaSuccess;
}

void accessed(Access how, const void* p, size_t bytes) {
  if (!records_accesses) return;
  const char *const at = static_cast<const char*>(p), *const shared = current->block->shared;
  if (at >= shared && at < shared + current->block->shared_bytes) return;
  const std::lock_guard lock(guard);
  accesses += static_cast<char>(how);
  accesses += ' ' + std::to_string(reinterpret_cast<uintptr_t>(p)) + ' ' + std::to_string(bytes);
  accesses += '\n';
}

}  // namespace simt

const char* cudaGetErrorString(cudaError_t error) {
  return error == simt::last_error ? simt::message.c_str() : cudaGetErrorName(error);
}
const char* cudaGetErrorName(cudaError_t error) {
  switch (error) {
    case cudaSuccess:
      return "cudaSuccess";
    case cudaErrorInvalidDevice:
      return "cudaErrorInvalidDevice";
    case cudaErrorInvalidValue:
      return "cudaErrorInvalidValue";
    case cudaErrorInvalidConfiguration:
      return "cudaErrorInvalidConfiguration";
    case cudaErrorLaunchFailure:
      return "cudaErrorLaunchFailure";
    case cudaErrorCooperativeLaunchTooLarge:
      return "cudaErrorCooperativeLaunchTooLarge";
    case cudaErrorNotSupported:
      return "cudaErrorNotSupported";
    default:
      return "a CUDA error";
  }
}
cudaError_t cudaGetLastError() { return std::exchange(simt::last_error, cudaSuccess); }
cudaError_t cudaPeekAtLastError() { return simt::last_error; }

cudaError_t cudaGetDeviceCount(int* count) {
  *count = simt::kCount;
  return cudaSuccess;
}
cudaError_t cudaGetDevice(int* device) {
  *device = simt::current_device();
  return cudaSuccess;
}
cudaError_t cudaSetDevice(int device) {
  if (device < 0 || device >= simt::kCount) {
    return simt::report(cudaErrorInvalidDevice, "no such device");
  }
  simt::current_device() = device;
  return cudaSuccess;
}
cudaError_t cudaStreamIsCapturing(cudaStream_t, cudaStreamCaptureStatus* status) {
  *status = simt::capture == simt::Capture::none ? cudaStreamCaptureStatusNone
            : simt::capture_is_valid             ? cudaStreamCaptureStatusActive
                                                 : cudaStreamCaptureStatusInvalidated;
  return cudaSuccess;
}
cudaError_t cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode* mode) {
  std::swap(simt::capture_mode, *mode);
  return cudaSuccess;
}
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device) {
  if (device < 0 || device >= simt::kCount) {
    return simt::report(cudaErrorInvalidDevice, "no such device");
  }
  const simt::Device& d = simt::kDevices[device];
  switch (attribute) {
    case cudaDevAttrMaxSharedMemoryPerBlock:
      *value = 48 << 10;
      break;
    case cudaDevAttrMultiProcessorCount:
      *value = d.multiprocessors;
      break;
    case cudaDevAttrL2CacheSize:
      *value = d.l2_bytes;
      break;
    case cudaDevAttrMaxThreadsPerMultiProcessor:
      *value = d.threads_per_multiprocessor;
      break;
    case cudaDevAttrComputeCapabilityMajor:
      *value = d.major;
      break;
    case cudaDevAttrComputeCapabilityMinor:
      *value = d.minor;
      break;
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor:
      *value = d.shared_per_multiprocessor;
      break;
    case cudaDevAttrMaxRegistersPerMultiprocessor:
      *value = 65536;
      break;
    case cudaDevAttrCooperativeLaunch:
      *value = 1;
      break;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin:
      *value = d.shared_per_block;
      break;
    case cudaDevAttrReservedSharedMemoryPerBlock:
      *value = 1024;
      break;
    case cudaDevAttrClusterLaunch:
      *value = d.major >= 9;
      break;
    default:
      return simt::report(cudaErrorInvalidValue, "an attribute that the simulation does not know");
  }
  return cudaSuccess;
}

// ---- for the tests, by ctypes ----

#define SIMT_EXPORT extern "C" __attribute__((visibility("default")))

SIMT_EXPORT void simt_set_seed(uint64_t seed) { simt::options.seed = seed; }
SIMT_EXPORT void simt_set_approximations(uint64_t seed) { simt::options.approximations = seed; }
// The device of tensors and streams from now on, which need not exist; and the current one of each
// thread, as of this runtime.
SIMT_EXPORT int simt_set_device(int of_tensors, int current) {
  if (current < 0 || current >= simt::kCount) return cudaErrorInvalidDevice;
  simt::chosen = {of_tensors, current, simt::chosen.times + 1};
  return cudaSuccess;
}
// What kernels are replaced by; null for their sources.
SIMT_EXPORT void simt_set_finder(simt::Finder finder) { simt::finder = finder; }
SIMT_EXPORT int simt_device_of_tensors() { return simt::chosen.of_tensors; }
SIMT_EXPORT int simt_current_device() { return simt::current_device(); }
// Begins a capture, see Capture, or ends it; returns whether the one that ends is valid.
SIMT_EXPORT int simt_capture(int how) {
  simt::capture = static_cast<simt::Capture>(how);
  return std::exchange(simt::capture_is_valid, true);
}
SIMT_EXPORT int simt_capture_mode() { return simt::capture_mode; }
SIMT_EXPORT int simt_device_count() { return simt::kCount; }
SIMT_EXPORT const char* simt_device_name(int device) { return simt::kDevices[device].name; }
// Whether accesses are written down from now on.
SIMT_EXPORT void simt_record_accesses(int on) { simt::records_accesses = on != 0; }
// Since the last call, a line each: the launches; the kernels that were loaded on which device; the
// cooperative launches that were refused; and accesses: how, address, bytes.
#define SIMT_TAKE(what)                        \
  SIMT_EXPORT const char* simt_take_##what() { \
    static std::string taken;                  \
    const std::lock_guard lock(simt::guard);   \
    taken = std::exchange(simt::what, {});     \
    return taken.c_str();                      \
  }
SIMT_TAKE(launches)
SIMT_TAKE(loads)
SIMT_TAKE(refusals)
SIMT_TAKE(accesses)
