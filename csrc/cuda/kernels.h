// The CUDA kernels as seen from outside: plan a call, give it scratch memory, launch it.
#pragma once

#include "plan.h"

namespace senet {
namespace gpu {

// What the plan of a call depends on, besides the device.
Task task_of(const ForwardArgs& args);
Task task_of(const BackwardArgs& args);

// The plan for a device, by torch's index of it. Cached per thread, kind of call and device.
Plan plan_of(const Task& task, int index);

// Launch on a stream (a cudaStream_t) of the device, with plan.scratch bytes of its memory,
// contents arbitrary. An error message, or null. Nothing is launched where there is nothing to do.
//
// A refused cooperative launch is an error, too; from then on plans for the device have none.
const char* forward(const ForwardArgs& args, const Plan& plan, void* scratch, int index,
                    void* stream);
const char* backward(const BackwardArgs& args, const Plan& plan, void* scratch, int index,
                     void* stream);

// Fills device memory with ones: NaN of every type. For tests.
void poison(void* p, size_t bytes, int index, void* stream);

}  // namespace gpu
}  // namespace senet
