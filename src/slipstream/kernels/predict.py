"""The catalogue of AsyncSpade (arXiv 2510.07486): query windows, predictors, stored sets. CUDA goes to Triton.

All tensors are of one layer; B requests with one query token each. No op synchronises on CUDA, and its grid depends on
shapes only. Definitions: :mod:`slipstream.kernels.reference_predict`.
"""

from __future__ import annotations

from slipstream.kernels import reference_predict
from slipstream.kernels.dispatch import op

MLPWeights = reference_predict.MLPWeights
predict_mlp = reference_predict.predict_mlp
push_queries = op(reference_predict.push_queries, "triton_predict")
predict_queries = op(reference_predict.predict_queries, "triton_predict")
push_and_predict = op(reference_predict.push_and_predict, "triton_predict")
store_sets = op(reference_predict.store_sets, "triton_predict")
check_queries = op(reference_predict.check_queries, "triton_predict")
LARGEST_SYSTEM = 128
"""Queries in a window for which ``ridge`` can be solved."""
KINDS = ("ridge", "analog", "last", "mean", "ema")
