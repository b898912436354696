// How a call is cut into blocks: the plan, and the one function that chooses it.
//
// No CUDA header: a plan can be made, and explained, for a device that is not there.
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <string>

#include "../se.h"

namespace senet {
namespace gpu {

// `before` of a kernel for which it is known at run time only.
constexpr Fn kAny = static_cast<Fn>(-1);

// What a plan depends on of a device.
struct Device {
  int capability = 0;  // 90 for sm_90
  int multiprocessors = 0;
  int64_t shared_per_block = 0;           // the most a launch may ask for
  int64_t shared_per_multiprocessor = 0;  // for all blocks on it
  int threads_per_multiprocessor = 0;
  int registers_per_multiprocessor = 65536;
  int blocks_per_multiprocessor = 32;  // at most, whatever else there would be room for
  bool cooperative = false;
  int largest_cluster = 1;  // blocks
};

// How the blocks that share an image exchange their sums.
enum class Exchange : int {
  none,     // one block per image
  cluster,  // in each other's shared memory
  grid,     // through global memory, under a cooperative launch
};
// Which loops over x a kernel has: the general ones, or those of lean.cuh for a 16-bit or a float
// dtype, of which fp16 has its own.
enum class Way : int { general, lean, lean_f16 };
// What a block's slice of an image is: some channels at all positions, or the reverse.
enum class Axis : int { channels, space };

// A plan's choices as asked for by name, for tests and bug reports: SENET_KERNELS_CUDA_PLAN, say
// "exchange=cluster,blocks=4,axis=space,resident=1,slots=2,weights=1,threads=256,groups=3".
// -1 leaves the choice to the plan.
struct Policy {
  int exchange = -1, blocks = -1, axis = -1, resident = -1, slots = -1, weights = -1;
  int threads = -1, groups = -1, lean = -1;
  const char* error = nullptr;  // what is wrong with the text it was read from
};

// Where a block's arrays begin in its shared memory, in bytes. First of all there is what the block
// knows of itself (Self in images.cuh), in so many bytes.
constexpr int kSelfBytes = 64;
struct Carving {
  int sums, scale, shift, mean, affine, hidden, exchange, scratch, bits, weights, barriers, slots;
};

// Bytes before each array but the first, and behind each slot, that nobody may touch: the
// simulation on a CPU finds out who does.
#if defined(SENET_SIMT)
constexpr int kRedZone = 32;
#else
constexpr int kRedZone = 0;
#endif

struct Plan {
  Exchange exchange = Exchange::none;
  Axis axis = Axis::channels;
  int blocks = 1;         // that share an image
  int groups = 1;         // of them: images in progress; each takes every groups-th image
  int threads = 256;      // per block
  bool vector = false;    // 16-byte accesses
  bool resident = false;  // the slice stays in shared memory from the first pass to the second
  int slots = 0;          // ... and so many slices: the one in progress, and those being loaded
  bool bulk = false;      // ... brought in by bulk copies
  bool lean = false;      // the loops of lean.cuh
  bool weights = false;   // slices of the weights stay in shared memory across images
  int per_multiprocessor = 1;  // blocks; as computed, or as the device said

  int granule = 1;         // a slice is a multiple of so many channels (or positions)
  int local_channels = 0;  // most that a block keeps vectors of
  int exchanged = 0;       // elements that a block publishes per image
  int lanes = 32;          // threads that share a row in a sum over positions
  int segments = 1;        // ... times so many groups of them, for few and long rows
  int band = 1;            // lean: the fewest rows that are whole units
  int stretch = 0;  // units whose bits of the mask are gathered at a time; 0: they need not be
  Carving at{};
  int shared = 0;       // bytes per block
  int64_t scratch = 0;  // bytes of global memory for the call
  // Within scratch: per-image vectors for the parameters' gradients, buffers of the exchange.
  int64_t of_du = 0, of_dh = 0, of_ds = 0, of_daffine = 0, of_exchange = 0, of_counters = 0;
  const char* error = nullptr;  // why there is no plan for the call
};

// What else of a call a plan depends on.
struct Task {
  Shape shape;
  DType dtype, parameter_dtype;
  Fn before;  // chooses the instance of the kernel
  bool backward;
  bool aligned;                // 16-byte vectors are possible, as far as addresses and strides go
  bool masks;                  // forward: after="relu", whose bit mask may be wanted
  bool needs_dx, needs_ds;     // backward: of x, and for the gradients of alpha and beta
  bool affine, needs_daffine;  // before_affine, and its gradients
  // y = p scale, or relu(p scale + residual), over all positions; backward with a mask whose bytes
  // units are, and dx wanted.
  bool plain;
};

Plan make_plan(const Task& task, const Device& device, const Policy& policy);

// Shares out the images among at most `room` groups, so that the last turn is as full as can be.
void share_out(Plan* plan, int64_t batch, int64_t room);

// "cluster of 8 blocks per image, 98 KB each, 2 blocks per multiprocessor, single pass", say.
std::string describe(const Plan& plan);

// What SENET_KERNELS_CUDA_PLAN asks for, where it is set.
std::optional<Policy> named_policy();

}  // namespace gpu
}  // namespace senet
