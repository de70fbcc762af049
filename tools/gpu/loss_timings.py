"""Parts of check_kernels.py: the passes over rows alone, and the losses and selections that are built of them.

The floor of each is the bytes of logits it has to move: reads and writes of [T, V] in their own dtype.
"""

import argparse
from collections.abc import Callable
from functools import partial

import torch
from gpu_clock import Clock, implementations, random_labels, random_logits

from megakd.divergences import DIVERGENCES
from megakd.kernels import VocabShard, dense_kd_loss, kd_loss, paths, sample_targets, select_top_k, selection
from megakd.kernels.predictions import predict
from megakd.kernels.selection import select_and_predict


def time_passes(options: argparse.Namespace, emit: Callable[[dict], None]) -> None:
    """Each pass over rows, in Triton and in plain PyTorch, with few entries and many, at each temperature."""
    clock, labels_T = Clock(options, emit), random_labels(options)
    x_TV, teacher_TV = (random_logits(options, seed) for seed in (1, 2))
    fresh_TV, shard, read = x_TV.clone(), VocabShard(0, options.vocab, options.vocab), x_TV.nbytes
    on_T, restore = torch.ones_like(labels_T, dtype=torch.bool), partial(x_TV.copy_, fresh_TV)
    for path in implementations(options):
        passes, selecting = paths.row_passes(x_TV), selection.selection_passes(x_TV)
        for top_k, temperature in [(k, t) for k in options.top_k for t in options.temperature]:
            row = partial(clock.row, path=path, top_k=top_k, temperature=temperature, kernels=path == "triton")
            ids_TK = select_top_k(teacher_TV, top_k, shard, temperature).ids_TK
            given = x_TV, ids_TK, labels_T, on_T, options.vocab, temperature
            stats = passes.statistics(*given)
            ones_T = torch.ones_like(stats.max_T)
            factors = stats.max_T, ones_T, None if temperature == 1 else ones_T, stats.entry_logits_TK, ones_T
            row("rows.statistics", partial(passes.statistics, *given), floor_bytes=read)
            row("rows.backward, in place", partial(passes.backward, *given, *factors, x_TV), floor_bytes=2 * read,
                prepare=restore)  # fmt: skip
            scan_rows = partial(selecting.scan_rows, teacher_TV, top_k, shard, temperature)
            row("scan_rows", scan_rows, floor_bytes=read)
            scan = scan_rows()
            agreed = selection.selection_steps(teacher_TV).share(scan.values_TL[None], top_k, 0)[:2]
            row("take_entries", partial(selecting.take_entries, teacher_TV, scan, *agreed, top_k, shard, temperature))
        restore()
        extremes = partial(passes.extremes, x_TV, labels_T, options.vocab)
        summarize = partial(passes.summarize, x_TV, options.vocab, max(1, round(options.vocab**0.5)), 1.0)
        clock.row("rows.extremes", extremes, floor_bytes=read, path=path)
        clock.row("rows.summarize", summarize, floor_bytes=read, path=path)


def time_losses(options: argparse.Namespace, emit: Callable[[dict], None]) -> None:
    """Selection, sampling, prediction and every divergence, sparse and dense, and what PyTorch has instead."""
    clock, labels_T = Clock(options, emit), random_labels(options)
    x_TV, teacher_TV = (random_logits(options, seed) for seed in (1, 2))
    fresh_TV, shard, read = x_TV.clone(), VocabShard(0, options.vocab, options.vocab), x_TV.nbytes
    ones_T, restore = torch.ones(options.tokens, device=x_TV.device), partial(x_TV.copy_, fresh_TV)
    few, hot, generator = options.top_k[0], options.temperature[-1], torch.Generator(x_TV.device).manual_seed(5)

    def trained(form, targets, **named):
        leaf, options = x_TV.detach().requires_grad_(), {"ce_weight": 0.1, "inplace_backward": True, **named}
        form(leaf, targets, labels_T, shard, **options).loss_T.backward(ones_T)

    for top_k in options.top_k:
        clock.row("torch.topk and logsumexp", partial(topk_and_logsumexp, teacher_TV, top_k), floor_bytes=read,
                  top_k=top_k, path="torch")  # fmt: skip
    for path in implementations(options):
        kernels = path == "triton"
        for top_k, temperature in [(k, t) for k in options.top_k for t in options.temperature]:
            row = partial(clock.row, path=path, top_k=top_k, temperature=temperature)
            select = partial(select_top_k, teacher_TV, top_k, shard, temperature)
            targets = select()
            row("select_top_k", select, floor_bytes=read, kernels=kernels)
            with_predictions = partial(select_and_predict, teacher_TV, labels_T, top_k, shard, temperature)
            row("select_and_predict", with_predictions, floor_bytes=read)
            row("kd_loss forward", partial(kd_loss, x_TV, targets, labels_T, shard, ce_weight=0.1), floor_bytes=read)
            row("kd_loss, in place", partial(trained, kd_loss, targets), floor_bytes=3 * read, prepare=restore,
                kernels=kernels, divergence="forward_kl")  # fmt: skip
        targets = select_top_k(teacher_TV, few, shard, hot)
        for divergence in DIVERGENCES:
            row = partial(clock.row, path=path, divergence=divergence, temperature=hot, prepare=restore)
            sparse = partial(trained, kd_loss, targets, divergence=divergence)
            dense = partial(trained, dense_kd_loss, teacher_TV, divergence=divergence, temperature=hot)
            if divergence != "forward_kl":
                row("kd_loss, in place", sparse, floor_bytes=3 * read, top_k=few, kernels=kernels)
            row("dense_kd_loss, in place", dense, floor_bytes=5 * read, kernels=kernels)
        restore()
        draw = partial(sample_targets, teacher_TV, few, shard, generator)
        clock.row("sample_targets", draw, floor_bytes=read, draws=few, path=path, kernels=kernels)
        clock.row("predict", partial(predict, x_TV, labels_T, shard), floor_bytes=read, path=path)


def topk_and_logsumexp(logits_TV: torch.Tensor, top_k: int) -> tuple:
    """What select_top_k gives, in PyTorch, as far as two calls go: the tail is a difference."""
    return logits_TV.topk(top_k), logits_TV.logsumexp(1)
