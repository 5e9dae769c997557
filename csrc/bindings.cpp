// fastlm._C: the launchers as Python functions of addresses and numbers.
//
// No header of torch: the module works with every torch of the same Python.  Arguments are checked
// by the caller, fastlm/ops; what a launcher complains of is a RuntimeError.

#include <pybind11/pybind11.h>

#include <stdexcept>
#include <string>

#include "cross_entropy.h"
#include "linear_cross_entropy.h"

#ifndef FASTLM_ARCHS
#error "FASTLM_ARCHS must list what the kernels are compiled for, such as \"80;90a;100+PTX\""
#endif

namespace py = pybind11;
using namespace py::literals;

namespace {

using Address = std::uintptr_t;

template <typename T = void>
T* at(Address address) {
  return reinterpret_cast<T*>(address);
}

void require(const std::string& error) {
  if (!error.empty()) throw std::runtime_error(error);
}

void bind_linear_cross_entropy(py::module_& m) {
  using namespace fastlm;
  py::class_<ChunkRows>(m, "ChunkRows", py::module_local())
      .def(py::init([](Address logits, Address bias, Address weight, Address weight_sum,
                       Address targets, int64_t rows, int64_t vocab_size, int64_t first_class,
                       int64_t num_classes, int64_t ignore_index, double label_smoothing,
                       double softcap, double logit_scale) {
             return ChunkRows{at(logits),         at(bias),    at(weight),
                              at(weight_sum),     at<int64_t>(targets),
                              rows,               vocab_size,  first_class,
                              num_classes,        ignore_index, label_smoothing,
                              softcap,            logit_scale};
           }),
           py::kw_only(), "logits"_a, "bias"_a, "weight"_a, "weight_sum"_a, "targets"_a, "rows"_a,
           "vocab_size"_a, "first_class"_a, "num_classes"_a, "ignore_index"_a, "label_smoothing"_a,
           "softcap"_a, "logit_scale"_a);

  py::class_<ChunkResults>(m, "ChunkResults", py::module_local())
      .def(py::init([](Address losses, Address lse, Address logprobs, Address entropy,
                       Address predictions, bool need_stats, Address sums) {
             return ChunkResults{at(losses),  at(lse),    at(logprobs), at(entropy),
                                 at<int64_t>(predictions), need_stats,   at(sums)};
           }),
           py::kw_only(), "losses"_a, "lse"_a, "logprobs"_a, "entropy"_a, "predictions"_a,
           "need_stats"_a, "sums"_a);

  py::class_<ChunkUpstream>(m, "ChunkUpstream", py::module_local())
      .def(py::init([](Address dlosses, Address dlogprobs, Address dlse, Address dentropy,
                       Address z_weight) {
             return ChunkUpstream{at(dlosses), at(dlogprobs), at(dlse), at(dentropy),
                                  at(z_weight)};
           }),
           py::kw_only(), "dlosses"_a, "dlogprobs"_a, "dlse"_a, "dentropy"_a, "z_weight"_a);

  py::class_<ChunkGradient>(m, "ChunkGradient", py::module_local())
      .def(py::init([](Address dlogits, double scale, bool lse_is_known, Address columns,
                       Address residuals) {
             return ChunkGradient{at(dlogits), scale, lse_is_known, at<int64_t>(columns),
                                  at(residuals)};
           }),
           py::kw_only(), "dlogits"_a, "scale"_a, "lse_is_known"_a, "columns"_a, "residuals"_a);

  m.def(
      "linear_cross_entropy_loss",
      [](Dtype dtype, const ChunkRows& rows, const ChunkResults& results, const LossPlan& plan,
         int device, Address stream) {
        require(linear_cross_entropy_loss(dtype, rows, results, plan, device, at(stream)));
      },
      py::kw_only(), "dtype"_a, "rows"_a, "results"_a, "plan"_a, "device"_a, "stream"_a);
  m.def(
      "linear_cross_entropy_gradient",
      [](Dtype dtype, Dtype narrow, const ChunkRows& rows, const ChunkResults& results,
         const ChunkUpstream& upstream, const ChunkGradient& gradient, const LossPlan& plan,
         int device, Address stream) {
        require(linear_cross_entropy_gradient(dtype, narrow, rows, results, upstream, gradient,
                                              plan, device, at(stream)));
      },
      py::kw_only(), "dtype"_a, "narrow"_a, "rows"_a, "results"_a, "upstream"_a, "gradient"_a,
      "plan"_a, "device"_a, "stream"_a);
  m.def(
      "linear_cross_entropy_bias",
      [](Dtype dtype, const ChunkRows& rows, const ChunkResults& results,
         const ChunkUpstream& upstream, Address dbias, const LossPlan& plan, int device,
         Address stream) {
        require(linear_cross_entropy_bias(dtype, rows, results, upstream, at(dbias), plan, device,
                                          at(stream)));
      },
      py::kw_only(), "dtype"_a, "rows"_a, "results"_a, "upstream"_a, "dbias"_a, "plan"_a,
      "device"_a, "stream"_a);
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  using namespace fastlm;
  m.doc() = "Kernels in CUDA C++.  Addresses are integers, 0 for none; see csrc/*.h.";
  m.attr("archs") = FASTLM_ARCHS;
#ifdef FASTLM_HOST
  m.attr("host") = true;  // kernels run on the CPU, on CPU tensors
#else
  m.attr("host") = false;
#endif

  py::enum_<Dtype>(m, "Dtype", py::module_local())
      .value("float32", Dtype::kFloat32)
      .value("bfloat16", Dtype::kBfloat16)
      .value("float16", Dtype::kFloat16)
      .value("float64", Dtype::kFloat64);

  py::class_<LossPlan>(m, "LossPlan", py::module_local())
      .def(py::init([](int threads, int blocks_per_row) {
             return LossPlan{threads, blocks_per_row};
           }),
           py::kw_only(), "threads"_a, "blocks_per_row"_a);

  py::class_<LossRows>(m, "LossRows", py::module_local())
      .def(py::init([](Address logits, Address targets, Address weight, Address weight_sum,
                       int64_t rows, int64_t inner, int64_t stride_outer, int64_t stride_inner,
                       int64_t stride_vocab, int64_t vocab_size, int64_t ignore_index,
                       double label_smoothing, double softcap, double logit_scale) {
             return LossRows{at(logits),   at<int64_t>(targets), at(weight),   at(weight_sum),
                             rows,         inner,                stride_outer, stride_inner,
                             stride_vocab, vocab_size,           ignore_index, label_smoothing,
                             softcap,      logit_scale};
           }),
           py::kw_only(), "logits"_a, "targets"_a, "weight"_a, "weight_sum"_a, "rows"_a, "inner"_a,
           "stride_outer"_a, "stride_inner"_a, "stride_vocab"_a, "vocab_size"_a, "ignore_index"_a,
           "label_smoothing"_a, "softcap"_a, "logit_scale"_a);

  m.def(
      "cross_entropy_forward",
      [](Dtype dtype, const LossRows& rows, Address losses, Address maximum, Address log_sum,
         Address logprobs, Address entropy, Address predictions, const LossPlan& plan, int device,
         Address stream) {
        const LossResults results{at(losses),   at(maximum), at(log_sum),
                                  at(logprobs), at(entropy), at<int64_t>(predictions)};
        require(cross_entropy_forward(dtype, rows, results, plan, device, at(stream)));
      },
      py::kw_only(), "dtype"_a, "rows"_a, "losses"_a, "maximum"_a, "log_sum"_a, "logprobs"_a,
      "entropy"_a, "predictions"_a, "plan"_a, "device"_a, "stream"_a);

  m.def(
      "cross_entropy_backward",
      [](Dtype dtype, const LossRows& rows, Address maximum, Address log_sum, Address entropy,
         Address dlosses, Address dlogprobs, Address dlse, Address dentropy, Address dlogits,
         const LossPlan& plan, int device, Address stream) {
        const LossUpstream upstream{at(maximum),   at(log_sum), at(entropy), at(dlosses),
                                    at(dlogprobs), at(dlse),    at(dentropy)};
        require(cross_entropy_backward(dtype, rows, upstream, at(dlogits), plan, device,
                                       at(stream)));
      },
      py::kw_only(), "dtype"_a, "rows"_a, "maximum"_a, "log_sum"_a, "entropy"_a, "dlosses"_a,
      "dlogprobs"_a, "dlse"_a, "dentropy"_a, "dlogits"_a, "plan"_a, "device"_a, "stream"_a);

  bind_linear_cross_entropy(m);
}
