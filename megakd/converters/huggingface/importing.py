"""Hugging Face -> Megatron: tensor by tensor through the family's rules, no model, no GPU, no Megatron."""

import dataclasses
import json
import pathlib
import shutil

import torch
from torch import Tensor

from megakd.checkpoints.folder import KEPT
from megakd.checkpoints.layout import Place, expected_shape, extra_states, place
from megakd.checkpoints.torch_dist_files import TorchDistWriter
from megakd.config import Model
from megakd.converters.families import Family, family_of, model_section
from megakd.converters.huggingface.folder import CONFIG, HuggingFaceFolder, read_json
from megakd.converters.rules import Rule, by_their_name
from megakd.data.tokenizers.load import load_tokenizer
from megakd.digests import FileDigests
from megakd.errors import CheckpointError
from megakd.progress import progress_bar

WEIGHT_FILES = "weights.json"
EXTRA = "extra.hf."


@dataclasses.dataclass(frozen=True)
class HuggingFaceModel:
    """An opened Hugging Face checkpoint whose tensors are all accounted for.

    Attributes:
        names: name in the tables -> name in the files (they differ where a file leaves out the family's prefix).
        rules: every tensor of the model, by its name in the tables.
        kept: tensors that are no weights, by name in the tables: constants, and the head of a tied model.
    """

    folder: HuggingFaceFolder
    family: Family
    model: Model
    names: dict[str, str]
    rules: dict[str, Rule]
    kept: list[str]
    tied_head: str | None

    def load(self, name: str) -> Tensor:
        return self.folder.load(self.names[name])

    def spec(self, name: str) -> tuple[torch.Size, torch.dtype]:
        return self.folder.spec(self.names[name])


def open_hf(path: pathlib.Path) -> HuggingFaceModel:
    """Open a folder and account for every key and shape; no weights are read.

    Raises:
        CheckpointError: see HuggingFaceFolder, family_of, model_section; tensors are missing, left over, or of
            another shape or mixed types; the tokenizer has more ids than the embedding has rows.
    """
    folder = HuggingFaceFolder(path)
    family = family_of(folder.config, path)
    model = model_section(family, path)
    rules = by_their_name(family.rules(model))
    names = table_names(family, list(folder.files), set(rules))
    head = head_name(family, model)
    kept = [name for name in names if family.is_ignored(name) and name not in rules]
    missing = sorted(set(rules) - set(names))
    unexpected = sorted(set(names) - set(rules) - set(kept) - {head})
    if missing or unexpected:
        raise CheckpointError(
            f"{path}: its tensors are not those of a {family.architecture} with this config"
            + listed("missing", missing)
            + listed("left over", unexpected),
            hint="config.json and the weights are of different models, or the checkpoint is incomplete",
        )
    opened = HuggingFaceModel(folder, family, model, names, rules, kept, head if head in names else None)
    check_shapes(opened)
    check_tokenizer(folder, model)
    return opened


def listed(what: str, names: list[str]) -> str:
    if not names:
        return ""
    more = f" and {len(names) - 10} more" if len(names) > 10 else ""
    return f"\n  {what}: {', '.join(names[:10])}{more}"


def table_names(family: Family, in_files: list[str], wanted: set[str]) -> dict[str, str]:
    """Names in the tables -> names in the files; a bare model's files leave out the prefix."""
    if any(name.startswith(family.prefix) for name in in_files):
        return {name: name for name in in_files}
    return {name if name in wanted else family.prefix + name: name for name in in_files}


def head_name(family: Family, model: Model) -> str | None:
    """What a tied model's head is called in files that store it all the same; None when it is not tied."""
    if not model.tie_embeddings:
        return None
    untied = family.rules(model.model_copy(update={"tie_embeddings": False}))
    return next(rule.theirs[0] for rule in untied if rule.ours == ("output_layer.weight",))


def check_shapes(opened: HuggingFaceModel) -> None:
    wrong = []
    for rule in dict.fromkeys(opened.rules.values()):
        specs = [opened.spec(name) for name in rule.theirs]
        if len({dtype for _, dtype in specs}) > 1:
            wrong.append(f"{', '.join(rule.theirs)}: of different types, {', '.join(str(d) for _, d in specs)}")
            continue
        try:
            made = rule.to_ours(tuple(torch.empty(s, dtype=d, device="meta") for s, d in specs))
        except RuntimeError:
            wrong.append(f"{', '.join(rule.theirs)}: {', '.join(str(list(s)) for s, _ in specs)} do not fit together")
            continue
        for name, tensor in zip(rule.ours, made, strict=True):
            shape = expected_shape(name, opened.model)
            if shape is not None and shape != tuple(tensor.shape):
                wrong.append(f"{', '.join(rule.theirs)}: makes {name} {list(tensor.shape)}, config.json {list(shape)}")
    if wrong:
        raise CheckpointError(
            f"{opened.folder.path}: {len(wrong)} tensors do not fit config.json:\n  " + "\n  ".join(wrong[:10]),
            hint="config.json and the weights are of different models; if vocab_size differs, correct it there",
        )


def check_tokenizer(folder: HuggingFaceFolder, model: Model) -> None:
    ids = tokenizer_ids(folder.tokenizer_files())
    if ids is not None and ids > model.vocab_size:
        raise CheckpointError(
            f"{folder.path}: the tokenizer has ids up to {ids - 1}, the embedding has {model.vocab_size} rows",
            hint="the tokenizer belongs to another model; copy the one that was trained with these weights",
        )


def tokenizer_ids(files: list[pathlib.Path]) -> int | None:
    """1 + the largest id of a tokenizer; None when there is none that can be asked."""
    for file in files:
        if file.name == "tokenizer.json":
            value = read_json(file)
            try:
                vocab = value.get("model", {}).get("vocab", {})
                ids = list(vocab.values()) if isinstance(vocab, dict) else list(range(len(vocab)))
                ids += [token["id"] for token in value.get("added_tokens", [])]
                return max(ids, default=-1) + 1
            except (KeyError, TypeError, AttributeError) as error:
                raise CheckpointError(
                    f"{file} is no tokenizer.json: {type(error).__name__}: {error}", hint="copy the folder again"
                ) from error
        if file.suffix == ".model":
            return load_tokenizer(file).vocab_size
    return None


def import_hf(opened: HuggingFaceModel, target: pathlib.Path, *, progress: bool = False) -> dict[str, FileDigests]:
    """Write all weights as a torch_dist folder, and beside them what the way back needs.

    Args:
        target: an empty folder.
        progress: a bar over bytes.
    Returns:
        digests of the data files by name, made while they were written.
    Raises:
        CheckpointError: a tensor holds NaN or infinity, or cannot be read.
    """
    total = sum(s.numel() * d.itemsize for s, d in (opened.spec(name) for name in opened.names))
    with TorchDistWriter(target) as writer, bytes_bar(total, "convert", progress) as bar:
        for rule in dict.fromkeys(opened.rules.values()):
            theirs = tuple(opened.load(name) for name in rule.theirs)
            for name, tensor in zip(rule.theirs, theirs, strict=True):
                check_finite(name, tensor)
            done = sum(tensor.nbytes for tensor in theirs)
            made = rule.to_ours(theirs)
            del theirs
            for name, tensor in zip(rule.ours, made, strict=True):
                writer.write(place(name, opened.model), tensor)
            del made
            bar.update(done)
        for name in opened.kept:
            writer.write(Place(EXTRA + name, (), ()), opened.load(name))
        if opened.tied_head is not None:
            check_tied(opened)
        for state in extra_states(opened.model):
            writer.write_object(state, [None])
        writer.finish({})
    keep_origin(opened, target / KEPT)
    return writer.written


def bytes_bar(total: int, what: str, progress: bool):
    return progress_bar(total, what, unit="B", shown=progress)


def keep_origin(opened: HuggingFaceModel, folder: pathlib.Path) -> None:
    folder.mkdir()
    for file in [opened.folder.path / CONFIG, *opened.folder.other_files()]:
        shutil.copyfile(file, folder / file.name)
    files = {"names": opened.names, "headers": opened.folder.headers(), "index": opened.folder.index}
    (folder / WEIGHT_FILES).write_text(json.dumps(files), encoding="utf-8")


def check_finite(name: str, tensor: Tensor) -> None:
    if not tensor.is_floating_point() or tensor.numel() == 0:
        return
    low, high = (tensor.float() if tensor.itemsize == 1 else tensor).aminmax()
    if not (torch.isfinite(low) and torch.isfinite(high)):
        seen = "NaN" if torch.isnan(low) or torch.isnan(high) else "infinity"
        raise CheckpointError(
            f"{name} holds {seen}", hint="these weights are broken; a model with them computes nothing"
        )


def check_tied(opened: HuggingFaceModel) -> None:
    embedding = next(
        rule.theirs[0] for rule in opened.rules.values() if rule.ours[0].endswith("word_embeddings.weight")
    )
    if not torch.equal(opened.load(embedding), opened.load(opened.tied_head)):
        raise CheckpointError(
            f"{opened.folder.path}: config.json ties the head to the embedding, but {opened.tied_head} differs from "
            f"{embedding}",
            hint="set tie_word_embeddings to false in config.json if the head was trained on its own",
        )
