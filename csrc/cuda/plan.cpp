#include "plan.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <numeric>

namespace senet {
namespace gpu {
namespace {

constexpr int kUnit = 8;
// A block pays for its launch, its share of the exchange and its barriers: below so many bytes of
// x an image is not cut further.
constexpr int64_t kSmallestSlice = 8 << 10;
// What the runtime keeps of a multiprocessor's shared memory for each block.
constexpr int64_t kReserved = 1024;
// Units of each thread between two writings of the mask's bytes: two barriers, and 4 KB for 256.
constexpr int kTurns = 16;
// Units from which on a row of whole units is for eight threads, lean.
constexpr int64_t kLongRow = 64;
// The most registers a thread has, by the kernels' launch bounds.
int registers_of(const Task& t, bool lean) {
  if (t.dtype == DType::f64) return 256;
  return t.backward && !lean ? 168 : 128;
}

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }
int power_of_two(int64_t n) {  // not below n
  int p = 1;
  while (p < n) p *= 2;
  return p;
}
int element_size(DType d) { return d == DType::f64 ? 8 : (d == DType::f32 ? 4 : 2); }

// One way to cut the work, and what it costs in shared memory.
class Draft {
 public:
  Draft(const Task& task, const Device& device) : t_(task), s_(task.shape), d_(device) {
    element_ = element_size(t_.dtype);
    accumulator_ = t_.dtype == DType::f64 ? 8 : 4;
    plan.vector = t_.aligned && t_.dtype != DType::f64 && s_.image() % kUnit == 0 &&
                  (!s_.channels_last || s_.channels % kUnit == 0) &&
                  (!odd_rows_of_mask() || s_.positions < int64_t(1) << 28);
  }

  Plan plan;

  int64_t granule(Axis axis, bool wide) const {
    if (axis == Axis::space) return 1;
    if (s_.channels_last) return wide ? std::max<int64_t>(kUnit, 64 / element_) : kUnit;
    return plan.vector ? kUnit / std::gcd<int64_t>(s_.positions, kUnit) : 1;
  }
  // Into how many blocks an image can be cut.
  int64_t most_blocks(Axis axis) const {
    const int64_t n = axis == Axis::space ? s_.positions : s_.channels;
    return std::max<int64_t>(1, ceil_div(n, granule(axis, plan.vector)));
  }

  // Fixes everything that follows from blocks, axis, threads, resident, slots and weights.
  void work_out() {
    Plan& p = plan;
    p.granule = static_cast<int>(granule(p.axis, p.vector && p.blocks > 1));
    const int64_t c = s_.channels, n = s_.positions;
    const auto part = [&](int64_t extent) {
      const int64_t granules = ceil_div(extent, p.granule);
      return std::min(extent, ceil_div(granules, p.blocks) * p.granule);
    };
    const bool by_channels = p.axis == Axis::channels;
    const int64_t channels = by_channels ? part(c) : c, positions = by_channels ? n : part(n);
    p.local_channels = static_cast<int>(channels);
    slice_bytes_ = channels * positions * element_;

    const int sums = t_.backward && s_.outputs > s_.channels ? 2 : 1;
    p.exchanged = 0;
    if (p.blocks > 1) {
      if (!by_channels) {
        p.exchanged = static_cast<int>(sums * c);
      } else if (s_.form == Form::two_layers) {
        p.exchanged = static_cast<int>(s_.hidden);
      } else if (s_.form == Form::one_layer) {
        p.exchanged = static_cast<int>(t_.backward ? s_.outputs : c);
      }
    }
    if (s_.form == (t_.backward ? Form::squeeze : Form::scale)) p.exchanged = 0;
    // Nothing to exchange: each block on its own.
    if (p.exchanged == 0) p.exchange = Exchange::none;

    // Sums over positions.
    p.lanes = 32;
    p.segments = 1;
    p.band = plan.vector ? kUnit / static_cast<int>(std::gcd<int64_t>(n, kUnit)) : 1;
    int64_t scratch = 0;
    if (s_.channels_last) {
      scratch = kUnit * std::max<int64_t>(p.threads, ceil_div(channels, kUnit));
    } else if (p.lean) {
      scratch = share_rows(channels, positions / kUnit);
    } else {
      const int64_t units = ceil_div(positions, kUnit) + (p.vector && positions % kUnit ? 1 : 0);
      p.lanes = std::min(32, power_of_two(units));
      const int64_t together = p.threads / p.lanes;
      while (p.segments < 32 && channels * p.segments < together &&
             units >= int64_t(8) * p.lanes * p.segments) {
        p.segments *= 2;
      }
      if (p.segments > 1) scratch = channels * p.segments;
    }
    if (t_.backward) {  // transposed products
      const int64_t columns = std::max<int64_t>(s_.hidden, channels);
      scratch = std::max(scratch, kUnit * std::max<int64_t>(p.threads, ceil_div(columns, kUnit)));
    }

    int64_t bytes = kSelfBytes;
    const auto carve = [&bytes](int64_t n) {
      const int64_t at = bytes + kRedZone;
      bytes = round_up(at + n, 16);
      return static_cast<int>(at);
    };
    const auto vectors = [&](int64_t n) { return carve(round_up(n, kUnit) * accumulator_); };
    const bool shifts = s_.outputs > s_.channels;
    p.at.sums = vectors((t_.backward && shifts ? 2 : 1) * round_up(channels, kUnit));
    p.at.scale = vectors(channels);
    p.at.shift = shifts ? vectors(channels) : p.at.scale;
    p.at.mean = t_.backward ? vectors(channels) : p.at.sums;
    p.at.affine = vectors(t_.affine ? 2 * round_up(channels, kUnit) : 0);
    p.at.hidden = vectors(inner_vector());
    p.at.exchange = p.exchange == Exchange::cluster ? vectors(2 * p.exchanged) : p.at.sums;
    p.at.scratch = vectors(scratch);
    p.stretch = p.vector && odd_rows_of_mask() ? kTurns * p.threads : 0;
    p.at.bits = carve(p.stretch ? p.stretch + 1 : 0);
    p.at.weights = carve(p.weights ? weight_bytes() : 0);
    p.at.barriers = carve(8 * p.slots);
    bytes = round_up(bytes + kRedZone, 128);
    p.at.slots = static_cast<int>(std::min<int64_t>(bytes, INT32_MAX / 2));
    bytes += p.slots * round_up(slice_bytes_ + kRedZone, 128);
    shared_ = bytes;
    p.shared = static_cast<int>(std::min<int64_t>(bytes, INT32_MAX));
    p.per_multiprocessor = static_cast<int>(std::max<int64_t>(
        1,
        std::min({int64_t(d_.blocks_per_multiprocessor),
                  d_.shared_per_multiprocessor / (shared_ + kReserved),
                  int64_t(d_.registers_per_multiprocessor) / (registers_of(t_, p.lean) * p.threads),
                  int64_t(d_.threads_per_multiprocessor) / p.threads})));
  }

  bool run_at_once() const {
    return plan.blocks <= int64_t(d_.multiprocessors) * plan.per_multiprocessor;
  }
  bool fits() const { return shared_ <= d_.shared_per_block; }
  int64_t slice_bytes() const { return slice_bytes_; }
  int64_t image_bytes() const { return s_.image() * element_; }

  // Whether there is a lean kernel for the call, which only the task decides.
  bool can_be_lean() const {
    const bool function = t_.before == Fn::identity || t_.before == Fn::silu ||
                          (element_ == 2 && (t_.before == Fn::relu || t_.before == Fn::hardswish));
    const int64_t band = s_.channels_last ? 1 : kUnit / std::gcd<int64_t>(s_.positions, kUnit);
    return plan.vector && t_.plain && function && s_.image() > 0 &&
           image_bytes() < int64_t(1) << 30 && (s_.channels_last || s_.positions >= kUnit) &&
           (!odd_rows_of_mask() || band * s_.positions / kUnit <= kTurns * 32);
  }

  // The slices of both matrices, their rows padded to whole units.
  int64_t weight_bytes() const {
    const int64_t size = element_size(t_.parameter_dtype), c = plan.local_channels;
    if (s_.form == Form::one_layer && t_.backward) {
      return round_up(s_.outputs * round_up(c, kUnit) * size, 16);
    }
    const int64_t w2 =
        (s_.outputs > s_.channels ? 2 : 1) * round_up(c * round_up(s_.inner(), kUnit) * size, 16);
    if (s_.form == Form::one_layer) return w2;
    if (s_.form != Form::two_layers) return 0;
    return w2 + round_up(s_.hidden * round_up(c, kUnit) * size, 16);
  }

 private:
  // Lean: eight threads to a row of many units, or one; and where rows are few, to a segment of it.
  // Returns how many sums of segments there are.
  int64_t share_rows(int64_t rows, int64_t units) {
    Plan& p = plan;
    p.lanes = units >= kLongRow && p.band == 1 ? 8 : 1;
    const int64_t tasks = p.threads / p.lanes;
    // A thread comes to rows that begin alike, every band-th; and to the same segment of them.
    while (2 * p.segments * rows <= tasks && tasks % (2 * p.segments * p.band) == 0 &&
           units >= 8 * p.lanes * p.segments) {
      p.segments *= 2;
    }
    return p.segments > 1 ? rows * p.segments : 0;
  }
  // A row of the mask is whole bytes. Where a row of the image is not, a unit's bits are of several
  // bytes, and they are put together in shared memory: a byte per unit, and one before. Whether a
  // mask is written or not: the same sums, in the same order, with and without.
  bool odd_rows_of_mask() const {
    return t_.masks && !s_.channels_last && s_.positions % kUnit != 0;
  }
  int64_t inner_vector() const {
    if (s_.form == Form::two_layers) return s_.hidden;
    if (s_.form == Form::one_layer) return t_.backward ? s_.outputs : s_.channels;
    return 0;
  }

  const Task& t_;
  const Shape& s_;
  const Device& d_;
  int element_, accumulator_;
  int64_t slice_bytes_ = 0, shared_ = 0;
};

Plan refuse(const char* why) {
  Plan p;
  p.error = why;
  return p;
}

}  // namespace

// The choice, in this order: enough blocks to occupy the device; slices small enough to stay in
// shared memory, two of them per multiprocessor if possible, so that one is loaded while the other
// is reduced; no more blocks per image than that takes.
Plan make_plan(const Task& task, const Device& device, const Policy& policy) {
  const Shape& s = task.shape;
  if (policy.error) return refuse(policy.error);
  if (s.positions >= (int64_t(1) << 31) - 64 || s.channels >= (int64_t(1) << 30) ||
      s.hidden >= (int64_t(1) << 30) || s.image() >= (int64_t(1) << 34)) {
    return refuse("an image of more than 2^34 elements, or 2^31 positions");
  }
  Draft draft(task, device);
  Plan& p = draft.plan;
  p.lean = policy.lean != 0 && draft.can_be_lean();
  const bool clusters = device.capability >= 90;
  const bool wants = policy.exchange > 0;
  const int64_t blocks_possible = clusters ? device.largest_cluster : (device.cooperative ? 32 : 1);

  // Narrow channels-last images are cut in space: a slice of their channels would be a few bytes
  // here and a few bytes there.
  const int64_t channel_blocks = draft.most_blocks(Axis::channels);
  p.axis = s.channels_last && s.form != Form::one_layer && channel_blocks < blocks_possible &&
                   draft.image_bytes() > 4 * kSmallestSlice * channel_blocks
               ? Axis::space
               : Axis::channels;
  if (policy.axis >= 0) p.axis = static_cast<Axis>(policy.axis);
  if (p.axis == Axis::space && !s.channels_last) {
    return refuse("SENET_KERNELS_CUDA_PLAN: axis=space is for channels-last tensors");
  }
  const int64_t most = std::min(blocks_possible, draft.most_blocks(p.axis));

  // Enough blocks for the device.
  int blocks = 1;
  while (2 * blocks <= most && s.batch * blocks < 2 * device.multiprocessors &&
         draft.image_bytes() >= 2 * blocks * kSmallestSlice) {
    blocks *= 2;
  }
  // As many as the registers of a multiprocessor have room for: twice 256, or once 384 where the
  // general loops of the backward pass need more of them.
  p.threads = task.backward && task.dtype != DType::f64 && !p.lean ? 384 : 256;
  if (policy.threads > 0) p.threads = policy.threads;
  // Both passes read the image: forward, and backward what it keeps of it, dy.
  const bool two_passes = s.form == Form::two_layers || s.form == Form::one_layer;
  // Of an empty image there is nothing to bring in, and no copy whose arrival one could wait for.
  const bool can_stay =
      p.vector && two_passes && (!task.backward || task.needs_dx) && s.image() > 0;
  const auto attempt = [&](int b, bool resident, int slots) {
    p.blocks = b;
    p.exchange = b == 1 ? Exchange::none : (clusters ? Exchange::cluster : Exchange::grid);
    p.resident = resident;
    p.slots = resident ? slots : 0;
    draft.work_out();
    return draft.fits() && (p.exchange != Exchange::grid || draft.run_at_once());
  };
  const auto search = [&] {
    if (can_stay && device.shared_per_block > 0) {
      for (int share : {2, 1}) {
        for (int b = blocks; b <= most; b *= 2) {
          if (attempt(b, true, 1) && p.per_multiprocessor >= share) return true;
        }
      }
    }
    for (int b = blocks; b <= most; b *= 2) {
      if (attempt(b, false, 0)) return true;
    }
    return attempt(static_cast<int>(most), false, 0) || attempt(1, false, 0);
  };
  if (!search())
    return refuse("more channels, or hidden channels, than there is shared memory for");

  // By name.
  if (policy.blocks > 0 || policy.exchange >= 0 || policy.resident >= 0 || policy.slots > 0) {
    int b = policy.blocks > 0 ? policy.blocks : p.blocks;
    if (policy.exchange == 0) b = 1;
    if (wants && b == 1) b = static_cast<int>(std::min<int64_t>(2, most));
    if (b > draft.most_blocks(p.axis)) {
      return refuse("SENET_KERNELS_CUDA_PLAN: blocks is more than the image can be cut into");
    }
    const bool resident = policy.resident >= 0 ? policy.resident > 0 : p.resident;
    if (resident && !can_stay) {
      return refuse("SENET_KERNELS_CUDA_PLAN: resident=1 is for aligned tensors and both passes");
    }
    attempt(b, resident, policy.slots > 0 ? policy.slots : 1);
    if (policy.exchange >= 0 && b > 1) p.exchange = static_cast<Exchange>(policy.exchange);
    draft.work_out();
    if (p.exchange == Exchange::cluster && (!clusters || b > device.largest_cluster)) {
      return refuse("SENET_KERNELS_CUDA_PLAN: this device has no such clusters");
    }
    if (p.exchange == Exchange::grid && !device.cooperative) {
      return refuse(
          "SENET_KERNELS_CUDA_PLAN: this device has no cooperative launch, or refused one");
    }
    if (!draft.fits()) {
      return refuse("SENET_KERNELS_CUDA_PLAN: the slices do not fit into shared memory");
    }
  }

  // As many images in progress as the device has room for; each group then takes the next one.
  const auto choose_groups = [&] {
    const int64_t room = int64_t(device.multiprocessors) * p.per_multiprocessor / p.blocks;
    share_out(&p, s.batch, room);
    if (policy.groups > 0) {
      p.groups = static_cast<int>(std::clamp<int64_t>(s.batch, 1, policy.groups));
      if (p.exchange == Exchange::grid && p.groups > room) share_out(&p, s.batch, room);
    }
  };
  choose_groups();
  if (p.exchange == Exchange::grid && !draft.run_at_once()) {
    return refuse("an image's blocks do not run at once on this device");
  }
  const int64_t turns = s.batch / std::max(1, p.groups);

  // A ring of slots: the next image is loaded while this one is worked on. Only where it does not
  // cost a second block on the multiprocessor, which does the same and more.
  if (p.resident && policy.slots <= 0 && turns >= 2) {
    const Plan before = p;
    p.slots = 2;
    draft.work_out();
    if (!draft.fits() || p.per_multiprocessor < before.per_multiprocessor) {
      p = before;
      draft.work_out();
    }
  }
  // Weights that outweigh the image stay.
  if (two_passes) {
    const Plan before = p;
    p.weights = true;
    draft.work_out();
    const bool worth = turns >= 2 && 2 * draft.weight_bytes() > draft.slice_bytes() &&
                       p.per_multiprocessor >= before.per_multiprocessor;
    const bool keep = policy.weights >= 0 ? policy.weights > 0 : worth;
    if (!keep || !draft.fits()) {
      if (keep && policy.weights > 0) {
        return refuse("SENET_KERNELS_CUDA_PLAN: the weights do not fit into shared memory");
      }
      p = before;
      draft.work_out();
    }
  }
  // A bulk copy costs as much to start for 64 bytes as for 16 KB.
  const int64_t row = p.local_channels * int64_t(element_size(task.dtype));
  p.bulk = p.resident && device.capability >= 90 &&
           (!s.channels_last || p.local_channels == s.channels || row >= 1024);
  choose_groups();

  // Global memory.
  const int64_t accumulator = task.dtype == DType::f64 ? 8 : 4;
  const auto carve = [&p](int64_t bytes) {
    const int64_t at = p.scratch;
    p.scratch = round_up(p.scratch + bytes, 128);
    return at;
  };
  if (task.backward) {
    p.of_du = carve(s.batch * s.outputs * accumulator);
    p.of_dh = carve(s.batch * s.hidden * accumulator);
    if (task.needs_ds) p.of_ds = carve(s.batch * s.channels * accumulator);
    // Of each image, and of each part of it where it is split in space.
    const int64_t parts = p.axis == Axis::space ? s.batch * p.blocks : s.batch;
    if (task.needs_daffine) p.of_daffine = carve(2 * parts * s.channels * accumulator);
  }
  if (p.exchange == Exchange::grid) {
    p.of_exchange = carve(int64_t(2) * p.groups * p.blocks * p.exchanged * accumulator);
    p.of_counters = carve(int64_t(p.groups) * 128);
  }
  return p;
}

void share_out(Plan* plan, int64_t batch, int64_t room) {
  batch = std::max<int64_t>(1, batch);
  const int64_t turns = ceil_div(batch, std::max<int64_t>(1, room));
  plan->groups = static_cast<int>(ceil_div(batch, turns));
}

std::string describe(const Plan& p) {
  if (p.error) return std::string("no plan: ") + p.error;
  const auto number = [](int64_t n) { return std::to_string(n); };
  std::string text;
  if (p.exchange == Exchange::cluster) {
    text = "cluster of " + number(p.blocks) + " blocks per image";
  } else if (p.exchange == Exchange::grid) {
    text = number(p.blocks) + " blocks per image, exchange through global memory";
  } else {
    text = p.blocks == 1 ? "one block per image" : number(p.blocks) + " blocks per image";
  }
  if (p.blocks > 1) text += p.axis == Axis::space ? ", split in space" : ", split by channels";
  text += ", " + number(p.threads) + " threads and " + number((p.shared + 512) / 1024) +
          " KB each, " + number(p.per_multiprocessor) +
          (p.per_multiprocessor == 1 ? " block" : " blocks") + " per multiprocessor";
  text += p.resident ? ", single pass" : ", two passes";
  if (p.slots > 1) text += ", next image prefetched";
  if (p.weights) text += ", weights kept";
  if (p.lean) text += ", lean loops";
  if (!p.vector) text += ", element by element";
  return text;
}

std::optional<Policy> named_policy() {
  const char* text = std::getenv("SENET_KERNELS_CUDA_PLAN");
  if (!text) return std::nullopt;
  Policy policy;
  const auto wrong = [&policy](const char* why) {
    policy.error = why;
    return policy;
  };
  while (*text) {
    const char* equals = std::strchr(text, '=');
    const char* end = std::strchr(text, ',');
    if (!end) end = text + std::strlen(text);
    if (!equals || equals > end) {
      return wrong("SENET_KERNELS_CUDA_PLAN: expected name=value, separated by commas");
    }
    const std::string name(text, equals), value(equals + 1, end);
    char* rest = nullptr;
    int number = static_cast<int>(std::strtol(value.c_str(), &rest, 10));
    if (value.empty() || *rest) {
      number = -1;
      if (name == "exchange") {
        number = value == "none" ? 0 : value == "cluster" ? 1 : value == "grid" ? 2 : -1;
      } else if (name == "axis") {
        number = value == "channels" ? 0 : value == "space" ? 1 : -1;
      }
    }
    int* field = name == "exchange"   ? &policy.exchange
                 : name == "blocks"   ? &policy.blocks
                 : name == "axis"     ? &policy.axis
                 : name == "resident" ? &policy.resident
                 : name == "slots"    ? &policy.slots
                 : name == "weights"  ? &policy.weights
                 : name == "threads"  ? &policy.threads
                 : name == "groups"   ? &policy.groups
                 : name == "lean"     ? &policy.lean
                                      : nullptr;
    if (!field) {
      return wrong(
          "SENET_KERNELS_CUDA_PLAN: expected exchange, blocks, axis, resident, slots, weights, "
          "threads, groups or lean");
    }
    const bool choice = field == &policy.exchange || field == &policy.axis;
    const bool bad = number < 0 || (choice && number > (field == &policy.axis ? 1 : 2)) ||
                     (field == &policy.threads && (number % 32 || number > 256)) ||
                     (field == &policy.slots && number > 3) ||
                     (field == &policy.blocks && number > 64);
    if (bad) return wrong("SENET_KERNELS_CUDA_PLAN: a value is out of range");
    *field = number;
    text = *end ? end + 1 : end;
  }
  return policy;
}

}  // namespace gpu
}  // namespace senet
