"""Hugging Face tokenizers: `tokenizer.json`, read by the tokenizers library, and the settings beside it."""

import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from megakd.data.tokenizers.tokenizer import encode_continuation, fingerprint_of, puts_space_first
from megakd.errors import DataError

_BESIDE = ("tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")
_AS_WRITTEN = (None, "PreTrainedTokenizerFast", "TokenizersBackend")  # classes that take tokenizer.json as it is
_BYTE_PIECE = re.compile(r"<0x([0-9A-F]{2})>")


class HuggingFaceTokenizer:
    """A `tokenizer.json`; see `Tokenizer` for the interface.

    bos, eos and pad are the tokens that tokenizer_config.json (or special_tokens_map.json) names; without these files
    there are none. Whatever the tokenizer's own post-processing would add around a text is left out.
    """

    kind = "huggingface"

    def __init__(self, path: str | Path):
        import tokenizers

        path = Path(path)
        self.files = [path, *(path.with_name(name) for name in _BESIDE if path.with_name(name).is_file())]
        try:
            content = path.read_text(encoding="utf-8")
            description = json.loads(content) | {"post_processor": None}  # it adds tokens and trims spans
            self._set_up(tokenizers.Tokenizer.from_str(json.dumps(description)), description)
        except Exception as error:  # the library raises bare Exception for whatever is wrong
            raise DataError(
                f"{path} is not a tokenizer.json of Hugging Face ({error})",
                hint="copy the file again, or save it with a newer version of transformers",
            ) from error
        settings = self._read_settings()
        self.chat_template = settings.get("chat_template")
        self.bos_id, self.eos_id, self.pad_id = (
            self._find(settings, name) for name in ("bos_token", "eos_token", "pad_token")
        )
        self._class = settings.get("tokenizer_class")
        self.named_tokens = _named_tokens(settings)
        self.special_texts = [content for content, _ in self._added.values()]
        self._puts_space_first = puts_space_first(self)
        self.fingerprint = fingerprint_of((self.is_special(i), self.id_to_bytes(i)) for i in range(self.vocab_size))

    def _set_up(self, tokenizer, description: dict) -> None:
        tokenizer.no_padding()
        tokenizer.no_truncation()
        self._tokenizer = tokenizer
        self.vocab_size = max(tokenizer.get_vocab(with_added_tokens=True).values()) + 1
        self._added = {i: (token.content, token.special) for i, token in tokenizer.get_added_tokens_decoder().items()}
        unknown = description["model"].get("unk_token")
        self._unknown_id = None if unknown is None else tokenizer.token_to_id(unknown)
        decoders = set(_types(description.get("decoder")))
        self._byte_values = byte_values() if "ByteLevel" in decoders else None
        self._has_byte_pieces = "ByteFallback" in decoders
        self._continuing = description["model"].get("continuing_subword_prefix") if "WordPiece" in decoders else None

    def _read_settings(self) -> dict:
        settings: dict = {}
        for file in reversed(self.files[1:]):  # tokenizer_config.json last: it has the last word
            try:
                content = file.read_text(encoding="utf-8")
                settings |= {"chat_template": content} if file.suffix == ".jinja" else json.loads(content)
            except (OSError, ValueError, RecursionError) as error:
                raise DataError(f"{file} cannot be read: {error}", hint="copy the tokenizer's folder again") from error
        named = settings.get("chat_template")
        if isinstance(named, list):  # an older form: several templates with names
            settings["chat_template"] = next((t["template"] for t in named if t.get("name") == "default"), None)
        return settings

    def _find(self, settings: dict, name: str) -> int | None:
        token = _text_of(settings.get(name))
        if token is None:
            return None
        token_id = self._tokenizer.token_to_id(token)
        if token_id is None:
            raise DataError(
                f"{self.files[1]} names {token!r} as {name}, which {self.files[0]} does not contain",
                hint="the files belong to different tokenizers: copy the folder again",
            )
        return token_id

    def encode(self, text: str, *, special: bool = False, continues: bool = False) -> list[int]:
        if not text:
            return []
        if continues and self._puts_space_first and not (special and self._starts_with_special(text)):
            return encode_continuation(self, text, special=special)
        self._tokenizer.encode_special_tokens = not special
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def encode_with_spans(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        self._tokenizer.encode_special_tokens = False
        encoding = self._tokenizer.encode(text, add_special_tokens=False)
        return encoding.ids, encoding.offsets

    def check_chat(self) -> None:
        if self._class in _AS_WRITTEN:
            return
        import transformers

        folder = self.files[0].parent
        try:
            theirs = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
        except Exception:  # a class of this name may be anything, and not installed
            return
        for text in ("x", *self.special_texts[:4]):
            text = f"{text}a{text}\n\nb 12{text} c"
            own, other = self.encode(text, special=True), theirs(text, add_special_tokens=False)["input_ids"]
            if own != other:
                raise DataError(
                    f"of {text!r} {self.files[0]} makes {own}, and transformers {transformers.__version__} as its "
                    f"{self._class} makes {other}: it does not read tokenizer.json as written",
                    hint="choose: to train on what transformers makes, save its tokenizer into this folder, "
                    "`transformers.AutoTokenizer.from_pretrained(F).save_pretrained(F)`; to have both keep to "
                    'tokenizer.json, write "tokenizer_class": "PreTrainedTokenizerFast" into tokenizer_config.json',
                )

    def _starts_with_special(self, text: str) -> bool:
        return any(text.startswith(content) for content, special in self._added.values() if special)

    def decode(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode([int(i) for i in ids], skip_special_tokens=True)

    def id_to_bytes(self, token_id: int) -> bytes:
        if token_id in self._added:
            return self._added[token_id][0].encode()
        piece = self._tokenizer.id_to_token(token_id)
        if piece is None:
            return b""  # a hole in the numbering
        if self._byte_values is not None:
            return bytes(self._byte_values[character] for character in piece)
        if self._has_byte_pieces and (byte := _BYTE_PIECE.fullmatch(piece)):
            return bytes([int(byte[1], 16)])
        if self._continuing is not None:
            return piece.removeprefix(self._continuing).encode()
        return piece.replace("\u2581", " ").encode()

    def is_special(self, token_id: int) -> bool:
        if token_id in self._added:
            return self._added[token_id][1]
        return token_id == self._unknown_id or self._tokenizer.id_to_token(token_id) is None


def _text_of(token) -> str | None:
    """The text of a token in the settings, where it stands as such or with its properties."""
    return token.get("content") if isinstance(token, dict) else token


def _named_tokens(settings: dict) -> dict[str, str]:
    texts = {name: _text_of(token) for name, token in settings.items() if name.endswith("_token")}
    extra = settings.get("extra_special_tokens")
    texts |= {name: _text_of(token) for name, token in extra.items()} if isinstance(extra, dict) else {}
    return {name: text for name, text in texts.items() if isinstance(text, str)}


def _types(decoder: dict | None) -> Iterator[str]:
    """Names of a decoder and of those inside it."""
    if decoder:
        yield decoder["type"]
        for inner in decoder.get("decoders", []):
            yield from _types(inner)


def byte_values() -> dict[str, int]:
    """The byte that each character of a byte-level vocabulary stands for.

    Printable Latin-1 characters stand for themselves; the other 68 bytes, in order, are written U+0100, U+0101, ...
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [value for value in range(256) if value not in printable]
    return {chr(value): value for value in printable} | {chr(0x100 + n): value for n, value in enumerate(others)}
