"""Every family: HF -> Megatron computes transformers' logits at TP1 and TP2, and -> HF gives the same bytes back."""

import pytest
import torch

from megakd.checkpoints import folder
from megakd.converters.huggingface.exporting import export_hf
from megakd.converters.huggingface.importing import import_hf, open_hf
from megakd.converters.parity.gate import as_checkpoint
from tests.converters import hf_models
from tests.converters.gpt_ranks import gate, megatron_logits
from tests.ranks import run_ranks

PIPELINED = ("llama31", "gpt2", "qwen3")  # pipelines too: untied, learned positions, tied


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    """case -> (Hugging Face folder, torch_dist folder, model section); each made once."""
    made = {}

    def make(case: str):
        if case not in made:
            root = tmp_path_factory.mktemp(case)
            opened = open_hf(hf_models.build(case, root / "hf"))
            target = folder.begin(root / "megatron")
            import_hf(opened, target)
            made[case] = root / "hf", target, opened.model
        return made[case]

    return make


@pytest.mark.parametrize("case", hf_models.CASES)
def test_gate_passes_and_reads_what_transformers_reads(case, converted):
    source, target, model = converted(case)
    (parity,) = run_ranks(1, gate, source, target, model)
    assert parity["passed"], parity["report"]
    assert max(parity["differences"]) < 5e-5, parity["report"]
    assert parity["logit_std"] > 0.3, "the logits are too small for a difference to show"


@pytest.mark.parametrize("case", hf_models.CASES)
def test_megatron_loads_it_at_tp2(case, converted):
    source, target, model = converted(case)
    ids_PS = torch.randint(251, (2, 40), generator=torch.Generator().manual_seed(5))
    ours = run_ranks(2, megatron_logits, target, model, ids_PS)[0]
    torch.testing.assert_close(ours, hf_models.logits(source, ids_PS), atol=5e-5, rtol=0)


@pytest.mark.parametrize("case", PIPELINED)
def test_megatron_loads_it_at_tp2_pp2(case, converted):
    source, target, model = converted(case)
    ids_PS = torch.randint(251, (2, 24), generator=torch.Generator().manual_seed(6))
    (ours,) = [x for x in run_ranks(4, megatron_logits, target, model, ids_PS, 2) if x is not None]
    torch.testing.assert_close(ours, hf_models.logits(source, ids_PS), atol=5e-5, rtol=0)


@pytest.mark.parametrize("case", hf_models.CASES)
def test_back_to_hf_is_the_same_file(case, converted, tmp_path):
    source, target, model = converted(case)
    export_hf(as_checkpoint(target, model), tmp_path)
    for name in ("model.safetensors", "config.json", "generation_config.json"):
        if (source / name).exists():
            assert (tmp_path / name).read_bytes() == (source / name).read_bytes(), name
