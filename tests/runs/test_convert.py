"""`megakd convert` as it is typed: what it prints, its exit code, what it leaves; memory that does not grow."""

import dataclasses
import json
import multiprocessing
import time

import pytest
import torch

from megakd.checkpoints import folder, record
from megakd.cli import main
from megakd.converters.huggingface.safetensors_files import make_header
from megakd.digests import CHUNK_BYTES, KEPT, digest_files
from tests import forked
from tests.converters import hf_models, nemo_models
from tests.ranks import forkserver


@pytest.fixture
def convert(capfd):
    """Run the verb in this process; the gate starts its own."""

    def run(*arguments, expect=0):
        try:
            code = main(["convert", *map(str, arguments)])
        except SystemExit as wrong_usage:
            code = wrong_usage.code
        said = capfd.readouterr()
        assert code == expect, said.out + said.err
        return said.out if expect == 0 else said.err

    return run


@pytest.fixture
def gate_of_forks(monkeypatch):
    """The gate's processes are forked with their imports done, instead of spawned."""
    context = forkserver()
    monkeypatch.setattr(multiprocessing, "get_context", lambda method: context)


def test_there_and_back_verified_at_two_layouts(convert, tmp_path):
    source = hf_models.build("qwen2", tmp_path / "hf")
    assert "verified: largest difference of a logit" in convert("--from", source, "--to", tmp_path / "megatron")
    record = folder.read_checkpoint(tmp_path / "megatron").conversion
    assert record["model_type"] == "qwen2" and max(record["verified"]["differences"]) < 1e-4
    said = convert("--from", tmp_path / "megatron", "--to", tmp_path / "back", "--tp", 2, "--progress")
    assert "TP 2" in said
    assert (tmp_path / "back" / "model.safetensors").read_bytes() == (source / "model.safetensors").read_bytes()
    assert json.loads((tmp_path / "back" / "megakd_conversion.json").read_text())["verified"]["tp"] == 2


def test_nemo_to_hugging_face(convert, gate_of_forks, tmp_path):
    nemo_models.build("core_tp2", tmp_path / "model.nemo")
    convert("--from", tmp_path / "model.nemo", "--to", tmp_path / "hf", "--format", "hf")
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert config["architectures"] == ["Phi3ForCausalLM"] and config["vocab_size"] == nemo_models.VOCAB
    assert sorted(p.name for p in tmp_path.iterdir()) == ["hf", "model", "model.nemo"]


def test_gpt_2b_is_written_as_stablelm_with_its_gains_plus_one(convert, gate_of_forks, tmp_path):
    nemo_models.build("gpt2b_tp2", tmp_path / "model.nemo")
    assert "verified" in convert("--from", tmp_path / "model.nemo", "--to", tmp_path / "hf", "--format", "hf")
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert config["architectures"] == ["StableLmForCausalLM"] and config["use_parallel_residual"] is False
    convert("--from", tmp_path / "hf", "--to", tmp_path / "megatron", "--no-verify")
    assert not folder.read_checkpoint(tmp_path / "megatron").model.norm_zero_centered


def test_not_verifying_must_be_asked_for_and_is_recorded(convert, tmp_path):
    source = hf_models.build("llama2", tmp_path / "hf")
    assert "not verified (--no-verify)" in convert("--from", source, "--to", tmp_path / "megatron", "--no-verify")
    assert folder.read_checkpoint(tmp_path / "megatron").conversion["verified"] == "not verified (--no-verify)"


def test_the_digests_of_a_conversion_are_made_while_it_is_written(convert, tmp_path, monkeypatch):
    source, read = hf_models.build("llama2", tmp_path / "hf"), []

    def noted(paths):
        read.extend(paths)
        return digest_files(read)

    monkeypatch.setattr(record, "digest_files", noted)
    convert("--from", source, "--to", tmp_path / "megatron", "--no-verify")
    assert read and not [path for path in read if path.suffix == record.DATA], "data files were read once more"
    assert main(["check", str(tmp_path / "megatron")]) == 0


def test_a_conversion_that_computes_something_else_is_thrown_away(convert, gate_of_forks, tmp_path, monkeypatch):
    from megakd.converters import convert as conversion

    source = hf_models.build("llama2", tmp_path / "hf")
    open_rightly = conversion.open_hf

    def open_wrongly(path):
        opened = open_rightly(path)
        return dataclasses.replace(opened, model=opened.model.model_copy(update={"norm_epsilon": 1e-6}))

    monkeypatch.setattr(conversion, "open_hf", open_wrongly)
    said = convert("--from", source, "--to", tmp_path / "out", expect=1)
    assert "compute different logits" in said and "prompt 3: largest difference" in said and "hint:" in said
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


def test_errors_have_one_paragraph_and_leave_nothing(convert, tmp_path):
    source = hf_models.build("llama2", tmp_path / "hf")
    (source / "config.json").write_text("{}")
    said = convert("--from", source, "--to", tmp_path / "out", expect=1)
    assert "CheckpointError" in said and "hint: known are" in said
    said = convert("--from", tmp_path / "nothing", "--to", tmp_path / "out", expect=1)
    assert "does not exist" in said
    assert convert("--from", source, expect=2)
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


def test_list_names_every_family(convert):
    said = convert("--list")
    for model_type, _ in hf_models.CASES.values():
        assert f"\n{model_type} " in said


def test_killed_conversion_leaves_nothing_that_looks_whole(convert, tmp_path):
    source = hf_models.build("llama2", tmp_path / "hf")
    process = forked.Forked("megakd.cli", "convert", "--from", source, "--to", tmp_path / "out")
    begun = tmp_path / "out.incomplete" / ".metadata"
    while not begun.exists():
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    process.kill()
    process.wait()
    assert not (tmp_path / "out").exists()
    convert("--from", source, "--to", tmp_path / "out", "--no-verify")
    assert folder.read_checkpoint(tmp_path / "out") and not (tmp_path / "out.incomplete").exists()


HIDDEN, INNER, LAYERS = 1024, 4096, 8
LARGEST_BYTES = 2 * 2 * INNER * HIDDEN  # of Megatron's tensors: gate and up as one, in bf16
MEASURE = """
import ctypes, pathlib, shutil, sys
from megakd.converters.convert import Options, convert

def kib(name):
    lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name))

def main(source, target, form):
    ctypes.CDLL(None).mallopt(-3, 1 << 20)  # M_MMAP_THRESHOLD: what is freed goes back to the system at once
    for _ in range(2):  # the first imports what it needs
        shutil.rmtree(target, ignore_errors=True)
        pathlib.Path("/proc/self/clear_refs").write_text("5")  # the peak so far is forgotten
        before = kib("VmRSS")
        convert(pathlib.Path(source), pathlib.Path(target), form, Options(verify=False))
    print(1024 * (kib("VmHWM") - before))

main(*sys.argv[1:])
"""


@pytest.mark.slow
def test_memory_is_that_of_a_tensor_not_of_the_model(tmp_path):
    """273 MB of weights. What a conversion holds at its peak, by adding up:

    - of a tensor that is read from Megatron's files, the bytes and the tensor; of one that is put together of two of
      Hugging Face's, those two and the tensor;
    - the chunks that were compared with their digests and are kept for what else is in them.

    glibc keeps more of what is freed: blocks below its threshold, which grows up to 32 MB with the blocks that are
    freed. Here that is switched off, so that what is held can be told from what is merely not given back.
    """
    source, script = tmp_path / "hf", tmp_path / "measure.py"
    source.mkdir()
    script.write_text(MEASURE)
    shapes = {"model.embed_tokens.weight": (2048, HIDDEN), "model.norm.weight": (HIDDEN,)}
    for i in range(LAYERS):
        layer = f"model.layers.{i}."
        shapes |= {f"{layer}self_attn.{x}_proj.weight": (HIDDEN, HIDDEN) for x in "qkvo"}
        shapes |= {f"{layer}mlp.{x}_proj.weight": (INNER, HIDDEN) for x in ("gate", "up")}
        shapes |= {f"{layer}mlp.down_proj.weight": (HIDDEN, INNER)}
        shapes |= {f"{layer}{x}_layernorm.weight": (HIDDEN,) for x in ("input", "post_attention")}
    specs = {name: (torch.Size(shape), torch.bfloat16) for name, shape in shapes.items()}
    header = make_header(specs).encode()
    with open(source / "model.safetensors", "wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + sum(s.numel() * 2 for s, _ in specs.values()))
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": HIDDEN}
    config |= {"intermediate_size": INNER, "num_hidden_layers": LAYERS, "num_attention_heads": 8, "vocab_size": 2048}
    (source / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": True}))
    for start, end, form, kept_bytes in (
        ("hf", "megatron", "megatron", 0),
        ("megatron", "back", "hf", KEPT * CHUNK_BYTES),
    ):
        done = forked.run(script, tmp_path / start, tmp_path / end, form, timeout=280)
        assert done.returncode == 0, done.stderr
        most = 2 * LARGEST_BYTES + kept_bytes + LARGEST_BYTES // 4
        assert LARGEST_BYTES < int(done.stdout) < most, f"{start} -> {end}: {done.stdout} bytes, allowed are {most}"
