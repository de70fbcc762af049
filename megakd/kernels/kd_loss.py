"""kd_loss: top-K distillation over a sharded vocabulary, one read of the logits forward and one backward.

1. `rows.statistics` reads this rank's logits once: log-sum-exp outside the entries, the logits at entries and label.
2. `records.build_record` makes of them and the teacher's entries at most 10 floats per token, which are all-gathered
   and merged in rank order, so that every rank has the same bits.
3. `divergences` turns them into D and, in the backward, into a gradient for each entry and one factor for all others.
4. `rows.backward` reads the logits once more and writes the gradient. Nothing is sent.

Sizes: T tokens, K entries per token, W vocabulary columns on this rank, V the real vocabulary.
"""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megakd.kernels.paths import row_passes
from megakd.kernels.records import build_record
from megakd.kernels.terms import (
    KDLoss,
    Saved,
    Supervised,
    build_options,
    check_inplace,
    check_labels,
    evaluate,
    gradient_factors,
    localize,
)
from megakd.kernels.vocab import VocabShard
from megakd.targets import TeacherTargets


def kd_loss(
    logits_TW: Tensor,
    targets: TeacherTargets,
    labels_T: Tensor,
    shard: VocabShard,
    *,
    divergence: str = "forward_kl",
    tail: str = "bucket",
    student_temperature: float | None = None,
    kd_weight: float = 1.0,
    ce_weight: float = 0.0,
    inplace_backward: bool = False,
    **parameters: float,
) -> KDLoss:
    """Distillation and cross-entropy losses per token of a student whose vocabulary is split over ranks.

    Args:
        logits_TW: the student's, float32, bfloat16 or float16, not divided by a temperature. All arithmetic is float32.
        targets: all entries of a row, or those of this rank's shard; the rest may be absent, here or elsewhere.
        labels_T: global ids, int64, the same on every rank; -100 masks the row: nothing of it is read, neither logits
            nor targets, its losses are 0 and its gradient is exactly 0.
        shard: this rank's part of the vocabulary.
        divergence: with p of the teacher and q of the student, forward_kl = KL(p || q); reverse_kl = KL(q || p);
            jsd = beta KL(p || m) + (1 - beta) KL(q || m), m = beta p + (1 - beta) q;
            skew_forward_kl = KL(p || skew p + (1 - skew) q); skew_reverse_kl = KL(q || skew q + (1 - skew) p);
            alpha = (1 - sum p^alpha q^(1 - alpha)) / (alpha (1 - alpha)); tvd = sum |p - q| / 2.
        tail: what becomes of the mass outside the entries. `bucket`: one outcome more on both sides; `renormalize`:
            both models rescaled to the entries; `renormalize_teacher`: the teacher alone, against the student's whole
            vocabulary; `drop`: no term for it. Which goes with which: `megakd.divergences.DIVERGENCES`.
        student_temperature: the student's logits are divided by it; None takes the teacher's.
        kd_weight, ce_weight: plain factors. temperature**2 (the student's) is applied here, once.
        inplace_backward: the backward overwrites logits_TW with its gradient and allocates nothing of that size; nobody
            else may need the logits then, and a second backward raises. Otherwise it makes one [T, W] gradient.
        parameters: `beta` (0.5), `skew` (0.1) and `alpha` (0.5) of the divergences above, between 0 and 1, exclusive;
            those of other divergences are not looked at.
    Returns:
        KDLoss; no mean and no sum is taken.
    Raises:
        ValueError: shapes, dtypes or names that do not fit; sampled targets (with entropy_T) with anything but
            forward_kl; a label outside [0, V); a supervised row whose teacher mass
            and tail do not sum to 1 within 1e-3, which is what targets of another shard or vocabulary look like.
    Collectives: one all-gather of 8 floats (temperature 1) or 10 per token and rank, and for every divergence but
        forward_kl and reverse_kl another of 2; none in the backward.
    Source: Hinton et al. 2015, arXiv:1503.02531 (forward, temperature); Gu et al. 2024, arXiv:2306.08543 (reverse);
        Agarwal et al. 2024, arXiv:2306.13649 (jsd); Ko et al. 2024, arXiv:2402.03898 (skew); Amari 2009,
        doi:10.1109/TIT.2009.2030485 (alpha); Wen et al. 2023, arXiv:2307.15190 (tvd). Derivation: docs/loss.md.
    """
    shard.check_logits(logits_TW)
    check_inplace(logits_TW, inplace_backward)
    options = build_options(targets, divergence, tail, parameters, student_temperature, kd_weight, ce_weight)
    check_labels(labels_T, len(logits_TW), targets.tokens)
    return KDLoss(*_KDLoss.apply(logits_TW, targets, labels_T, shard, options, inplace_backward))


class _KDLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits_TW, targets, labels_T, shard, options, inplace_backward):
        s = localize(targets, labels_T, shard)
        stats = row_passes(logits_TW).statistics(
            logits_TW, s.columns_TK, s.label_columns_T, s.supervised_T, shard.real_width, options.temperature
        )
        record_TL = build_record(stats, s.logprobs_TK, options.temperature, sampled=options.sampled)
        outputs, saved = evaluate(record_TL, stats.entry_logits_TK, s, targets, labels_T, shard, options)
        ctx.save_for_backward(logits_TW, stats.entry_logits_TK, *s, *saved)
        ctx.shard, ctx.options, ctx.inplace_backward = shard, options, inplace_backward
        ctx.mark_non_differentiable(*outputs[1:])
        ctx.set_materialize_grads(False)  # no zeros for the outputs without a gradient
        return tuple(outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_T, *_):
        if grad_T is None:
            return (None,) * len(ctx.needs_input_grad)
        logits_TW, entry_logits_TK, *rest = ctx.saved_tensors
        s, saved = Supervised(*rest[: len(Supervised._fields)]), Saved(*rest[len(Supervised._fields) :])
        out_TW = logits_TW.detach() if ctx.inplace_backward else torch.empty_like(logits_TW)
        row_passes(logits_TW).backward(
            logits_TW,
            s.columns_TK,
            s.label_columns_T,
            s.supervised_T,
            ctx.shard.real_width,
            ctx.options.temperature,
            *gradient_factors(grad_T, entry_logits_TK, s, saved, ctx.options),
            out_TW,
        )
        return out_TW, None, None, None, None, None
