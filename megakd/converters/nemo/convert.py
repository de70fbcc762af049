"""`.nemo` -> Megatron and back: opened, accounted for, written."""

import dataclasses
import pathlib
import re
import shutil

import torch
import yaml

from megakd.checkpoints.folder import Checkpoint
from megakd.checkpoints.layout import expected_shape, extra_states, place
from megakd.checkpoints.torch_dist_files import TorchDistWriter
from megakd.config import Model
from megakd.converters.huggingface.exporting import WEIGHTS as IS_WEIGHT
from megakd.converters.huggingface.exporting import MegatronWeights
from megakd.converters.huggingface.importing import bytes_bar, check_finite, listed
from megakd.converters.nemo.archive import CONFIG, WEIGHTS, artifact, hashed_name, pack, plain_name, read_config
from megakd.converters.nemo.config import cannot_express, config_of, model_of
from megakd.converters.nemo.weights import NemoWeights
from megakd.data.tokenizers.load import load_tokenizer
from megakd.digests import FileDigests
from megakd.errors import CheckpointError
from megakd.limits import read_json

VOCABULARY = ("embedding.word_embeddings.weight", "output_layer.weight")
PREFIX = "model."  # of every key of a distributed checkpoint inside an archive


@dataclasses.dataclass(frozen=True)
class NemoModel:
    """An unpacked archive whose tensors are all accounted for.

    Attributes:
        tokenizer: its SentencePiece file, None when it has another kind.
    """

    folder: pathlib.Path
    model: Model
    weights: NemoWeights
    tokenizer: pathlib.Path | None


def open_nemo(folder: pathlib.Path, where: pathlib.Path) -> NemoModel:
    """Read the config, open the weights and account for every name.

    Args:
        where: what errors call the archive.
    Raises:
        CheckpointError: see read_config, model_of, NemoWeights; tensors are missing or left over; the tokenizer has
            more ids than the embedding has rows.
    """
    config = read_config(folder, where)
    weights = NemoWeights(folder, config)
    tokenizer = sentencepiece_of(folder, config)
    rows = weights.vocabulary_rows()
    vocab = vocabulary(folder, config, tokenizer, rows)
    if vocab > rows:
        raise CheckpointError(
            f"{where}: the tokenizer has {vocab} ids, the embedding {rows} rows",
            hint="the tokenizer belongs to another model",
        )
    model = model_of(config, vocab)
    wanted, there = set(our_names(model)), weights.names(model)
    if wanted != there:
        raise CheckpointError(
            f"{where}: its tensors are not those of a GPT with this config"
            + listed("missing", sorted(wanted - there))
            + listed("left over", sorted(there - wanted)),
            hint=f"{CONFIG} and the weights are of different models, or the archive is incomplete",
        )
    return NemoModel(folder, model, weights, tokenizer)


def our_names(model: Model) -> list[str]:
    """The names of all tensors of a dense GPT."""
    kinds = ["weight", "bias"] if model.normalization == "LayerNorm" else ["weight"]
    biased = {"linear_qkv": model.add_bias_linear or model.add_qkv_bias}
    names = ["embedding.word_embeddings.weight"]
    if model.position_embedding == "learned_absolute":
        names.append("embedding.position_embeddings.weight")
    for i in range(model.num_layers):
        layer = f"decoder.layers.{i}."
        for linear in ("self_attention.linear_qkv", "self_attention.linear_proj", "mlp.linear_fc1", "mlp.linear_fc2"):
            names.append(f"{layer}{linear}.weight")
            if biased.get(linear.partition(".")[2], model.add_bias_linear):
                names.append(f"{layer}{linear}.bias")
        for norm in ("self_attention.linear_qkv", "mlp.linear_fc1"):
            names += [f"{layer}{norm}.layer_norm_{kind}" for kind in kinds]
        if model.qk_norm:
            names += [f"{layer}self_attention.{x}_layernorm.{kind}" for x in "qk" for kind in kinds]
    names += [f"decoder.final_layernorm.{kind}" for kind in kinds]
    return names if model.tie_embeddings else [*names, "output_layer.weight"]


def sentencepiece_of(folder: pathlib.Path, config: dict) -> pathlib.Path | None:
    tokenizer = config.get("tokenizer") or {}
    if tokenizer.get("library") != "sentencepiece":
        return None
    return artifact(folder, tokenizer.get("model")) or artifact(folder, tokenizer.get("tokenizer_model"))


def vocabulary(folder: pathlib.Path, config: dict, tokenizer: pathlib.Path | None, rows: int) -> int:
    """The real vocabulary: NeMo's padded rows are random numbers, so they must go.

    What the config overrides comes first, then what the tokenizer has; without either all rows are kept.
    """
    if config.get("override_vocab_size"):
        return int(config["override_vocab_size"])
    if tokenizer is not None:
        return load_tokenizer(tokenizer).vocab_size
    entries = artifact(folder, (config.get("tokenizer") or {}).get("vocab_file"))
    if entries is not None and entries.suffix == ".json":
        try:
            return len(read_json(entries, CheckpointError))
        except (OSError, ValueError, TypeError) as error:
            raise CheckpointError(f"{entries} cannot be read: {error}", hint="the archive is damaged") from error
    return rows


def import_nemo(opened: NemoModel, target: pathlib.Path, *, progress: bool = False) -> dict[str, FileDigests]:
    """Write all weights as a torch_dist folder.

    Args:
        target: an empty folder.
    Returns:
        digests of the data files by name, made while they were written.
    Raises:
        CheckpointError: a tensor holds NaN or infinity, has another shape than the config says, or cannot be read.
    """
    names = our_names(opened.model)
    with TorchDistWriter(target) as writer, bytes_bar(len(names), "convert", progress) as bar:
        for name in names:
            tensor = opened.weights.load(name, opened.model)
            if name in VOCABULARY:
                tensor = tensor[: opened.model.vocab_size]
            check_finite(name, tensor)
            shape = expected_shape(name, opened.model)
            if tuple(tensor.shape) != shape:
                raise CheckpointError(
                    f"{name} is {list(tensor.shape)}, {CONFIG} makes it {list(shape)}",
                    hint=f"{CONFIG} and the weights are of different models",
                )
            writer.write(place(name, opened.model), tensor)
            bar.update()
        for state in extra_states(opened.model):
            writer.write_object(state, [None])
        writer.finish({})
    return writer.written


def export_nemo(checkpoint: Checkpoint, target: pathlib.Path, *, progress: bool = False) -> None:
    """Write an archive of an mcore GPT: config, a distributed checkpoint of one rank, and the tokenizer.

    Args:
        target: the file to write; a folder beside it is used meanwhile.
    Raises:
        CheckpointError: NeMo's GPT cannot express the model.
    """
    model = checkpoint.model
    check_expressible(model)
    tokenizer = checkpoint.tokenizer_path
    if tokenizer is not None and tokenizer.suffix != ".model":
        tokenizer = None
    config = config_of(model, hashed_name(tokenizer) if tokenizer else None)
    source = MegatronWeights(checkpoint)
    names = our_names(model)
    unused = {key for key in source.reader.tensors if IS_WEIGHT.match(key)} - {place(n, model).key for n in names}
    if unused:
        raise CheckpointError(f"{checkpoint.path}: left over: {sorted(unused)[:10]}", hint="is its record right?")
    folder = target.with_name(target.name + ".folder")
    shutil.rmtree(folder, ignore_errors=True)
    (folder / WEIGHTS).mkdir(parents=True)
    try:
        with TorchDistWriter(folder / WEIGHTS) as writer, bytes_bar(len(names), "export", progress) as bar:
            for name in names:
                where = place(name, model)
                writer.write(dataclasses.replace(where, key=PREFIX + where.key), source.load(name))
                bar.update()
            for state in extra_states(model):
                writer.write_object(dataclasses.replace(state, key=PREFIX + state.key), [None])
            writer.finish({})
        (folder / CONFIG).write_text(yaml.safe_dump(config, sort_keys=True), encoding="utf-8")
        if tokenizer is not None:
            shutil.copyfile(tokenizer, folder / hashed_name(tokenizer))
        pack(folder, target)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def check_expressible(model: Model) -> None:
    """Raises CheckpointError where NeMo's GPT cannot express a model."""
    if model.moe is not None or model.mla is not None:
        raise cannot_express("experts and latent attention are not written to .nemo")
    config_of(model, None)


def check_equal(opened: NemoModel, checkpoint: Checkpoint) -> int:
    """Compare an archive just written, read anew, with the checkpoint it was made from, to the bit.

    Returns:
        the number of tensors compared.
    Raises:
        CheckpointError: a tensor or the model section differs.
    """
    source, names = MegatronWeights(checkpoint), our_names(checkpoint.model)
    wrong = [n for n in names if not torch.equal(opened.weights.load(n, opened.model), source.load(n))]
    if wrong:
        raise CheckpointError(f"the archive holds other tensors than {checkpoint.path}" + listed("wrong", wrong))
    return len(names)


def tokenizer_copy(opened: NemoModel, folder: pathlib.Path) -> pathlib.Path | None:
    """The tokenizer's file under its own name, without NeMo's hash."""
    if opened.tokenizer is None:
        return None
    target = folder / re.sub(r"[^\w.\-]", "_", plain_name(opened.tokenizer))
    shutil.copyfile(opened.tokenizer, target)
    return target
