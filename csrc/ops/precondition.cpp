// precondition.
#include <algorithm>

#include "cuda/launches.h"
#include "op.h"
#include "workspace.h"

namespace nk {

// Returns whether rows follow each other and their values are dense, the channels (`inner`) or the taps innermost.
static bool dense_rows(const Tensor& weight, bool inner) {
  int64_t expected = 1;
  const auto as_expected = [&](int64_t dim) {
    const bool same = weight.size(dim) == 1 || weight.stride(dim) == expected;
    expected *= weight.size(dim);
    return same;
  };
  bool dense = !inner || as_expected(1);
  for (int64_t dim = weight.dim() - 1; dim >= 2; --dim) dense = dense && as_expected(dim);
  return dense && (inner || as_expected(1)) && as_expected(0);
}

static void check_layer(const char* op, const Tensor& weight, const Tensor& bias, const Tensor& mean,
                        const Tensor& variance, int64_t groups, double q2, const Tensor& first) {
  STD_TORCH_CHECK(weight.dim() >= 2 && weight.numel() > 0, op,
                  ": weight_grads: expected non-empty shapes (O, I / groups, *k), got ", text(shape_of(weight)));
  check_like(op, "weight_grads", weight, shape_of(weight), first.scalar_type(), first);
  const int64_t rows = weight.size(0), inputs = weight.size(1) * groups;
  STD_TORCH_CHECK(groups >= 1 && rows % groups == 0, op, ": groups: expected a divisor of the ", rows, " outputs, got ",
                  groups);
  STD_TORCH_CHECK(q2 > 0, op, ": q2: expected a number above 0, got ", q2);
  STD_TORCH_CHECK(weight.numel() / rows <= INT32_MAX && rows <= INT32_MAX, op, ": weight_grads: expected up to ",
                  INT32_MAX, " outputs and weights of an output, got ", text(shape_of(weight)));
  if (bias.numel() > 0) check_like(op, "bias_grads", bias, {rows}, first.scalar_type(), first);
  check_like(op, "means", mean, {inputs}, ScalarType::Float, first);
  check_like(op, "variances", variance, {inputs}, ScalarType::Float, first);
}

Tensor precondition(const std::vector<Tensor>& weights, const std::vector<Tensor>& biases,
                    const std::vector<Tensor>& means, const std::vector<Tensor>& variances,
                    const std::vector<int64_t>& groups, const std::vector<double>& q2, double eps1, double eps2) {
  const char* op = "precondition";
  const size_t count = weights.size();
  STD_TORCH_CHECK(count > 0, op, ": weight_grads: expected at least one layer, got none");
  const auto check_size = [&](const char* name, size_t size) {
    STD_TORCH_CHECK(size == count, op, ": ", name, ": expected one for each of the ", count, " layers, got ", size);
  };
  check_size("bias_grads", biases.size()), check_size("means", means.size());
  check_size("variances", variances.size()), check_size("groups", groups.size()), check_size("q2", q2.size());
  for (size_t i = 0; i < count; ++i) {
    check_layer(op, weights[i], biases[i], means[i], variances[i], groups[i], q2[i], weights[0]);
  }
  const OnDevice on(op, weights[0]);
  const Tensor left = empty({int64_t(count)}, ScalarType::Int, weights[0]);
  unsigned* const counters = static_cast<unsigned*>(left.data_ptr());
  on.run.zero(counters, int64_t(count));
  for (size_t first = 0; first < count; first += MOST_LAYERS) {
    GradientLayers all{};
    all.eps1 = float(eps1), all.eps2 = float(eps2), all.bfloat = weights[0].scalar_type() == ScalarType::BFloat16;
    std::vector<Tensor> kept;                        // until the launch
    std::vector<std::pair<Tensor, Tensor>> changed;  // copies, and where they go back to
    const auto in_place = [&](const Tensor& t, bool dense) {
      if (!dense) changed.emplace_back(packed(t), t);
      return dense ? t : changed.back().first;
    };
    const auto read_only = [&](const Tensor& t) { return floats(kept.emplace_back(packed(t))); };
    for (size_t i = first; i < std::min(count, first + MOST_LAYERS); ++i) {
      const bool positions = dense_rows(weights[i], false), inner = !positions && dense_rows(weights[i], true);
      const Tensor weight = in_place(weights[i], positions || inner);
      const int64_t rows = weight.size(0), channels = weight.size(1);
      all.layer[all.count++] = {
          .weight = static_cast<unsigned char*>(weight.data_ptr()),
          .bias = biases[i].numel() == 0
                      ? nullptr
                      : static_cast<unsigned char*>(in_place(biases[i], biases[i].is_contiguous()).data_ptr()),
          .mean = read_only(means[i]),
          .variance = read_only(variances[i]),
          .q2 = float(q2[i]),
          .rows = int(rows),
          .rows_of_group = int(rows / groups[i]),
          .channels = int(channels),
          .taps = int(weight.numel() / rows / channels),
          .inner = inner,
      };
    }
    launch_precondition(on.run, all, int(weights[0].element_size()), counters + first);
    for (auto& [copy, original] : changed) torch::stable::copy_(original, copy);
  }
  return left;
}

NORMKERNELS_OP(precondition, {}, .data = a.list(0).tensor(0))

}  // namespace nk
