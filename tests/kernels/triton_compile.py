"""Compiles every Triton kernel for GPUs that are not there: `triton_compile.py 90 80`, with all options for the first.

What the interpreter forgives (types that do not fit, shapes that are no powers of two, more shared memory than there
is) stops the compiler, down to ptxas. The host functions run as they are, on CPU tensors; a launch compiles, and does
nothing.
"""

import inspect
import pathlib
import re
import sys

import torch

from megakd.divergences import DIVERGENCES
from megakd.kernels import VocabShard, divergences
from megakd.kernels.dense_rows import Scale
from megakd.kernels.rows import Statistics
from megakd.kernels.terms import Saved
from megakd.kernels.triton import candidates as triton_candidates
from megakd.kernels.triton import chunks as triton_chunks
from megakd.kernels.triton import dense_rows as triton_dense
from megakd.kernels.triton import dense_terms as triton_dense_terms
from megakd.kernels.triton import exact as triton_exact
from megakd.kernels.triton import records as triton_records
from megakd.kernels.triton import rows as triton_rows
from megakd.kernels.triton import selection_rows as triton_selection
from megakd.kernels.triton import selection_steps as triton_steps
from megakd.kernels.triton import softcap as triton_softcap
from megakd.kernels.triton import terms as triton_terms
from megakd.kernels.triton.tiles import lane_shape

sys.path.append(str(pathlib.Path(__file__).parents[2] / "tools" / "gpu"))

import static_counts

SHARED_BYTES = 163 << 10  # of an sm_80; an sm_90 has more


class Compiled(dict):
    """The variants of each kernel, by its name; called with one, looks at what the compiler made of it."""

    def __call__(self, kernel, compiled) -> None:
        assert compiled.asm["cubin"], kernel
        assert compiled.metadata.shared <= SHARED_BYTES, (kernel, compiled.metadata.shared)
        if kernel.__name__ == "_backward":  # in place, a warp must not write what another has yet to read
            assert compiled.asm["ptx"].index("bar.sync") < compiled.asm["ptx"].index("st.global")
        self.setdefault(kernel.__name__, set()).add(compiled.hash)


def call_all(T: int, W: int, top_k: int, dtype: torch.dtype, temperature: float, kinds: list[tuple]) -> None:
    """Every host function of the Triton modules, with the options that change a kernel.

    Args:
        kinds: of loss: divergence, tail, and whether the targets are sampled.
    """
    logits_TW = torch.randn(T, W).to(dtype)
    assert lane_shape(logits_TW)["E"] == (1 if W % 16 else 16 // dtype.itemsize)
    columns_TK = torch.arange(top_k).expand(T, top_k).contiguous()
    label_columns_T, labels_T, on_T = columns_TK[:, 0].contiguous(), torch.arange(T), torch.ones(T, dtype=torch.bool)
    numbers_T, numbers_TK = torch.zeros(T), torch.zeros(T, top_k)
    at_one_T = None if temperature == 1 else numbers_T
    given = logits_TW, columns_TK, label_columns_T, on_T, W, temperature
    triton_rows.statistics(*given)
    triton_rows.backward(*given, numbers_T, numbers_T, at_one_T, numbers_TK, numbers_T, logits_TW)
    triton_rows.extremes(logits_TW, label_columns_T, W)
    triton_softcap.cap(logits_TW, 30.0, logits_TW)
    triton_softcap.uncap(logits_TW, 30.0, logits_TW)
    more = temperature != 1
    triton_chunks.summarize(logits_TW, W, 128, temperature, at_one=more, drift=more, column=more)
    shard, values_RTL = VocabShard(0, W, W), logits_TW[None, :, :top_k]
    given, said = (top_k, shard, temperature), labels_T if more else None
    scan = triton_selection.scan_rows(logits_TW, *given, at_one=more)
    agreed = triton_steps.share(values_RTL.contiguous(), top_k, 0)[:2]
    chosen = triton_selection.take_entries(logits_TW, scan, *agreed, *given, said)
    triton_steps.normalize(chosen.entry_logits_TK, chosen.record_TL[None], said, temperature)
    if not more:
        said = labels_T  # at temperature 1
        triton_steps.normalize(chosen.entry_logits_TK, chosen.record_TL.repeat(1, 2)[None, :, :6], said, temperature)
    triton_candidates.find_candidates(logits_TW, top_k, top_k + 1, temperature, at_one=False)  # too narrow for chunks

    triton_terms.localize(columns_TK, numbers_TK, labels_T, 0, W)
    stats = Statistics(numbers_T, numbers_T, at_one_T, numbers_TK, numbers_T)
    saved = Saved(*numbers_T.double().expand(len(Saved._fields), T).clone())
    if any(sampled for *_, sampled in kinds):
        triton_records.build_record(stats, numbers_TK, temperature, sampled=True)
    record_TL = triton_records.build_record(stats, numbers_TK, temperature)
    ranks = 1 if T == 1 else 2
    records_RTL, half = record_TL.expand(ranks, *record_TL.shape).contiguous(), (0.5, 0.5)
    seen = set()
    for divergence, tail, sampled in kinds:
        kind, sums_RT2 = (divergence, tail, 0.5), None
        if divergences.mixes(divergence):
            sums_T2 = triton_terms.entry_sums(records_RTL, numbers_TK, numbers_TK, *kind, temperature)
            sums_RT2 = sums_T2.expand(ranks, T, 2).contiguous()
        if divergence in seen and sums_RT2 is not None:
            continue  # its form has been compiled, and the tail is another divergence's too
        triton_terms.evaluate(records_RTL, sums_RT2, on_T, numbers_T, numbers_T if sampled else None, labels_T, W,
                              *kind, half, temperature, 1e-3)  # fmt: skip
        if divergence not in seen:
            triton_terms.gradient_factors(numbers_T, numbers_TK, numbers_TK, columns_TK, label_columns_T, saved,
                                          divergence, 0.5, half, temperature)  # fmt: skip
        seen.add(divergence)


def call_dense(T: int, W: int, dtype: torch.dtype, temperature: float, names: list[str]) -> None:
    """The passes over both models' rows, for some divergences."""
    student_TW, teacher_TW = torch.randn(2, T, W).to(dtype)
    columns_T, on_T, numbers_T = torch.arange(T), torch.ones(T, dtype=torch.bool), torch.zeros(T)
    scale, scale_at_one = Scale(numbers_T, numbers_T, temperature), Scale(numbers_T, numbers_T, 1.0)
    for name in names:
        triton_dense.dense_record(student_TW, teacher_TW, columns_T, on_T, W, (temperature, temperature), name)
        if divergences.mixes(name):
            triton_dense.dense_sums(student_TW, teacher_TW, on_T, W, (scale, scale), name, 0.5)
        given_T, sums_RT2 = numbers_T.double(), torch.zeros(1, T, 2) if divergences.mixes(name) else None
        triton_dense_terms.merge(torch.zeros(1 if T == 1 else 2, T, 7), (temperature, temperature), name)
        triton_dense_terms.total(
            given_T, given_T, numbers_T, sums_RT2, on_T, columns_T, W, name, (0.5, 0.5), temperature
        )
        lone = [(None, numbers_T) if temperature == 1 else (numbers_T, None)] if name == "forward_kl" else []
        for kd_T, ce_T in [(numbers_T, numbers_T), *lone]:
            triton_dense.dense_backward(
                student_TW, teacher_TW, columns_T, on_T, W, (scale, scale), name, 0.5, numbers_T, kd_T, scale_at_one,
                ce_T, student_TW,
            )  # fmt: skip


def compile_all() -> None:
    """Every kernel with every option, at least once."""
    every = [(name, "bucket", False) for name in DIVERGENCES]  # every form once, and every tail on each of both ways
    every += [("forward_kl", tail, tail == "drop") for tail in DIVERGENCES["forward_kl"].tails[1:]]
    every += [("jsd", tail, False) for tail in DIVERGENCES["jsd"].tails[1:]]
    call_all(
        16, 9008, 64, torch.bfloat16, 1.0, every[:1]
    )  # numbers that are multiples of 16 are compiled apart, and so is 1
    call_all(3, 9000, 1000, torch.float32, 2.0, every)
    call_all(1, 4096, 1, torch.float16, 1.0, [("jsd", "bucket", False)])
    call_dense(16, 9008, torch.bfloat16, 1.0, list(DIVERGENCES))
    call_dense(3, 9000, torch.float32, 2.0, ["forward_kl", "jsd"])


def compile_once() -> None:
    """Every kernel once on real logits, with the most entries: what an architecture may fail in is how it rounds to
    bfloat16, reduces, sorts and lays out shared memory. The front end (types, shapes, constants) is the same for all.
    """
    call_all(16, 9008, 1000, torch.bfloat16, 2.0, [("forward_kl", "bucket", True), ("jsd", "renormalize", False)])
    call_all(16, 9008, 64, torch.bfloat16, 2.0, [("forward_kl", "bucket", True)])  # few entries are selected by chunks
    call_dense(16, 9008, torch.bfloat16, 2.0, ["forward_kl", "jsd"])


def main(first: int, *others: int) -> None:
    for capability in (first, *others):
        found = Compiled()
        with static_counts.AbsentGPU(capability, found).compiling():
            compile_all() if capability == first else compile_once()
        modules = (triton_dense, triton_dense_terms, triton_rows, triton_chunks, triton_candidates, triton_exact,
                   triton_selection, triton_steps, triton_records, triton_terms, triton_softcap)  # fmt: skip
        launched = {name for module in modules for name in re.findall(r"\s(_[a-z_]+)\[", inspect.getsource(module))}
        assert set(found) == launched, launched ^ set(found)
        print(f"sm_{capability}", *sorted(f"{name} {len(hashes)}" for name, hashes in found.items()), sep="\n")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
