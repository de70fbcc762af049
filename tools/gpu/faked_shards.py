"""Part of check_kernels.py: what a rank of many computes, on one device that plays all of them.

1. The ranks run as threads, each with its own columns; what is gathered goes from one to the others through a list.
   Every rank's loss must be that of one rank that has all columns, and their gradients the pieces of its gradient.
2. The first rank runs alone, is handed what the others have said before, and is timed: its share of the columns and the
   merge of all ranks' records, without a network.
"""

import argparse
import itertools
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch
from gpu_clock import Clock, random_labels, random_logits
from torch import Tensor

from megakd.kernels import VocabShard, kd_loss, select_top_k


class Team:
    """The threads that share a vocabulary, and all that the first of them was given.

    One computes at a time (Triton's interpreter knows only one), all others wait for their turn or for one another.
    """

    def __init__(self, ranks: int):
        self.ranks, self.slots, self.heard = ranks, [None] * ranks, []
        self.barrier, self.turn = threading.Barrier(ranks, timeout=300), threading.Lock()

    def run(self, work: Callable[[int], object]) -> list:
        """[work(place)] of each rank; raises what the first of them raised."""

        def in_turn(place: int):
            try:
                with self.turn:
                    return work(place)
            except BaseException:
                self.barrier.abort()
                raise

        with ThreadPoolExecutor(self.ranks) as pool:
            futures = [pool.submit(in_turn, place) for place in range(self.ranks)]
        failures = [future.exception() for future in futures if future.exception() is not None]
        for failure in sorted(failures, key=lambda failure: isinstance(failure, threading.BrokenBarrierError)):
            raise failure
        return [future.result() for future in futures]

    def exchange(self, place: int, mine: Tensor) -> Tensor:
        """What all ranks hold, in rank order."""
        self.slots[place] = mine
        self.turn.release()
        try:
            self.barrier.wait()
            everyone = list(self.slots)
            self.barrier.wait()
        finally:
            self.turn.acquire()
        everyone_R = torch.stack(everyone)
        if place == 0:
            self.heard.append(everyone_R)
        return everyone_R


@dataclass(frozen=True)
class FakedShard(VocabShard):
    """A shard of `team.ranks`; what it gathers comes from the other threads, or is the next of `replies`."""

    team: Team = None
    place: int = 0
    replies: Iterator[Tensor] | None = None

    def __post_init__(self):
        pass

    @property
    def ranks(self) -> int:
        return self.team.ranks

    @property
    def rank(self) -> int:
        return self.place

    def all_gather(self, mine: Tensor) -> Tensor:
        if self.replies is not None:
            return next(self.replies)
        return self.team.exchange(self.place, mine.detach().clone())


def time_merges(options: argparse.Namespace, emit: Callable[[dict], None]) -> None:
    """Selection and loss at each --ranks that divides the vocabulary, against one rank."""
    clock, labels_T = Clock(options, emit), random_labels(options)
    x_TV, teacher_TV = (random_logits(options, seed) for seed in (1, 2))
    top_k, temperature = options.top_k[0], options.temperature[-1]
    for divergence in ("forward_kl", "jsd"):
        whole_T, whole_grad_TV = step(
            x_TV, teacher_TV, labels_T, VocabShard(0, options.vocab, options.vocab), top_k, temperature, divergence
        )
        for ranks in options.ranks:
            team, width = Team(ranks), options.vocab // ranks

            def shard(place: int, team=team, width=width, **more) -> FakedShard:
                return FakedShard(place * width, (place + 1) * width, options.vocab, None, team, place, **more)

            def columns(x: Tensor, place: int, width=width) -> Tensor:
                return x[:, place * width : (place + 1) * width].contiguous()

            def one_rank(place: int, divergence=divergence, shard=shard, columns=columns):
                mine = columns(x_TV, place), columns(teacher_TV, place)
                return step(*mine, labels_T, shard(place), top_k, temperature, divergence)

            results = team.run(one_rank)
            losses = [float((loss_T - whole_T).abs().max() / whole_T.abs().max()) for loss_T, _ in results]
            gap_TV = torch.cat([grad_TW for _, grad_TW in results], 1).float() - whole_grad_TV.float()
            gradients = float(gap_TV.abs().max() / whole_grad_TV.abs().max())
            worst = max(*losses, 0.0) / 2e-5, gradients / (torch.finfo(x_TV.dtype).eps + 1e-4)
            alone = shard(0, replies=itertools.cycle(team.heard))
            x, teacher = columns(x_TV, 0), columns(teacher_TV, 0)
            clock.row(
                "a rank's selection and loss",
                lambda x=x, t=teacher, s=alone, d=divergence: step(x, t, labels_T, s, top_k, temperature, d),
                floor_bytes=4 * x.nbytes,  # the teacher once, the student twice, and a gradient of its own
                ranks=ranks,
                divergence=divergence,
                gathered_bytes_per_token=sum(heard.nbytes // ranks for heard in team.heard) / options.tokens,
                worst=max(worst),
                verdict="right" if max(worst) <= 1 else "WRONG",
            )


def step(x_TW, teacher_TW, labels_T, shard, top_k, temperature, divergence) -> tuple[Tensor, Tensor]:
    """(loss of each token, gradient of this shard's logits)."""
    targets = select_top_k(teacher_TW, top_k, shard, temperature)
    leaf = x_TW.detach().requires_grad_()
    loss_T = kd_loss(leaf, targets, labels_T, shard, divergence=divergence, ce_weight=0.1).loss_T
    loss_T.sum().backward()
    return loss_T.detach(), leaf.grad
