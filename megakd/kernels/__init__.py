"""Losses on logits whose vocabulary is split over ranks: tensors in, tensors out."""

from megakd.kernels.kd_loss import KDLoss, kd_loss
from megakd.kernels.kd_loss_reference import kd_loss_reference
from megakd.kernels.selection import select_top_k
from megakd.kernels.vocab import VocabShard

__all__ = ["KDLoss", "VocabShard", "kd_loss", "kd_loss_reference", "select_top_k"]
