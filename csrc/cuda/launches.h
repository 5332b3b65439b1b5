// The launches of each op, on columns and addresses. An op calls them, which is host code.
#pragma once

#include <array>
#include <cstdint>

#include "common/columns.h"
#include "cuts.h"
#include "run.h"

namespace nk {

// A vector in global memory, and what rounding it left out.
struct Rounded {
  float *value, *remainder;

  NK_INLINE void store(int64_t i, double exact) const {
    value[i] = float(exact);
    remainder[i] = float(exact - double(value[i]));
  }
};

void launch_moments(const Run& run, const Columns& x, int element, int64_t groups, int64_t d, const Reduction& how,
                    const Workspace& workspace, const Rounded& mean, float* cov);

void launch_cross_moments(const Run& run, const Columns& y, const Columns& x, int element, const float* mean,
                          int64_t groups, int64_t d, const Reduction& how, const Workspace& workspace, float* cross,
                          float* sum);

// The same for groups of one channel: cov and cross are (C,).
void launch_channel_moments(const Run& run, const Columns& x, int element, const ChannelReduction& how,
                            const Workspace& workspace, const Rounded& mean, float* cov);

void launch_channel_sums(const Run& run, const Columns& y, const Columns& x, int element, const float* mean,
                         const ChannelReduction& how, const Workspace& workspace, float* cross, float* sum);

// A matrix (G, rows, columns) in global memory, by its strides.
struct MatrixView {
  const float* data;
  int64_t group_stride, row_stride, column_stride;
};

void launch_mix(const Run& run, const Columns& a, const float* a_shift, const Columns* b, const float* b_shift,
                const Columns& y, int element, const MatrixView& matrix, const Parameter& weight, const Parameter& bias,
                int64_t groups, int64_t d);

// A factor for each channel (C,), or 1.
struct Factor {
  const float* data = nullptr;
  int64_t stride = 1;

  NK_INLINE float operator()(int64_t channel) const { return data == nullptr ? 1.f : data[channel * stride]; }
};

// The same for channels on their own: y = weight (of_a (a - a_shift) + of_b b) + bias, without b if it is nullptr.
void launch_scale(const Run& run, const Columns& a, const Factor& of_a, const float* a_shift, const Columns* b,
                  const Factor& of_b, const Columns& y, int element, int64_t channels, const Parameter& weight,
                  const Parameter& bias);

// The options of POP-Norm, and its reductions' results for its maps, all (C,) in global memory.
struct PopOptions {
  float kappa, eps;
  bool center, scale;
};
struct PopForward {
  float *mean, *var, *factor, *constant;
};
struct PopBackward {
  float *of_grad, *of_x, *constant, *grad_weight, *grad_bias;
};

void launch_pop_forward(const Run& run, const Columns& x, int element, const ChannelReduction& how,
                        const Workspace& workspace, const PopOptions& options, const Parameter& weight,
                        const Parameter& bias, const PopForward& out);

void launch_pop_backward(const Run& run, const Columns& grad, const Columns& x, int element,
                         const ChannelReduction& how, const Workspace& workspace, const PopOptions& options,
                         const Parameter& weight, const Parameter& bias, const float* mean, const float* var,
                         const PopBackward& out);

void launch_inverse_sqrt(const Run& run, const float* cov, int64_t groups, const Newton& how, const Room& room,
                         float* scratch, float* W, float* S, float* scale);

void launch_inverse_sqrt_backward(const Run& run, const float* grad, const float* W, const float* S, const float* scale,
                                  int64_t groups, const Newton& how, const Room& room, float* scratch, float* grad_cov);

// The results of the training op's reductions, and the inputs of the one backward, all in global memory.
struct ForwardResults {
  float *mean, *W, *S, *scale, *constant;
};
struct BackwardInputs {
  const float *mean, *W, *S, *scale;
};
struct BackwardResults {
  float *matrix, *grad_mean, *constant, *grad_weight, *grad_bias;
};

void launch_forward(const Run& run, const Columns& x, int element, int64_t groups, const Newton& how,
                    const Reduction& reduction, const Workspace& workspace, float* scratch, const Parameter& weight,
                    const Parameter& bias, const ForwardResults& out);

void launch_backward(const Run& run, const Columns& grad, const Columns& x, int element, int64_t groups,
                     const Newton& how, const Reduction& reduction, const Workspace& workspace, float* scratch,
                     const Parameter& weight, const BackwardInputs& in, const BackwardResults& out);

constexpr int ROW_THREADS = 256, ROW_WARPS = ROW_THREADS / 32;
constexpr int LONG_ROW = 2048;  // values from which on a whole block has a row

// A layer whose rows of weights are dense: channels of an output's group, and taps of a kernel, either innermost.
struct GradientLayer {
  unsigned char *weight, *bias;  // bias may be nullptr
  const float *mean, *variance;
  float q2;
  int rows, rows_of_group, channels, taps;
  bool inner;                       // the channels are next to each other, otherwise the taps
  int first_block = 0, vector = 1;  // the layer's first block in the launch; values of an access

  NK_INLINE bool is_long() const { return int64_t(channels) * taps >= LONG_ROW; }
  NK_INLINE int rows_of_block() const { return is_long() ? 1 : ROW_WARPS; }
};

// The layers of one launch: a kernel's parameters are at most 4 KiB.
constexpr int MOST_LAYERS = 56;
struct GradientLayers {
  GradientLayer layer[MOST_LAYERS];
  int count;
  float eps1, eps2;
  bool bfloat;
};
static_assert(sizeof(GradientLayers) + sizeof(void*) <= 4096);

// left (layers,): how many rows of each layer are left as they are; it must be zero before.
void launch_precondition(const Run& run, GradientLayers all, int element, unsigned* left);

// Where the values of a tensor (N, C, h, w) lie: on the H x W plane at start + step i, and in memory.
struct Window {
  int start, step, count;

  // The index of a position of the plane, or -1.
  NK_INLINE int index(int position) const {
    const int from = position - start;
    if (step == 1) return from >= 0 && from < count ? from : -1;
    return from >= 0 && from % step == 0 && from / step < count ? from / step : -1;
  }
};

struct Planes {
  unsigned char* data = nullptr;
  int64_t sample_stride, channel_stride, row_stride, column_stride;
  Window rows, columns;
  bool inner, bfloat;

  NK_INLINE int64_t plane(int64_t number, int channels) const {
    return number / channels * sample_stride + number % channels * channel_stride;
  }
};

// v (C, H, W) by its strides; coefficients: coefficient_floats(H, W, C) of workspace.
void launch_filter(const Run& run, const Planes& z, const Planes& y, int element, const float* v,
                   const std::array<int64_t, 3>& v_strides, int64_t H, int64_t W, int64_t samples, int64_t channels,
                   float* coefficients);
int64_t coefficient_floats(int64_t H, int64_t W, int64_t channels);

}  // namespace nk
