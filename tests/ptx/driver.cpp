// Runs kernels of translated PTX for tests, by ctypes.
#include <cuda_runtime.h>

#include <string>

#include "ptx.h"

// What went wrong, or an empty text. `grid` has three extents. `only` are the clusters that run, if
// it is not null.
extern "C" const char* ptx_run(const ptx::Entry* entry, const unsigned* grid, unsigned block,
                               unsigned cluster, unsigned shared, int cooperative,
                               const void* const* parameters, uint64_t seed, const uint32_t* only,
                               unsigned count) {
  static std::string error;
  simt::Launch launch;
  launch.grid = {grid[0], grid[1], grid[2]};
  launch.block = {block, 1, 1};
  launch.cluster = cluster;
  launch.shared_bytes = shared + static_cast<unsigned>(entry->shared_bytes);
  launch.cooperative = cooperative != 0;
  launch.kernel = entry->name;
  if (only) launch.only.assign(only, only + count);
  simt::options.seed = seed;
  error = simt::run(launch, [&] { entry->run(parameters); });
  return error.c_str();
}
