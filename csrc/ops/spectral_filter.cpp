// spectral_filter.
#include <algorithm>

#include "cuda/launches.h"
#include "op.h"
#include "workspace.h"

namespace nk {

static Planes planes_of(const Tensor& t, const Window& rows, const Window& columns) {
  return {static_cast<unsigned char*>(t.data_ptr()),
          t.stride(0),
          t.stride(1),
          t.stride(2),
          t.stride(3),
          rows,
          columns,
          channels_innermost(t),
          t.scalar_type() == ScalarType::BFloat16};
}

static void check_window(const char* name, const Window& window, int64_t n) {
  STD_TORCH_CHECK(window.start >= 0 && window.step >= 1 && window.count >= 0 &&
                      (window.count == 0 || window.start + int64_t(window.step) * (window.count - 1) < n),
                  "spectral_filter: ", name, ": expected start, step and count within 0:", n, ", got ", window.start,
                  ", ", window.step, ", ", window.count);
}

Tensor spectral_filter(const Tensor& z, const Tensor& v, const std::vector<int64_t>& source,
                       const std::vector<int64_t>& target) {
  const char* op = "spectral_filter";
  STD_TORCH_CHECK(z.dim() == 4, op, ": z: expected shape (N, C, h, w), got ", text(shape_of(z)));
  STD_TORCH_CHECK(v.dim() == 3, op, ": v: expected shape (C, H, W), got ", text(shape_of(v)));
  STD_TORCH_CHECK(source.size() == 4, op, ": source: expected 4 numbers, got ", source.size());
  STD_TORCH_CHECK(target.size() == 6, op, ": target: expected 6 numbers, got ", target.size());
  const int64_t H = v.size(1), W = v.size(2);
  check_like(op, "v", v, {z.size(1), H, W}, ScalarType::Float, z);
  const auto window = [](int64_t start, int64_t step, int64_t count) {
    const auto small = [](int64_t value) { return int(std::clamp<int64_t>(value, INT32_MIN, INT32_MAX)); };
    return Window{small(start), small(step), small(count)};
  };
  const Window z_rows = window(source[0], source[1], z.size(2)), z_columns = window(source[2], source[3], z.size(3));
  const Window y_rows = window(target[0], target[1], target[2]), y_columns = window(target[3], target[4], target[5]);
  check_window("source", z_rows, H), check_window("source", z_columns, W);
  check_window("target", y_rows, H), check_window("target", y_columns, W);
  const OnDevice on(op, z);
  Tensor y = empty_output(z, {target[2], target[5]});
  const Tensor coefficients = empty({coefficient_floats(H, W, z.size(1))}, ScalarType::Float, z);
  launch_filter(on.run, planes_of(z, z_rows, z_columns), planes_of(y, y_rows, y_columns), int(z.element_size()),
                floats(v), {v.stride(0), v.stride(1), v.stride(2)}, H, W, z.size(0), z.size(1), floats(coefficients));
  return y;
}

// Where the filter or the target window is empty, there is nothing to do.
NORMKERNELS_OP(spectral_filter, {.largest_plane = 64}, .data = a.tensor(0), .plane = {a.size(1, 1), a.size(1, 2)},
               .left = a.is_empty(1) || a.list(3).integer(2, -1) == 0 || a.list(3).integer(5, -1) == 0)

}  // namespace nk
