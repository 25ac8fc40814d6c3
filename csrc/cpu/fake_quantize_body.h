// Quantize-dequantize of rows and its straight-through gradient, for one instruction set. A body;
// needs row_body.h before it. A row is read from cache after the first pass, so each of the two ops
// moves what it must through memory and no more: x in, y out; x and grad in, grad_x out.

struct RowGrid {
  float scale, zero, lowest, highest;  // codes relative to zero: rint(x / scale) in lowest..highest
};

inline RowGrid row_grid(const Range& range, float clip_max, float clip_min, int bits,
                        bool symmetric) {
  if (symmetric) {
    const float scale = symmetric_scale(range.max, range.min, clip_max, clip_min, bits);
    return {scale, 0.0f, static_cast<float>(qmin(bits, false)), static_cast<float>(qmax(bits))};
  }
  const ScaleZero found = asymmetric_scale(range.max, range.min, clip_max, clip_min, bits);
  const float zero = static_cast<float>(found.zero);
  return {found.scale, zero, -zero, static_cast<float>(levels(bits)) - zero};
}

inline void fake_quantize_rows(const FakeQuantize& args, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; ++i) {
    const float* const x = args.x + i * args.k;
    float* const y = args.y + i * args.k;
    const int64_t at = args.clip_per_row ? i : 0, next = args.clip_per_row ? args.rows : 1;
    const RowGrid grid = row_grid(range_of(x, args.k), args.clip[at], args.clip[at + next],
                                  args.bits, args.symmetric);
    for (int64_t j = 0; j < args.k; ++j) {
      float q = __builtin_rintf(x[j] / grid.scale);
      q = q < grid.lowest ? grid.lowest : q;
      q = q > grid.highest ? grid.highest : q;
      y[j] = q * grid.scale;
    }
  }
}

// First position of a value in a row; k if it is not there.
inline int64_t position_of(const float* x, int64_t k, float value) {
  int64_t j = 0;
  while (j < k && x[j] != value) ++j;
  return j;
}

// work: room for k floats.
inline void fake_quantize_backward_rows(const FakeQuantizeBackward& args, int64_t begin,
                                        int64_t end, void* work) {
  float* const terms = static_cast<float*>(work);
  for (int64_t i = begin; i < end; ++i) {
    const float* const x = args.x + i * args.k;
    const float* const grad = args.grad + i * args.k;
    float* const grad_x = args.grad_x + i * args.k;
    const int64_t at = args.clip_per_row ? i : 0, next = args.clip_per_row ? args.rows : 1;
    const float clip_max = args.clip[at], clip_min = args.clip[at + next];
    const Range range = range_of(x, args.k);
    const RowGrid grid = row_grid(range, clip_max, clip_min, args.bits, args.symmetric);
    // d y / d scale is q - x / scale where rounding passes the gradient on, q where clamping stops
    for (int64_t j = 0; j < args.k; ++j) {
      const float ratio = x[j] / grid.scale, r = __builtin_rintf(ratio), g = grad[j];
      float q = r < grid.lowest ? grid.lowest : r;
      q = q > grid.highest ? grid.highest : q;
      grad_x[j] = q == r ? g : 0.0f;
      terms[j] = g * (q == r ? q - ratio : q);
    }
    float lanes[16] = {};
    int64_t j = 0;
    for (; j + 16 <= args.k; j += 16)
      for (int l = 0; l < 16; ++l) lanes[l] = lanes[l] + terms[j + l];
    for (int l = 0; j + l < args.k; ++l) lanes[l] = lanes[l] + terms[j + l];
    for (int half = 8; half > 0; half /= 2)
      for (int l = 0; l < half; ++l) lanes[l] = lanes[l] + lanes[l + half];

    // the scale is (a multiple of) the clipped range, the range is one or two elements of the row
    const int steps = args.symmetric ? qmax(args.bits) : levels(args.bits);
    const float slope = lanes[0] / static_cast<float>(steps);
    const bool use_max = !args.symmetric || clip_max * range.max >= clip_min * -range.min;
    const bool use_min = !args.symmetric || !use_max;
    if (use_max && range.max > 0.0f) grad_x[position_of(x, args.k, range.max)] += slope * clip_max;
    if (use_min && range.min < 0.0f) grad_x[position_of(x, args.k, range.min)] -= slope * clip_min;
    args.grad_clip[i] = use_max ? slope * range.max : 0.0f;
    args.grad_clip[args.rows + i] = use_min ? slope * -range.min : 0.0f;
  }
}
