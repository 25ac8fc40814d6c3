// See args.h.
#include "args.h"

#include <torch/csrc/stable/ops.h>

#include <cmath>
#include <limits>
#include <utility>

#include "checks.h"

namespace fq::binding {
namespace {

struct Rows {
  std::vector<int64_t> lead;  // the leading dimensions
  int64_t count, k;
};

Rows rows_of(const Checks& check, const char* name, const Tensor& t, int64_t least_columns = 1) {
  check.require(t.dim() >= 1, name, " has no dimension: it must have at least one");
  std::vector<int64_t> lead = shape_of(t);
  const int64_t k = lead.back();
  check.require(k >= least_columns, name, " has ", k, " columns: it must have at least ",
                least_columns);
  lead.pop_back();
  int64_t count = 1;
  for (int64_t size : lead) count *= size;
  return {std::move(lead), count, k};
}

std::vector<int64_t> with(std::vector<int64_t> lead, int64_t last) {
  lead.push_back(last);
  return lead;
}

Tensor empty(const Tensor& like, const std::vector<int64_t>& shape, ScalarType type) {
  return torch::stable::new_empty(like, shape, type);
}

// Whether it is finite as the float32 that the kernels take.
bool is_float(double number) { return std::abs(number) <= std::numeric_limits<float>::max(); }

const float* clip_of(const Checks& check, const MaybeTensor& clip) {
  if (!clip) return nullptr;
  return static_cast<const float*>(check.input("clip", *clip, ScalarType::Float, {2}));
}

Grid grid_of(const Checks& check, int64_t bits, bool symmetric, bool narrow, int64_t layout) {
  check.require(symmetric || !narrow, "narrow is set: it needs symmetric");
  check.require(layout == 0 || layout == 1, "layout is ", layout,
                ": it must be 0 (packed) or 1 (one byte a code)");
  return {check.bits("bits", bits), symmetric, narrow, static_cast<Layout>(layout)};
}

// Allocates codes, scale and zero and points args at them.
template <class Args>
Quantized outputs_for(Args& args, const Tensor& x, const Rows& rows) {
  const bool symmetric = args.grid.symmetric;
  const bool nibbles = args.grid.bits <= 4 && args.grid.layout == Layout::kPacked;
  const ScalarType type = symmetric && !nibbles ? ScalarType::Char : ScalarType::Byte;
  Tensor codes = empty(x, with(rows.lead, row_bytes(args.grid, rows.k)), type);
  Tensor scale = empty(x, rows.lead, ScalarType::Float);
  Tensor zero = empty(x, symmetric ? std::vector<int64_t>{0} : rows.lead, ScalarType::Int);
  args.codes = static_cast<uint8_t*>(codes.mutable_data_ptr());
  args.scale = static_cast<float*>(scale.mutable_data_ptr());
  args.zero = symmetric ? nullptr : static_cast<int32_t*>(zero.mutable_data_ptr());
  return {codes, scale, zero};
}

int64_t factor_size(const Checks& check, const char* name, const Tensor& factor) {
  check.dense(name, factor);
  check.require(factor.dim() == 2 && factor.size(0) == factor.size(1) && factor.size(0) > 0, name,
                " has shape ", text(shape_of(factor)), ": it must be square");
  return factor.size(0);
}

const void* factor_of(const Checks& check, const char* name, const MaybeTensor& factor,
                      ScalarType narrower, Dtype* dtype, std::vector<Tensor>& kept) {
  if (!factor) return nullptr;
  kept.push_back(check.any_floating(name, *factor, narrower));
  *dtype = check.floating(name, kept.back());
  return kept.back().const_data_ptr();
}

Transform transform_of(const Checks& check, const Tensor& x, int64_t k, const MaybeTensor& left,
                       const MaybeTensor& right, const MaybeTensor& channel_scale,
                       std::vector<Tensor>& kept) {
  Transform t{};
  if (channel_scale)
    t.channel_scale = static_cast<const float*>(
        check.input("channel_scale", *channel_scale, ScalarType::Float, {k}));
  const int64_t left_size = left ? factor_size(check, "left", *left) : 0;
  const int64_t right_size = right ? factor_size(check, "right", *right) : 0;
  t.n1 = left ? left_size : right ? k / right_size : 1;
  t.n2 = right ? right_size : k / t.n1;
  check.require(t.n1 * t.n2 == k, "x has ", k, " columns, left and right are ", t.n1, " and ", t.n2,
                ": their product must equal it");
  t.left = factor_of(check, "left", left, x.scalar_type(), &t.left_dtype, kept);
  t.right = factor_of(check, "right", right, x.scalar_type(), &t.right_dtype, kept);
  return t;
}

int64_t transform_work(const Transform& t, int64_t k) {
  return k * (1 + (t.left ? t.n1 : 0) / 8 + (t.right ? t.n2 : 0) / 8);
}

struct Bias {
  const void* data = nullptr;
  Dtype dtype = Dtype::kFloat32;
};

Bias bias_of(const Checks& check, const MaybeTensor& bias, int64_t n, std::vector<Tensor>& kept) {
  if (!bias) return {};
  check.dense("bias", *bias);
  check.shape("bias", *bias, {n});
  kept.push_back(check.any_floating("bias", *bias, ScalarType::Float));
  return {kept.back().const_data_ptr(), check.floating("bias", kept.back())};
}

void byte_codes(const Checks& check, const Tensor& a, bool has_zero) {
  const ScalarType wanted = has_zero ? ScalarType::Byte : ScalarType::Char;
  check.require(a.scalar_type() == wanted, "a has dtype ", name_of(a.scalar_type()), ", a_zero is ",
                has_zero ? "given" : "missing", ": a must be ", name_of(wanted));
}

// What the integer GEMMs share: everything but the shape of a and w.
Prepared<GemmInteger, Tensor> integer_gemm(const Checks& check, const Tensor& a, const Rows& rows,
                                           int64_t k, const Tensor& a_scale,
                                           const MaybeTensor& a_zero, const Tensor& w,
                                           const Tensor& w_scale, const MaybeTensor& w_colsum,
                                           const MaybeTensor& bias, const MaybeTensor& residual,
                                           ScalarType out_dtype) {
  check.require(k <= kMaxGemmK, "a has ", k, " columns: int32 sums allow at most ", kMaxGemmK);
  check.require(a_zero.has_value() == w_colsum.has_value(), "a_zero is ",
                a_zero ? "given" : "missing", ", w_colsum is ", w_colsum ? "given" : "missing",
                ": they must be given together");
  const int64_t n = w.size(0);
  Prepared<GemmInteger, Tensor> p{};
  GemmInteger& args = p.args;
  args.out_dtype = check.floating("out_dtype", out_dtype);
  args.a = static_cast<const uint8_t*>(a.const_data_ptr());
  args.w = static_cast<const uint8_t*>(w.const_data_ptr());
  args.a_scale =
      static_cast<const float*>(check.input("a_scale", a_scale, ScalarType::Float, rows.lead));
  args.w_scale = static_cast<const float*>(check.input("w_scale", w_scale, ScalarType::Float, {n}));
  if (a_zero) {
    args.a_zero =
        static_cast<const int32_t*>(check.input("a_zero", *a_zero, ScalarType::Int, rows.lead));
    args.w_colsum =
        static_cast<const int32_t*>(check.input("w_colsum", *w_colsum, ScalarType::Int, {n}));
  }
  const Bias b = bias_of(check, bias, n, p.kept);
  args.bias = b.data;
  args.bias_dtype = b.dtype;
  if (residual) args.residual = check.input("residual", *residual, out_dtype, with(rows.lead, n));
  p.out = empty(a, with(rows.lead, n), out_dtype);
  args.out = p.out.mutable_data_ptr();
  args.m = rows.count;
  args.n = n;
  args.k = k;
  p.units = rows.count * n;
  p.work = (rows.count + 1) * n * k / 128;
  return p;
}

struct CacheSide {
  const uint8_t* codes;
  const float* scale;
  const uint8_t* zero;
};

CacheSide cache_side(const Checks& check, const std::string& prefix, const Tensor& codes,
                     const Tensor& scale, const Tensor& zero, int64_t batch, int64_t kv_heads,
                     int64_t capacity, int64_t head_dim, int32_t bits) {
  const int64_t bytes = packed_bytes(head_dim, bits);
  const std::string codes_name = prefix + "codes", scale_name = prefix + "scale";
  const std::string zero_name = prefix + "zero";
  return {static_cast<const uint8_t*>(check.input(codes_name.c_str(), codes, ScalarType::Byte,
                                                  {batch, kv_heads, capacity, bytes})),
          static_cast<const float*>(check.input(scale_name.c_str(), scale, ScalarType::Float,
                                                {batch, kv_heads, capacity})),
          static_cast<const uint8_t*>(
              check.input(zero_name.c_str(), zero, ScalarType::Byte, {batch, kv_heads, capacity}))};
}

int64_t length_of(const Checks& check, int64_t length, int64_t capacity) {
  check.require(0 <= length && length <= capacity, "length is ", length, ": it must be 0..",
                capacity, ", the capacity of the cache");
  return length;
}

// What reads a cache that may be paged: the sequences' blocks, and how much of them is in use.
// Kernels have 32 bits for a position.
template <class Args>
void address_cache(const Checks& check, Args& args, const Tensor& codes, int64_t batch,
                   int64_t length, const MaybeTensor& block_table, const MaybeTensor& lengths) {
  args.blocks = codes.size(0);
  int64_t capacity = args.capacity;
  if (block_table) {
    args.block_table = static_cast<const int32_t*>(
        check.input("block_table", *block_table, ScalarType::Int, {batch, kAny}));
    args.max_blocks = block_table->size(1);
    check.require(args.capacity > 0 || args.max_blocks == 0,
                  "block_table is given and blocks have 0 positions: they must have at least 1");
    capacity = args.max_blocks * args.capacity;
  }
  if (lengths)
    args.lengths =
        static_cast<const int32_t*>(check.input("lengths", *lengths, ScalarType::Int, {batch}));
  args.length = length_of(check, length, capacity);
  check.require((!block_table && !lengths) || capacity < (int64_t{1} << 31) - 65536,
                "the cache has ", capacity,
                " positions a sequence: with block_table or lengths it must have fewer than 2^31 - "
                "65536");
}

}  // namespace

Prepared<QuantizeActivation, Quantized> quantize_activation(Tensor x, MaybeTensor clip,
                                                            int64_t bits, bool symmetric,
                                                            bool narrow, int64_t layout) {
  const Checks check("quantize_activation", "x", x);
  const Rows rows = rows_of(check, "x", x);
  Prepared<QuantizeActivation, Quantized> p{};
  p.args.x = x.const_data_ptr();
  p.args.dtype = check.floating("x", x);
  p.args.clip = clip_of(check, clip);
  p.args.grid = grid_of(check, bits, symmetric, narrow, layout);
  p.args.rows = p.units = rows.count;
  p.args.k = rows.k;
  p.out = outputs_for(p.args, x, rows);
  p.work = rows.count * (1 + rows.k / 4);
  return p;
}

Prepared<Kronecker, Tensor> kronecker(Tensor x, MaybeTensor left, MaybeTensor right,
                                      MaybeTensor channel_scale, ScalarType out_dtype) {
  const Checks check("kronecker", "x", x);
  const Rows rows = rows_of(check, "x", x);
  Prepared<Kronecker, Tensor> p{};
  p.args.x = x.const_data_ptr();
  p.args.dtype = check.floating("x", x);
  p.args.out_dtype = check.floating("out_dtype", out_dtype);
  p.args.transform = transform_of(check, x, rows.k, left, right, channel_scale, p.kept);
  p.args.rows = p.units = rows.count;
  p.args.k = rows.k;
  p.out = empty(x, shape_of(x), out_dtype);
  p.args.out = p.out.mutable_data_ptr();
  p.work = rows.count * transform_work(p.args.transform, rows.k);
  return p;
}

Prepared<KroneckerQuantize, Quantized> kronecker_quantize(
    Tensor x, MaybeTensor gate, MaybeTensor channel_scale, std::optional<double> rms_eps,
    MaybeTensor left, MaybeTensor right, MaybeTensor clip, int64_t bits, bool symmetric,
    bool narrow, int64_t layout) {
  const Checks check("kronecker_quantize", "x", x);
  const Rows rows = rows_of(check, "x", x);
  Prepared<KroneckerQuantize, Quantized> p{};
  p.args.x = x.const_data_ptr();
  p.args.dtype = check.floating("x", x);
  if (gate) p.args.gate = check.input("gate", *gate, x.scalar_type(), shape_of(x));
  check.require(!rms_eps || (is_float(*rms_eps) && *rms_eps >= 0), "rms_eps is ",
                rms_eps.value_or(0), ": it must be finite and not negative");
  p.args.rms = rms_eps.has_value();
  p.args.rms_eps = static_cast<float>(rms_eps.value_or(0));
  p.args.clip = clip_of(check, clip);
  p.args.grid = grid_of(check, bits, symmetric, narrow, layout);
  p.args.transform = transform_of(check, x, rows.k, left, right, channel_scale, p.kept);
  p.args.rows = p.units = rows.count;
  p.args.k = rows.k;
  p.out = outputs_for(p.args, x, rows);
  p.work = rows.count * (transform_work(p.args.transform, rows.k) + rows.k / 4);
  return p;
}

Prepared<Hadamard, Tensor> hadamard(Tensor x, MaybeTensor base, double scale) {
  const Checks check("hadamard", "x", x);
  const Rows rows = rows_of(check, "x", x);
  Prepared<Hadamard, Tensor> p{};
  p.args.x = x.const_data_ptr();
  p.args.dtype = check.floating("x", x);
  p.args.n = rows.k;
  p.args.m = base ? factor_size(check, "base", *base) : 1;
  p.args.power = rows.k / p.args.m;
  check.require(p.args.m * p.args.power == rows.k && (p.args.power & (p.args.power - 1)) == 0,
                "x has ", rows.k, " columns, base is ", p.args.m,
                ": their quotient must be a power of two");
  p.args.base = factor_of(check, "base", base, ScalarType::Float, &p.args.base_dtype, p.kept);
  check.require(is_float(scale), "scale is ", scale, ": it must be finite");
  p.args.scale = static_cast<float>(scale);
  p.args.rows = p.units = rows.count;
  p.out = empty(x, shape_of(x), x.scalar_type());
  p.args.out = p.out.mutable_data_ptr();
  p.work = rows.count * rows.k * (1 + p.args.m / 8);
  return p;
}

Prepared<GemmInteger, Tensor> gemm_w4a4(Tensor a, Tensor a_scale, MaybeTensor a_zero, Tensor w,
                                        Tensor w_scale, MaybeTensor w_colsum, MaybeTensor bias,
                                        MaybeTensor residual, ScalarType out_dtype) {
  const Checks check("gemm_w4a4", "a", a);
  const Rows rows = rows_of(check, "a", a);
  check.dtype("a", a, ScalarType::Byte);
  check.input("w", w, ScalarType::Byte, {kAny, kAny});
  check.require(w.size(1) == rows.k, "a has ", rows.k, " packed columns, w has ", w.size(1),
                ": they must be equal");
  return integer_gemm(check, a, rows, 2 * rows.k, a_scale, a_zero, w, w_scale, w_colsum, bias,
                      residual, out_dtype);
}

Prepared<GemmInteger, Tensor> gemm_w4a8(Tensor a, Tensor a_scale, MaybeTensor a_zero, Tensor w,
                                        Tensor w_scale, MaybeTensor w_colsum, MaybeTensor bias,
                                        MaybeTensor residual, ScalarType out_dtype) {
  const Checks check("gemm_w4a8", "a", a);
  const Rows rows = rows_of(check, "a", a);
  byte_codes(check, a, a_zero.has_value());
  check.input("w", w, ScalarType::Byte, {kAny, kAny});
  check.require(w.size(1) == nibble_bytes(rows.k), "a has ", rows.k, " columns, w has ", w.size(1),
                " packed columns: w must have half as many, rounded up");
  return integer_gemm(check, a, rows, rows.k, a_scale, a_zero, w, w_scale, w_colsum, bias, residual,
                      out_dtype);
}

Prepared<GemmInteger, Tensor> gemm_w8a8(Tensor a, Tensor a_scale, MaybeTensor a_zero, Tensor w,
                                        Tensor w_scale, MaybeTensor w_colsum, MaybeTensor bias,
                                        MaybeTensor residual, ScalarType out_dtype) {
  const Checks check("gemm_w8a8", "a", a);
  const Rows rows = rows_of(check, "a", a);
  byte_codes(check, a, a_zero.has_value());
  check.input("w", w, ScalarType::Char, {kAny, rows.k});
  check.require(rows.k <= kMaxGemmK / 16, "a has ", rows.k,
                " columns: int32 sums of 8-bit products allow at most ", kMaxGemmK / 16);
  return integer_gemm(check, a, rows, rows.k, a_scale, a_zero, w, w_scale, w_colsum, bias, residual,
                      out_dtype);
}

Prepared<GemmW4A16, Tensor> gemm_w4a16(Tensor x, Tensor w, Tensor w_scale, MaybeTensor bias,
                                       int64_t bits) {
  const Checks check("gemm_w4a16", "x", x);
  const Rows rows = rows_of(check, "x", x);
  Prepared<GemmW4A16, Tensor> p{};
  GemmW4A16& args = p.args;
  args.x = x.const_data_ptr();
  args.dtype = check.floating("x", x);
  args.bits = check.bits("bits", bits, 2, 4);
  const int64_t bytes = packed_bytes(rows.k, args.bits);
  args.w = static_cast<const uint8_t*>(check.input("w", w, ScalarType::Byte, {kAny, bytes}));
  args.n = w.size(0);
  args.w_scale =
      static_cast<const float*>(check.input("w_scale", w_scale, ScalarType::Float, {args.n, kAny}));
  args.groups = w_scale.size(1);
  check.require(args.groups > 0 && rows.k % args.groups == 0, "x has ", rows.k,
                " columns, w_scale has ", args.groups, " groups: they must divide them");
  const Bias b = bias_of(check, bias, args.n, p.kept);
  args.bias = b.data;
  args.bias_dtype = b.dtype;
  args.m = rows.count;
  args.k = rows.k;
  p.out = empty(x, with(rows.lead, args.n), x.scalar_type());
  args.out = p.out.mutable_data_ptr();
  p.units = rows.count * args.n;
  p.work = (rows.count + 4) * args.n * rows.k / 32;
  return p;
}

Prepared<KvQuantizeAppend, Nothing> kv_quantize_append(Tensor x, MaybeTensor transform,
                                                       MaybeTensor clip, int64_t bits, Tensor codes,
                                                       Tensor scale, Tensor zero, int64_t start,
                                                       MaybeTensor slots) {
  const Checks check("kv_quantize_append", "x", x);
  check.shape("x", x, {kAny, kAny, kAny, kAny});
  Prepared<KvQuantizeAppend, Nothing> p{};
  KvQuantizeAppend& args = p.args;
  args.x = x.const_data_ptr();
  args.dtype = check.floating("x", x);
  args.bits = check.bits("bits", bits);
  args.t = x.size(2);
  args.head_dim = x.size(3);
  check.require(args.head_dim > 0, "x has 0 columns: it must have at least 1");
  check.shape("codes", codes, {kAny, kAny, kAny, kAny});
  args.capacity = codes.size(2);
  args.kv_heads = x.size(1);
  args.blocks = codes.size(0);
  cache_side(check, "", codes, scale, zero, slots ? args.blocks : x.size(0), args.kv_heads,
             args.capacity, args.head_dim, args.bits);
  if (slots)
    args.slots = static_cast<const int64_t*>(
        check.input("slots", *slots, ScalarType::Long, {x.size(0), args.t}));
  constexpr int64_t kLast = std::numeric_limits<int64_t>::max();
  const int64_t stop = start < kLast - args.t ? start + args.t : kLast;
  check.require(!slots || start == 0, "start is ", start, ": with slots it must be 0");
  check.require(slots || (start >= 0 && stop <= args.capacity), "positions ", start, "..", stop,
                " do not fit: the capacity is ", args.capacity);
  if (transform) {
    check.dense("transform", *transform);
    check.shape("transform", *transform, {args.head_dim, args.head_dim});
  }
  args.transform =
      factor_of(check, "transform", transform, x.scalar_type(), &args.transform_dtype, p.kept);
  args.clip = clip_of(check, clip);
  // The first three are written. x stands in for what is absent.
  const std::pair<const char*, const Tensor*> all[] = {{"codes", &codes},
                                                       {"scale", &scale},
                                                       {"zero", &zero},
                                                       {"x", &x},
                                                       {"transform", transform ? &*transform : &x},
                                                       {"clip", clip ? &*clip : &x},
                                                       {"slots", slots ? &*slots : &x}};
  for (int written = 0; written < 3; ++written)
    for (int other = written + 1; other < 7; ++other)
      check.apart(all[written].first, *all[written].second, all[other].first, *all[other].second);
  args.codes = static_cast<uint8_t*>(codes.mutable_data_ptr());
  args.scale = static_cast<float*>(scale.mutable_data_ptr());
  args.zero = static_cast<uint8_t*>(zero.mutable_data_ptr());
  args.batch_heads = x.size(0) * x.size(1);
  args.start = start;
  p.units = args.batch_heads * args.t;
  p.work = p.units * args.head_dim * (1 + (transform ? args.head_dim / 8 : 0));
  return p;
}

Prepared<KvDequantize, Tensor> kv_dequantize(Tensor codes, Tensor scale, Tensor zero, int64_t bits,
                                             int64_t head_dim, int64_t length, ScalarType out_dtype,
                                             MaybeTensor block_table, MaybeTensor lengths) {
  const Checks check("kv_dequantize", "codes", codes);
  check.shape("codes", codes, {kAny, kAny, kAny, kAny});
  Prepared<KvDequantize, Tensor> p{};
  KvDequantize& args = p.args;
  args.bits = check.bits("bits", bits);
  check.require(0 < head_dim && head_dim <= kMaxGemmK, "head_dim is ", head_dim,
                ": it must be at least 1, at most ", kMaxGemmK);
  args.head_dim = head_dim;
  args.capacity = codes.size(2);
  args.kv_heads = codes.size(1);
  if (block_table) check.shape("block_table", *block_table, {kAny, kAny});
  const int64_t batch = block_table ? block_table->size(0) : codes.size(0);
  address_cache(check, args, codes, batch, length, block_table, lengths);
  const CacheSide side = cache_side(check, "", codes, scale, zero, args.blocks, args.kv_heads,
                                    args.capacity, head_dim, args.bits);
  args.codes = side.codes;
  args.scale = side.scale;
  args.zero = side.zero;
  args.batch_heads = batch * args.kv_heads;
  args.out_dtype = check.floating("out_dtype", out_dtype);
  p.out = empty(codes, {batch, args.kv_heads, length, head_dim}, out_dtype);
  args.out = p.out.mutable_data_ptr();
  p.units = args.batch_heads * length;
  p.work = p.units * (1 + head_dim / 4);
  return p;
}

Prepared<AttentionDecode, Tensor> attention_decode(Tensor q, Tensor k_codes, Tensor k_scale,
                                                   Tensor k_zero, Tensor v_codes, Tensor v_scale,
                                                   Tensor v_zero, MaybeTensor mask, int64_t k_bits,
                                                   int64_t v_bits, int64_t length, double scaling,
                                                   MaybeTensor block_table, MaybeTensor lengths,
                                                   int64_t window) {
  const Checks check("attention_decode", "q", q);
  check.shape("q", q, {kAny, kAny, kAny, kAny});
  check.shape("k_codes", k_codes, {block_table ? kAny : q.size(0), kAny, kAny, kAny});
  Prepared<AttentionDecode, Tensor> p{};
  AttentionDecode& args = p.args;
  args.q = q.const_data_ptr();
  args.dtype = check.floating("q", q);
  args.batch = q.size(0);
  args.heads = q.size(1);
  args.tq = q.size(2);
  args.head_dim = q.size(3);
  check.require(args.head_dim > 0, "q has 0 columns: it must have at least 1");
  args.kv_heads = k_codes.size(1);
  args.capacity = k_codes.size(2);
  check.require(args.kv_heads > 0 && args.heads % args.kv_heads == 0, "q has ", args.heads,
                " heads, the cache ", args.kv_heads, ": no multiple");
  args.k_bits = check.bits("k_bits", k_bits);
  args.v_bits = check.bits("v_bits", v_bits);
  address_cache(check, args, k_codes, args.batch, length, block_table, lengths);
  check.require(window >= 0, "window is ", window, ": it must not be negative");
  check.require(window == 0 || lengths, "window is ", window, ": it needs lengths");
  args.window = window;
  const CacheSide k = cache_side(check, "k_", k_codes, k_scale, k_zero, args.blocks, args.kv_heads,
                                 args.capacity, args.head_dim, args.k_bits);
  const CacheSide v = cache_side(check, "v_", v_codes, v_scale, v_zero, args.blocks, args.kv_heads,
                                 args.capacity, args.head_dim, args.v_bits);
  args.k_codes = k.codes;
  args.k_scale = k.scale;
  args.k_zero = k.zero;
  args.v_codes = v.codes;
  args.v_scale = v.scale;
  args.v_zero = v.zero;
  check.require(is_float(scaling), "scaling is ", scaling, ": it must be finite");
  args.scaling = static_cast<float>(scaling);
  if (mask) {
    check.on_device("mask", *mask);
    check.aligned("mask", *mask);
    const std::vector<int64_t> full = {args.batch, args.heads, args.tq, length};
    const int64_t missing = 4 - mask->dim();
    bool fits = missing >= 0;
    for (int64_t i = 0; fits && i < mask->dim(); ++i)
      fits = mask->size(i) == 1 || mask->size(i) == full[i + missing];
    check.require(fits, "mask has shape ", text(shape_of(*mask)), ": it must broadcast to ",
                  text(full));
    const bool logical = mask->scalar_type() == ScalarType::Bool;
    p.kept.push_back(logical ? *mask : check.any_floating("mask", *mask, ScalarType::Float));
    const Tensor& kept = p.kept.back();
    args.mask = kept.const_data_ptr();
    args.mask_kind = logical ? Mask::kBool : Mask::kAdditive;
    if (!logical) args.mask_dtype = check.floating("mask", kept);
    for (int64_t i = 0; i < kept.dim(); ++i)
      args.mask_strides[i + missing] = kept.size(i) == 1 ? 0 : kept.stride(i);
  }
  p.out = empty(q, shape_of(q), q.scalar_type());
  args.out = p.out.mutable_data_ptr();
  p.units = args.batch * args.heads * args.tq;
  p.work = p.units * (1 + length * args.head_dim / 8);
  return p;
}

namespace {

// What fake_quantize and its gradient share: x [rows, k] and its clip ratios.
template <class Args>
Args fake_quantize_args(const Checks& check, const Tensor& x, const Tensor& clip, int64_t bits,
                        bool symmetric) {
  Args args{};
  check.require(x.dim() == 2, "x has ", x.dim(), " dimensions: it must have 2");
  args.rows = x.size(0);
  args.k = x.size(1);
  check.require(args.k > 0, "x has 0 columns: it must have at least 1");
  args.x = static_cast<const float*>(check.input("x", x, ScalarType::Float, {args.rows, args.k}));
  args.clip_per_row = clip.dim() == 2;
  const std::vector<int64_t> one{2}, per_row{2, args.rows};
  args.clip = static_cast<const float*>(
      check.input("clip", clip, ScalarType::Float, args.clip_per_row ? per_row : one));
  args.bits = check.bits("bits", bits);
  args.symmetric = symmetric;
  return args;
}

}  // namespace

Prepared<FakeQuantize, Tensor> fake_quantize(Tensor x, Tensor clip, int64_t bits, bool symmetric) {
  const Checks check("fake_quantize", "x", x);
  Prepared<FakeQuantize, Tensor> p{};
  p.args = fake_quantize_args<FakeQuantize>(check, x, clip, bits, symmetric);
  p.out = empty(x, shape_of(x), ScalarType::Float);
  p.args.y = static_cast<float*>(p.out.mutable_data_ptr());
  p.units = p.args.rows;
  p.work = p.args.rows * (1 + p.args.k / 2);
  return p;
}

Prepared<FakeQuantizeBackward, std::tuple<Tensor, Tensor>> fake_quantize_backward(
    Tensor grad, Tensor x, Tensor clip, int64_t bits, bool symmetric) {
  const Checks check("fake_quantize_backward", "x", x);
  Prepared<FakeQuantizeBackward, std::tuple<Tensor, Tensor>> p{};
  p.args = fake_quantize_args<FakeQuantizeBackward>(check, x, clip, bits, symmetric);
  p.args.grad =
      static_cast<const float*>(check.input("grad", grad, ScalarType::Float, shape_of(x)));
  Tensor grad_x = empty(x, shape_of(x), ScalarType::Float);
  Tensor grad_clip = empty(x, {2, p.args.rows}, ScalarType::Float);
  p.args.grad_x = static_cast<float*>(grad_x.mutable_data_ptr());
  p.args.grad_clip = static_cast<float*>(grad_clip.mutable_data_ptr());
  p.out = {grad_x, grad_clip};
  p.units = p.args.rows;
  p.work = p.args.rows * (1 + p.args.k / 2);
  return p;
}

}  // namespace fq::binding
