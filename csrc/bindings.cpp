// SPDX-License-Identifier: Apache-2.0
// Every operator's schema and the implementation behind it, and nothing else.
// One file, so that the boundary between Python and C++ can be read on one page.

#include <Python.h>
#include <torch/library.h>

#include "lightning_indexer/lightning_indexer.h"
#include "select_top_k/select_top_k.h"
#include "selected_indexer_scores/selected_indexer_scores.h"
#include "sparse_attention/sparse_attention.h"
#include "sparse_decode/sparse_decode.h"

TORCH_LIBRARY(megatron_keye, m) {
  m.def(
      "lightning_indexer(Tensor q_TIJ, Tensor k_SJ, Tensor? key_scale_S, Tensor gate_TI, "
      "Tensor key_start_T, Tensor key_end_T, int k, int scratch_bytes) -> Tensor");
  m.def("select_top_k(Tensor scores_TS, Tensor key_start_T, Tensor key_end_T, int k) -> Tensor");
  m.def("select_top_k_split_rows(Tensor scores_TS, Tensor key_end_T, int k) -> Tensor");
  m.def(
      "selected_indexer_scores_backward(Tensor dscores_TK, Tensor q_TIJ, Tensor k_SJ, "
      "Tensor gate_TI, Tensor keys_BU, Tensor masks_BU, Tensor counts_B, float scale) -> "
      "(Tensor, Tensor, Tensor)");
  m.def(
      "sparse_attention_forward(Tensor q_THC, Tensor k_SGC, Tensor v_SGC, Tensor keys_BU, "
      "Tensor masks_BU, Tensor counts_B, float scale) -> (Tensor, Tensor)");
  m.def(
      "sparse_attention_backward(Tensor dout_THC, Tensor q_THC, Tensor k_SGC, Tensor v_SGC, "
      "Tensor out_THC, Tensor lse_TH, Tensor keys_BU, Tensor masks_BU, Tensor counts_B, "
      "float scale, bool in_bulk) -> (Tensor, Tensor)");
  m.def(
      "sparse_attention_loss(Tensor q_THC, Tensor k_SGC, Tensor lse_TH, Tensor keys_BU, "
      "Tensor masks_BU, Tensor counts_B, Tensor scores_TK, Tensor score_lse_T, Tensor dkl_T, "
      "Tensor(a!) dscores_TK, float scale) -> Tensor");
  m.def(
      "sparse_decode_scores(Tensor q_BTIJ, Tensor gate_BTI, Tensor index_keys_PLJ, "
      "Tensor? index_scales_PL, Tensor pages_BN, Tensor lengths_B, int tiles_of_block) -> "
      "(Tensor, Tensor)");
  m.def(
      "sparse_decode_attention(Tensor query_BTHC, Tensor keys_PLGC, Tensor values_PLGC, "
      "Tensor pages_BN, Tensor indices_TK, float scale, int groups_of_block, int cluster) -> "
      "Tensor");
}

TORCH_LIBRARY_IMPL(megatron_keye, CUDA, m) {
#ifdef MEGATRON_KEYE_SM90A
  m.impl("lightning_indexer", &megatron_keye::lightning_indexer);
  m.impl("selected_indexer_scores_backward", &megatron_keye::selected_indexer_scores_backward);
  m.impl("sparse_attention_forward", &megatron_keye::sparse_attention_forward);
  m.impl("sparse_attention_backward", &megatron_keye::sparse_attention_backward);
  m.impl("sparse_attention_loss", &megatron_keye::sparse_attention_loss);
  m.impl("sparse_decode_scores", &megatron_keye::sparse_decode_scores);
  m.impl("sparse_decode_attention", &megatron_keye::sparse_decode_attention);
#endif
  m.impl("select_top_k", &megatron_keye::select_top_k);
  m.impl("select_top_k_split_rows", &megatron_keye::select_top_k_split_rows);
}

// An empty Python module: importing it loads the registrations above.
PyMODINIT_FUNC PyInit__C() {
  static PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_C", "CUDA operators of megatron_keye.",
                                   -1, nullptr};
  return PyModule_Create(&definition);
}
