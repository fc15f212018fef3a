// Cells of LSTM and GRU: torch calls the fused operators on every device but the host, and the host has no kernel.
#include "alias.h"

#include <ATen/ATen.h>
#include <torch/library.h>

namespace emu {
namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

Tensor sum_of_gates(const Tensor& input, const Tensor& hidden, const OptionalTensor& input_bias,
                    const OptionalTensor& hidden_bias) {
  Tensor gates = host_alias(input) + host_alias(hidden);
  if (input_bias.has_value() && input_bias->defined()) gates = gates + host_alias(*input_bias);
  if (hidden_bias.has_value() && hidden_bias->defined()) gates = gates + host_alias(*hidden_bias);
  return gates;
}

Tensor host_or_zeros(const OptionalTensor& gradient, const Tensor& like) {
  return gradient.has_value() && gradient->defined() ? host_alias(*gradient) : at::zeros_like(like);
}

// Gates (B, 4H) in the order i, f, g, o; the third result, kept for backward, is the activated gates (B, 4H).
std::tuple<Tensor, Tensor, Tensor> lstm_cell(const Tensor& input_gates, const Tensor& hidden_gates, const Tensor& cx,
                                             const OptionalTensor& input_bias, const OptionalTensor& hidden_bias) {
  const auto gates = sum_of_gates(input_gates, hidden_gates, input_bias, hidden_bias).chunk(4, 1);
  const Tensor i = gates[0].sigmoid(), f = gates[1].sigmoid(), g = gates[2].tanh(), o = gates[3].sigmoid();
  const Tensor cy = f * host_alias(cx) + i * g;
  const Tensor hy = o * cy.tanh();
  return {copy_to_device(hy), copy_to_device(cy), copy_to_device(at::cat({i, f, g, o}, 1))};
}

std::tuple<Tensor, Tensor, Tensor> lstm_cell_backward(const OptionalTensor& grad_hy, const OptionalTensor& grad_cy,
                                                      const Tensor& cx, const Tensor& cy, const Tensor& workspace,
                                                      bool has_bias) {
  if (!(grad_hy.has_value() && grad_hy->defined()) && !(grad_cy.has_value() && grad_cy->defined())) return {};
  const auto gates = host_alias(workspace).chunk(4, 1);
  const Tensor &i = gates[0], &f = gates[1], &g = gates[2], &o = gates[3];
  const Tensor tanh_cy = host_alias(cy).tanh();
  const Tensor d_hy = host_or_zeros(grad_hy, tanh_cy);
  const Tensor d_cy = host_or_zeros(grad_cy, tanh_cy) + d_hy * o * (1 - tanh_cy * tanh_cy);
  const Tensor d_gates = at::cat({d_cy * g * i * (1 - i), d_cy * host_alias(cx) * f * (1 - f),
                                  d_cy * i * (1 - g * g), d_hy * tanh_cy * o * (1 - o)}, 1);
  const Tensor d_bias = has_bias ? d_gates.sum(0) : Tensor();
  return {copy_to_device(d_gates), copy_to_device(d_cy * f), copy_to_device(d_bias)};
}

// Gates (B, 3H) in the order r, z, n; the second result, kept for backward, is r, z, n, hx, hidden part of n (B, 5H).
std::tuple<Tensor, Tensor> gru_cell(const Tensor& input_gates, const Tensor& hidden_gates, const Tensor& hx,
                                    const OptionalTensor& input_bias, const OptionalTensor& hidden_bias) {
  Tensor from_input = host_alias(input_gates), from_hidden = host_alias(hidden_gates);
  if (input_bias.has_value() && input_bias->defined()) from_input = from_input + host_alias(*input_bias);
  if (hidden_bias.has_value() && hidden_bias->defined()) from_hidden = from_hidden + host_alias(*hidden_bias);
  const auto a = from_input.chunk(3, 1), b = from_hidden.chunk(3, 1);
  const Tensor r = (a[0] + b[0]).sigmoid(), z = (a[1] + b[1]).sigmoid(), n = (a[2] + r * b[2]).tanh();
  const Tensor old = host_alias(hx);
  return {copy_to_device(n + z * (old - n)), copy_to_device(at::cat({r, z, n, old, b[2]}, 1))};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> gru_cell_backward(const Tensor& grad_hy, const Tensor& workspace,
                                                                     bool has_bias) {
  const auto saved = host_alias(workspace).chunk(5, 1);
  const Tensor &r = saved[0], &z = saved[1], &n = saved[2], &hx = saved[3], &hidden_n = saved[4];
  const Tensor d_hy = host_alias(grad_hy);
  const Tensor d_n = d_hy * (1 - z) * (1 - n * n);
  const Tensor d_z = d_hy * (hx - n) * z * (1 - z);
  const Tensor d_r = d_n * hidden_n * r * (1 - r);
  const Tensor d_input = at::cat({d_r, d_z, d_n}, 1), d_hidden = at::cat({d_r, d_z, d_n * r}, 1);
  const Tensor d_input_bias = has_bias ? d_input.sum(0) : Tensor();
  const Tensor d_hidden_bias = has_bias ? d_hidden.sum(0) : Tensor();
  return {copy_to_device(d_input), copy_to_device(d_hidden), copy_to_device(d_hy * z), copy_to_device(d_input_bias),
          copy_to_device(d_hidden_bias)};
}

}  // namespace

TORCH_LIBRARY_IMPL(aten, PrivateUse1, library) {
  library.impl("_thnn_fused_lstm_cell", &lstm_cell);
  library.impl("_thnn_fused_lstm_cell_backward_impl", &lstm_cell_backward);
  library.impl("_thnn_fused_gru_cell", &gru_cell);
  library.impl("_thnn_fused_gru_cell_backward", &gru_cell_backward);
}

}  // namespace emu
