// decoder_plan: the layers of a model, checked and bound once. See decoder_plan.h.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cmath>
#include <cstring>

#include "decoder_plan.h"

namespace fq::binding {
namespace {

constexpr int64_t kTensors = 48;    // of a layer, in the order of Reader::layer
constexpr int64_t kSizes = 11;      // in the order of sizes_of
constexpr int64_t kPlanRow = 1024;  // a plan is [1 + layers, kPlanRow]: room for header and layers
constexpr uint64_t kMagic = 0x31766e616c507146u;

struct Header {
  uint64_t magic, digest;  // of the layers, which begin at the second row
  int64_t count;
  int32_t on_cuda, device;  // where the layers are
  StackSizes sizes;
};
static_assert(sizeof(Header) <= kPlanRow && sizeof(StackLayer) <= kPlanRow);

int64_t layers_bytes(int64_t count) { return count * static_cast<int64_t>(sizeof(StackLayer)); }

StackSizes sizes_of(const Checks& check, const std::vector<int64_t>& sizes, double scaling) {
  StackSizes s{};
  s.hidden = sizes[1];
  s.intermediate = sizes[2];
  s.heads = sizes[3];
  s.kv_heads = sizes[4];
  s.head_dim = sizes[5];
  s.a_bits = check.bits("a_bits", sizes[6]);
  s.w_bits = check.bits("w_bits", sizes[7]);
  s.k_bits = check.bits("k_bits", sizes[8]);
  s.v_bits = check.bits("v_bits", sizes[9]);
  s.symmetric = sizes[10] != 0;
  s.scaling = static_cast<float>(scaling);
  check.require(std::isfinite(s.scaling), "scaling is ", scaling, ": it must be finite");
  const char* const names[] = {"hidden", "intermediate", "heads", "kv_heads", "head_dim"};
  const int64_t values[] = {s.hidden, s.intermediate, s.heads, s.kv_heads, s.head_dim};
  for (int i = 0; i < 5; ++i)
    check.require(0 < values[i] && values[i] <= kMaxGemmK, names[i], " is ", values[i],
                  ": it must be 1..", kMaxGemmK);
  check.require(s.heads % s.kv_heads == 0, "heads is ", s.heads, ", kv_heads ", s.kv_heads,
                ": no multiple");
  check.require(s.head_dim % 2 == 0, "head_dim is ", s.head_dim, ": it must be even");
  const int64_t widest = std::max({s.hidden, s.intermediate, s.heads * s.head_dim});
  const int64_t most = s.w_bits > 4 ? kMaxGemmK / 16 : kMaxGemmK;
  check.require(widest <= most, "a linear has ", widest, " columns: int32 sums allow at most ",
                most);
  return s;
}

// Takes the tensors of one layer, one after the other. An empty tensor stands for none.
class Reader {
 public:
  Reader(const Checks& check, const StackSizes& sizes, const std::vector<Tensor>& tensors,
         int64_t layer)
      : check_(check),
        sizes_(sizes),
        next_(tensors.data() + layer * kTensors),
        prefix_("layers[" + std::to_string(layer) + "].") {}

  StackLayer layer() {
    const StackSizes& s = sizes_;
    const int64_t q = s.heads * s.head_dim, kv = s.kv_heads * s.head_dim;
    StackLayer layer;
    std::memset(static_cast<void*>(&layer), 0, sizeof layer);  // the digest is over padding too
    input("attention_in", s.hidden, true, &layer.attention_in);
    input("attention_out", q, false, &layer.attention_out);
    input("mlp_in", s.hidden, true, &layer.mlp_in);
    input("mlp_out", s.intermediate, false, &layer.mlp_out);
    linear("q", q, s.hidden, &layer.q);
    linear("k", kv, s.hidden, &layer.k);
    linear("v", kv, s.hidden, &layer.v);
    linear("o", s.hidden, q, &layer.o);
    linear("gate", s.intermediate, s.hidden, &layer.gate);
    linear("up", s.intermediate, s.hidden, &layer.up);
    linear("down", s.hidden, s.intermediate, &layer.down);
    layer.k_transform = square("k_transform", s.head_dim, &layer.k_transform_dtype);
    layer.q_transform = square("q_transform", s.head_dim, &layer.q_transform_dtype);
    layer.k_clip = floats("k_clip", 2, false);
    layer.v_clip = floats("v_clip", 2, false);
    return layer;
  }

 private:
  // The next tensor, whose full name is then name_; null if it is absent.
  const Tensor* next(const std::string& name) {
    name_ = prefix_ + name;
    const Tensor& found = *next_++;
    return found.numel() > 0 ? &found : nullptr;
  }

  const Tensor& needed(const std::string& name) {
    const Tensor* const found = next(name);
    check_.require(found != nullptr, name_, " is missing: every layer needs it");
    return *found;
  }

  const float* floats(const std::string& name, int64_t size, bool is_needed) {
    const Tensor* const t = is_needed ? &needed(name) : next(name);
    if (t == nullptr) return nullptr;
    return static_cast<const float*>(check_.input(name_.c_str(), *t, ScalarType::Float, {size}));
  }

  // A square matrix whose size, if it is kAny, must divide `width`.
  const void* square(const std::string& name, int64_t size, Dtype* dtype, int64_t width = 0,
                     int64_t* found = nullptr) {
    const Tensor* const t = next(name);
    if (t == nullptr) return nullptr;
    check_.dense(name_.c_str(), *t);
    check_.shape(name_.c_str(), *t, {size, size});
    const int64_t n = t->size(0);
    check_.require(t->size(1) == n && (size != kAny || width % n == 0), name_, " has shape ",
                   text(shape_of(*t)), ": it must be square, and its size divide ", width);
    *dtype = check_.floating(name_.c_str(), *t);
    if (found != nullptr) *found = n;
    return t->const_data_ptr();
  }

  void input(const std::string& name, int64_t width, bool follows_norm, StackInput* in) {
    Transform& t = in->transform;
    t.channel_scale = floats(name + ".channel_scale", width, follows_norm);
    check_.require(follows_norm || t.channel_scale == nullptr, name_,
                   " is given: no norm precedes");
    int64_t n1 = 0, n2 = 0;
    t.left = square(name + ".left", kAny, &t.left_dtype, width, &n1);
    t.right = square(name + ".right", kAny, &t.right_dtype, width, &n2);
    t.n1 = t.left ? n1 : t.right ? width / n2 : 1;
    t.n2 = width / t.n1;
    check_.require(t.right == nullptr || n2 == t.n2, prefix_, name, " has ", width,
                   " columns, left and right are ", n1, " and ", n2,
                   ": their product must equal it");
    in->clip = floats(name + ".clip", 2, false);
  }

  void linear(const std::string& name, int64_t n, int64_t k, StackLinear* out) {
    const bool nibbles = sizes_.w_bits <= 4;
    const Tensor& w = needed(name + ".weight");
    out->w = static_cast<const uint8_t*>(check_.input(name_.c_str(), w,
                                                      nibbles ? ScalarType::Byte : ScalarType::Char,
                                                      {n, nibbles ? nibble_bytes(k) : k}));
    out->w_scale = floats(name + ".scale", n, true);
    const Tensor* const colsum = sizes_.symmetric ? next("") : &needed(name + ".colsum");
    if (!sizes_.symmetric)
      out->w_colsum =
          static_cast<const int32_t*>(check_.input(name_.c_str(), *colsum, ScalarType::Int, {n}));
    if (const Tensor* const bias = next(name + ".bias")) {
      check_.dense(name_.c_str(), *bias);
      check_.shape(name_.c_str(), *bias, {n});
      out->bias = bias->const_data_ptr();
      out->bias_dtype = check_.floating(name_.c_str(), *bias);
    }
    out->n = n;
  }

  const Checks& check_;
  const StackSizes& sizes_;
  const Tensor* next_;
  const std::string prefix_;
  std::string name_;
};

Tensor decoder_plan(std::vector<Tensor> tensors, std::vector<int64_t> sizes,
                    std::vector<double> numbers) {
  if (tensors.empty())
    throw std::runtime_error("decoder_plan: tensors is empty: a plan needs a layer");
  const Checks check("decoder_plan", "tensors", tensors[0]);
  check.require(static_cast<int64_t>(sizes.size()) == kSizes, "sizes has ", sizes.size(),
                " entries: it must have ", kSizes);
  const int64_t count = sizes[0], given = static_cast<int64_t>(tensors.size());
  check.require(given % kTensors == 0 && count == given / kTensors, "tensors has ", given,
                " entries for ", count, " layers: it must have ", kTensors, " for each");
  check.require(static_cast<int64_t>(numbers.size()) == 1 + 2 * count, "numbers has ",
                numbers.size(), " entries: it must have 1, and 2 for each layer");
  const StackSizes s = sizes_of(check, sizes, numbers[0]);

  Tensor plan = host_bytes(tensors[0], 1 + count, kPlanRow);
  uint8_t* const data = static_cast<uint8_t*>(plan.mutable_data_ptr());
  std::memset(data, 0, static_cast<size_t>((1 + count) * kPlanRow));
  for (int64_t i = 0; i < count; ++i) {
    StackLayer layer = Reader(check, s, tensors, i).layer();
    for (int64_t j = 1; j <= 2; ++j) {
      const double eps = numbers[2 * i + j];
      check.require(std::isfinite(static_cast<float>(eps)) && eps >= 0, "the epsilon of a norm is ",
                    eps, ": it must be finite and not negative");
      (j == 1 ? layer.attention_eps : layer.mlp_eps) = static_cast<float>(eps);
    }
    std::memcpy(data + kPlanRow + i * static_cast<int64_t>(sizeof layer), &layer, sizeof layer);
  }
  const Header header{kMagic,
                      digest(data + kPlanRow, layers_bytes(count)),
                      count,
                      tensors[0].is_cuda(),
                      tensors[0].get_device_index(),
                      s};
  std::memcpy(data, &header, sizeof header);
  return plan;
}

}  // namespace

Tensor host_bytes(const Tensor& like, int64_t rows, int64_t row_bytes) {
  const torch::stable::Device host(torch::headeronly::DeviceType::CPU);
  return torch::stable::new_empty(like, {rows, row_bytes}, ScalarType::Byte, std::nullopt, host);
}

// FNV-1a by words, in four lanes that overlap.
uint64_t digest(const void* data, int64_t bytes) {
  const uint8_t* const first = static_cast<const uint8_t*>(data);
  uint64_t lanes[4] = {1, 2, 3, 4};
  for (int64_t i = 0; i + 8 <= bytes; i += 8) {
    uint64_t word, &lane = lanes[i / 8 % 4];
    std::memcpy(&word, first + i, 8);
    lane = (lane ^ word) * 1099511628211u;
  }
  for (int i = 1; i < 4; ++i) lanes[0] = (lanes[0] ^ lanes[i]) * 1099511628211u;
  return lanes[0];
}

Plan read_plan(const Checks& check, const Tensor& plan, const Tensor& first) {
  check.host_input("plan", plan, ScalarType::Byte, {kAny, kPlanRow});
  const uint8_t* const data = static_cast<const uint8_t*>(plan.const_data_ptr());
  constexpr char kForeign[] = "plan is not what decoder_plan returned";
  check.require(reinterpret_cast<uintptr_t>(data) % alignof(Header) == 0, kForeign);
  const Header& header = *reinterpret_cast<const Header*>(data);
  const int64_t count = plan.size(0) - 1;
  check.require(count > 0 && header.magic == kMagic && header.count == count &&
                    header.digest == digest(data + kPlanRow, layers_bytes(count)),
                kForeign);
  check.require(header.on_cuda == first.is_cuda() && header.device == first.get_device_index(),
                "the layers of plan are on another device: they must be on one with the rest");
  return {reinterpret_cast<const StackLayer*>(data + kPlanRow), count, header.sizes};
}

}  // namespace fq::binding

STABLE_TORCH_LIBRARY_FRAGMENT(FQ_LIBRARY, m) {
  m.def("decoder_plan(Tensor[] tensors, int[] sizes, float[] numbers) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(FQ_LIBRARY, CPU, m) {
  m.impl("decoder_plan", TORCH_BOX(&fq::binding::decoder_plan));
}

STABLE_TORCH_LIBRARY_IMPL(FQ_LIBRARY, CUDA, m) {
  m.impl("decoder_plan", TORCH_BOX(&fq::binding::decoder_plan));
}
