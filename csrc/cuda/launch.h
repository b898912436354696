// Launching a kernel the way its plan says, and asking the device how many of it run at once.
#pragma once

#include <cuda_runtime.h>

#include <atomic>
#include <mutex>
#include <string>

#include "kernels.h"

namespace senet {
namespace gpu {

constexpr int kDevices = 128;  // torch's index of a device is an int8_t

// The CUDA runtime linked into this library is not torch's: which device torch chose there, it need
// not know. In this scope the device is the current one here.
class CurrentDevice {
 public:
  explicit CurrentDevice(int index) : error_(cudaGetDevice(&before_)) {
    if (error_ != cudaSuccess || before_ == index) return;
    error_ = cudaSetDevice(index);
    changed_ = error_ == cudaSuccess;
  }
  ~CurrentDevice() {
    if (changed_) cudaSetDevice(before_);
  }
  CurrentDevice(const CurrentDevice&) = delete;
  cudaError_t error() const { return error_; }

 private:
  int before_ = 0;
  cudaError_t error_;
  bool changed_ = false;
};

// In this scope the thread may do what could disturb a capture, but does not conflict with it: load
// a kernel, which allocates memory.
class WhateverIsCaptured {
 public:
  WhateverIsCaptured() : changed_(cudaThreadExchangeStreamCaptureMode(&mode_) == cudaSuccess) {}
  ~WhateverIsCaptured() {
    if (changed_) cudaThreadExchangeStreamCaptureMode(&mode_);
  }
  WhateverIsCaptured(const WhateverIsCaptured&) = delete;

 private:
  cudaStreamCaptureMode mode_ = cudaStreamCaptureModeRelaxed;
  bool changed_;
};

// Whether the stream is captured, as far as the runtime says: it does not of the default stream
// while another one is.
inline bool is_captured(void* stream) {
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  if (cudaStreamIsCapturing(static_cast<cudaStream_t>(stream), &status) != cudaSuccess) {
    cudaGetLastError();
    return true;
  }
  return status != cudaStreamCaptureStatusNone;
}

// A step that is taken once per device; where it failed, the next call tries again.
class OncePerDevice {
 public:
  template <class Step>
  cudaError_t operator()(int index, Step step) {
    if (index < 0 || index >= kDevices) return cudaErrorInvalidDevice;
    if (done_[index].load(std::memory_order_acquire)) return cudaSuccess;
    const std::lock_guard lock(guard_);
    if (done_[index].load(std::memory_order_relaxed)) return cudaSuccess;
    const cudaError_t error = step();
    if (error == cudaSuccess) done_[index].store(true, std::memory_order_release);
    return error;
  }

 private:
  std::atomic<bool> done_[kDevices] = {};
  std::mutex guard_;
};

// What is settled once per kernel and device: that it is loaded, that a block may have all the
// shared memory there is, and a cluster more than eight blocks. On the current device.
class Prepared {
 public:
  cudaError_t operator()(const void* kernel, int index, const Device& device) {
    return once_(index, [&] { return prepare(kernel, device); });
  }

 private:
  static cudaError_t prepare(const void* kernel, const Device& device) {
    const WhateverIsCaptured scope;
    const int most = static_cast<int>(device.shared_per_block);
    cudaFuncAttributes loaded{};
    cudaError_t e = cudaFuncGetAttributes(&loaded, kernel);
    if (e == cudaSuccess) {
      e = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, most);
    }
    if (e == cudaSuccess) {
      e = cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout, 100);
    }
    if (e == cudaSuccess && device.capability >= 90) {
      e = cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
    }
    return e;
  }

  OncePerDevice once_;
};

// What there is to know of a device, asked at its first use. Where that fails the device is as far
// as it is known, and asked again the next time.
cudaError_t device_of(int index, Device* device);
// From now on no plan for the device has a cooperative launch.
void refuse_cooperation(int index);

// A launch's configuration, and the attribute it points to.
struct Configuration {
  cudaLaunchConfig_t config{};
  cudaLaunchAttribute attribute{};

  Configuration(const Plan& plan, int64_t blocks, void* stream) {
    config.gridDim = dim3(static_cast<unsigned>(blocks));
    config.blockDim = dim3(static_cast<unsigned>(plan.threads));
    config.dynamicSmemBytes = static_cast<size_t>(plan.shared);
    config.stream = static_cast<cudaStream_t>(stream);
    if (plan.exchange == Exchange::cluster) {
      attribute.id = cudaLaunchAttributeClusterDimension;
      attribute.val.clusterDim.x = static_cast<unsigned>(plan.blocks);
      attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
    } else if (plan.exchange == Exchange::grid) {
      attribute.id = cudaLaunchAttributeCooperative;
      attribute.val.cooperative = 1;
    }
    config.attrs = &attribute;
    config.numAttrs = plan.exchange == Exchange::none ? 0 : 1;
  }
  Configuration(const Configuration&) = delete;
};

// An error message, or null. Valid until the next one on this thread.
inline const char* explain_error(cudaError_t error, const Plan& plan, int index,
                                 const Device& device, bool prepared, void* stream) {
  if (error == cudaSuccess) return nullptr;
  thread_local std::string text;
  text = cudaGetErrorString(error);
  cudaGetLastError();  // reported here
  text += " (launching: " + describe(plan) + "; on device " + std::to_string(index) +
          " of capability " + std::to_string(device.capability / 10) + "." +
          std::to_string(device.capability % 10);
  text += "; the library was built for the architectures that backends() shows)";
  if (error == cudaErrorCooperativeLaunchTooLarge) {
    text +=
        "; an MPS limit or a green context may leave this process fewer multiprocessors than the "
        "device has";
  }
  if (!prepared && is_captured(stream)) {
    text +=
        "; its kernel could not be loaded while a stream is captured: make one such call, with "
        "tensors of this dtype on this device, before the capture";
  }
  return text.c_str();
}

// The kernel's parameters, which the driver copies: what every device takes.
constexpr size_t kMostParameters = 4096;

template <class Args>
const char* launch(void (*kernel)(const Args), Prepared& prepared, const Plan& plan, int64_t blocks,
                   const Args& args, int index, void* stream) {
  static_assert(sizeof(Args) <= kMostParameters, "more than a kernel's parameters may be");
  const CurrentDevice current(index);
  Device device;
  cudaError_t error = current.error();
  if (error == cudaSuccess) error = device_of(index, &device);
  if (error == cudaSuccess) error = prepared(reinterpret_cast<const void*>(kernel), index, device);
  const bool ready = error == cudaSuccess;
  if (ready) {
    Configuration c(plan, blocks, stream);
    error = cudaLaunchKernelEx(&c.config, kernel, args);
    if (error == cudaErrorCooperativeLaunchTooLarge) refuse_cooperation(index);
  }
  return explain_error(error, plan, index, device, ready, stream);
}

// How many blocks of a plan a multiprocessor runs at once, and how many clusters the device; 0
// where it does not say. Of the current device.
struct Room {
  int per_multiprocessor = 0, clusters = 0;
  bool known = false;  // else the kernel could not be loaded
};
template <class Args>
Room room_for(void (*kernel)(const Args), Prepared& prepared, const Plan& plan, int index,
              const Device& device) {
  Room room;
  room.known = prepared(reinterpret_cast<const void*>(kernel), index, device) == cudaSuccess;
  if (room.known && cudaOccupancyMaxActiveBlocksPerMultiprocessor(
                        &room.per_multiprocessor, kernel, plan.threads,
                        static_cast<size_t>(plan.shared)) != cudaSuccess) {
    room.per_multiprocessor = 0;
  }
  if (room.known && plan.exchange == Exchange::cluster) {
    Configuration c(plan, plan.blocks, nullptr);
    if (cudaOccupancyMaxActiveClusters(&room.clusters, kernel, &c.config) != cudaSuccess) {
      room.clusters = 0;
    }
  }
  cudaGetLastError();  // not knowing is no error of the program's
  return room;
}

// Calls f(kernel, prepared) with the instance of Kernels that a call needs. The functions `before`
// that networks have are instances of their own of the lean kernels, which the plan chooses: for
// 16-bit types all of them, for float two. The other kernels take any function.
template <class Kernels, int kBytes, bool kVector, Fn kBefore, Way kWay, class F>
auto with(F f) {
  static Prepared prepared;
  return f(Kernels::template kernel<kBytes, kVector, static_cast<int>(kBefore), kWay>(), prepared);
}
template <class Kernels, int kBytes, Way kWay, class F>
auto with_lean(Fn before, F f) {
  if constexpr (kBytes == 2) {
    if (before == Fn::relu) return with<Kernels, kBytes, true, Fn::relu, kWay>(f);
    if (before == Fn::hardswish) return with<Kernels, kBytes, true, Fn::hardswish, kWay>(f);
  }
  if (before == Fn::silu) return with<Kernels, kBytes, true, Fn::silu, kWay>(f);
  return with<Kernels, kBytes, true, Fn::identity, kWay>(f);
}
template <class Kernels, int kBytes, class F>
auto with_general(bool vector, F f) {
  return vector ? with<Kernels, kBytes, true, kAny, Way::general>(f)
                : with<Kernels, kBytes, false, kAny, Way::general>(f);
}
template <class Kernels, class F>
auto with_instance(DType dtype, Fn before, const Plan& plan, F f) {
  if (dtype == DType::f64) return with<Kernels, 8, false, kAny, Way::general>(f);
  if (dtype == DType::f32) {
    return plan.lean ? with_lean<Kernels, 4, Way::lean>(before, f)
                     : with_general<Kernels, 4>(plan.vector, f);
  }
  if (!plan.lean) return with_general<Kernels, 2>(plan.vector, f);
  return dtype == DType::bf16 ? with_lean<Kernels, 2, Way::lean>(before, f)
                              : with_lean<Kernels, 2, Way::lean_f16>(before, f);
}

// Calls f(kernel, prepared) with every instance of Kernels, with some of them more than once.
template <class Kernels, class F>
void with_every_instance(F f) {
  for (DType dtype : {DType::f64, DType::f32, DType::f16, DType::bf16}) {
    for (int ways = 0; ways < 4; ++ways) {
      Plan plan;
      plan.vector = ways & 1;
      plan.lean = ways == 3;
      for (int before = 0; before <= static_cast<int>(kLastFn); ++before) {
        with_instance<Kernels>(dtype, static_cast<Fn>(before), plan, f);
      }
    }
  }
}

// Prepares kernels of a kind, for `each` to name, when the first of them is called on the device: a
// capture that comes later then loads nothing. Within a capture no more is loaded than the call
// needs. What fails here is reported by the call that needs it.
template <class Each>
void preload(OncePerDevice& once, int index, void* stream, Each each) {
  once(index, [&] {
    if (is_captured(stream)) return cudaErrorStreamCaptureUnsupported;  // the next call, then
    const CurrentDevice current(index);
    Device device;
    cudaError_t error = current.error();
    if (error == cudaSuccess) error = device_of(index, &device);
    if (error != cudaSuccess) return error;
    each([&](auto* kernel, Prepared& prepared) {
      prepared(reinterpret_cast<const void*>(kernel), index, device);
    });
    cudaGetLastError();
    return cudaSuccess;
  });
}

// What device.cpp, which has no kernels, asks of forward.cu and backward.cu, of the current device.
Room forward_room(const Task& task, const Plan& plan, int index, const Device& device);
Room backward_room(const Task& task, const Plan& plan, int index, const Device& device);
// The capability the kernels were compiled for, at most the device's; and the largest cluster whose
// blocks each have a multiprocessor to themselves.
cudaError_t compiled_capability(int* capability, const Device& device);
int largest_cluster(const Device& device);

}  // namespace gpu
}  // namespace senet
