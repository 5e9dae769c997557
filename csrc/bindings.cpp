// fastlm._C: the launchers as Python functions of addresses and numbers.
//
// No header of torch: the module works with every torch of the same Python.  Arguments are checked
// by the caller, fastlm/ops; what a launcher complains of is a RuntimeError.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <stdexcept>
#include <string>

#include "attention_with_kv_cache.h"
#include "causal_attention.h"
#include "cross_entropy.h"
#include "glu.h"
#include "linear_cross_entropy.h"
#include "rms_norm.h"
#include "rotary.h"

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

void add_attention(py::module_& m) {
  using namespace fastlm;
  py::class_<AttentionPlan>(m, "AttentionPlan", py::module_local())
      .def(py::init([](int most_warps, int shared_limit) {
             return AttentionPlan{most_warps, shared_limit};
           }),
           py::kw_only(), "most_warps"_a, "shared_limit"_a);

  // in the order of dimensions: batch, token, head
  using Strides = std::array<int64_t, 3>;
  const auto strides_of = [](const Strides& strides) {
    return AttentionStrides{strides[0], strides[1], strides[2]};
  };

  py::class_<AttentionInputs>(m, "AttentionInputs", py::module_local())
      .def(py::init([=](Address query, Address key, Address value, const Strides& query_strides,
                        const Strides& key_strides, const Strides& value_strides, int64_t batch,
                        int64_t heads, int64_t group_size, int num_queries, int num_keys,
                        int head_dim, int value_dim, Address bounds_q, Address bounds_k,
                        Address key_start, Address key_end, int num_documents, int window,
                        int64_t heads_per_section, double scale, double softcap) {
             return AttentionInputs{at(query),
                                    at(key),
                                    at(value),
                                    strides_of(query_strides),
                                    strides_of(key_strides),
                                    strides_of(value_strides),
                                    batch,
                                    heads,
                                    group_size,
                                    num_queries,
                                    num_keys,
                                    head_dim,
                                    value_dim,
                                    at<int>(bounds_q),
                                    at<int>(bounds_k),
                                    at<int>(key_start),
                                    at<int>(key_end),
                                    num_documents,
                                    window,
                                    heads_per_section,
                                    scale,
                                    softcap};
           }),
           py::kw_only(), "query"_a, "key"_a, "value"_a, "query_strides"_a, "key_strides"_a,
           "value_strides"_a, "batch"_a, "heads"_a, "group_size"_a, "num_queries"_a, "num_keys"_a,
           "head_dim"_a, "value_dim"_a, "bounds_q"_a, "bounds_k"_a, "key_start"_a, "key_end"_a,
           "num_documents"_a, "window"_a, "heads_per_section"_a, "scale"_a, "softcap"_a);

  py::class_<AttentionUpstream>(m, "AttentionUpstream", py::module_local())
      .def(py::init([=](Address dout, const Strides& dout_strides, Address lse, Address delta) {
             return AttentionUpstream{at(dout), strides_of(dout_strides), at(lse), at(delta)};
           }),
           py::kw_only(), "dout"_a, "dout_strides"_a, "lse"_a, "delta"_a);

  py::enum_<AttentionStep>(m, "AttentionStep", py::module_local())
      .value("forward", AttentionStep::kForward)
      .value("dkdv", AttentionStep::kDkDv)
      .value("dq", AttentionStep::kDq);

  m.def("attention_fits", attention_fits, py::kw_only(), "step"_a, "dtype"_a, "head_dim"_a,
        "value_dim"_a, "shared_limit"_a);

  m.def(
      "attention_forward",
      [](Dtype dtype, const AttentionInputs& inputs, Address sinks, Address out, Address lse,
         const AttentionPlan& plan, int device, Address stream) {
        const AttentionResults results{at(sinks), at(out), at(lse)};
        require(attention_forward(dtype, inputs, results, plan, device, at(stream)));
      },
      py::kw_only(), "dtype"_a, "inputs"_a, "sinks"_a, "out"_a, "lse"_a, "plan"_a, "device"_a,
      "stream"_a);

  m.def(
      "attention_delta",
      [](Dtype dtype, const AttentionInputs& inputs, const AttentionUpstream& upstream,
         Address out, Address dlse, Address delta, int device, Address stream) {
        require(attention_delta(dtype, inputs, upstream, at(out), at(dlse), at(delta), device,
                                at(stream)));
      },
      py::kw_only(), "dtype"_a, "inputs"_a, "upstream"_a, "out"_a, "dlse"_a, "delta"_a,
      "device"_a, "stream"_a);

  m.def(
      "attention_dkdv",
      [](Dtype dtype, const AttentionInputs& inputs, const AttentionUpstream& upstream,
         Address dkey, Address dvalue, const AttentionPlan& plan, int device, Address stream) {
        require(attention_dkdv(dtype, inputs, upstream, at(dkey), at(dvalue), plan, device,
                               at(stream)));
      },
      py::kw_only(), "dtype"_a, "inputs"_a, "upstream"_a, "dkey"_a, "dvalue"_a, "plan"_a,
      "device"_a, "stream"_a);

  m.def(
      "attention_dq",
      [](Dtype dtype, const AttentionInputs& inputs, const AttentionUpstream& upstream,
         Address dquery, const AttentionPlan& plan, int device, Address stream) {
        require(attention_dq(dtype, inputs, upstream, at(dquery), plan, device, at(stream)));
      },
      py::kw_only(), "dtype"_a, "inputs"_a, "upstream"_a, "dquery"_a, "plan"_a, "device"_a,
        "stream"_a);
}

void bind_attention_with_kv_cache(py::module_& m) {
  using namespace fastlm;
  py::class_<Stored>(m, "Stored", py::module_local())
      .def(py::init([](Address elements, Address scales, std::array<int64_t, 3> strides,
                       std::array<int64_t, 3> scale_strides, int dim) {
             return Stored{at(elements),     at<float>(scales), strides[0],
                           strides[1],       strides[2],        scale_strides[0],
                           scale_strides[1], scale_strides[2],  dim};
           }),
           py::kw_only(), "elements"_a, "scales"_a, "strides"_a, "scale_strides"_a, "dim"_a);

  py::class_<Given>(m, "Given", py::module_local())
      .def(py::init([](Address elements, std::array<int64_t, 3> strides) {
             return Given{at(elements), strides[0], strides[1], strides[2]};
           }),
           py::kw_only(), "elements"_a, "strides"_a);

  py::class_<CachedRows>(m, "CachedRows", py::module_local())
      .def(py::init([](const Stored& keys, const Stored& values, Address lengths, Address table,
                       Address bounds, Address cos, Address sin, Dtype table_dtype, int turned,
                       bool is_interleaved, bool appends, int rows, int num_tokens,
                       int kv_heads, int group_size, int length, int capacity, int max_pages,
                       int page_size, int num_pages) {
             return CachedRows{keys,        values,         at<int>(lengths), at<int>(table),
                               at<int>(bounds), at(cos),    at(sin),          table_dtype,
                               turned,      is_interleaved, appends,          rows,
                               num_tokens,  kv_heads,       group_size,       length,
                               capacity,    max_pages,      page_size,        num_pages};
           }),
           py::kw_only(), "keys"_a, "values"_a, "lengths"_a, "table"_a, "bounds"_a, "cos"_a,
           "sin"_a, "table_dtype"_a, "turned"_a, "is_interleaved"_a, "appends"_a, "rows"_a,
           "num_tokens"_a, "kv_heads"_a, "group_size"_a, "length"_a, "capacity"_a, "max_pages"_a,
           "page_size"_a, "num_pages"_a);

  py::class_<CachePlan>(m, "CachePlan", py::module_local())
      .def(py::init([](int tile, int teams, int parts, int split_keys, int most_splits,
                       int most_pairs, int splits, int64_t slots, int64_t row_slots) {
             return CachePlan{tile,   teams, parts,    split_keys, most_splits, most_pairs,
                              splits, slots, row_slots};
           }),
           py::kw_only(), "tile"_a, "teams"_a, "parts"_a, "split_keys"_a, "most_splits"_a,
           "most_pairs"_a, "splits"_a, "slots"_a, "row_slots"_a);

  m.def(
      "append_to_kv_cache",
      [](Dtype dtype, const CachedRows& rows, const Given& key, const Given& value, int device,
         Address stream) {
        require(append_to_kv_cache(dtype, rows, key, value, device, at(stream)));
      },
      py::kw_only(), "dtype"_a, "rows"_a, "key"_a, "value"_a, "device"_a, "stream"_a);

  m.def(
      "attend_to_kv_cache",
      [](Dtype dtype, const CachedRows& rows, const Given& query, double scale, double softcap,
         int window, Address sinks, Dtype sinks_dtype, Address out, Address lse, Address part_outs,
         Address part_lses, const CachePlan& plan, int device, Address stream) {
        const CacheOptions options{scale, softcap, window, at(sinks), sinks_dtype};
        const Attended results{at(out), at(lse), at(part_outs), at(part_lses)};
        require(attend_to_kv_cache(dtype, rows, query, options, results, plan, device, at(stream)));
      },
      py::kw_only(), "dtype"_a, "rows"_a, "query"_a, "scale"_a, "softcap"_a, "window"_a, "sinks"_a,
      "sinks_dtype"_a, "out"_a, "lse"_a, "part_outs"_a, "part_lses"_a, "plan"_a, "device"_a,
      "stream"_a);
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

void bind_layers(py::module_& m) {
  using namespace fastlm;
  py::class_<Rows>(m, "Rows", py::module_local())
      .def(py::init([](Address elements, Dtype dtype, int64_t stride_outer, int64_t stride_inner,
                       int64_t stride_col) {
             return Rows{at(elements), dtype, stride_outer, stride_inner, stride_col};
           }),
           py::kw_only(), "elements"_a, "dtype"_a, "stride_outer"_a, "stride_inner"_a,
           "stride_col"_a);

  py::class_<NormInputs>(m, "NormInputs", py::module_local())
      .def(py::init([](const Rows& vectors, const Rows& residual, Address weight,
                       Dtype weight_dtype, int64_t rows, int64_t inner, int64_t size, double eps,
                       double weight_offset) {
             return NormInputs{vectors, residual, at(weight), weight_dtype, rows,
                               inner,   size,     eps,        weight_offset};
           }),
           py::kw_only(), "vectors"_a, "residual"_a, "weight"_a, "weight_dtype"_a, "rows"_a,
           "inner"_a, "size"_a, "eps"_a, "weight_offset"_a);

  py::class_<NormPlan>(m, "NormPlan", py::module_local())
      .def(py::init([](int threads, int team, int rows_per_team) {
             return NormPlan{threads, team, rows_per_team};
           }),
           py::kw_only(), "threads"_a, "team"_a, "rows_per_team"_a);

  m.def(
      "rms_norm_forward",
      [](const NormInputs& inputs, Address out, Address total, Address rstd, Dtype dtype,
         const NormPlan& plan, int device, Address stream) {
        const NormResults results{at(out), at(total), at(rstd), dtype};
        require(rms_norm_forward(inputs, results, plan, device, at(stream)));
      },
      py::kw_only(), "inputs"_a, "out"_a, "total"_a, "rstd"_a, "dtype"_a, "plan"_a, "device"_a,
      "stream"_a);

  m.def(
      "rms_norm_backward",
      [](const NormInputs& inputs, const Rows& dout, Address dtotal, Address rstd,
         Address dvectors, Address partial, const NormPlan& plan, int device, Address stream) {
        const NormUpstream upstream{dout, at(dtotal), at(rstd)};
        const NormGradients gradients{at(dvectors), at(partial)};
        require(rms_norm_backward(inputs, upstream, gradients, plan, device, at(stream)));
      },
      py::kw_only(), "inputs"_a, "dout"_a, "dtotal"_a, "rstd"_a, "dvectors"_a, "partial"_a,
      "plan"_a, "device"_a, "stream"_a);

  // in the order of dimensions: batch, token, head, channel; of angles batch, token, pair
  m.def(
      "rotate",
      [](Address heads, const std::array<int64_t, 4>& strides, Address cos, Address sin,
         Dtype angle_dtype, const std::array<int64_t, 3>& angle_strides, Address out, Dtype dtype,
         const std::array<int64_t, 4>& shape, int64_t pairs, bool is_interleaved, bool turns_back,
         int threads, int device, Address stream) {
        const Rotation rotation{at(heads),        strides[0],       strides[1],
                                strides[2],       strides[3],       at(cos),
                                at(sin),          angle_dtype,      angle_strides[0],
                                angle_strides[1], angle_strides[2], at(out),
                                dtype,            shape[0],         shape[1],
                                shape[2],         shape[3],         pairs,
                                is_interleaved,   turns_back};
        require(rotate(rotation, threads, device, at(stream)));
      },
      py::kw_only(), "heads"_a, "strides"_a, "cos"_a, "sin"_a, "angle_dtype"_a, "angle_strides"_a,
      "out"_a, "dtype"_a, "shape"_a, "pairs"_a, "is_interleaved"_a, "turns_back"_a, "threads"_a,
      "device"_a, "stream"_a);

  py::enum_<Activation>(m, "Activation", py::module_local())
      .value("silu", Activation::kSilu)
      .value("gelu", Activation::kGelu)
      .value("gelu_tanh", Activation::kGeluTanh)
      .value("relu", Activation::kRelu)
      .value("relu2", Activation::kRelu2)
      .value("sigmoid", Activation::kSigmoid);

  m.def(
      "glu",
      [](const Rows& gate, const Rows& up, const Rows& dout, Address out, Address dup,
         int64_t rows, int64_t inner, int64_t size, Activation activation, int threads, int device,
         Address stream) {
        const GatedUnits units{gate, up, dout, at(out), at(dup), rows, inner, size, activation};
        require(glu(units, threads, device, at(stream)));
      },
      py::kw_only(), "gate"_a, "up"_a, "dout"_a, "out"_a, "dup"_a, "rows"_a, "inner"_a, "size"_a,
      "activation"_a, "threads"_a, "device"_a, "stream"_a);
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
  m.attr("float64") = is_served(Dtype::kFloat64);

  py::enum_<Dtype>(m, "Dtype", py::module_local())
      .value("float32", Dtype::kFloat32)
      .value("bfloat16", Dtype::kBfloat16)
      .value("float16", Dtype::kFloat16)
      .value("float64", Dtype::kFloat64);

  bind_attention_with_kv_cache(m);

  py::class_<LossPlan>(m, "LossPlan", py::module_local())
      .def(py::init([](int threads, int blocks_per_row) {
             return LossPlan{threads, blocks_per_row};
           }),
           py::kw_only(), "threads"_a, "blocks_per_row"_a);

  add_attention(m);

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
  bind_layers(m);
}
