// What a translated module includes: a statement per instruction calls what is here.
#pragma once

#include "matrices.h"

namespace ptx {

inline char* parameter(const void* at) { return static_cast<char*>(const_cast<void*>(at)); }

// A kernel. Its parameters are given by their addresses.
struct Entry {
  const char* name;
  void (*run)(const void* const* parameters);
  int parameters;
  int shared_bytes;  // beside what the launch asks for
};

}  // namespace ptx
