#pragma once

#include <string>

namespace senet {

// The name of the instruction set in use.
std::string cpu_isa();

}  // namespace senet
