// flatquant_cuda._native: what tests ask of the native code that has no op: the
// contract's scalars, to be compared with the PyTorch reference over whole
// arrays, the table of GPUs and the planners of the CUDA kernels. No torch, no
// CUDA toolkit. The package works without it.
#include "introspect.h"

#include "../ops.h"

namespace fq::native {
namespace {

Dtype dtype_at(int index) { return static_cast<Dtype>(index); }

void add_contract(py::module_& m) {
  m.def("bf16_to_float", py::vectorize([](uint16_t h) { return bf16_to_float(h); }));
  m.def("fp16_to_float", py::vectorize([](uint16_t h) { return fp16_to_float(h); }));
  m.def("float_to_bf16", py::vectorize([](float x) { return float_to_bf16(x); }));
  m.def("float_to_fp16", py::vectorize([](float x) { return float_to_fp16(x); }));
  m.def("round_to", py::vectorize([](int dtype, float x) { return round_to(dtype_at(dtype), x); }));

  m.def("symmetric_scale",
        py::vectorize([](float max_x, float min_x, float clip_max, float clip_min, int bits) {
          return symmetric_scale(max_x, min_x, clip_max, clip_min, bits);
        }));
  m.def("asymmetric_scale",
        py::vectorize([](float max_x, float min_x, float clip_max, float clip_min, int bits) {
          return asymmetric_scale(max_x, min_x, clip_max, clip_min, bits).scale;
        }));
  m.def("asymmetric_zero",
        py::vectorize([](float max_x, float min_x, float clip_max, float clip_min, int bits) {
          return asymmetric_scale(max_x, min_x, clip_max, clip_min, bits).zero;
        }));
  m.def("symmetric_code", py::vectorize([](float x, float scale, int bits, bool narrow) {
          return symmetric_code(x, scale, bits, narrow);
        }));
  m.def("asymmetric_code", py::vectorize([](float x, float scale, int32_t zero, int bits) {
          return asymmetric_code(x, scale, zero, bits);
        }));
  m.def("value",
        py::vectorize([](int32_t q, int32_t zero, float scale) { return value(q, zero, scale); }));

  m.def("pack_nibbles",
        py::vectorize([](int32_t even, int32_t odd) { return pack_nibbles(even, odd); }));
  m.def("nibble", py::vectorize([](uint8_t byte, int64_t i) { return nibble(byte, i); }));
  m.def("signed_nibble",
        py::vectorize([](uint8_t byte, int64_t i) { return signed_nibble(byte, i); }));
  m.def("crumb", py::vectorize([](uint8_t byte, int64_t i) { return crumb(byte, i); }));
  m.def("signed_crumb",
        py::vectorize([](uint8_t byte, int64_t i) { return signed_crumb(byte, i); }));
  m.def("packed_bytes", py::vectorize([](int64_t k, int bits) { return packed_bytes(k, bits); }));
  m.def("activation_bytes",
        py::vectorize([](int64_t k, int bits) { return activation_bytes(k, bits); }));

  m.def("scaled", py::vectorize([](int32_t accumulator, float scale_x, float scale_w) {
          return scaled(accumulator, scale_x, scale_w);
        }));
  m.def("exponential", py::vectorize([](float x) { return exponential(x); }));
  m.def("silu", py::vectorize([](float g) { return silu(g); }));
  m.def("rms_reciprocal",
        py::vectorize([](float sum, int64_t k, float eps) { return rms_reciprocal(sum, k, eps); }));
}

py::list gpus() {
  py::list out;
  for (const cuda::Gpu& gpu : cuda::kGpus) {
    py::dict entry;
    entry["name"] = gpu.name;
    entry["arch"] = gpu.arch;
    entry["sms"] = gpu.sms;
    entry["shared_per_block"] = gpu.shared_per_block;
    entry["shared_per_sm"] = gpu.shared_per_sm;
    entry["registers_per_sm"] = gpu.registers_per_sm;
    entry["l2_bytes"] = gpu.l2_bytes;
    entry["bandwidth_gb"] = gpu.bandwidth_gb;
    out.append(entry);
  }
  return out;
}

}  // namespace
}  // namespace fq::native

PYBIND11_MODULE(_native, m) {
  using namespace fq::native;
  m.doc() =
      "The contract's scalars over NumPy arrays, the table of GPUs, the "
      "planners.";
  add_contract(m);
  m.def("gpus", &gpus, "The GPUs that the planners are tested for, as dicts.");
  add_gemm(m);
  add_transform(m);
  add_hadamard(m);
  add_attention(m);
}
