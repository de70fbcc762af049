"""What keeps a student's experts evenly used: load balance and z-loss as terms of the objective, biases of experts.

Megatron's own terms are scaled by positions over the tokens that count in the loss, and differ between its versions
where a sequence is cut over ranks. Here both are attached to the router's logits as sums over positions, and a step
gives them the factor that makes them means.

Legend: S sequence (of this rank, where it is cut), B micro-batch, E experts, K experts of a token.
"""

import types

import torch
import torch.distributed as dist
from megatron.core.transformer.moe.router import TopKRouter
from torch import Tensor

from megakd.config import Routing
from megakd.models.features import AddLoss
from megakd.models.gpt import GPT


class RoutingLosses:
    """Attaches the terms to the routers of a student; call before it is wrapped for data parallelism.

    Args:
        student: this rank's part.
        section: the config's.
    Attributes:
        layers: with experts, of the whole student.
    """

    def __init__(self, student: GPT, section: Routing):
        model, self.groups = student.config.model, student.pg_collection
        self.section, self.sequence_parallel = section, student.config.sequence_parallel
        self.routers = [
            module for chunk in student.chunks for module in chunk.modules() if isinstance(module, TopKRouter)
        ]
        self.layers = sum(model.has_experts(layer) for layer in range(model.num_layers))
        self.top_k, self.sigmoid = model.moe.top_k, model.moe.score == "sigmoid"
        self.share = 0.0
        self.totals = torch.zeros(2, dtype=torch.float64, device=next(student.parameters()).device)
        student.config.moe_router_bias_update_rate = section.bias_update_rate
        if section.in_objective:
            for router in self.routers:
                router.gating = types.MethodType(self._attached(router.gating), router)

    def begin(self, supervised_tokens: int, positions: int) -> None:
        """Before a step: what its terms are multiplied with, and which biases are to come back if it is left out.

        Args:
            supervised_tokens: of the global batch, which gradients are divided by.
            positions: of the global batch.
        """
        self.share = supervised_tokens / positions
        self.positions = positions
        self.totals.zero_()
        self.biases = [None if r.expert_bias is None else r.expert_bias.clone() for r in self.routers]

    def leave_out(self) -> None:
        """The step is left out: Megatron moves the biases while it reduces the gradients, before they are looked at."""
        for router, bias in zip(self.routers, self.biases, strict=True):
            if bias is not None:
                router.expert_bias.copy_(bias)

    def metrics(self) -> dict[str, float]:
        """`balance` and `router_z`, means over positions and layers, and what they add to the objective as `loss`.

        Collectives: all-reduces of 2 numbers over dp, pp, and with sequence parallelism tp, where there are terms.
        """
        if not self.section.in_objective:
            return {}
        totals = self.totals.clone()
        groups = self.groups
        for group in (groups.dp_cp, groups.pp, *([groups.tp] if self.sequence_parallel else [])):
            dist.all_reduce(totals, group=group)
        balance, z = (totals / self.positions).tolist()
        loss = self.section.balance_weight * balance + self.section.z_loss_weight * z
        return {"balance": balance / self.layers, "router_z": z / self.layers, "loss": loss}

    def _attached(self, gating):
        def gating_with_losses(router: TopKRouter, hidden_SBH: Tensor) -> Tensor:
            logits_SBE = gating(hidden_SBH)
            if not torch.is_grad_enabled() or not router.training:  # first pass of a recomputed layer; validation
                return logits_SBE
            terms = torch.stack([self.balance(logits_SBE), logits_SBE.float().logsumexp(-1).square().sum()])
            self.totals += terms.detach().double()
            weights = terms.new_tensor([self.section.balance_weight, self.section.z_loss_weight])
            return AddLoss.apply(logits_SBE, self.share * (weights * terms).sum())

        return gating_with_losses

    def balance(self, logits_SBE: Tensor) -> Tensor:
        """Sum over this rank's positions; the choices of a sequence are counted on all ranks that it is cut over.

        Collectives: one all-reduce of B x E numbers over tp and cp, where a sequence is cut; none in backward.
        """
        logits_SBE = logits_SBE.float()
        scores_SBE = logits_SBE.sigmoid() if self.sigmoid else logits_SBE.softmax(-1)
        if self.sigmoid:
            scores_SBE = scores_SBE / scores_SBE.sum(-1, keepdim=True)
        chosen_SBK = scores_SBE.topk(self.top_k).indices
        counts_BE = torch.zeros_like(scores_SBE).scatter_(-1, chosen_SBK, 1.0).sum(0)
        length, group = len(logits_SBE), self.groups.tp_cp
        if group.size() > 1:
            dist.all_reduce(counts_BE, group=group)
            length *= group.size()
        return logits_SBE.shape[-1] / (self.top_k * length) * (counts_BE * scores_SBE.sum(0)).sum()
