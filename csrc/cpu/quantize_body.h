// quantize_activation over rows, for one instruction set. A body; needs row_body.h before it.

// work: room for k floats and k + 1 bytes.
inline void quantize_rows(const QuantizeActivation& args, int64_t begin, int64_t end, void* work) {
  float* const row = static_cast<float*>(work);
  uint8_t* const bytes = reinterpret_cast<uint8_t*>(row + args.k);
  const int64_t size = row_bytes(args.grid, args.k);
  for (int64_t i = begin; i < end; ++i) {
    const float* y = static_cast<const float*>(args.x) + i * args.k;
    if (args.dtype != Dtype::kFloat32) {
      widen_row(args.x, args.dtype, i * args.k, args.k, row);
      y = row;
    }
    const ScaleZero found =
        quantize_row(y, args.k, args.clip, args.grid, args.codes + i * size, bytes);
    args.scale[i] = found.scale;
    if (args.zero) args.zero[i] = found.zero;
  }
}
