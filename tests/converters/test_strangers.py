"""What a stranger may send to `convert`: ways out of a folder, links, code, bombs. Refused, nothing written outside."""

import gzip
import io
import json
import os
import pickle
import shutil
import tarfile
import time

import pytest
import torch
import yaml

from megakd.checkpoints import folder
from megakd.checkpoints.torch_dist_reader import TorchDistReader
from megakd.converters.convert import Options, convert
from megakd.converters.huggingface.folder import HuggingFaceFolder
from megakd.converters.nemo.archive import artifact, resolve, unpacked
from megakd.converters.nemo.convert import open_nemo
from megakd.errors import CheckpointError
from tests.checkpoints.planted import Plant, edit_description, edit_record, record_files
from tests.converters import hf_models, nemo_models
from tests.converters.test_nemo import archive

UNVERIFIED = Options(verify=False)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """(Hugging Face folder, its conversion); copied by those who change them."""
    root = tmp_path_factory.mktemp("whole")
    source = hf_models.build("llama2", root / "hf")
    (source / "merges.txt").write_text("a b\n")
    convert(source, root / "megatron", "megatron", UNVERIFIED)
    return source, root / "megatron"


@pytest.fixture
def source(whole, tmp_path):
    return shutil.copytree(whole[0], tmp_path / "hf")


@pytest.fixture
def checkpoint(whole, tmp_path):
    return shutil.copytree(whole[1], tmp_path / "megatron")


def refused(source, words, target_format="megatron", seconds=20):
    """Refused soon, with a hint, and the folder around holds what it held before."""
    root = source.parent
    before = {path: path.lstat().st_mtime_ns for path in root.rglob("*")}
    started = time.process_time()
    with pytest.raises(CheckpointError, match=words) as caught:
        convert(source, root / "out", target_format, UNVERIFIED)
    assert time.process_time() - started < seconds
    assert caught.value.hint
    after = {path: path.lstat().st_mtime_ns for path in root.rglob("*")}
    assert {k: v for k, v in after.items() if k.is_file()} == {k: v for k, v in before.items() if k.is_file()}
    return caught.value


def kept(checkpoint, **changes):
    path = checkpoint / folder.KEPT / "weights.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    record_files(checkpoint)


@pytest.mark.parametrize(
    "name",
    ["../../overwritten.safetensors", "/tmp/overwritten.safetensors", "a/b.safetensors", "a\\b.safetensors", ".."],
)
def test_a_kept_file_list_cannot_write_elsewhere(name, checkpoint):
    header = json.loads((checkpoint / folder.KEPT / "weights.json").read_text())["headers"]["model.safetensors"]
    kept(checkpoint, headers={name: header})
    refused(checkpoint, "which is no plain name", "hf")


@pytest.mark.parametrize(
    "changes",
    [
        {"headers": {".bashrc": "{}"}},
        {"headers": ["x"]},
        {"headers": {"a.safetensors": 3}},
        {"names": [1]},
        {"index": 7},
    ],
)
def test_a_kept_file_list_of_another_kind_is_refused(changes, checkpoint):
    kept(checkpoint, **changes)
    refused(checkpoint, r"weights\.json", "hf")


@pytest.mark.parametrize("name", ["merges.txt", "config.json", "model.safetensors", "tokenizer_config.json"])
def test_links_out_of_a_hugging_face_folder_are_not_followed(name, source):
    (source.parent / "secret").write_bytes((source / name).read_bytes() if (source / name).exists() else b"{}")
    (source / name).unlink(missing_ok=True)
    (source / name).symlink_to("../secret")
    refused(source, f"{name} is a link that leads out of its folder, to ../secret")


OUT = {  # link below a folder called hf -> where it leads; beside hf there are `hf-secret` and, two folders up, `blobs`
    "a folder whose name begins alike": ("config.json", "../hf-secret/config.json"),
    "from a folder inside": ("sub/x.json", "../../hf-secret/config.json"),
    "a whole folder": ("sub/other", "../../hf-secret"),
    "blobs of a folder that is no snapshot": ("config.json", "../../blobs/config.json"),
    "an absolute one": ("config.json", "/etc/hostname"),
}


@pytest.mark.parametrize("way", OUT)
def test_no_link_finds_a_way_out(way, whole, tmp_path):
    source = shutil.copytree(whole[0], tmp_path / "a" / "hf")
    (source / "sub").mkdir()
    (source / "sub" / "inside").symlink_to("../config.json")
    for place in (source.parent / "hf-secret", tmp_path / "blobs"):
        place.mkdir()
        shutil.copyfile(source / "config.json", place / "config.json")
    HuggingFaceFolder(source)
    name, target = OUT[way]
    (source / name).unlink(missing_ok=True)
    (source / name).symlink_to(target)
    with pytest.raises(CheckpointError, match="is a link that leads out of its folder"):
        HuggingFaceFolder(source)


def test_links_inside_a_folder_and_those_of_the_hubs_cache_are_followed(source, tmp_path):
    (source / "other").mkdir()
    (source / "config.json").rename(source / "other" / "config.json")
    (source / "config.json").symlink_to("other/config.json")
    assert HuggingFaceFolder(source).config["model_type"] == "llama"
    blobs, snapshot = tmp_path / "models--x" / "blobs", tmp_path / "models--x" / "snapshots" / "abc"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for number, name in enumerate(["other/config.json", "model.safetensors"]):
        (blobs / str(number)).write_bytes((source / name).read_bytes())
        (snapshot / os.path.basename(name)).symlink_to(f"../../blobs/{number}")
    assert HuggingFaceFolder(snapshot).config["model_type"] == "llama"
    (blobs / "1").unlink()
    (blobs / "1").symlink_to("/etc/passwd")
    with pytest.raises(CheckpointError, match="a link that leads out"):
        HuggingFaceFolder(snapshot)
    (blobs / "1").unlink()
    os.mkfifo(blobs / "1")
    with pytest.raises(CheckpointError, match="neither a file nor a folder"):
        HuggingFaceFolder(snapshot)


def test_a_pipe_in_a_folder_does_not_hang(checkpoint, source):
    (checkpoint / ".metadata").unlink()
    os.mkfifo(checkpoint / ".metadata")
    refused(checkpoint, r"\.metadata is neither a file nor a folder", "hf")
    (source / "tokenizer.json").unlink(missing_ok=True)
    os.mkfifo(source / "tokenizer.json")
    refused(source, "neither a file nor a folder")


@pytest.mark.parametrize("file", ["../../etc/passwd", "/etc/passwd", 7])
def test_a_record_cannot_name_a_tokenizer_elsewhere(file, checkpoint):
    theirs = {"kind": "huggingface", "file": file, "fingerprint": None}
    edit_record(checkpoint, lambda record: record.update(tokenizer=theirs))
    with pytest.raises(CheckpointError, match="which is no plain name"):
        folder.read_checkpoint(checkpoint)


@pytest.mark.parametrize("name", ["../../../etc/passwd", "/etc/passwd", "hf/../../x"])
def test_a_record_cannot_list_files_elsewhere(name, checkpoint):
    edit_record(checkpoint, lambda record: record["files"].update({name: next(iter(record["files"].values()))}))
    with pytest.raises(CheckpointError, match="which is no plain name"):
        folder.read_checkpoint(checkpoint)


@pytest.mark.parametrize("name", ["tokenizer_config.json", "hf/generation_config.json"])
def test_a_link_in_a_checkpoint_is_not_followed(name, checkpoint):
    (checkpoint / name).unlink(missing_ok=True)
    (checkpoint / name).symlink_to("/etc/hostname")
    with pytest.raises(CheckpointError, match="a link that leads out"):
        folder.read_checkpoint(checkpoint)


def test_a_shard_index_cannot_name_files_elsewhere(source):
    names = list(HuggingFaceFolder(source).files)
    for place in ("../model.safetensors", "/etc/passwd", {"a": 1}):
        index = {"metadata": {}, "weight_map": dict.fromkeys(names, place)}
        (source / "model.safetensors.index.json").write_text(json.dumps(index))
        refused(source, "which is no plain name")


CODE = "import pathlib\npathlib.Path({!r}).touch()\nclass C: pass\n"


def test_code_beside_a_model_is_never_run(source):
    """auto_map is how a folder asks transformers to import its Python files."""
    ran = source.parent / "ran"
    (source / "code.py").write_text(CODE.format(str(ran)))
    config = json.loads((source / "config.json").read_text())
    asks = {"auto_map": {"AutoConfig": "code.C", "AutoModelForCausalLM": "code.C", "AutoTokenizer": ["code.C", None]}}
    (source / "config.json").write_text(json.dumps(config | asks))
    tokenizer = {"model": {"type": "BPE", "vocab": {"a": 0, "b": 1}, "merges": []}, "added_tokens": []}
    (source / "tokenizer.json").write_text(json.dumps(tokenizer))
    (source / "tokenizer_config.json").write_text(
        json.dumps(asks | {"tokenizer_class": "C", "trust_remote_code": True})
    )
    convert(source, source.parent / "out", "megatron", UNVERIFIED)
    from megakd.converters.huggingface.reference import HuggingFaceReference

    HuggingFaceReference(source)
    assert not ran.exists()
    (source / "config.json").write_text(json.dumps(config | asks | {"model_type": "theirs", "architectures": ["C"]}))
    with pytest.raises(CheckpointError, match="unknown architecture"):
        convert(source, source.parent / "other", "megatron", UNVERIFIED)
    assert not ran.exists()


def damage(change, key="decoder.final_layernorm.weight"):
    def edit(description):
        index = next(index for index in description.storage_data if index.fqn == key)
        change(description, description.state_dict_metadata[key], index, description.storage_data[index])

    return edit


LIES = {
    "a file elsewhere": lambda d, entry, index, info: setattr(info, "relative_path", "../../../etc/passwd"),
    "an absolute file": lambda d, entry, index, info: setattr(info, "relative_path", "/etc/passwd"),
    "a file that is not there": lambda d, entry, index, info: setattr(info, "relative_path", "__9_9.distcp"),
    "a negative offset": lambda d, entry, index, info: setattr(info, "offset", -5),
    "an offset beyond the file": lambda d, entry, index, info: setattr(info, "offset", 1 << 60),
    "a length beyond the file": lambda d, entry, index, info: setattr(info, "length", 1 << 60),
    "a transformation": lambda d, entry, index, info: setattr(info, "transform_descriptors", ["zstd"]),
    "a shape of petabytes": lambda d, entry, index, info: setattr(entry, "size", torch.Size([10**15])),
    "a part of petabytes": lambda d, entry, index, info: vars(entry).update(
        size=torch.Size([10**15]), chunks=[type(entry.chunks[0])(entry.chunks[0].offsets, torch.Size([10**15]))]
    ),
    "no parts": lambda d, entry, index, info: setattr(entry, "chunks", []),
    "a part outside": lambda d, entry, index, info: setattr(entry, "size", torch.Size([3])),
    "a shape of fractions": lambda d, entry, index, info: vars(entry).update(size=(48.0,)),
}


def begin_later(description, entry, index, info):
    """A part that is as large as its tensor and begins inside of it."""
    part = type(entry.chunks[0])(torch.Size([1]), entry.chunks[0].sizes)
    entry.chunks[:] = [part]
    description.storage_data[type(index)(index.fqn, part.offsets)] = description.storage_data.pop(index)


def turn(description, entry, index, info):
    """Two negative sizes make the right number of values."""
    entry.chunks[:] = [type(part)(part.offsets, tuple(-n for n in part.sizes)) for part in entry.chunks]


LIES |= {"a part that begins later": begin_later}


@pytest.mark.parametrize("lie", LIES)
def test_lies_of_a_description_are_found_before_memory_is_taken(lie, checkpoint):
    edit_description(checkpoint, damage(LIES[lie]))
    with pytest.raises(CheckpointError) as caught:
        TorchDistReader(checkpoint)
    assert ".metadata" in str(caught.value) and caught.value.hint
    assert ("which is no plain name" in str(caught.value)) == (lie in ("a file elsewhere", "an absolute file"))


def test_a_part_of_negative_sizes_is_refused(checkpoint):
    edit_description(checkpoint, damage(turn, "embedding.word_embeddings.weight"))
    with pytest.raises(CheckpointError, match="has a part of"):
        TorchDistReader(checkpoint)


def test_what_is_stored_is_compared_with_its_description(checkpoint):
    """Half of a tensor, where the other half would be read as well."""

    def halve(description, entry, index, info):
        sizes = torch.Size([24])
        vars(entry).update(size=sizes, chunks=[type(entry.chunks[0])(entry.chunks[0].offsets, sizes)])

    edit_description(checkpoint, damage(halve))
    with pytest.raises(CheckpointError, match=r"final_layernorm.weight is \[48\] torch.float32, .metadata says \[24\]"):
        TorchDistReader(checkpoint).read_slice("decoder.final_layernorm.weight", [0], [24])


def edit_header(source, edit):
    data = (source / "model.safetensors").read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    edit(header)
    new = json.dumps(header).encode()
    (source / "model.safetensors").write_bytes(len(new).to_bytes(8, "little") + new + data[8 + length :])


NORM = "model.norm.weight"
HEADERS = {
    "negative offsets": lambda h: h[NORM].update(data_offsets=[-192, 0]),
    "ends before it starts": lambda h: h[NORM].update(data_offsets=h[NORM]["data_offsets"][::-1]),
    "a negative shape": lambda h: h[NORM].update(shape=[-48]),
    "a shape of petabytes": lambda h: h[NORM].update(shape=[10**15]),
    "fractions": lambda h: h[NORM].update(shape=[48.0]),
    "one offset": lambda h: h[NORM].update(data_offsets=[0]),
    "no offsets": lambda h: h.update({NORM: 5}),
    "an offset beyond the file": lambda h: h[NORM].update(data_offsets=[0, 1 << 60], shape=[1 << 58]),
    "an unknown type that ends before it starts": lambda h: h[NORM].update(
        dtype="X9", data_offsets=h[NORM]["data_offsets"][::-1]
    ),
}


@pytest.mark.parametrize("lie", HEADERS)
def test_lies_of_a_safetensors_header_are_found(lie, source):
    edit_header(source, HEADERS[lie])
    refused(source, r"model\.safetensors is (no safetensors file|\d+ bytes long)")


def test_a_header_above_the_limit_is_refused_and_the_limit_can_be_raised(source, monkeypatch):
    monkeypatch.setenv("MEGAKD_LIMIT_HEADER_BYTES", "50")
    caught = refused(source, "bytes of a safetensors header exceed the limit HEADER_BYTES = 50")
    assert "MEGAKD_LIMIT_HEADER_BYTES" in caught.hint
    (source / "model.safetensors").write_bytes((1 << 62).to_bytes(8, "little") + b"{}")
    refused(source, "no safetensors file")


def test_ten_to_the_nine_layers_are_refused_at_once(source, checkpoint):
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 10**9}))
    caught = refused(source, "1,000,000,000 layers exceed the limit LAYERS = 10,000")
    assert "MEGAKD_LIMIT_LAYERS" in caught.hint
    edit_record(checkpoint, lambda record: record["model"].update(num_layers=10**9))
    refused(checkpoint, "1,000,000,000 layers exceed the limit LAYERS", "hf")


@pytest.mark.parametrize("name", ["config.json", "model.safetensors.index.json", "tokenizer.json"])
def test_a_hundred_thousand_brackets_are_refused(name, source):
    (source / name).write_text("[" * 100_000)
    refused(source, "100,000 levels of JSON exceed the limit JSON_DEPTH = 100")


def test_brackets_in_a_safetensors_header_are_refused(source):
    edit_header(source, lambda header: header.update(__metadata__="here"))
    data = (source / "model.safetensors").read_bytes()
    header = data[8 : 8 + int.from_bytes(data[:8], "little")]
    deep = header.replace(b'"here"', b"[" * 100_000)
    (source / "model.safetensors").write_bytes(len(deep).to_bytes(8, "little") + deep + data[8 + len(header) :])
    refused(source, "100,00[0-9] levels of JSON exceed the limit JSON_DEPTH = 100")


def test_brackets_in_a_record_are_refused(checkpoint):
    (checkpoint / "megakd.json").write_text('{"a":' * 100_000)
    refused(checkpoint, "levels of JSON exceed the limit", "hf")


def nemo_config(**changes):
    return yaml.safe_dump({**nemo_models.GPT2B, "override_vocab_size": 251, **changes})


LAUGHS = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 12)
)
MERGES = "a0: &a0 {x: 1}\n" + "".join(f"a{i}: &a{i} {{<<: [{', '.join([f'*a{i - 1}'] * 10)}]}}\n" for i in range(1, 12))


@pytest.mark.parametrize("text", [LAUGHS, MERGES, "a: &a [*a]\n", "a: " + "[" * 100_000])
def test_a_config_of_nemo_that_grows_is_refused(text, tmp_path):
    archive(tmp_path / "m.nemo", [("./model_config.yaml", text.encode())])
    refused(tmp_path / "m.nemo", r"YAML nodes, aliases written out exceed the limit YAML_NODES|nested too deep|YAML")


def test_layers_and_size_of_a_nemo_config_are_bounded(tmp_path):
    archive(tmp_path / "m.nemo", [("./model_config.yaml", b"a: " + b"x" * (1 << 20))])
    refused(tmp_path / "m.nemo", "bytes of YAML exceed the limit YAML_BYTES")
    nemo_models.build("gpt2b", tmp_path / "n.nemo")
    (tmp_path / "n" / "model_config.yaml").write_text(nemo_config(num_layers=10**9))
    refused(tmp_path / "n", "layers exceed the limit LAYERS")


def test_a_gzip_bomb_is_refused(tmp_path):
    with (
        gzip.open(tmp_path / "m.nemo", "wb", compresslevel=1) as packed,
        tarfile.open(fileobj=packed, mode="w:") as tar,
    ):
        info = tarfile.TarInfo("./model_weights.ckpt")
        info.size = 64 << 20
        tar.addfile(info, io.BytesIO(bytes(info.size)))
    refused(tmp_path / "m.nemo", "bytes unpacked for one byte of an archive exceed the limit ARCHIVE_RATIO")


@pytest.mark.parametrize(
    ("headers", "megabytes", "words"), [(1, 17, "a header of [0-9]+ bytes"), (9, 8, "exceed the limit ARCHIVE_RATIO")]
)
def test_headers_that_grow_are_refused(headers, megabytes, words, tmp_path):
    """What describes a member counts too: it is unpacked before the member is there to be counted."""
    with (
        gzip.open(tmp_path / "m.nemo", "wb", compresslevel=1) as packed,
        tarfile.open(fileobj=packed, mode="w:", format=tarfile.PAX_FORMAT) as tar,
    ):
        for number in range(headers):
            info = tarfile.TarInfo(f"./a{number}")
            info.pax_headers = {"comment": "x" * (megabytes << 20)}
            tar.addfile(info)
    refused(tmp_path / "m.nemo", words)


def test_a_link_in_an_unpacked_archive_is_not_followed(tmp_path):
    nemo_models.build("gpt2b", tmp_path / "m.nemo")
    weights = tmp_path / "m" / "model_weights.ckpt"
    weights.rename(tmp_path / "secret")
    weights.symlink_to("../secret")
    refused(tmp_path / "m", "a link that leads out of its folder")


def test_too_many_members_are_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("MEGAKD_LIMIT_ARCHIVE_MEMBERS", "20")
    archive(tmp_path / "m.nemo", [(f"./a{i}", b"x") for i in range(21)])
    refused(tmp_path / "m.nemo", "21 members of an archive exceed the limit ARCHIVE_MEMBERS = 20")


def test_a_member_brings_no_rights_of_its_own(tmp_path):
    info = tarfile.TarInfo("./model_weights.ckpt")
    info.mode = 0o7777
    archive(tmp_path / "m.nemo", [(info.name, info)])
    with unpacked(tmp_path / "m.nemo", tmp_path) as files:
        assert (files / "model_weights.ckpt").stat().st_mode & 0o7022 == 0


def test_a_key_that_refers_to_itself_is_named():
    with pytest.raises(CheckpointError, match=r"\$\{(\.b|b|a)\} refers to itself"):
        resolve("${.b}", {"a": "${.b}", "b": "${model.a}"})


def test_a_sparse_member_is_refused(tmp_path):
    """A header that says a member is a terabyte of nothing."""
    headers = {"GNU.sparse.map": "0,0", "GNU.sparse.size": str(1 << 40), "GNU.sparse.numblocks": "1"}
    with tarfile.open(tmp_path / "m.nemo", "w:", format=tarfile.PAX_FORMAT) as tar:
        info = tarfile.TarInfo("./model_weights.ckpt")
        info.pax_headers = headers | {"GNU.sparse.name": "./model_weights.ckpt"}
        tar.addfile(info, io.BytesIO())
    refused(tmp_path / "m.nemo", "ARCHIVE_RATIO|cannot be unpacked|no plain file")


def edit_zarr(tmp_path, edit):
    nemo_models.build("core_zarr", tmp_path / "m.nemo")
    array = tmp_path / "m" / "model_weights" / "model.embedding.word_embeddings.weight"
    said = json.loads((array / ".zarray").read_text())
    edit(said)
    (array / ".zarray").write_text(json.dumps(said))
    return tmp_path / "m"


ARRAYS = {
    "petabytes": lambda z: z.update(shape=[10**15, 48]),
    "negative": lambda z: z.update(shape=[-256, 48]),
    "many chunks": lambda z: z.update(shape=[10**9, 10**9], chunks=[1, 1]),
    "no chunks": lambda z: z.update(chunks=[0, 0]),
    "objects": lambda z: z.update(dtype="|O"),
    "text": lambda z: z.update(shape="wide"),
    "compressed": lambda z: z.update(compressor={"id": "zlib"}),
    "filtered": lambda z: z.update(filters=[{"id": "delta"}]),
    "columns first": lambda z: z.update(order="F"),
}


def test_an_artifact_is_looked_for_by_its_name_alone(tmp_path):
    (tmp_path / "secret").touch()
    (tmp_path / "m").mkdir()
    for reference in ("nemo:../secret", "../secret", str(tmp_path / "secret"), "/etc/hostname"):
        assert artifact(tmp_path / "m", reference) is None
    (tmp_path / "m" / "0a_secret").touch()
    assert artifact(tmp_path / "m", "nemo:../secret") == tmp_path / "m" / "0a_secret"


def test_brackets_of_a_zarr_array_are_refused(tmp_path):
    folder = edit_zarr(tmp_path, dict.clear)
    next(folder.glob("*/*embeddings.weight/.zarray")).write_text("[" * 100_000)
    refused(folder, "100,000 levels of JSON exceed the limit JSON_DEPTH = 100")


@pytest.mark.parametrize("lie", ARRAYS)
def test_lies_of_a_zarr_array_are_found(lie, tmp_path):
    refused(edit_zarr(tmp_path, ARRAYS[lie]), "word_embeddings.weight cannot be read")


def test_weights_of_nemo_run_no_code_in_either_format(tmp_path):
    for new in (True, False):
        name = f"m{int(new)}"
        nemo_models.build("gpt2b", tmp_path / f"{name}.nemo")
        weights = torch.load(tmp_path / name / "model_weights.ckpt")
        torch.save(weights, tmp_path / name / "model_weights.ckpt", _use_new_zipfile_serialization=new)
        convert(tmp_path / name, tmp_path / f"out{name}", "megatron", UNVERIFIED)
        weights["planted"] = Plant(tmp_path / "ran")
        torch.save(weights, tmp_path / name / "model_weights.ckpt", _use_new_zipfile_serialization=new)
        refused(tmp_path / name, r"model_weights\.ckpt refers to posix\.system")
    assert not (tmp_path / "ran").exists()


def test_a_distributed_nemo_runs_no_code(tmp_path):
    nemo_models.build("core_torch_dist", tmp_path / "m.nemo")
    (tmp_path / "m" / "model_weights" / ".metadata").write_bytes(pickle.dumps(Plant(tmp_path / "ran")))
    refused(tmp_path / "m", r"\.metadata refers to posix\.system")
    assert not (tmp_path / "ran").exists()


def test_a_legacy_nemo_holds_the_same_tensors(tmp_path):
    """torch's format before 1.6, which NeMo's first archives are in."""
    tensors = nemo_models.build("gpt2b_tp2", tmp_path / "m.nemo")
    for file in (tmp_path / "m").glob("*/model_weights.ckpt"):
        torch.save(torch.load(file), file, _use_new_zipfile_serialization=False)
    with unpacked(tmp_path / "m", tmp_path) as files:
        opened = open_nemo(files, tmp_path)
        for name, tensor in tensors.items():
            assert torch.equal(opened.weights.load(name, opened.model)[: len(tensor)].float(), tensor), name
