"""`.nemo` of every layout: tensors to the bit, logits through the gate, writing, and archives that do harm."""

import io
import tarfile

import pytest
import torch
import yaml

from megakd.checkpoints import folder
from megakd.converters.convert import Options, convert
from megakd.converters.huggingface.exporting import MegatronWeights
from megakd.converters.nemo.archive import unpacked
from megakd.converters.nemo.convert import import_nemo, open_nemo
from megakd.data.tokenizers.sentencepiece import train_sentencepiece
from megakd.errors import CheckpointError
from tests.converters import nemo_models
from tests.converters.gpt_ranks import gate
from tests.ranks import run_ranks

UNVERIFIED = Options(verify=False)


@pytest.mark.parametrize("case", nemo_models.CASES)
def test_tensors_are_the_generators_and_the_gate_passes(case, tmp_path):
    tensors = nemo_models.build(case, tmp_path / "model.nemo")
    with unpacked(tmp_path / "model.nemo", tmp_path) as files:
        opened = open_nemo(files, tmp_path / "model.nemo")
        assert opened.model.vocab_size == nemo_models.VOCAB
        target = folder.begin(tmp_path / "megatron")
        import_nemo(opened, target)
        (found,) = run_ranks(1, gate, files, target, opened.model)
    assert found["passed"] and max(found["differences"]) < 5e-5, found["report"]
    assert found["logit_std"] > 0.3
    folder.publish(tmp_path / "megatron", model=opened.model, step=0, tokenizer=None, training=False, metrics={})
    written = MegatronWeights(folder.read_checkpoint(tmp_path / "megatron"))
    for name, tensor in tensors.items():
        assert torch.equal(written.load(name).float(), tensor), name


MISTAKES = {
    "tanh for erf": ("nmgpt_erf_pp2", {"activation": "gelu_tanh"}),
    "gain for gain - 1": ("gpt2b", {"norm_zero_centered": False}),
    "eps": ("gpt2b", {"norm_epsilon": 1e-6}),
    "whole head rotated": ("gpt2b_tp2", {"rotary_percent": 1.0}),
    "rope scaling dropped": ("core_zarr_nemotron", {"rope_scaling": None, "rotary_base": 10001.0}),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_misread_config_fails_the_gate(mistake, tmp_path):
    case, fields = MISTAKES[mistake]
    nemo_models.build(case, tmp_path / "model.nemo")
    with unpacked(tmp_path / "model.nemo", tmp_path) as files:
        opened = open_nemo(files, tmp_path)
        target = folder.begin(tmp_path / "megatron")
        import_nemo(opened, target)
        (found,) = run_ranks(1, gate, files, target, opened.model.model_copy(update=fields))
    assert not found["passed"], found["report"]


def test_a_rank_packed_gate_read_as_whole_fails(tmp_path, monkeypatch):
    nemo_models.build("gpt2b_tp2", tmp_path / "model.nemo")
    with unpacked(tmp_path / "model.nemo", tmp_path) as files:
        opened = open_nemo(files, tmp_path)
        load = opened.weights.load
        monkeypatch.setattr(
            opened.weights,
            "load",
            lambda name, model: torch.cat(opened.weights.pieces(name, model)) if "fc1.w" in name else load(name, model),
        )
        target = folder.begin(tmp_path / "megatron")
        import_nemo(opened, target)
        (found,) = run_ranks(1, gate, files, target, opened.model)
    assert not found["passed"]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    file = tmp_path_factory.mktemp("tokenizer") / "small_bpe.model"
    train_sentencepiece(["a text to learn from, " * 40] * 9, file, vocab_size=275)
    return file


def test_written_archive_is_read_back_with_its_tokenizer(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr(nemo_models, "PADDED", 288)
    monkeypatch.setattr(nemo_models, "VOCAB", 275)
    nemo_models.build("core_tp2", tmp_path / "in.nemo", tokenizer)
    convert(tmp_path / "in.nemo", tmp_path / "megatron", "megatron", UNVERIFIED)
    checkpoint = folder.read_checkpoint(tmp_path / "megatron")
    assert checkpoint.model.vocab_size == 275
    assert checkpoint.tokenizer_path.name == "small_bpe.model"
    assert checkpoint.tokenizer_path.read_bytes() == tokenizer.read_bytes()
    assert folder.tokenizer_path(tmp_path / "megatron") == checkpoint.tokenizer_path, "what --tokenizer takes"
    record = convert(tmp_path / "megatron", tmp_path / "out.nemo", "nemo", Options())
    assert "equal to the bit" in record["verified"]
    convert(tmp_path / "out.nemo", tmp_path / "again", "megatron", UNVERIFIED)
    again = folder.read_checkpoint(tmp_path / "again")
    assert again.model == checkpoint.model and again.tokenizer_fingerprint == checkpoint.tokenizer_fingerprint
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["again", "in", "in.nemo", "megatron", "out.nemo"], "something was left behind"


def archive(path, members):
    """A tar of (name, bytes or a TarInfo) pairs."""
    with tarfile.open(path, "w:") as tar:
        for name, content in members:
            info = content if isinstance(content, tarfile.TarInfo) else tarfile.TarInfo(name)
            if isinstance(content, bytes):
                info.size = len(content)
            tar.addfile(info, io.BytesIO(content) if isinstance(content, bytes) else None)


def link(name, target, kind=tarfile.SYMTYPE):
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


CONFIG = yaml.safe_dump({**nemo_models.GPT2B, "override_vocab_size": 251}).encode()
HARMFUL = {
    "traversal": [("../evil", b"x")],
    "absolute": [("/tmp/evil", b"x")],
    "symbolic link": [("model_weights.ckpt", link("model_weights.ckpt", "/etc/passwd"))],
    "hard link": [("a", link("a", "../b", tarfile.LNKTYPE))],
    "device": [("a", link("a", "", tarfile.CHRTYPE))],
}


@pytest.mark.parametrize("kind", HARMFUL)
def test_harmful_archives_are_refused(kind, tmp_path):
    archive(tmp_path / "m.nemo", [("./model_config.yaml", CONFIG), *HARMFUL[kind]])
    with pytest.raises(CheckpointError, match="the member"):
        convert(tmp_path / "m.nemo", tmp_path / "out", "megatron", UNVERIFIED)
    assert [path.name for path in tmp_path.iterdir()] == ["m.nemo"]


def test_broken_archives_are_named(tmp_path):
    def refused(words):
        with pytest.raises(CheckpointError, match=words) as caught:
            convert(tmp_path / "m.nemo", tmp_path / "out", "megatron", UNVERIFIED)
        assert caught.value.hint and not (tmp_path / "out").exists()

    archive(tmp_path / "m.nemo", [("./model_weights.ckpt", b"x")])
    refused("model_config.yaml is missing")
    archive(tmp_path / "m.nemo", [("./model_config.yaml", CONFIG)])
    refused("holds no weights")
    archive(tmp_path / "m.nemo", [("./model_config.yaml", CONFIG), ("./model_weights.ckpt", b"no pickle")])
    refused("model_weights.ckpt cannot be read")
    archive(tmp_path / "m.nemo", [("./model_config.yaml", CONFIG), ("./mp_rank_01/model_weights.ckpt", b"x")])
    refused(r"\(0, 0\)")
    (tmp_path / "m.nemo").write_bytes(b"no tar at all")
    refused("cannot be unpacked")
    exotic = yaml.safe_dump({**nemo_models.GPT2B, "position_embedding_type": "alibi", "override_vocab_size": 251})
    nemo_models.build("gpt2b", tmp_path / "whole.nemo")
    with tarfile.open(tmp_path / "whole.nemo") as tar:
        tar.extractall(tmp_path / "files", filter="data")
    (tmp_path / "files" / "model_config.yaml").write_text(exotic)
    with pytest.raises(CheckpointError, match="alibi"):
        convert(tmp_path / "files", tmp_path / "out", "megatron", UNVERIFIED)
