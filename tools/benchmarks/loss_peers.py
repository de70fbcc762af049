"""What others offer for the same job, called as their own code calls it.

A peer that cannot be imported or run here is listed with the reason. Importing this module loads Megatron-Core.
"""

import functools
import importlib
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from loss_forms import Form
from loss_problem import Problem, Spec
from torch import Tensor


def build_peers(device: torch.device) -> list[Form]:
    """All peers; Megatron's seam for `device` must be installed and parallel_state initialised when they run."""
    return [
        Form("ModelOpt LogitsKLLoss", "modelopt", "logits", Spec("whole"), _modelopt_whole, gives="parts"),
        Form("ModelOpt TopKLogitsKLLoss", "modelopt", "logits", Spec(tail="renormalize"), _modelopt_top_k),
        Form(
            "Megatron vocab_parallel_cross_entropy", "megatron-core", "logits", Spec("none", **_CE_ONLY), _megatron_ce
        ),
        Form("PyTorch kl_div, vocabulary gathered", "torch", "logits", Spec("whole"), _torch_whole),
        Form("PyTorch top-K bucket + CE, vocabulary gathered", "torch", "logits", Spec(ce_weight=1.0), _torch_top_k),
        Form(
            "Liger fused linear JSD",
            "liger-kernel",
            "head",
            Spec("whole", "jsd"),
            functools.partial(_liger, device),
            gives="mean",
        ),
    ]


_CE_ONLY = {"kd_weight": 0.0, "ce_weight": 1.0}


def _modelopt(name: str, problem: Problem, **arguments) -> Tensor:
    losses = importlib.import_module("modelopt.torch.distill.plugins.megatron")
    config = SimpleNamespace(tensor_model_parallel_size=problem.shard.ranks, sequence_parallel=False)
    loss = getattr(losses, name)(config, **arguments)
    return loss(problem.student_TW[:, None], problem.teacher_TW[:, None])[0][0]  # [S, B = 1, W] in, [B, S] out


def _modelopt_whole(problem: Problem, top_k: int, _) -> Tensor:
    return _modelopt("LogitsKLLoss", problem)


def _modelopt_top_k(problem: Problem, top_k: int, _) -> Tensor:
    return _modelopt("TopKLogitsKLLoss", problem, top_k=top_k)


def _megatron_ce(problem: Problem, top_k: int, _) -> Tensor:
    from megatron.core.tensor_parallel import vocab_parallel_cross_entropy

    return vocab_parallel_cross_entropy(problem.student_TW[:, None], problem.labels_T[:, None])[:, 0]


def _whole(problem: Problem) -> tuple[Tensor, Tensor]:
    """Both models' logits over the whole vocabulary; the gradient comes back to this rank's columns."""
    from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region

    if problem.shard.ranks == 1:
        return problem.student_TW, problem.teacher_TW
    return tuple(gather_from_tensor_model_parallel_region(x_TW) for x_TW in (problem.student_TW, problem.teacher_TW))


def _torch_whole(problem: Problem, top_k: int, _) -> Tensor:
    student_TV, teacher_TV = _whole(problem)
    return F.kl_div(
        student_TV.float().log_softmax(1), teacher_TV.float().log_softmax(1), reduction="none", log_target=True
    ).sum(1)


def _torch_top_k(problem: Problem, top_k: int, _) -> Tensor:
    student_TV, teacher_TV = _whole(problem)
    ids_TK = teacher_TV.topk(top_k, 1).indices
    (log_p_TK, log_p_tail_T), (log_q_TK, log_q_tail_T) = (
        _entries_and_tail(x_TV.float().log_softmax(1), ids_TK) for x_TV in (teacher_TV, student_TV)
    )
    kd_T = (log_p_TK.exp() * (log_p_TK - log_q_TK)).sum(1) + log_p_tail_T.exp() * (log_p_tail_T - log_q_tail_T)
    return kd_T + F.cross_entropy(student_TV.float(), problem.labels_T, reduction="none")


def _entries_and_tail(logprobs_TV: Tensor, ids_TK: Tensor) -> tuple[Tensor, Tensor]:
    return logprobs_TV.gather(1, ids_TK), logprobs_TV.scatter(1, ids_TK, -torch.inf).logsumexp(1)


def _liger(device: torch.device, problem: Problem, top_k: int, _) -> Tensor:
    if device.type != "cuda":
        raise RuntimeError("its kernels are Triton's, which need a GPU")
    if problem.shard.ranks > 1:
        raise RuntimeError("it knows no split vocabulary")
    loss = importlib.import_module("liger_kernel.transformers.fused_linear_jsd").LigerFusedLinearJSD()
    mean = loss(problem.hidden_TH, problem.weight_WH, problem.teacher_hidden_TH, problem.teacher_weight_WH, None)
    return mean.expand(problem.tokens)
