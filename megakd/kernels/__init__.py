"""Losses on logits whose vocabulary is split over ranks: tensors in, tensors out."""

from megakd.kernels.dense import dense_kd_loss
from megakd.kernels.kd_loss import kd_loss
from megakd.kernels.kd_loss_reference import kd_loss_reference
from megakd.kernels.linear import linear_kd_loss, linear_select_top_k
from megakd.kernels.linear_dense import linear_dense_kd_loss
from megakd.kernels.sampling import sample_targets
from megakd.kernels.selection import select_top_k
from megakd.kernels.terms import KDLoss
from megakd.kernels.vocab import VocabShard

__all__ = [
    "KDLoss",
    "VocabShard",
    "dense_kd_loss",
    "kd_loss",
    "kd_loss_reference",
    "linear_dense_kd_loss",
    "linear_kd_loss",
    "linear_select_top_k",
    "sample_targets",
    "select_top_k",
]
