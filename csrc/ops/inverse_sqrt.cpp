// inverse_sqrt and its adjoint.
#include "cuda/launches.h"
#include "op.h"
#include "workspace.h"

namespace nk {

static int64_t check_square(const char* op, const char* name, const Tensor& t) {
  STD_TORCH_CHECK(t.dim() == 3 && t.size(1) == t.size(2) && t.size(1) >= 1, op, ": ", name,
                  ": expected shape (G, d, d), got ", text(shape_of(t)));
  return t.size(1);
}

std::tuple<Tensor, Tensor, Tensor> inverse_sqrt(const Tensor& matrix, int64_t iterations, double eps, bool frobenius,
                                                bool /*eigh*/) {
  const int64_t d = check_square("inverse_sqrt", "cov", matrix);
  const OnDevice on("inverse_sqrt", matrix);
  const Tensor cov = packed(matrix);
  const int64_t groups = cov.size(0);
  Tensor W = empty({groups, d, d}, ScalarType::Float, cov), S = empty({groups, d, d}, ScalarType::Float, cov);
  Tensor scale = empty({groups, 1}, ScalarType::Float, cov);
  const Room room = small_matrix_room(on.run.device, d, FORWARD_MATRICES);
  const Tensor scratch = scratch_for(room, cov, groups);
  launch_inverse_sqrt(on.run, floats(cov), groups, newton_of("inverse_sqrt", d, iterations, frobenius, eps), room,
                      floats(scratch), floats(W), floats(S), floats(scale));
  return {W, S, scale};
}

Tensor inverse_sqrt_backward(const Tensor& gradient, const Tensor& root, const Tensor& saved_matrix,
                             const Tensor& saved_scale, int64_t iterations, bool frobenius, bool /*eigh*/) {
  const char* op = "inverse_sqrt_backward";
  const int64_t d = check_square(op, "grad", gradient), groups = gradient.size(0);
  check_like(op, "W", root, {groups, d, d}, ScalarType::Float, gradient);
  check_like(op, "saved_matrix", saved_matrix, {groups, d, d}, ScalarType::Float, gradient);
  check_like(op, "saved_scale", saved_scale, {groups, 1}, ScalarType::Float, gradient);
  const OnDevice on(op, gradient);
  const Tensor grad = packed(gradient), W = packed(root), S = packed(saved_matrix), scale = packed(saved_scale);
  Tensor grad_cov = empty({groups, d, d}, ScalarType::Float, grad);
  const Room room = small_matrix_room(on.run.device, d, BACKWARD_MATRICES);
  const Tensor scratch = scratch_for(room, grad, groups);
  launch_inverse_sqrt_backward(on.run, floats(grad), floats(W), floats(S), floats(scale), groups,
                               newton_of(op, d, iterations, frobenius, 0.), room, floats(scratch), floats(grad_cov));
  return grad_cov;
}

// The last argument is eigh: a library has the eigendecomposition.
NORMKERNELS_OP(inverse_sqrt, {.half_types = false}, .data = a.tensor(0), .group_size = a.size(0, 1),
               .left = a.boolean(4))
NORMKERNELS_OP(inverse_sqrt_backward, {.half_types = false}, .data = a.tensor(0), .group_size = a.size(0, 1),
               .left = a.boolean(6))

}  // namespace nk
