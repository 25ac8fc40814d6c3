// Rows of numbers: widening, rounding, their range. A body: it is included into the
// anonymous namespace of one file per instruction set, so it includes nothing and needs ../ops.h
// before it. Loops run over contiguous elements and hold no branch, which lets the compiler
// vectorise them; every element is computed alone, so each instruction set gives the same bits.

// Elements first .. first + k of an array of T, as float32.
inline void widen_row(const void* data, Dtype dtype, int64_t first, int64_t k, float* out) {
  if (dtype == Dtype::kFloat32) {
    const float* const x = static_cast<const float*>(data) + first;
    for (int64_t j = 0; j < k; ++j) out[j] = x[j];
  } else if (dtype == Dtype::kBFloat16) {
    const uint16_t* const x = static_cast<const uint16_t*>(data) + first;
    for (int64_t j = 0; j < k; ++j) out[j] = bf16_to_float(x[j]);
  } else {
    const uint16_t* const x = static_cast<const uint16_t*>(data) + first;
    for (int64_t j = 0; j < k; ++j) out[j] = fp16_to_float(x[j]);
  }
}

inline void narrow_row(const float* y, Dtype dtype, int64_t first, int64_t k, void* data) {
  if (dtype == Dtype::kFloat32) {
    float* const out = static_cast<float*>(data) + first;
    for (int64_t j = 0; j < k; ++j) out[j] = y[j];
  } else if (dtype == Dtype::kBFloat16) {
    uint16_t* const out = static_cast<uint16_t*>(data) + first;
    for (int64_t j = 0; j < k; ++j) out[j] = float_to_bf16(y[j]);
  } else {
    uint16_t* const out = static_cast<uint16_t*>(data) + first;
    for (int64_t j = 0; j < k; ++j) out[j] = float_to_fp16(y[j]);
  }
}

// y = round_T(y)
inline void round_row(float* y, Dtype dtype, int64_t k) {
  if (dtype == Dtype::kBFloat16)
    for (int64_t j = 0; j < k; ++j) y[j] = bf16_to_float(float_to_bf16(y[j]));
  else if (dtype == Dtype::kFloat16)
    for (int64_t j = 0; j < k; ++j) y[j] = fp16_to_float(float_to_fp16(y[j]));
}

// sum y^2 in 16 lanes, folded in halves: one order of additions for every instruction set.
inline float sum_of_squares(const float* y, int64_t k) {
  float lanes[16] = {};
  int64_t j = 0;
  for (; j + 16 <= k; j += 16)
    for (int l = 0; l < 16; ++l) lanes[l] = fq::fma(y[j + l], y[j + l], lanes[l]);
  for (int l = 0; j + l < k; ++l) lanes[l] = fq::fma(y[j + l], y[j + l], lanes[l]);
  for (int half = 8; half > 0; half /= 2)
    for (int l = 0; l < half; ++l) lanes[l] = lanes[l] + lanes[l + half];
  return lanes[0];
}

struct Range {
  float max, min;  // of the row and 0; NaN or infinite if the row holds such a value
};

// As signed integers, the bits of positive floats are ordered like the floats, below Inf, below
// NaN, and all negative ones are negative. So an integer maximum finds max(x, 0), and loses no NaN;
// with the sign flipped it finds max(-x, 0).
inline Range range_of(const float* y, int64_t k) {
  int32_t above = 0, below = 0;
  for (int64_t j = 0; j < k; ++j) {
    const uint32_t bits = bits_of(y[j]);
    const int32_t plus = static_cast<int32_t>(bits);
    const int32_t minus = static_cast<int32_t>(bits ^ 0x80000000u);
    above = plus > above ? plus : above;
    below = minus > below ? minus : below;
  }
  return {float_of(static_cast<uint32_t>(above)), -float_of(static_cast<uint32_t>(below))};
}
