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
};
constexpr int kCount = static_cast<int>(std::size(kDevices));

struct Attributes {
  size_t shared_bytes = 48 << 10;
  bool large_clusters = false;
};
std::mutex guard;  // of what follows
std::map<std::pair<int, const void*>, Attributes> attributes;
std::string launches, accesses;
std::atomic<bool> records_accesses{false};

thread_local cudaError_t last_error = cudaSuccess;
thread_local std::string message;
int chosen = 0;  // for all threads: autograd has threads of its own

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
  const auto found = attributes.find({chosen, kernel});
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

const Device& device() { return kDevices[chosen]; }

cudaError_t set_attribute(const void* kernel, cudaFuncAttribute attribute, int value) {
  const std::lock_guard lock(guard);
  Attributes& a = attributes[{chosen, kernel}];
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

cudaError_t occupancy(int* blocks, int threads, size_t shared_bytes) {
  if (threads < 1 || threads > 1024) return report(cudaErrorInvalidValue, "threads per block");
  *blocks = blocks_per_multiprocessor(threads, shared_bytes);
  return cudaSuccess;
}

cudaError_t occupancy_of_clusters(int* clusters, const void* kernel,
                                  const cudaLaunchConfig_t& config) {
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
    if (blocks > static_cast<uint64_t>(each) * static_cast<uint64_t>(d.multiprocessors)) {
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
  *device = simt::chosen;
  return cudaSuccess;
}
cudaError_t cudaSetDevice(int device) {
  if (device < 0 || device >= simt::kCount) {
    return simt::report(cudaErrorInvalidDevice, "no such device");
  }
  simt::chosen = device;
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
SIMT_EXPORT int simt_set_device(int device) { return cudaSetDevice(device); }
SIMT_EXPORT int simt_device_count() { return simt::kCount; }
SIMT_EXPORT const char* simt_device_name(int device) { return simt::kDevices[device].name; }
// Whether accesses are written down from now on, and those since the last call, a line each: how,
// address, bytes.
SIMT_EXPORT void simt_record_accesses(int on) { simt::records_accesses = on != 0; }
SIMT_EXPORT const char* simt_take_accesses() {
  static std::string taken;
  const std::lock_guard lock(simt::guard);
  taken = std::exchange(simt::accesses, {});
  return taken.c_str();
}
// The launches since the last call, a line each.
SIMT_EXPORT const char* simt_take_launches() {
  static std::string taken;
  const std::lock_guard lock(simt::guard);
  taken = std::exchange(simt::launches, {});
  return taken.c_str();
}
