"""The slow and obvious loss over a whole vocabulary, in float64, that every kernel is compared with.

Written apart from megakd.kernels: outcomes are lists of probabilities, and autograd does the rest.
"""

import torch
import torch.distributed

from megakd.divergences import DIVERGENCES
from megakd.kernels import VocabShard


def dense_targets(teacher_TV, top_k, temperature=1.0):
    """ids, log-probabilities and log tail of the K largest logits, ties by ascending id; float64."""
    log_p = (teacher_TV.double() / temperature).log_softmax(1)
    ids = teacher_TV.double().sort(dim=1, descending=True, stable=True).indices[:, :top_k].sort(1).values
    tail = log_p.scatter(1, ids, -torch.inf).logsumexp(1)
    return ids, log_p.gather(1, ids), tail


def dense_loss(
    student_TV,
    ids_TK,
    log_p_TK,
    log_tail_T,
    labels_T,
    *,
    divergence,
    tail,
    temperature,
    beta=0.5,
    skew=0.1,
    alpha=0.5,
    kd_weight=1.0,
    ce_weight=0.0,
):
    """(loss_T, kd_T, ce_T, teacher mass, student mass) of rows that are all supervised; student_TV is float64."""
    log_Q = (student_TV / temperature).log_softmax(1)
    p, q = log_p_TK.exp(), log_Q.gather(1, ids_TK).exp()
    outside = torch.ones_like(student_TV, dtype=torch.bool).scatter(1, ids_TK, False)
    q_tail, p_tail = (log_Q.exp() * outside).sum(1, keepdim=True), log_tail_T.exp()[:, None]
    m, q_mass = p.sum(1), q.sum(1)
    if tail == "bucket":
        p, q = torch.cat([p, p_tail], 1), torch.cat([q, q_tail], 1)
    elif tail == "renormalize":
        p, q = p / m[:, None], q / q_mass[:, None]
    elif tail == "renormalize_teacher":
        p, q = torch.cat([p / m[:, None], 0 * p_tail], 1), torch.cat([q, q_tail], 1)
    kd = dense_divergence(divergence, p, q, beta, skew, alpha)
    ce = -student_TV.log_softmax(1).gather(1, labels_T[:, None])[:, 0]
    return ce_weight * ce + kd_weight * temperature**2 * kd, kd, ce, m, q_mass


def dense_divergence(name, p, q, beta=0.5, skew=0.1, alpha=0.5):
    """By the definition, from probabilities."""
    mixed = beta * p + (1 - beta) * q
    return {
        "forward_kl": lambda: kl(p, q),
        "reverse_kl": lambda: kl(q, p),
        "jsd": lambda: beta * kl(p, mixed) + (1 - beta) * kl(q, mixed),
        "skew_forward_kl": lambda: kl(p, skew * p + (1 - skew) * q),
        "skew_reverse_kl": lambda: kl(q, skew * q + (1 - skew) * p),
        "alpha": lambda: (1 - common(p, q, alpha)) / (alpha * (1 - alpha)),
        "tvd": lambda: (p - q).abs().sum(1) / 2,
    }[name]()


def common(p, q, alpha):
    """Sum of p^alpha q^(1 - alpha); without outcomes, 1."""
    some = (p > 0) & (q > 0)
    product = p.where(some, 1) ** alpha * q.where(some, 1) ** (1 - alpha)
    return torch.where(some, product, 0).sum(1) if p.shape[1] else torch.ones(len(p))


def kl(p, q):
    """Sum of p log(p / q), with 0 where p is 0."""
    some = p > 0
    return torch.where(some, p * (p.where(some, 1) / q.where(some, 1)).log(), 0).sum(1)


PAIRS = [(name, tail) for name, row in DIVERGENCES.items() for tail in row.tails]


def draw(tokens, vocabulary, *, seed=0, scale=3.0, dtype=torch.float32):
    """Random student, teacher [T, V] and labels [T]; where there are 3 rows or more, the middle one is masked."""
    generator = torch.Generator().manual_seed(seed)
    student, teacher = (scale * torch.randn(2, tokens, vocabulary, generator=generator)).to(dtype)
    labels = torch.randint(0, vocabulary, (tokens,), generator=generator)
    if tokens > 2:
        labels[tokens // 2] = -100
    return student, teacher, labels


def cut(whole_TV, rank, ranks, *, padding=3, garbage=float("nan")):
    """This rank's columns of an even split of V + padding columns, the padding full of garbage; and the shard."""
    size = whole_TV.shape[1]
    width = -(-(size + padding) // ranks)
    padded = torch.nn.functional.pad(whole_TV, (0, width * ranks - size), value=garbage)
    group = torch.distributed.group.WORLD if ranks > 1 else None
    shard = VocabShard(rank * width, (rank + 1) * width, size, group)
    return padded[:, shard.start : shard.stop].clone(), shard
