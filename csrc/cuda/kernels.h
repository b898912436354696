// The CUDA kernels as seen from outside: plan a call, give it scratch memory, launch it.
#pragma once

#include "plan.h"

namespace senet {
namespace gpu {

// The current device, queried once; capability 0 where there is none.
const Device& current_device();

// What the plan of a call depends on, besides the device.
Task task_of(const ForwardArgs& args);
Task task_of(const BackwardArgs& args);

// The plan for the current device. Cached per thread, kind of call and device.
Plan plan_of(const Task& task);

// Launch on a stream (a cudaStream_t), with plan.scratch bytes of device memory, contents
// arbitrary. An error message, or null. Nothing is launched where there is nothing to do.
const char* forward(const ForwardArgs& args, const Plan& plan, void* scratch, void* stream);
const char* backward(const BackwardArgs& args, const Plan& plan, void* scratch, void* stream);

// Fills device memory with ones: NaN of every type. For tests.
void poison(void* p, size_t bytes, void* stream);

}  // namespace gpu
}  // namespace senet
