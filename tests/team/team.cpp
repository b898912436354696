// The CPU kernels with std::thread in OpenMP's place, for ThreadSanitizer: it knows how threads of
// the standard library wait for each other, and nothing of libgomp's ways.
//
// Runs forward and backward over shapes that the plan shares out in every way it has, with several
// callers at once, and holds the results of a team to those of one thread. `fault` as the only
// argument adds a race, which must be reported. `memory` is for valgrind: one team, and scratch
// memory as it came, so that a read of what nobody wrote shows; `unwritten` plants one.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "se.h"

#ifndef SENET_ISA
#define SENET_ISA baseline
#endif

using namespace senet;

namespace {

int team_size = 1;
bool faulty = false, fresh = false;
int64_t raced_on = 0;

// As at::parallel_for: contiguous ranges, one for each thread, the caller among them.
void team(int64_t n, void (*body)(int64_t, int64_t, void*), void* context) {
  const int64_t threads = std::min<int64_t>(n, team_size);
  std::vector<std::thread> others;
  for (int64_t i = 1; i < threads; ++i) {
    others.emplace_back([=] {
      body(n * i / threads, n * (i + 1) / threads, context);
      if (faulty) raced_on += i;
    });
  }
  body(0, n / threads, context);
  if (faulty) raced_on += 1;
  for (std::thread& t : others) t.join();
}

void alone(int64_t n, void (*body)(int64_t, int64_t, void*), void* context) { body(0, n, context); }

bool is_untouched(const void*, int64_t) { return false; }

void* scratch(size_t bytes) {
  struct Free {
    void operator()(void* p) const { std::free(p); }
  };
  thread_local std::unique_ptr<void, Free> buffer;
  buffer.reset(std::aligned_alloc(64, (bytes + 63) / 64 * 64));
  if (!fresh) std::memset(buffer.get(), 0xff, bytes);
  return buffer.get();
}

// Of whole cache lines, or nothing would be written around the caches.
template <class T>
struct Lines {
  using value_type = T;
  T* allocate(size_t n) {
    return static_cast<T*>(::operator new(n * sizeof(T), std::align_val_t(64)));
  }
  void deallocate(T* p, size_t) { ::operator delete(p, std::align_val_t(64)); }
  bool operator==(const Lines&) const { return true; }
};
using Values = std::vector<float, Lines<float>>;

struct Case {
  Shape shape;
  Fn before, after;
  bool residual, weighted, affine, lengths;
};

// Named results of a case, forward and backward.
std::vector<Values> run(const Case& c, const Runtime& runtime) {
  const Shape& s = c.shape;
  std::mt19937 random(1);
  std::normal_distribution<float> normal;
  const auto drawn = [&](int64_t n, float size = 1) {
    Values v(static_cast<size_t>(n));
    for (float& x : v) x = size * normal(random);
    return v;
  };
  const auto poisoned = [](int64_t n) { return Values(static_cast<size_t>(n), NAN); };
  const int64_t elements = s.batch * s.image(), inner = s.inner();
  const Values x = drawn(elements), dy = drawn(elements), residual = drawn(elements);
  const float size = 1.0f / std::sqrt(static_cast<float>(s.channels));
  const Values w1 = drawn(s.hidden * s.channels, size), w2 = drawn(s.outputs * inner, size);
  const Values b1 = drawn(s.hidden), b2 = drawn(s.outputs);
  const Values alpha = drawn(s.channels), beta = drawn(s.channels);
  const Values scale = drawn(s.channels), shift = drawn(s.channels);
  std::vector<int64_t> lengths;
  for (int64_t b = 0; b < s.batch; ++b) lengths.push_back(1 + b % s.positions);

  Parameters p{};
  p.dtype = DType::f32;
  if (s.form == Form::two_layers) p.w1 = w1.data(), p.b1 = b1.data();
  p.w2 = w2.data(), p.b2 = b2.data();
  if (c.weighted) p.alpha = alpha.data(), p.beta = beta.data();
  if (c.affine) p.affine_scale = scale.data(), p.affine_shift = shift.data();

  Values y = poisoned(elements), z = poisoned(s.batch * s.channels);
  Values h = poisoned(s.batch * s.hidden), u = poisoned(s.batch * s.outputs);
  std::vector<uint8_t> mask(
      static_cast<size_t>(s.batch * ((s.channels + 7) / 8) * ((s.positions + 7) / 8) * 8));
  ForwardArgs f{};
  f.shape = s;
  f.dtype = DType::f32;
  f.options = {Fn::silu, Fn::sigmoid, c.before, c.after};
  f.parameters = p;
  f.x = {x.data(), s.image()};
  if (c.residual) f.residual = {residual.data(), s.image()};
  f.lengths = c.lengths ? lengths.data() : nullptr;
  f.y = y.data();
  f.y_stride = s.image();
  if (c.after == Fn::relu) f.mask = mask.data();
  f.z = z.data(), f.h = h.data(), f.u = u.data();
  SENET_ISA::forward(f, runtime);

  Values dx = poisoned(elements), dresidual = poisoned(elements);
  Values dw1 = poisoned(s.hidden * s.channels), db1 = poisoned(s.hidden);
  Values dw2 = poisoned(s.outputs * inner), db2 = poisoned(s.outputs);
  Values dalpha = poisoned(s.channels), dbeta = poisoned(s.channels);
  Values dscale = poisoned(s.channels), dshift = poisoned(s.channels);
  BackwardArgs b{};
  b.shape = s;
  b.dtype = DType::f32;
  b.options = f.options;
  b.parameters = p;
  b.dy = {dy.data(), s.image()};
  b.x = f.x;
  if (c.after != Fn::relu && c.after != Fn::identity) b.residual = f.residual;
  b.lengths = f.lengths;
  b.mask = f.mask;
  b.z = f.z, b.h = f.h, b.u = f.u;
  b.dx = dx.data();
  std::vector<Values*> results = {&y, &dx, &dw2, &db2};
  b.dw2 = dw2.data(), b.db2 = db2.data();
  if (c.residual) b.dresidual = dresidual.data(), results.push_back(&dresidual);
  if (s.form == Form::two_layers) {
    b.dw1 = dw1.data(), b.db1 = db1.data();
    results.insert(results.end(), {&dw1, &db1});
  }
  if (c.weighted) {
    b.dalpha = dalpha.data(), b.dbeta = dbeta.data();
    results.insert(results.end(), {&dalpha, &dbeta});
  }
  if (c.affine) {
    b.daffine_scale = dscale.data(), b.daffine_shift = dshift.data();
    results.insert(results.end(), {&dscale, &dshift});
  }
  SENET_ISA::backward(b, runtime);
  std::vector<Values> copies;
  for (Values* v : results) copies.push_back(*v);
  return copies;
}

bool close(const std::vector<Values>& a, const std::vector<Values>& b) {
  for (size_t i = 0; i < a.size(); ++i) {
    float largest = 0;
    for (float v : b[i]) largest = std::max(largest, std::fabs(v));
    for (size_t j = 0; j < a[i].size(); ++j) {
      if (!(std::fabs(a[i][j] - b[i][j]) <= 1e-4f * (1 + largest))) {
        std::printf("result %zu, element %zu: %g by a team, %g by one thread\n", i, j,
                    static_cast<double>(a[i][j]), static_cast<double>(b[i][j]));
        return false;
      }
    }
  }
  return true;
}

}  // namespace

int main(int argc, char** argv) {
  const std::string mode = argc > 1 ? argv[1] : "";
  faulty = mode == "fault";
  fresh = mode == "memory" || mode == "unwritten";
  if (mode == "unwritten") {
    std::puts(*static_cast<float*>(scratch(64)) > 0 ? "positive" : "not positive");
    return 0;
  }
  const Fn none = Fn::identity;
  std::vector<Case> cases;
  for (bool last : {false, true}) {
    // Whole images, images in slices, groups of images, weights larger than the images.
    for (Shape s : {Shape{Form::two_layers, 8, 32, 196, 8, 32, last},
                    Shape{Form::two_layers, 1, 64, 1024, 4, 64, last},
                    Shape{Form::two_layers, 5, 24, 400, 6, 48, last},
                    Shape{Form::two_layers, 7, 256, 24, 64, 256, last},
                    Shape{Form::one_layer, 3, 48, 300, 0, 48, last}}) {
      cases.push_back({s, none, none, false, false, false, false});
      cases.push_back({s, Fn::silu, Fn::relu, true, false, false, false});
      cases.push_back({s, Fn::mish, Fn::gelu, true, true, true, true});
    }
  }
  int wrong = 0, done = 0;
  for (int threads : fresh ? std::vector<int>{3} : std::vector<int>{2, 3, 8}) {
    team_size = threads;
    for (const Case& c : cases) {
      const std::vector<Values> right = run(c, {1, 0, 0, is_untouched, alone, scratch});
      // Two callers at once, each with a team; one as if nothing fitted the caches.
      std::vector<Values> other;
      std::thread caller([&] { other = run(c, {threads, 0, 1, is_untouched, team, scratch}); });
      const std::vector<Values> mine =
          run(c, {threads, 1 << 20, 1 << 30, is_untouched, team, scratch});
      caller.join();
      wrong += !close(mine, right) + !close(other, right);
      done += 2;
    }
  }
  std::printf("%d calls, %d wrong\n", done, wrong);
  return wrong ? 1 : 0;
}
