// SPDX-License-Identifier: Apache-2.0
#include "encoder/encoder.h"

#include <tuple>
#include <variant>
#include <vector>

#include "bindings/int8_matrix.h"
#include "bindings/module.h"
#include "bindings/pattern.h"

namespace pybsp {
namespace {

// Addresses of tensors that pybsp.ops.Encoder has checked and keeps alive, 0 for none.
const float* floats(uintptr_t address) {
  return reinterpret_cast<const float*>(address);
}
const int64_t* integers(uintptr_t address) {
  return reinterpret_cast<const int64_t*>(address);
}

// (pattern, values, bias), or (weights of 8 bits, input_scale, bias)
using FloatLinear = std::tuple<const BlockSparsePattern*, uintptr_t, uintptr_t>;
using Int8Linear = std::tuple<const Int8Matrix*, float, uintptr_t>;
using LinearArguments = std::variant<FloatLinear, Int8Linear>;
// (weight, bias, eps)
using NormArguments = std::tuple<uintptr_t, uintptr_t, float>;
// (rows, count)
using TableArguments = std::tuple<uintptr_t, int64_t>;

EncoderLinear linear(const LinearArguments& arguments) {
  if (const Int8Linear* int8 = std::get_if<Int8Linear>(&arguments)) {
    const auto& [matrix, input_scale, bias] = *int8;
    const Product product = matrix->product(input_scale, bias, 0, 0, 0);
    return {product.weight, product.schedule, product.epilogue.bias, product.int8,
            product.input_scale};
  }
  const auto& [pattern, values, bias] = std::get<FloatLinear>(arguments);
  return {pattern->weight(values), &pattern->token_lanes(), floats(bias), nullptr,
          0.0f};
}

LayerNorm layer_norm(const NormArguments& arguments) {
  const auto& [weight, bias, eps] = arguments;
  return {floats(weight), floats(bias), eps};
}

EmbeddingTable table(const TableArguments& arguments) {
  const auto& [rows, count] = arguments;
  return {floats(rows), count};
}

SelfAttention self_attention(const std::vector<LinearArguments>& projections,
                             const LinearArguments& output, int64_t heads, float scale,
                             int64_t window, uintptr_t cosines, uintptr_t sines,
                             int64_t rotary_positions, uintptr_t relative_bias,
                             int64_t bias_positions) {
  SelfAttention attention{};
  for (const LinearArguments& projection : projections) {
    attention.projections.push_back(linear(projection));
  }
  attention.output = linear(output);
  attention.heads = heads;
  attention.head_dim = attention.output.weight.in_features / heads;
  attention.scale = scale;
  attention.window = window;
  attention.cosines = floats(cosines);
  attention.sines = floats(sines);
  attention.rotary_positions = rotary_positions;
  attention.relative_bias = floats(relative_bias);
  attention.bias_positions = bias_positions;
  return attention;
}

FeedForward feed_forward(const LinearArguments& up, int activation,
                         const LinearArguments& down, bool gated) {
  return {linear(up), static_cast<Activation>(activation), linear(down), gated};
}

// The arguments of run and profile.
EncoderInput encoder_input(int64_t batch, int64_t length, uintptr_t ids,
                           uintptr_t hidden, uintptr_t mask, uintptr_t token_types,
                           uintptr_t positions) {
  return {batch,
          length,
          integers(ids),
          floats(hidden),
          reinterpret_cast<const bool*>(mask),
          integers(token_types),
          integers(positions)};
}

void run(const Encoder& encoder, int64_t batch, int64_t length, uintptr_t ids,
         uintptr_t hidden, uintptr_t mask, uintptr_t token_types, uintptr_t positions,
         uintptr_t y, int threads) {
  const EncoderInput input =
      encoder_input(batch, length, ids, hidden, mask, token_types, positions);
  py::gil_scoped_release release;
  run_encoder(encoder, input, reinterpret_cast<float*>(y), threads);
}

// Seconds by the name of the part.
py::dict profile(const Encoder& encoder, int64_t batch, int64_t length, uintptr_t ids,
                 uintptr_t hidden, uintptr_t mask, uintptr_t token_types,
                 uintptr_t positions, uintptr_t y, int threads) {
  const EncoderInput input =
      encoder_input(batch, length, ids, hidden, mask, token_types, positions);
  PartTimes times{};
  {
    py::gil_scoped_release release;
    run_encoder(encoder, input, reinterpret_cast<float*>(y), threads, &times);
  }
  py::dict seconds;
  for (int i = 0; i < kParts; ++i) seconds[kPartNames[i]] = times.seconds[i];
  return seconds;
}

}  // namespace

void register_encoder(py::module_& module) {
  using py::arg;
  py::class_<SelfAttention>(module, "SelfAttention")
      .def(py::init(&self_attention), arg("projections"), arg("output"), arg("heads"),
           arg("scale"), arg("window"), arg("cosines"), arg("sines"),
           arg("rotary_positions"), arg("relative_bias"), arg("bias_positions"));
  py::class_<FeedForward>(module, "FeedForward")
      .def(py::init(&feed_forward), arg("up"), arg("activation"), arg("down"),
           arg("gated"));
  py::class_<EncoderLayer>(module, "EncoderLayer")
      .def(py::init([](const SelfAttention& attention, const NormArguments& norm,
                       const FeedForward& part, const NormArguments& part_norm) {
             return EncoderLayer{attention, layer_norm(norm), part,
                                 layer_norm(part_norm)};
           }),
           arg("attention"), arg("attention_norm"), arg("feed_forward"),
           arg("feed_forward_norm"));
  py::class_<Encoder>(module, "Encoder")
      .def(
          py::init(
              [](int64_t features, bool norm_first,
                 const std::vector<EncoderLayer>& layers, const TableArguments& words,
                 const TableArguments& positions, const TableArguments& token_types,
                 const NormArguments& embedding_norm, const NormArguments& final_norm) {
                return Encoder{features,
                               norm_first,
                               layers,
                               table(words),
                               table(positions),
                               table(token_types),
                               layer_norm(embedding_norm),
                               layer_norm(final_norm)};
              }),
          arg("features"), arg("norm_first"), arg("layers"), arg("words"),
          arg("positions"), arg("token_types"), arg("embedding_norm"),
          arg("final_norm"))
      .def("run", &run, arg("batch"), arg("length"), arg("ids"), arg("hidden"),
           arg("mask"), arg("token_types"), arg("positions"), arg("y"), arg("threads"))
      .def("profile", &profile, arg("batch"), arg("length"), arg("ids"), arg("hidden"),
           arg("mask"), arg("token_types"), arg("positions"), arg("y"), arg("threads"));
}

}  // namespace pybsp
