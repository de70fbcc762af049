"""A conversion as a whole: read, write, verify, publish; a failed one leaves nothing that looks whole."""

import dataclasses
import json
import pathlib
import tempfile

from megakd.checkpoints import folder
from megakd.converters.huggingface.exporting import export_hf
from megakd.converters.huggingface.folder import TOKENIZER_FILES, is_hf_folder
from megakd.converters.huggingface.importing import import_hf, open_hf
from megakd.converters.nemo.archive import is_nemo, unpacked
from megakd.converters.nemo.convert import check_equal, export_nemo, import_nemo, open_nemo, tokenizer_copy
from megakd.converters.parity.gate import run_gate
from megakd.data.tokenizers.load import load_tokenizer
from megakd.errors import CheckpointError, DataError
from megakd.publish import publish_written

NOT_VERIFIED = "not verified (--no-verify)"
HF_RECORD = "megakd_conversion.json"


@dataclasses.dataclass(frozen=True)
class TokenizerFiles:
    """A tokenizer as far as a checkpoint folder wants to know it; see megakd.data Tokenizer."""

    kind: str
    files: list[pathlib.Path]
    fingerprint: str | None


@dataclasses.dataclass(frozen=True)
class Options:
    """What may be chosen about a conversion.

    Attributes:
        verify: run the parity gate.
        tp: tensor parallel size of our side of the gate.
        family: model_type of an export that has no Hugging Face origin; None chooses.
        max_shard_bytes: size of one exported safetensors file.
        overwrite: replace a destination that exists.
        progress: bars on stderr.
    """

    verify: bool = True
    tp: int = 1
    family: str | None = None
    max_shard_bytes: int = 5 << 30
    overwrite: bool = False
    progress: bool = False


def format_of(path: pathlib.Path) -> str:
    """Which of hf, nemo and megatron it is, by what is there.

    Raises:
        CheckpointError: it is neither.
    """
    if (path / folder.RECORD).is_file() or (path / "checkpoints").is_dir():
        return "megatron"
    if is_hf_folder(path):
        return "hf"
    if is_nemo(path):
        return "nemo"
    seen = f"holds neither config.json nor {folder.RECORD} nor model_config.yaml" if path.exists() else "does not exist"
    raise CheckpointError(f"{path} {seen}", hint="give a Hugging Face folder, a .nemo file or a megakd checkpoint")


def convert(source: pathlib.Path, destination: pathlib.Path, target_format: str, options: Options) -> dict:
    """Convert and publish.

    Returns:
        the record of the conversion, which is in the destination too.
    Raises:
        CheckpointError: see open_hf, import_hf, export_hf, run_gate; the destination is then absent.
    """
    source_format = format_of(source)
    converters = {
        ("hf", "megatron"): hf_to_megatron,
        ("megatron", "hf"): megatron_to_hf,
        ("nemo", "megatron"): nemo_to_megatron,
        ("megatron", "nemo"): megatron_to_nemo,
        ("nemo", "hf"): by_way_of_megatron,
        ("hf", "nemo"): by_way_of_megatron,
    }
    if (source_format, target_format) not in converters:
        raise CheckpointError(
            f"{source} is a {source_format} checkpoint; it cannot be converted to {target_format}",
            hint="--format is what the destination shall be",
        )
    if destination.exists() and not options.overwrite:
        raise CheckpointError(f"{destination} exists", hint="remove it, or give --overwrite")
    try:
        return converters[source_format, target_format](source, destination, options)
    except OSError as error:
        folder.discard(destination)
        raise CheckpointError(
            f"{destination} could not be written: {error}",
            hint="free space on the disk, or choose another destination; nothing was kept",
        ) from error
    except BaseException:
        folder.discard(destination)
        raise


def by_way_of_megatron(source: pathlib.Path, destination: pathlib.Path, options: Options) -> dict:
    """Two conversions, each verified, with a checkpoint beside the destination that is removed again."""
    destination.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".convert-", dir=destination.parent) as scratch:
        middle = pathlib.Path(scratch) / "megatron"
        first = convert(source, middle, "megatron", options)
        second = convert(middle, destination, "hf" if format_of(source) == "nemo" else "nemo", options)
    return {**second, "by_way_of": first}


def nemo_to_megatron(source: pathlib.Path, destination: pathlib.Path, options: Options) -> dict:
    with unpacked(source, destination.parent) as files:
        opened = open_nemo(files, source)
        target = folder.begin(destination)
        written = import_nemo(opened, target, progress=options.progress)
        record = {"source": "nemo", "model_type": "megatron_gpt", "verified": NOT_VERIFIED}
        if options.verify:
            record["verified"] = run_gate(files, target, opened.model, tp=options.tp, progress=options.progress)
        with tempfile.TemporaryDirectory() as scratch:
            file = tokenizer_copy(opened, pathlib.Path(scratch))
            parts = {"model": opened.model, "step": 0, "training": False, "metrics": {}, "written": written}
            folder.publish(destination, tokenizer=tokenizer_of([file] if file else []), conversion=record, **parts)
    return record


def megatron_to_nemo(source: pathlib.Path, destination: pathlib.Path, options: Options) -> dict:
    """The archive is read anew and compared to the bit, which is more than its logits could show."""
    checkpoint = folder.read_checkpoint(source)
    target = folder.incomplete(destination)
    record = {"source": "megatron", "model_type": "megatron_gpt", "verified": NOT_VERIFIED}
    try:
        export_nemo(checkpoint, target, progress=options.progress)
        if options.verify:
            with unpacked(target, destination.parent) as files:
                record["verified"] = f"{check_equal(open_nemo(files, target), checkpoint)} tensors equal to the bit"
        publish_written(target, destination)
    finally:
        target.unlink(missing_ok=True)
    return record


def hf_to_megatron(source: pathlib.Path, destination: pathlib.Path, options: Options) -> dict:
    opened = open_hf(source)
    target = folder.begin(destination)
    written = import_hf(opened, target, progress=options.progress)
    record = {"source": "hf", "model_type": opened.family.model_type, "verified": NOT_VERIFIED}
    if options.verify:
        record["verified"] = run_gate(source, target, opened.model, tp=options.tp, progress=options.progress)
    tokenizer = tokenizer_of(opened.folder.tokenizer_files())
    parts = {"model": opened.model, "step": 0, "training": False, "metrics": {}, "written": written}
    folder.publish(destination, tokenizer=tokenizer, conversion=record, **parts)
    return record


def megatron_to_hf(source: pathlib.Path, destination: pathlib.Path, options: Options) -> dict:
    checkpoint = folder.read_checkpoint(source)
    target = folder.begin(destination)
    choices = {"family_name": options.family, "max_shard_bytes": options.max_shard_bytes}
    family = export_hf(checkpoint, target, **choices, progress=options.progress)
    record = {"source": "megatron", "step": checkpoint.step, "model_type": family.model_type, "verified": NOT_VERIFIED}
    if options.verify:
        record["verified"] = run_gate(
            target, checkpoint.path, checkpoint.model, tp=options.tp, progress=options.progress
        )
    (target / HF_RECORD).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    publish_written(target, destination)
    return record


def tokenizer_of(files: list[pathlib.Path]) -> TokenizerFiles | None:
    """The tokenizer of a Hugging Face folder, with its fingerprint where megakd can load it."""
    if not files:
        return None
    main = next((file for file in files if file.name in TOKENIZER_FILES[:3]), files[0])
    others = [file for file in files if file != main]
    try:
        loaded = load_tokenizer(main)
        return TokenizerFiles(loaded.kind, [main, *others], loaded.fingerprint)
    except DataError:
        return TokenizerFiles("huggingface", [main, *others], None)
