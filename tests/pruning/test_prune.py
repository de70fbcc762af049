"""`megakd prune` against transformers' models: importances at every layout, logits of what is left, and the folder."""

import json
import re

import numpy as np
import pytest
import torch

from megakd.checkpoints import folder
from megakd.checkpoints.torch_dist_reader import TorchDistReader
from megakd.config import Config
from megakd.converters.convert import Options, convert
from megakd.errors import CheckpointError
from megakd.planning.parameters import whole_parameters
from megakd.pruning import cut as cutting
from megakd.pruning.choose import choose
from megakd.pruning.prune import write
from megakd.pruning.sizes import cuts_of, sizes_of
from tests.converters import hf_models
from tests.converters.gpt_ranks import groups_of, megatron_logits
from tests.pruning import dense
from tests.ranks import run_ranks
from tests.training import small

UNVERIFIED = Options(verify=False)
LENGTHS = (16, 5, 9, 12, 16, 7, 3)
LAYOUTS = [{"tp": 2}, {"pp": 2}, {}, {"tp": 2, "sp": True}]  # of two ranks
HIDDEN = {"hidden_size": 31}
ALL = {"num_layers": 3, "ffn_hidden_size": 34, "num_query_groups": 2}
EXPERTS = {"num_layers": 3, "num_experts": 4, "expert_ffn_hidden_size": 14, "shared_ffn_hidden_size": 22}


class Samples:
    """Samples of several lengths, as a data set gives them."""

    sequence_length = 16

    def __len__(self):
        return len(LENGTHS)

    def length(self, epoch, index):
        return LENGTHS[index]

    def sample(self, epoch, index):
        ids = np.random.default_rng(index).integers(0, 251, LENGTHS[index])
        return {"ids": ids, "labels": np.roll(ids, -1), "segments": [len(ids)]}


def collect(rank, ranks, path, model, layouts, keys):
    """Importances at each layout of two ranks."""
    found = []
    for axes in layouts:
        tp, pp, ep = (axes.get(name, 1) for name in ("tp", "pp", "ep"))
        with groups_of(tp, pp, ep) as groups:
            from megakd.assembly.models import build_model
            from megakd.converters.parity.gate import as_checkpoint
            from megakd.models.forward_only import forward_only
            from megakd.pruning.calibration import batches
            from megakd.pruning.importance import Importance

            changes = {f"parallel__{name}": size for name, size in axes.items()}
            config = small.config(tp, pp, train__micro_batch_size=2, **changes)
            gpt = build_model(
                model, as_checkpoint(path, model), config.parallel, config.train, groups,
                vocab_size=model.vocab_size, padded_size=1024, device=torch.device("cpu"), local=True,
                sharded=config.parallel.shards("teacher"),
            )  # fmt: skip
            gpt.requires_grad_(False).eval()
            with Importance(gpt, keys) as importance:
                for micro_batches, _ in batches(config, Samples(), len(LENGTHS), groups, torch.device("cpu")):
                    importance.begin(micro_batches)
                    forward_only(gpt, micro_batches, lambda *_: None, groups)
            found.append(importance.result())
    return found


def converted(case, tmp_path, **changes):
    source = hf_models.build(case, tmp_path / "hf", **changes)
    convert(source, tmp_path / "megatron", "megatron", UNVERIFIED)
    return source, folder.read_checkpoint(tmp_path / "megatron")


@pytest.mark.parametrize(
    ("case", "layouts"),
    [
        ("llama31", [*LAYOUTS, {"fsdp": "teacher"}]),
        ("gpt2", LAYOUTS),
        ("qwen2_moe", [*LAYOUTS, {"tp": 2, "ep": 2, "sp": True}]),
    ],
)
def test_importances_are_those_of_a_dense_model_at_every_layout(case, layouts, tmp_path):
    source, checkpoint = converted(case, tmp_path)
    model = checkpoint.model
    wanted = dense.importances(source, model, [Samples().sample(0, i)["ids"] for i in range(len(LENGTHS))])
    keys = set(sizes_of(model))
    assert keys == set(wanted)
    for axes, *of_ranks in zip(layouts, *run_ranks(2, collect, checkpoint.path, model, layouts, keys), strict=True):
        for found in of_ranks:
            for key in keys:
                for place, values in wanted[key].items():
                    seen = found[key][place].numpy()
                    np.testing.assert_allclose(seen, values, rtol=2e-5, atol=1e-7, err_msg=f"{axes} {key} {place}")


def pruned(checkpoint, tmp_path, asked, seed=3):
    """(what is kept, the student's folder), by random importances."""
    path = tmp_path / "student"
    config = small.config(student__model=None, student__checkpoint=str(path), log__progress=False)
    config = Config.from_dict(config.model_dump() | {"prune": asked})
    model, draw = checkpoint.model, torch.Generator().manual_seed(seed)
    sizes = sizes_of(model)
    importances = {}
    for key in cuts_of(model, config.prune):
        shape = {"num_layers": (), "hidden_size": ()}.get(key, (model.num_layers,))
        shape += (sizes["num_experts"],) if key == "expert_ffn_hidden_size" else ()
        importances[key] = torch.rand(*shape, sizes[key], generator=draw)
    kept = choose(model, config.prune, importances)
    write(config, checkpoint, None, kept, {})
    return kept, path


@pytest.mark.parametrize(
    ("case", "asked"),
    [
        ("llama31", ALL),
        ("llama31", HIDDEN),
        ("llama_biases", {"drop_layers": [0, 2], "ffn_hidden_size": 28}),
        ("gpt2", ALL),
        ("gpt2", HIDDEN),
        ("qwen2_moe", EXPERTS),
        ("qwen2_moe", HIDDEN),
        ("qwen3_moe_partly", {"keep_layers": [1, 2, 3], "num_experts": 4, "ffn_hidden_size": 28}),
        ("qwen3_moe_partly", {"drop_layers": [0, 2, 3]}),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(value),
)
def test_logits_are_the_models_without_what_was_removed(case, asked, tmp_path):
    heads = {"num_attention_heads": 8, "num_key_value_heads": 4} if case == "llama31" else {}
    source, checkpoint = converted(case, tmp_path, **heads)
    kept, path = pruned(checkpoint, tmp_path, asked)
    ids_PS = torch.randint(0, 251, (3, 13), generator=torch.Generator().manual_seed(1))
    wanted = dense.logits_without(source, checkpoint.model, kept, ids_PS)
    student = folder.read_checkpoint(path).model
    assert whole_parameters(student) == stored_parameters(path) < stored_parameters(checkpoint.path)
    for ranks in (1, 2):
        seen = run_ranks(ranks, megatron_logits, path, student, ids_PS)[0]
        torch.testing.assert_close(seen, wanted, rtol=0, atol=5e-5)


def stored_parameters(path):
    entries = TorchDistReader(path).tensors.items()
    return sum(entry.size.numel() for key, entry in entries if not re.match("extra|.*expert_bias", key))


@pytest.mark.parametrize(("case", "changes"), [("llama32_tied", {"eos_token_id": 77}), ("qwen2", {})])
def test_a_pruned_model_goes_back_to_hugging_face_as_its_family(case, changes, tmp_path):
    source, checkpoint = converted(case, tmp_path, **changes)
    kept, path = pruned(checkpoint, tmp_path, ALL | {"num_query_groups": 1})
    convert(path, tmp_path / "back", "hf", UNVERIFIED)
    said, before = (json.loads((where / "config.json").read_text()) for where in (tmp_path / "back", source))
    assert said["architectures"] == before["architectures"] and said["eos_token_id"] == before["eos_token_id"]
    assert (said["num_hidden_layers"], said["intermediate_size"], said["num_key_value_heads"]) == (3, 34, 1)
    ids_PS = torch.arange(40).view(2, 20)
    seen, wanted = (
        hf_models.logits(tmp_path / "back", ids_PS),
        dense.logits_without(source, checkpoint.model, kept, ids_PS),
    )
    torch.testing.assert_close(seen, wanted, rtol=0, atol=5e-5)


def test_a_tensor_that_no_rule_cuts_is_an_error_and_nothing_is_written(tmp_path, monkeypatch):
    _, checkpoint = converted("qwen2", tmp_path)
    bare = {name: axes for name, axes in cutting.AXES.items() if name != "self_attention.linear_qkv.bias"}
    monkeypatch.setattr(cutting, "AXES", bare)
    with pytest.raises(
        CheckpointError, match=r"not known how they are cut: decoder\.layers\.0\.self_attention\.linear_qkv"
    ):
        pruned(checkpoint, tmp_path, ALL)
    assert not list(tmp_path.glob("student*"))


@pytest.mark.parametrize(
    "case", ["falcon", "gemma2", "olmo2", "opt", "stablelm", "deepseek_v2", "deepseek_v2_lite", "deepseek_v3", "qwen3"]
)
def test_families_of_every_kind_are_cut_to_what_their_section_says(case, tmp_path):
    """Each tensor's shape is compared where it is written; that the values are the right ones: the tests above."""
    _, checkpoint = converted(case, tmp_path)
    asked = {"drop_layers": [2], "hidden_size": 44, "ffn_hidden_size": 40}
    _, path = pruned(checkpoint, tmp_path, asked)
    assert whole_parameters(folder.read_checkpoint(path).model) == stored_parameters(path)
