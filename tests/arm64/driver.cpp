// The CPU kernels of one instruction set without torch: runs cases from a file, writes what they
// computed to another. For `qemu-aarch64`, see tests/test_arm64.py, which writes the cases.
//
// driver CASES RESULTS. All inputs and results end at a page that must not be touched, or begin
// behind one. Results and scratch memory are NaN before the kernels run.
#include <sys/mman.h>

#include <array>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <thread>
#include <vector>

#include "se.h"

using namespace senet;

namespace {

constexpr size_t kPage = 1 << 16;  // at least that of any system

struct Unmap {
  size_t bytes;
  void operator()(void* p) const { munmap(p, bytes); }
};

// `bytes` of memory with a guard page behind the last, or before the first.
class Guarded {
 public:
  Guarded() = default;
  Guarded(size_t bytes, bool at_end) {
    const size_t inside = (bytes + kPage - 1) / kPage * kPage, all = inside + 2 * kPage;
    void* p = mmap(nullptr, all, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (p == MAP_FAILED) std::abort();
    memory_ = {p, Unmap{all}};
    char* first = static_cast<char*>(p);
    mprotect(first, kPage, PROT_NONE);
    mprotect(first + kPage + inside, kPage, PROT_NONE);
    data_ = first + kPage + (at_end ? inside - bytes : 0);
  }
  char* data() const { return data_; }

 private:
  std::unique_ptr<void, Unmap> memory_{nullptr, Unmap{0}};
  char* data_ = nullptr;
};

void check(bool right, const char* what) {
  if (right) return;
  std::fprintf(stderr, "driver: %s\n", what);
  std::exit(2);
}

int64_t read_word(std::FILE* file) {
  int64_t word = 0;
  check(std::fread(&word, sizeof word, 1, file) == 1, "the file of cases ends too soon");
  return word;
}

void team(int64_t n, void (*body)(int64_t, int64_t, void*), void* context) {
  const int64_t threads = std::min<int64_t>(n, 3);
  std::vector<std::thread> others;
  for (int64_t i = 1; i < threads; ++i) {
    others.emplace_back([=] { body(n * i / threads, n * (i + 1) / threads, context); });
  }
  body(0, n / threads, context);
  for (std::thread& t : others) t.join();
}

void* scratch(size_t bytes) {
  thread_local std::unique_ptr<void, decltype(&std::free)> buffer{nullptr, std::free};
  buffer.reset(std::aligned_alloc(64, (bytes + 63) / 64 * 64));
  std::memset(buffer.get(), 0xff, bytes);
  return buffer.get();
}

bool is_untouched(const void*, int64_t) { return false; }

// In the order of the file.
enum In {
  kX,
  kResidual,
  kLengths,
  kW1,
  kB1,
  kW2,
  kB2,
  kAlpha,
  kBeta,
  kScale,
  kShift,
  kGiven,
  kDy,
  kInputs
};
enum Out {
  kY,
  kMask,
  kZ,
  kH,
  kU,
  kDx,
  kDresidual,
  kDw1,
  kDb1,
  kDw2,
  kDb2,
  kDalpha,
  kDbeta,
  kDscale,
  kDshift,
  kDu,
  kResults
};

struct Memory {
  std::array<Guarded, kInputs> in;
  std::array<Guarded, kResults> out;
  std::array<size_t, kResults> bytes;
};

template <class Args>
Args arguments(const Shape& shape, DType dtype, DType parameters, const Options& options,
               const Memory& m) {
  Args args{};
  args.shape = shape;
  args.dtype = dtype;
  args.options = options;
  args.parameters = {parameters,         m.in[kW1].data(),    m.in[kB1].data(),
                     m.in[kW2].data(),   m.in[kB2].data(),    m.in[kAlpha].data(),
                     m.in[kBeta].data(), m.in[kScale].data(), m.in[kShift].data()};
  args.lengths = reinterpret_cast<const int64_t*>(m.in[kLengths].data());
  args.x = {m.in[kX].data(), shape.image()};
  args.z = m.out[kZ].data();
  args.h = m.out[kH].data();
  args.u = shape.form == Form::scale ? m.in[kGiven].data() : m.out[kU].data();
  return args;
}

void run_case(std::FILE* cases, std::FILE* results) {
  int64_t word[14];
  for (int64_t& w : word) w = read_word(cases);
  const Shape shape{
      static_cast<Form>(word[0]), word[1], word[2], word[3], word[4], word[5], word[6] != 0};
  const auto dtype = static_cast<DType>(word[7]), parameters = static_cast<DType>(word[8]);
  const Options options = unpack_options(word[9]);
  const Runtime runtime{static_cast<int>(word[10]), word[11], 0, is_untouched, team, scratch};
  const bool at_end = word[12] != 0;
  check(word[13] == kInputs * 100 + kResults, "the file of cases is not for this program");
  Memory m;
  for (Guarded& in : m.in) {
    const int64_t bytes = read_word(cases);
    if (bytes < 0) continue;
    in = Guarded(static_cast<size_t>(bytes), at_end);
    check(std::fread(in.data(), 1, static_cast<size_t>(bytes), cases) == static_cast<size_t>(bytes),
          "the file of cases ends too soon");
  }
  for (int i = 0; i < kResults; ++i) {
    const int64_t bytes = read_word(cases);
    m.bytes[i] = static_cast<size_t>(std::max<int64_t>(bytes, 0));
    if (bytes < 0) continue;
    m.out[i] = Guarded(m.bytes[i], at_end);
    std::memset(m.out[i].data(), 0xff, m.bytes[i]);
  }

  auto there = arguments<ForwardArgs>(shape, dtype, parameters, options, m);
  there.residual = {m.in[kResidual].data(), shape.image()};
  there.y = m.out[kY].data();
  there.y_stride = shape.image();
  there.mask = reinterpret_cast<uint8_t*>(m.out[kMask].data());
  SENET_ISA::forward(there, runtime);

  auto back = arguments<BackwardArgs>(shape, dtype, parameters, options, m);
  if (shape.form == Form::squeeze) {
    back.dz = m.in[kDy].data();
  } else {
    back.dy = {m.in[kDy].data(), shape.image()};
  }
  back.mask = there.mask;
  // As the host has it: where `after` needs its argument again, but for a ReLU's bits.
  if (options.after != Fn::identity && options.after != Fn::relu) back.residual = there.residual;
  back.dx = m.out[kDx].data();
  back.dresidual = m.out[kDresidual].data();
  back.dw1 = m.out[kDw1].data();
  back.db1 = m.out[kDb1].data();
  back.dw2 = m.out[kDw2].data();
  back.db2 = m.out[kDb2].data();
  back.dalpha = m.out[kDalpha].data();
  back.dbeta = m.out[kDbeta].data();
  back.daffine_scale = m.out[kDscale].data();
  back.daffine_shift = m.out[kDshift].data();
  back.du = m.out[kDu].data();
  SENET_ISA::backward(back, runtime);
  for (int i = 0; i < kResults; ++i) {
    check(std::fwrite(m.out[i].data(), 1, m.bytes[i], results) == m.bytes[i], "disk full?");
  }
}

}  // namespace

int main(int count, char** arguments) {
  check(count == 3, "expected: driver CASES RESULTS");
  std::FILE* cases = std::fopen(arguments[1], "rb");
  std::FILE* results = std::fopen(arguments[2], "wb");
  check(cases && results, "a file cannot be opened");
  for (int64_t left = read_word(cases); left > 0; --left) run_case(cases, results);
  check(std::fclose(results) == 0, "disk full?");
  return 0;
}
