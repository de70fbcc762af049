"""The tensors of a `.nemo`: every layout that NeMo has written, by our names.

Layouts of the weights: `model_weights.ckpt` (one rank), `mp_rank_TT/` (tensor parallel), `tp_rank_TT_pp_rank_PPP/`
(and pipelines; layers are counted per stage), and distributed checkpoints `model_weights/`, torch_dist or zarr.
Names: NeMo's own GPT, with or without Transformer Engine layers, and Megatron-Core's.

Legend: N heads of a rank, D channels of a head.
"""

import pathlib
import re
from collections.abc import Iterator

import torch
from torch import Tensor

from megakd.checkpoints.layout import LAYER, Place, place
from megakd.checkpoints.pickles import load_file
from megakd.checkpoints.torch_dist_reader import TorchDistReader
from megakd.config import Model
from megakd.converters.nemo.zarr import read_zarr, zarr_shapes
from megakd.errors import CheckpointError
from megakd.limits import read_json

OLD_NAMES = [  # (pattern of a whole name of NeMo's own GPT, our name; the layer's number is put in later)
    (r"embedding\.(word|position)_embeddings\.weight", r"embedding.\1_embeddings.weight"),
    (r"output_layer\.weight", r"output_layer.weight"),
    (r"(?:encoder|transformer)\.final_layernorm\.(\w+)", r"decoder.final_layernorm.\1"),
    (r"LAYER\.input_layernorm\.(\w+)", r"LAYER.self_attention.linear_qkv.layer_norm_\1"),
    (r"LAYER\.(?:self_)?attention\.query_key_value\.(\w+)", r"LAYER.self_attention.linear_qkv.\1"),
    (r"LAYER\.(?:self_)?attention\.dense\.(\w+)", r"LAYER.self_attention.linear_proj.\1"),
    (r"LAYER\.post_attention_layernorm\.(\w+)", r"LAYER.mlp.linear_fc1.layer_norm_\1"),
    (r"LAYER\.mlp\.dense_h_to_4h\.(\w+)", r"LAYER.mlp.linear_fc1.\1"),
    (r"LAYER\.mlp\.dense_h_to_4h_2\.(\w+)", r"LAYER.mlp.linear_fc1.up_\1"),
    (r"LAYER\.mlp\.dense_4h_to_h\.(\w+)", r"LAYER.mlp.linear_fc2.\1"),
    (r"LAYER\.self_attention\.layernorm_qkv\.(\w+)", r"LAYER.self_attention.linear_qkv.\1"),
    (r"LAYER\.self_attention\.proj\.(\w+)", r"LAYER.self_attention.linear_proj.\1"),
    (r"LAYER\.layernorm_mlp\.layer_norm_(\w+)", r"LAYER.mlp.linear_fc1.layer_norm_\1"),
    (r"LAYER\.layernorm_mlp\.fc([12])_(\w+)", r"LAYER.mlp.linear_fc\1.\2"),
]
CORE_NAMES = [
    (r"LAYER\.input_layernorm\.(\w+)", r"LAYER.self_attention.linear_qkv.layer_norm_\1"),
    (r"LAYER\.pre_mlp_layernorm\.(\w+)", r"LAYER.mlp.linear_fc1.layer_norm_\1"),
]
IGNORED = re.compile(r".*(_extra_state|rotary_pos_emb\.inv_freq|core_attention\..*)|word_embeddings\.weight")
ROWS_SPLIT = re.compile(r".*(word_embeddings|output_layer|linear_qkv|linear_fc1)\.(up_)?(weight|bias)")
COLUMNS_SPLIT = re.compile(r".*(linear_proj|linear_fc2)\.weight")
CHECKPOINT = "model_weights.ckpt"


class NemoWeights:
    """All tensors by our names, merged over the ranks that wrote them.

    Args:
        folder: the unpacked archive.
        config: model_config.yaml.

    Raises:
        CheckpointError: no known layout, damaged or incomplete files, an unknown name.
    """

    def __init__(self, folder: pathlib.Path, config: dict):
        self.folder = folder
        self.queries_first = bool(config.get("megatron_legacy", False)) and not config.get("mcore_gpt", False)
        self.dist = None
        self.ranks: dict[str, list[Tensor]] = {}
        if (folder / "model_weights" / "metadata.json").is_file():
            self.dist = open_distributed(folder / "model_weights")
        else:
            self._open_ranks()

    def _open_ranks(self) -> None:
        stages = rank_files(self.folder)
        first_layer = 0
        for stage in stages:
            files = [load_file(file) for file in stage]
            names = {ours_of(name): name for name in files[0] if not IGNORED.fullmatch(strip(name))}
            layers = {int(layer[1]) for name in names if (layer := LAYER.match(name))}
            for ours, theirs in names.items():
                if any(theirs not in file for file in files):
                    raise CheckpointError(f"{self.folder}: {theirs} is not in all of {len(files)} ranks' files")
                if layer := LAYER.match(ours):
                    ours = f"decoder.layers.{int(layer[1]) + first_layer}.{ours[layer.end() :]}"
                self.ranks[ours] = [file[theirs] for file in files]
            first_layer += len(layers)

    def names(self, model: Model) -> set[str]:
        """Our names of everything that is there, halves of a gated first layer under its one name."""
        if self.dist is not None:
            return set(self.dist.names(model))
        return {name.replace(".up_", ".") for name in self.ranks}

    def pieces(self, name: str, model: Model) -> list[Tensor]:
        """A tensor as the tensor parallel ranks hold it, nothing merged or reordered."""
        return [self.dist.load(name, model)] if self.dist is not None else self.ranks[name]

    def load(self, name: str, model: Model) -> Tensor:
        """A tensor of ours, whole; vocabulary rows include whatever NeMo padded."""
        pieces = self.pieces(name, model)
        up = name.replace("linear_fc1.", "linear_fc1.up_")
        if up != name and up in self.ranks:
            return torch.cat([*pieces, *self.ranks[up]])
        if re.fullmatch(r".*linear_qkv\.(weight|bias)", name) and self.queries_first:
            pieces = [queries_first_to_heads(piece, model) for piece in pieces]
        if model.gated and re.fullmatch(r".*linear_fc1\.(weight|bias)", name):
            halves = [piece.chunk(2) for piece in pieces]
            return torch.cat([half[0] for half in halves] + [half[1] for half in halves])
        if ROWS_SPLIT.fullmatch(name):
            return torch.cat(list(pieces))
        if COLUMNS_SPLIT.fullmatch(name):
            return torch.cat(list(pieces), 1)
        if any(not torch.equal(piece, pieces[0]) for piece in pieces[1:]):
            raise CheckpointError(
                f"{self.folder}: {name} differs between tensor parallel ranks, which all hold the whole of it",
                hint="the ranks' files are of different steps",
            )
        return pieces[0].clone()

    def vocabulary_rows(self) -> int:
        name = "embedding.word_embeddings.weight"
        if self.dist is not None:
            return self.dist.rows(name)
        return sum(len(piece) for piece in self.ranks[name])


def rank_files(folder: pathlib.Path) -> list[list[pathlib.Path]]:
    """Files by pipeline stage, then tensor parallel rank.

    Raises:
        CheckpointError: there are none, or some of the grid are missing.
    """
    if (folder / CHECKPOINT).is_file():
        return [[folder / CHECKPOINT]]
    found = {}
    for path in folder.glob(f"*/{CHECKPOINT}"):
        if match := re.fullmatch(r"tp_rank_(\d+)_pp_rank_(\d+)", path.parent.name):
            found[int(match[2]), int(match[1])] = path
        elif match := re.fullmatch(r"mp_rank_(\d+)", path.parent.name):
            found[0, int(match[1])] = path
    if not found:
        raise CheckpointError(
            f"{folder} holds no weights (model_weights.ckpt, mp_rank_*, tp_rank_*_pp_rank_* or model_weights/)",
            hint="the archive is incomplete; copy it again",
        )
    stages, ranks = (max(key[axis] for key in found) + 1 for axis in (0, 1))
    missing = [(p, t) for p in range(stages) for t in range(ranks) if (p, t) not in found]
    if missing:
        raise CheckpointError(
            f"{folder}: of {ranks} tensor x {stages} pipeline parallel ranks, (pp, tp) {missing} have no weights",
            hint="the archive is incomplete; copy it again",
        )
    return [[found[p, t] for t in range(ranks)] for p in range(stages)]


def strip(name: str) -> str:
    """A name without the wrappers that were around the model."""
    return re.sub(r"^(module\.|model\.)*(language_model\.)?", "", name)


def ours_of(name: str) -> str:
    """Our name, with the layer's number as it stands.

    Raises:
        CheckpointError: the name is of no known kind.
    """
    bare = strip(name)
    layer = re.match(r"(decoder|encoder|transformer)\.layers\.(\d+)\.", bare)
    number = layer[2] if layer else None
    generic = f"LAYER.{bare[layer.end() :]}" if layer else bare
    is_core = bare.startswith("decoder.") or not layer
    for pattern, replacement in [*CORE_NAMES, *([] if layer and is_core else OLD_NAMES)]:
        if re.fullmatch(pattern, generic):
            generic = re.sub(pattern, replacement, generic)
            break
    else:
        if not is_core or not re.match(r"LAYER\.|decoder\.final_layernorm|embedding|output_layer", generic):
            raise CheckpointError(f"unknown tensor {name}", hint="is it a GPT that NeMo wrote?")
    return generic.replace("LAYER", f"decoder.layers.{number}")


def queries_first_to_heads(piece: Tensor, model: Model) -> Tensor:
    """A rank's rows [q of N heads | k of N | v of N] into N times [q | k | v], the order of every other layout."""
    channels = model.head_channels
    return piece.unflatten(0, (3, -1, channels)).transpose(0, 1).flatten(0, 2)


def open_distributed(folder: pathlib.Path):
    try:
        backend = dict(read_json(folder / "metadata.json", CheckpointError)).get("sharded_backend")
    except (OSError, ValueError, TypeError) as error:
        raise CheckpointError(
            f"{folder / 'metadata.json'} cannot be read: {error}", hint="the archive is damaged; copy it"
        ) from error
    if backend == "torch_dist":
        reader = TorchDistReader(folder)
        shapes = {key: tuple(entry.size) for key, entry in reader.tensors.items()}
        return Distributed(shapes, lambda key, where: reader.read(Place(key, where.index, where.sizes)))
    if backend == "zarr":
        return Distributed(zarr_shapes(folder), lambda key, where: read_zarr(folder / key, where.index))
    raise CheckpointError(f"{folder}: distributed format {backend!r}", hint="torch_dist and zarr are read")


class Distributed:
    """A distributed checkpoint: Megatron-Core's names below `model.` or `module.`, layers stacked."""

    def __init__(self, shapes: dict[str, tuple[int, ...]], read):
        self.shapes, self.read = shapes, read
        self.keys = {strip(key): key for key in shapes if not IGNORED.fullmatch(strip(key))}

    def load(self, name: str, model: Model) -> Tensor:
        where = place(name, model)
        if where.key in self.keys:
            return self.read(self.keys[where.key], where)
        return self.read(self.keys[name], Place(name, (), ()))

    def names(self, model: Model) -> Iterator[str]:
        for key in self.keys:
            if key.startswith("decoder.layers.") and not re.match(r"decoder\.layers\.\d+\.", key):
                yield from (key.replace("layers.", f"layers.{i}.", 1) for i in range(model.num_layers))
            else:
                yield key

    def rows(self, name: str) -> int:
        return self.shapes[self.keys[name]][0]
