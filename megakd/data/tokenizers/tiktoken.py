"""tiktoken files: lines `BASE64 RANK`, and the pattern and special tokens that such a file does not hold.

OpenAI's own files are known by name (cl100k_base, o200k_base, p50k_base, r50k_base). Any other FILE needs FILE.json
beside it: {"pattern": REGEX, "special_tokens": {NAME: ID, ...}, "bos": NAME?, "eos": NAME?, "pad": NAME?}.
"""

import base64
import json
from collections.abc import Sequence
from pathlib import Path

from megakd.data.tokenizers.huggingface import byte_values
from megakd.data.tokenizers.tokenizer import fingerprint_of
from megakd.errors import DataError

_GPT2 = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""
_CL100K = (
    r"""'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s+\z|\s*[\r\n]"""
    r"""|\s+(?!\S)|\s"""
)
_CASED = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]%s[\p{Ll}\p{Lm}\p{Lo}\p{M}]%s(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
_O200K = (
    f"{_CASED % ('*', '+')}|{_CASED % ('+', '*')}"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_END = "<|endoftext|>"
_FILL = {"<|fim_prefix|>": 100258, "<|fim_middle|>": 100259, "<|fim_suffix|>": 100260, "<|endofprompt|>": 100276}
_KNOWN = {
    "r50k_base": {"pattern": _GPT2, "special_tokens": {_END: 50256}, "eos": _END},
    "p50k_base": {"pattern": _GPT2, "special_tokens": {_END: 50256}, "eos": _END},
    "cl100k_base": {"pattern": _CL100K, "special_tokens": {_END: 100257, **_FILL}, "eos": _END},
    "o200k_base": {"pattern": _O200K, "special_tokens": {_END: 199999, "<|endofprompt|>": 200018}, "eos": _END},
}


class TiktokenTokenizer:
    """A tiktoken file; see `Tokenizer` for the interface. The tokenizers library does the work.

    tiktoken merges, in every piece that the pattern cuts out, the two neighbours whose union has the lowest rank; a
    piece that is a token already stays whole. The same result comes from byte-pair merges listed by the rank of their
    union.
    """

    kind = "tiktoken"
    chat_template = None

    def __init__(self, path: str | Path):
        path = Path(path)
        beside = path.with_name(path.name + ".json")
        self.files = [path, *([beside] if beside.is_file() else [])]
        settings = _load_settings(path, beside)
        try:
            lines = [line.split() for line in path.read_bytes().splitlines() if line]
            ranks = {base64.b64decode(token, validate=True): int(rank) for token, rank in lines}
            self._special = {name: int(number) for name, number in settings.get("special_tokens", {}).items()}
            self._tokenizer = _build(ranks, settings["pattern"], self._special)
        except Exception as error:  # the tokenizers library raises bare Exception for a bad pattern
            raise DataError(f"{path} is not a tiktoken file ({error})", hint="copy the file again") from error
        self._bytes = {rank: token for token, rank in ranks.items()}
        self._special_names = {number: name for name, number in self._special.items()}
        self.vocab_size = max([*self._bytes, *self._special_names]) + 1
        self.bos_id, self.eos_id, self.pad_id = (self._find(settings.get(name)) for name in ("bos", "eos", "pad"))
        names = {"bos_token": settings.get("bos"), "eos_token": settings.get("eos"), "pad_token": settings.get("pad")}
        self.named_tokens = {name: text for name, text in names.items() if text is not None}
        self.special_texts = list(self._special)
        self.fingerprint = fingerprint_of((self.is_special(i), self.id_to_bytes(i)) for i in range(self.vocab_size))

    def _find(self, name: str | None) -> int | None:
        if name is not None and name not in self._special:
            raise DataError(f"{self.files[-1]}: {name!r} is not one of its special_tokens {sorted(self._special)}")
        return None if name is None else self._special[name]

    def encode(self, text: str, *, special: bool = False, continues: bool = False) -> list[int]:
        self._tokenizer.encode_special_tokens = not special
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def encode_with_spans(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        self._tokenizer.encode_special_tokens = False
        encoding = self._tokenizer.encode(text, add_special_tokens=False)
        return encoding.ids, encoding.offsets

    def check_chat(self) -> None:
        pass  # transformers reads no such file

    def decode(self, ids: Sequence[int]) -> str:
        return b"".join(self._bytes.get(int(i), b"") for i in ids).decode("utf-8", errors="replace")

    def id_to_bytes(self, token_id: int) -> bytes:
        return self._bytes.get(token_id, self._special_names.get(token_id, "").encode())

    def is_special(self, token_id: int) -> bool:
        return token_id not in self._bytes


def _load_settings(path: Path, beside: Path) -> dict:
    if not beside.is_file():
        if path.stem in _KNOWN:
            return _KNOWN[path.stem]
        raise DataError(
            f"{path} is a tiktoken file of unknown pattern and special tokens",
            hint=f'write {beside.name} beside it: {{"pattern": REGEX, "special_tokens": {{NAME: ID}}, "eos": NAME}}',
        )
    try:
        settings = json.loads(beside.read_text(encoding="utf-8"))
        if not isinstance(settings, dict) or "pattern" not in settings:
            raise ValueError('no key "pattern"')
        return settings
    except (OSError, ValueError) as error:
        raise DataError(f"{beside} cannot be read: {error}", hint="see megakd/data/tokenizers/tiktoken.py") from error


def _build(ranks: dict[bytes, int], pattern: str, special: dict[str, int]):
    """The same tokenizer for the tokenizers library, whose vocabularies write each byte as one character."""
    from tokenizers import AddedToken, Regex, Tokenizer, models, pre_tokenizers

    characters = {value: character for character, value in byte_values().items()}
    written = {token: "".join(characters[value] for value in token) for token in ranks}
    merges = []
    for token in sorted(ranks, key=ranks.get):
        halves = ((token[:cut], token[cut:]) for cut in range(1, len(token)))
        known = [(ranks[left], ranks[right], left, right) for left, right in halves if left in ranks and right in ranks]
        merges += [(written[left], written[right]) for _, _, left, right in sorted(known)]
    vocabulary = {written[token]: rank for token, rank in ranks.items()}
    vocabulary |= special
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, ignore_merges=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in special])
    return tokenizer
