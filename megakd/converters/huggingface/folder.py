"""A Hugging Face checkpoint folder as a source: its config, its tensors one at a time, and what else lies in it."""

import pathlib

import torch
from torch import Tensor

from megakd import limits
from megakd.checkpoints.inside import check_folder, plain_name
from megakd.checkpoints.pickles import load_file
from megakd.converters.huggingface.safetensors_files import SafetensorsReader
from megakd.errors import CheckpointError

CONFIG = "config.json"
INDEX = "model.safetensors.index.json"
TOKENIZER_FILES = (  # the one that a loader starts from, first
    "tokenizer.json",
    "tokenizer.model",
    "spiece.model",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
)
OTHER_FILES = ("generation_config.json",)


def is_hf_folder(path: pathlib.Path) -> bool:
    return (path / CONFIG).is_file()


class HuggingFaceFolder:
    """Config and tensors of a folder as `save_pretrained` writes it.

    Attributes:
        config: config.json.
        files: tensor name -> the reader of its file.
        index: text of the shard index, None when there is one file.

    Raises:
        CheckpointError: config.json or weights are missing, damaged, or do not belong together; a link leads out.
    """

    def __init__(self, path: pathlib.Path):
        self.path = path
        check_folder(path)
        self.config = read_json(path / CONFIG)
        self.index = None
        self.readers: list[SafetensorsReader | TorchFile] = []
        if (path / INDEX).is_file():
            self.index = (path / INDEX).read_text(encoding="utf-8")
            self._open_shards(read_json(path / INDEX), SafetensorsReader)
        elif (path / "model.safetensors").is_file():
            self.readers = [SafetensorsReader(path / "model.safetensors")]
        elif (path / "pytorch_model.bin.index.json").is_file():
            self._open_shards(read_json(path / "pytorch_model.bin.index.json"), TorchFile)
        elif (path / "pytorch_model.bin").is_file():
            self.readers = [TorchFile(path / "pytorch_model.bin")]
        else:
            raise CheckpointError(
                f"{path} has a {CONFIG} but no weights (model.safetensors, {INDEX} or pytorch_model.bin)",
                hint="copy the weights too; other weight formats are not read",
            )
        self.files = {name: reader for reader in self.readers for name in reader.entries}

    def _open_shards(self, index: dict, reader_type) -> None:
        weight_map = index.get("weight_map")
        if not isinstance(weight_map, dict):
            raise CheckpointError(f"the shard index of {self.path} has no weight_map", hint="copy the folder again")
        names = sorted({plain_name(name, f"the shard index of {self.path}") for name in weight_map.values()})
        missing = [name for name in names if not (self.path / name).is_file()]
        if missing:
            raise CheckpointError(
                f"{self.path}: {len(missing)} of {len(names)} files of the shard index are missing: "
                f"{', '.join(missing[:5])}",
                hint="the download is incomplete; fetch the missing files",
            )
        self.readers = [reader_type(self.path / name) for name in names]
        held = {(reader.path.name, name) for reader in self.readers for name in reader.entries}
        promised = {(file, name) for name, file in weight_map.items()}
        if held != promised:
            wrong = sorted({name for _, name in held ^ promised})
            raise CheckpointError(
                f"{self.path}: the shard index and the files disagree about {len(wrong)} tensors: "
                f"{', '.join(wrong[:5])}",
                hint="files of two versions were mixed; fetch the folder again",
            )

    def spec(self, name: str) -> tuple[torch.Size, torch.dtype]:
        return self.files[name].spec(name)

    def load(self, name: str) -> Tensor:
        return self.files[name].load(name)

    def headers(self) -> dict[str, str] | None:
        """Header text by file name, to write the same files again; None when the weights are not safetensors."""
        if not all(isinstance(reader, SafetensorsReader) for reader in self.readers):
            return None
        return {reader.path.name: reader.header for reader in self.readers}

    def tokenizer_files(self) -> list[pathlib.Path]:
        return [self.path / name for name in TOKENIZER_FILES if (self.path / name).is_file()]

    def other_files(self) -> list[pathlib.Path]:
        return [self.path / name for name in OTHER_FILES if (self.path / name).is_file()]


class TorchFile:
    """A pytorch_model.bin, mapped into memory; only tensors are unpickled, never code."""

    def __init__(self, path: pathlib.Path):
        self.path, self.entries = path, load_file(path)

    def spec(self, name: str) -> tuple[torch.Size, torch.dtype]:
        return self.entries[name].shape, self.entries[name].dtype

    def load(self, name: str) -> Tensor:
        return self.entries[name].clone()


def read_json(path: pathlib.Path) -> dict:
    try:
        value = limits.read_json(path, CheckpointError)
        if not isinstance(value, dict):
            raise ValueError("it holds no object")
        return value
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}", hint="the file is missing or damaged") from error
