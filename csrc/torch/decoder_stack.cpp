// decoder_stack: all decoder layers of a model as one op. The layers come as a plan
// (decoder_plan.h).
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstring>
#include <utility>

#include "decoder_plan.h"

namespace fq::binding {
namespace {

constexpr int64_t kTensors = 6;     // of a layer's cache: codes, scale, zero of K, then of V
constexpr int64_t kCacheRow = 128;  // a bound cache is [1 + layers, kCacheRow]
constexpr uint64_t kMagic = 0x3165686361437146u;

// The first row of a bound cache; a StackCache for every layer follows.
struct CacheHeader {
  uint64_t magic, digest;  // of the layers
  int64_t count, batch, capacity, kv_heads, head_dim;
  int32_t k_bits, v_bits, on_cuda, device;
};
static_assert(sizeof(CacheHeader) <= kCacheRow && sizeof(StackCache) <= kCacheRow);

int64_t caches_bytes(int64_t count) { return count * static_cast<int64_t>(sizeof(StackCache)); }

// Codes, scale and zero of the keys or the values of a layer.
void check_side(const Checks& check, const std::string& name, const Tensor* side,
                const CacheHeader& of, int64_t capacity, int32_t bits) {
  check.input((name + "codes").c_str(), side[0], ScalarType::Byte,
              {of.batch, of.kv_heads, capacity, packed_bytes(of.head_dim, bits)});
  check.input((name + "scale").c_str(), side[1], ScalarType::Float,
              {of.batch, of.kv_heads, capacity});
  check.input((name + "zero").c_str(), side[2], ScalarType::Byte,
              {of.batch, of.kv_heads, capacity});
}

constexpr const char* kNames[kTensors] = {"k_codes", "k_scale", "k_zero",
                                          "v_codes", "v_scale", "v_zero"};

// All of them are written, so none may share memory with another, also of another layer.
void check_apart(const Checks& check, const std::vector<Tensor>& tensors) {
  std::vector<std::pair<uintptr_t, int64_t>> starts;
  for (size_t i = 0; i < tensors.size(); ++i)
    if (tensors[i].numel() > 0)
      starts.emplace_back(reinterpret_cast<uintptr_t>(tensors[i].const_data_ptr()), i);
  std::sort(starts.begin(), starts.end());
  const auto name = [](int64_t i) {
    return "layers[" + std::to_string(i / kTensors) + "]." + kNames[i % kTensors];
  };
  for (size_t i = 1; i < starts.size(); ++i) {
    const int64_t one = starts[i].second, other = starts[i - 1].second;
    check.apart(name(one).c_str(), tensors[one], name(other).c_str(), tensors[other]);
  }
}

Tensor decoder_cache(Tensor plan, std::vector<Tensor> tensors) {
  if (tensors.empty())
    throw std::runtime_error("decoder_cache: tensors is empty: a plan has a layer or more");
  const Checks check("decoder_cache", "layers[0].k_codes", tensors[0]);
  const Plan bound = read_plan(check, plan, tensors[0]);
  const StackSizes& s = bound.sizes;
  const int64_t given = static_cast<int64_t>(tensors.size());
  check.require(given == bound.count * kTensors, "tensors has ", given, " entries for ",
                bound.count, " layers: it must have ", kTensors, " for each");
  check.shape("layers[0].k_codes", tensors[0], {kAny, kAny, kAny, kAny});

  CacheHeader header{kMagic,
                     0,
                     bound.count,
                     tensors[0].size(0),
                     INT64_MAX,
                     s.kv_heads,
                     s.head_dim,
                     s.k_bits,
                     s.v_bits,
                     tensors[0].is_cuda(),
                     tensors[0].get_device_index()};
  Tensor out = host_bytes(plan, 1 + bound.count, kCacheRow);
  uint8_t* const data = static_cast<uint8_t*>(out.mutable_data_ptr());
  std::memset(data, 0, static_cast<size_t>((1 + bound.count) * kCacheRow));
  for (int64_t i = 0; i < bound.count; ++i) {
    const Tensor* const t = tensors.data() + i * kTensors;
    const std::string name = "layers[" + std::to_string(i) + "].";
    const int64_t capacity = t[0].dim() == 4 ? t[0].size(2) : 0;
    check_side(check, name + "k_", t, header, capacity, s.k_bits);
    check_side(check, name + "v_", t + 3, header, capacity, s.v_bits);
    const StackCache cache{static_cast<uint8_t*>(t[0].mutable_data_ptr()),
                           static_cast<float*>(t[1].mutable_data_ptr()),
                           static_cast<uint8_t*>(t[2].mutable_data_ptr()),
                           static_cast<uint8_t*>(t[3].mutable_data_ptr()),
                           static_cast<float*>(t[4].mutable_data_ptr()),
                           static_cast<uint8_t*>(t[5].mutable_data_ptr()),
                           capacity};
    std::memcpy(data + kCacheRow + caches_bytes(i), &cache, sizeof cache);
    header.capacity = std::min(header.capacity, capacity);
  }
  check_apart(check, tensors);
  header.digest = digest(data + kCacheRow, bound.count * kCacheRow);
  std::memcpy(data, &header, sizeof header);
  return out;
}

// Points args at a bound cache, and sees that it is one for this plan with room for t more tokens.
void take_cache(const Checks& check, const Tensor& cache, const Tensor& hidden,
                DecoderStack& args) {
  check.host_input("cache", cache, ScalarType::Byte, {1 + args.count, kCacheRow});
  const uint8_t* const data = static_cast<const uint8_t*>(cache.const_data_ptr());
  constexpr char kForeign[] = "cache is not what decoder_cache returned for a plan like this";
  check.require(reinterpret_cast<uintptr_t>(data) % alignof(CacheHeader) == 0, kForeign);
  const CacheHeader& header = *reinterpret_cast<const CacheHeader*>(data);
  const StackSizes& s = args.sizes;
  check.require(header.magic == kMagic && header.count == args.count &&
                    header.kv_heads == s.kv_heads && header.head_dim == s.head_dim &&
                    header.k_bits == s.k_bits && header.v_bits == s.v_bits &&
                    header.digest == digest(data + kCacheRow, args.count * kCacheRow),
                kForeign);
  check.require(header.on_cuda == hidden.is_cuda() && header.device == hidden.get_device_index(),
                "the memory of cache is on another device than hidden: they must be on one");
  check.require(header.batch == args.batch, "hidden has ", args.batch, " sequences, cache ",
                header.batch, ": they must be as many");
  check.require(args.past <= header.capacity - args.t, "cache holds ", header.capacity,
                " positions: ", args.past, " and ", args.t, " more do not fit");
  args.caches = reinterpret_cast<const StackCache*>(data + kCacheRow);
}

// Tokens that a step of a CUDA graph places by numbers on the device.
void take_places(const Checks& check, const MaybeTensor& slots, const MaybeTensor& lengths,
                 DecoderStack& args) {
  check.require(slots.has_value() == lengths.has_value(), slots ? "lengths" : "slots",
                " is missing: slots and lengths are given together");
  if (!slots) return;
  for (int64_t i = 1; i < args.count; ++i)
    check.require(args.caches[i].capacity == args.caches[0].capacity, "layer ", i, " of cache has ",
                  args.caches[i].capacity, " positions, layer 0 ", args.caches[0].capacity,
                  ": with slots all must have as many");
  args.slots = static_cast<const int64_t*>(
      check.input("slots", *slots, ScalarType::Long, {args.batch, args.t}));
  args.lengths =
      static_cast<const int32_t*>(check.input("lengths", *lengths, ScalarType::Int, {args.batch}));
  check.require(args.past + args.t < (int64_t{1} << 31) - 65536, "past is ", args.past,
                ": with lengths it must be below 2^31 - 65536");
}

void take_mask(const Checks& check, const Tensor& mask, DecoderStack& args) {
  check.on_device("mask", mask);
  check.aligned("mask", mask);
  check.shape("mask", mask, {kAny, kAny, args.t, args.past + args.t});
  const bool logical = mask.scalar_type() == ScalarType::Bool;
  args.mask_kind = logical ? Mask::kBool : Mask::kAdditive;
  if (!logical) args.mask_dtype = check.floating("mask", mask);
  args.mask = mask.const_data_ptr();
  const int64_t most[] = {args.batch, args.sizes.heads, args.t, args.past + args.t};
  for (int i = 0; i < 4; ++i) {
    check.require(mask.size(i) == 1 || mask.size(i) == most[i], "mask has shape ",
                  text(shape_of(mask)), ": it must broadcast to ", args.batch, " sequences and ",
                  args.sizes.heads, " heads");
    args.mask_strides[i] = mask.size(i) == 1 ? 0 : mask.stride(i);
  }
}

}  // namespace

Prepared<DecoderStack, Tensor> decoder_stack(Tensor hidden, Tensor cos, Tensor sin,
                                             MaybeTensor mask, Tensor plan, Tensor cache,
                                             int64_t past, MaybeTensor slots, MaybeTensor lengths) {
  const Checks check("decoder_stack", "hidden", hidden);
  const Plan bound = read_plan(check, plan, hidden);
  const StackSizes& s = bound.sizes;
  check.shape("hidden", hidden, {kAny, kAny, s.hidden});
  check.require(past >= 0, "past is ", past, ": it must not be negative");

  DecoderStack args{};
  args.layers = bound.layers;
  args.count = bound.count;
  args.sizes = s;
  args.dtype = check.floating("hidden", hidden);
  args.batch = hidden.size(0);
  args.t = hidden.size(1);
  args.past = past;
  args.cos = check.input("cos", cos, hidden.scalar_type(), {kAny, args.t, s.head_dim});
  args.cos_batch = cos.size(0);
  check.require(args.cos_batch == 1 || args.cos_batch == args.batch, "cos has ", args.cos_batch,
                " rows: it must have 1, or one for each of ", args.batch, " sequences");
  args.sin = check.input("sin", sin, hidden.scalar_type(), shape_of(cos));
  take_cache(check, cache, hidden, args);
  take_places(check, slots, lengths, args);
  if (mask) take_mask(check, *mask, args);

  Tensor out = torch::stable::clone(hidden);
  args.hidden = out.mutable_data_ptr();
  const int64_t rows = hidden.numel() == 0 ? 0 : args.batch * args.t;
  return {args, std::move(out), rows, 0, {}};
}

}  // namespace fq::binding

STABLE_TORCH_LIBRARY_FRAGMENT(FQ_LIBRARY, m) {
  m.def("decoder_cache(Tensor plan, Tensor[] tensors) -> Tensor");
  m.def(
      "decoder_stack(Tensor hidden, Tensor cos, Tensor sin, Tensor? mask, Tensor plan,"
      " Tensor(a!) cache, int past, Tensor? slots=None, Tensor? lengths=None) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(FQ_LIBRARY, CPU, m) {
  m.impl("decoder_cache", TORCH_BOX(&fq::binding::decoder_cache));
}

STABLE_TORCH_LIBRARY_IMPL(FQ_LIBRARY, CUDA, m) {
  m.impl("decoder_cache", TORCH_BOX(&fq::binding::decoder_cache));
}
