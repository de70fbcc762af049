"""Megatron -> Hugging Face: the same rules read backwards, tensor by tensor, into safetensors files.

A checkpoint that came from Hugging Face goes back into the same files: config.json and headers were kept. Others get
the config of a family that computes exactly this model.
"""

import contextlib
import json
import pathlib
import re
import shutil

import torch
from torch import Tensor

from megakd.checkpoints.folder import KEPT, Checkpoint
from megakd.checkpoints.inside import plain_name
from megakd.checkpoints.layout import OPT_UNUSED_POSITIONS, Place, expected_shape, place
from megakd.checkpoints.torch_dist_reader import TorchDistReader
from megakd.config import Model
from megakd.converters.families import Family, config_of, family_of, model_section
from megakd.converters.huggingface.folder import CONFIG, INDEX, OTHER_FILES, TOKENIZER_FILES, read_json
from megakd.converters.huggingface.importing import EXTRA, WEIGHT_FILES, bytes_bar, head_name, listed
from megakd.converters.huggingface.safetensors_files import NAMES, SafetensorsWriter, described
from megakd.converters.rules import Rule, by_their_name, their_shapes
from megakd.errors import CheckpointError
from megakd.limits import parse_json

VOCABULARY = ("embedding.word_embeddings.weight", "output_layer.weight")
WEIGHTS = re.compile(r"(decoder|embedding|output_layer)\.")
TRAINING_ONLY = ("hidden_dropout", "attention_dropout", "init_std")
Specs = dict[str, tuple[torch.Size, torch.dtype]]


class MegatronWeights:
    """The tensors of a checkpoint folder by our names, unpadded, whatever layout wrote them."""

    def __init__(self, checkpoint: Checkpoint):
        self.model = checkpoint.model
        self.reader = TorchDistReader(checkpoint.path, checkpoint.files)

    def load(self, name: str) -> Tensor:
        if self._is_absent(name):
            shape, dtype = self.spec(name)
            return torch.zeros(shape, dtype=dtype)
        return self.reader.read(place(name, self.model), rows=self.model.vocab_size if name in VOCABULARY else None)

    def spec(self, name: str) -> tuple[torch.Size, torch.dtype]:
        if self._is_absent(name):
            return torch.Size(expected_shape(name, self.model)), self.spec(VOCABULARY[0])[1]
        where = place(name, self.model)
        entry = self.reader.tensors[where.key]
        shape = list(entry.size[len(where.sizes) :])
        if name in VOCABULARY:
            shape[0] = min(shape[0], self.model.vocab_size)
        return torch.Size(shape), entry.dtype

    def _is_absent(self, name: str) -> bool:
        """OPT's two unused rows are not trained, so a trained checkpoint has none; they are written as zeros."""
        return name == OPT_UNUSED_POSITIONS and name not in self.reader.tensors

    def check(self, rules: list[Rule]) -> None:
        """Raises CheckpointError unless the rules use exactly the weights that are there, at the section's shapes."""
        used = {place(name, self.model).key for rule in rules for name in rule.ours}
        there = {key for key in self.reader.tensors if WEIGHTS.match(key)}
        missing = sorted(used - there - {OPT_UNUSED_POSITIONS})
        unused = sorted(there - used)
        if missing or unused:
            raise CheckpointError(
                f"{self.reader.folder}: its tensors are not those of its model section"
                + listed("missing", missing)
                + listed("left over", unused),
                hint="megakd.json and the weights are of different models",
            )
        for name in {name for rule in rules for name in rule.ours}:
            seen, wanted = tuple(self.spec(name)[0]), expected_shape(name, self.model)
            if wanted is not None and seen != wanted:
                raise CheckpointError(
                    f"{self.reader.folder}: {name} is {list(seen)}, the model section makes it {list(wanted)}",
                    hint="megakd.json and the weights are of different models",
                )


def export_hf(
    checkpoint: Checkpoint,
    target: pathlib.Path,
    *,
    family_name: str | None = None,
    max_shard_bytes: int = 5 << 30,
    progress: bool = False,
) -> Family:
    """Write config, weights and tokenizer.

    Args:
        target: an empty folder.
        family_name: model_type for a model that did not come from Hugging Face; None chooses.
        max_shard_bytes: files are cut at this size, with an index, unless those of the origin are written again.
        progress: a bar over bytes.
    Raises:
        CheckpointError: no family expresses the model, or tensors are missing or left over.
    """
    weights = MegatronWeights(checkpoint)
    family, config, kept = origin(checkpoint.model, checkpoint.path, family_name)
    rules = list(dict.fromkeys(by_their_name(family.rules(checkpoint.model)).values()))
    weights.check(rules)
    specs = {n: (t.shape, t.dtype) for r in rules for n, t in their_shapes(r, {o: weights.spec(o) for o in r.ours})}
    extras = {k.removeprefix(EXTRA): k for k in weights.reader.tensors if k.startswith(EXTRA)} if kept else {}
    specs |= {name: weights.spec(key) for name, key in extras.items()}
    in_files = {name: name for name in specs}
    tied_head = None
    if kept:
        in_files = kept["names"]
        if (head := head_name(family, checkpoint.model)) in in_files:  # the files stored it although it is tied
            tied_head, specs[head] = head, weights.spec(VOCABULARY[0])
    specs = {in_files[name]: spec for name, spec in specs.items()}
    total = sum(shape.numel() * dtype.itemsize for shape, dtype in specs.values())
    with contextlib.ExitStack() as files:
        writers, index = open_files(target, specs, kept, max_shard_bytes, files)
        bar = files.enter_context(bytes_bar(total, "export", progress))

        def write(name: str, tensor: Tensor) -> None:
            writers[in_files[name]].write(in_files[name], tensor)
            bar.update(tensor.nbytes)

        for rule in rules:
            theirs = rule.to_theirs(tuple(weights.load(name) for name in rule.ours))
            for name, tensor in zip(rule.theirs, theirs, strict=True):
                write(name, tensor)
            if rule.ours[0] == VOCABULARY[0] and tied_head is not None:
                write(tied_head, theirs[0])
            del theirs
        for name, key in extras.items():
            write(name, weights.reader.read(Place(key, (), ())))
        for writer in dict.fromkeys(writers.values()):
            writer.finish()
    if index is not None:
        (target / INDEX).write_text(index, encoding="utf-8")
    write_config(target, config, checkpoint, kept, {dtype for _, dtype in specs.values()})
    copy_small_files(checkpoint, target)
    return family


def origin(model: Model, checkpoint: pathlib.Path | None, family_name: str | None) -> tuple[Family, dict, dict | None]:
    """Family, config.json and kept file list; the latter None when the checkpoint did not come from Hugging Face.

    Args:
        model: of the checkpoint, or of the run that is to write one.
        checkpoint: its folder, or that of the checkpoint that the run started from; None where there was none.
    Raises:
        CheckpointError: no family computes exactly this model.
    """
    folder = None if checkpoint is None else checkpoint / KEPT
    cut_from = None
    if family_name is None and folder is not None and (folder / CONFIG).is_file():
        cut_from = read_json(folder / CONFIG)
        family = family_of(cut_from, folder)
        theirs = model_section(family, folder)
        ours = model.model_copy(update={key: getattr(theirs, key) for key in TRAINING_ONLY})
        if theirs == ours:
            return family, cut_from, read_kept(folder / WEIGHT_FILES)
    family, config = config_of(model, family_name, cut_from)
    return family, config, None


def read_kept(path: pathlib.Path) -> dict:
    """The file list that an import kept: "names" (in the tables -> in the files), "headers" by file, "index".

    Raises:
        CheckpointError: it is damaged, or names files that are not plain safetensors names.
    """
    kept = read_json(path)
    names, headers, index = (kept.get(key) for key in ("names", "headers", "index"))
    texts = [*names, *names.values()] if isinstance(names, dict) else [None]
    texts += [*headers.values()] if isinstance(headers, dict) else [""] if headers is None else [None]
    if not all(isinstance(text, str) for text in [*texts, "" if index is None else index]):
        raise CheckpointError(f"{path} is no list of files and tensors", hint="copy the checkpoint again")
    for file in headers or ():
        if not plain_name(file, path).endswith(".safetensors"):
            raise CheckpointError(f"{path} names the file {file}", hint="weights are written as .safetensors alone")
    return kept


def open_files(
    target: pathlib.Path, specs: Specs, kept: dict | None, max_shard_bytes: int, files: contextlib.ExitStack
) -> tuple[dict[str, SafetensorsWriter], str | None]:
    """A writer for every tensor, closed by `files`, and the text of the index if there is one."""
    if kept and kept["headers"] and is_described(kept["headers"], specs):
        writers = {}
        for file, header in kept["headers"].items():
            writer = files.enter_context(SafetensorsWriter(target / file, {}, header))
            writers |= dict.fromkeys(writer.entries, writer)
        return writers, kept["index"]
    shards, size = [[]], 0
    for name in sorted(specs):
        nbytes = specs[name][0].numel() * specs[name][1].itemsize
        if shards[-1] and size + nbytes > max_shard_bytes:
            shards, size = [*shards, []], 0
        shards[-1].append(name)
        size += nbytes
    writers, weight_map = {}, {}
    for i, names in enumerate(shards):
        file = "model.safetensors" if len(shards) == 1 else f"model-{i + 1:05}-of-{len(shards):05}.safetensors"
        writer = files.enter_context(SafetensorsWriter(target / file, {name: specs[name] for name in names}))
        writers |= dict.fromkeys(names, writer)
        weight_map |= dict.fromkeys(names, file)
    if len(shards) == 1:
        return writers, None
    total = sum(shape.numel() * dtype.itemsize for shape, dtype in specs.values())
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    return writers, json.dumps(index, indent=2, sort_keys=True) + "\n"


def is_described(headers: dict[str, str], specs: Specs) -> bool:
    """Whether kept headers have exactly these names, shapes and types."""
    entries = {}
    try:
        for file, header in headers.items():
            entries |= described(parse_json(header, file, CheckpointError))
        return {k: (e["dtype"], e["shape"]) for k, e in entries.items()} == {
            name: (NAMES[dtype], list(shape)) for name, (shape, dtype) in specs.items()
        }
    except (ValueError, KeyError, TypeError, AttributeError):
        return False


def write_config(target: pathlib.Path, config: dict, checkpoint: Checkpoint, kept: dict | None, dtypes: set) -> None:
    """config.json as it was, unless the weights have changed their type since."""
    names = {str(dtype).removeprefix("torch.") for dtype in dtypes if dtype.is_floating_point}
    said = config.get("dtype", config.get("torch_dtype"))
    if kept and (said in names or said is None or len(names) > 1):
        shutil.copyfile(checkpoint.path / KEPT / CONFIG, target / CONFIG)
        return
    if len(names) == 1:
        config = {**config, "torch_dtype" if "torch_dtype" in config else "dtype": names.pop()}
    (target / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def copy_small_files(checkpoint: Checkpoint, target: pathlib.Path) -> None:
    """The tokenizer's files, and generation_config.json where there was one."""
    for name in TOKENIZER_FILES:
        if (checkpoint.path / name).is_file():
            shutil.copyfile(checkpoint.path / name, target / name)
    for name in OTHER_FILES:
        if (checkpoint.path / KEPT / name).is_file():
            shutil.copyfile(checkpoint.path / KEPT / name, target / name)
