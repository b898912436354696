// run_package MODEL.pt2 CASES.pt LIBRARY: an AOTInductor package with fused operators, in a process
// without Python. make_package.py writes the package and the cases: inputs and right outputs.
#include <ATen/ATen.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <c10/core/InferenceMode.h>
#include <dlfcn.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>
#include <torch/csrc/jit/serialization/pickle.h>

#include <fstream>
#include <iostream>
#include <iterator>
#include <stdexcept>
#include <string>

namespace {

// The library registers its operators as it is loaded, and they have to stay: it is never closed.
void load_operators(const char* library) {
  if (library && !dlopen(library, RTLD_NOW | RTLD_GLOBAL))
    throw std::runtime_error(std::string("the library does not load: ") + dlerror());
  if (!c10::Dispatcher::singleton().findSchema({"senet_kernels::squeeze_excite", ""}))
    throw std::runtime_error(
        "the operator senet_kernels::squeeze_excite is missing: LIBRARY is expected to be the file "
        "senet_kernels/_native.abi3.so, got " +
        std::string(library ? library : "none"));
}

// A list of tensors as torch.save writes it.
c10::List<c10::IValue> read_tensors(const char* path) {
  std::ifstream file(path, std::ios::binary);
  if (!file) throw std::runtime_error(std::string("cannot read ") + path);
  return torch::jit::pickle_load({std::istreambuf_iterator<char>(file), {}}).toList();
}

}  // namespace

int main(int argc, char** argv) try {
  if (argc != 3 && argc != 4) {
    std::cerr << "usage: run_package MODEL.pt2 CASES.pt LIBRARY\n";
    return 2;
  }
  load_operators(argc == 4 ? argv[3] : nullptr);
  c10::InferenceMode guard;
  torch::inductor::AOTIModelPackageLoader model(argv[1]);
  const auto cases = read_tensors(argv[2]);  // an input, its output, the next input, ...
  for (size_t i = 0; i + 1 < cases.size(); i += 2) {
    const at::Tensor x = cases.get(i).toTensor(), right = cases.get(i + 1).toTensor();
    const double off = (model.run({x})[0] - right).abs().max().item<double>();
    const double largest = right.abs().max().item<double>();
    std::cout << x.sizes() << " difference " << off << " of " << largest << "\n";
  }
} catch (const c10::Error& error) {
  std::cerr << "error: " << error.what_without_backtrace() << "\n";
  return 1;
} catch (const std::exception& error) {
  std::cerr << "error: " << error.what() << "\n";
  return 1;
}
