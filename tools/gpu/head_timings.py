"""Part of check_kernels.py: output layer and loss together, beside the layer and the loss apart.

There is no floor in bytes here: the products set it. Their share of what the device gives for one large product in the
same dtype is in each row.
"""

import argparse
from collections.abc import Callable

import torch
from gpu_clock import DTYPES, Clock, implementations, random_labels

from megakd.kernels import VocabShard, kd_loss, linear_kd_loss, linear_select_top_k


def time_head(options: argparse.Namespace, emit: Callable[[dict], None]) -> None:
    """Selection and loss of hidden states, in blocks; soft-capped too; with both ways to form gradients."""
    clock, labels_T = Clock(options, emit), random_labels(options)
    generator = torch.Generator(device=options.device).manual_seed(1)

    def draw(rows: int) -> torch.Tensor:
        scale = options.hidden**-0.25
        drawn = scale * torch.randn(rows, options.hidden, generator=generator, device=options.device)
        return drawn.to(DTYPES[options.dtype])

    hidden_TH, weight_VH, teacher_VH = draw(options.tokens), draw(options.vocab), draw(options.vocab)
    weight_VH.requires_grad_()
    weight_VH.main_grad = torch.zeros_like(weight_VH, dtype=torch.float32)
    shard, ones_T = VocabShard(0, options.vocab, options.vocab), torch.ones(options.tokens, device=options.device)
    product_flops = 2 * options.tokens * options.vocab * options.hidden
    with torch.no_grad():
        peak = product_flops / clock.row("product", lambda: hidden_TH @ weight_VH.T, flops=product_flops)["seconds"]

    def row(name: str, products: int, run, **said):
        flops = products * product_flops

        def emit_with_share(given: dict):
            emit(given | {"share_of_product_flops": flops / given["seconds"] / peak})

        Clock(options, emit_with_share, clock.bandwidth).row(name, run, flops=flops, **said)

    top_k, hidden = options.top_k[0], hidden_TH.requires_grad_()
    for path in implementations(options):
        targets = linear_select_top_k(hidden_TH.detach(), teacher_VH, top_k, shard)
        row("linear_select_top_k", 1, lambda: linear_select_top_k(hidden_TH.detach(), teacher_VH, top_k, shard),
            path=path, top_k=top_k)  # fmt: skip
        given = targets, labels_T, shard

        def fused(given=given, **named):
            named = {"ce_weight": 0.1, "accumulate_into_main_grad": True, **named}
            linear_kd_loss(hidden, weight_VH, *given, **named).loss_T.backward(ones_T)

        def apart(given=given):
            kd_loss(hidden @ weight_VH.T, *given, ce_weight=0.1, inplace_backward=True).loss_T.backward(ones_T)
            weight_VH.main_grad.add_(weight_VH.grad)
            weight_VH.grad = None

        row("output layer, then kd_loss, in place", 3, apart, path=path, top_k=top_k)
        row("linear_kd_loss", 4, fused, path=path, top_k=top_k)
        row("linear_kd_loss, gradient in forward", 3, lambda f=fused: f(gradient_in_forward=True), path=path,
            top_k=top_k)  # fmt: skip
        row("linear_kd_loss, gradient in forward, soft cap", 3,
            lambda f=fused: f(gradient_in_forward=True, softcap=30.0), path=path, top_k=top_k)  # fmt: skip
