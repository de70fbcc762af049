"""SentencePiece: reading its `.model` files, and training one that reproduces every text exactly."""

import io
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from megakd.data.tokenizers.tokenizer import encode_continuation, fingerprint_of, puts_space_first, spans_of_spelling
from megakd.errors import DataError, MegakdError
from megakd.publish import publishing

_SPACE = "\u2581"  # how SentencePiece writes a space inside a piece


class SentencePieceTokenizer:
    """A SentencePiece `.model` file; see `Tokenizer` for the interface.

    With a model trained by megakd (byte fallback, no normalisation, no dummy prefix) decode(encode(text)) == text for
    every text, including newlines, tabs, runs of spaces, control characters and U+2581, which SentencePiece itself
    confuses with a space.
    """

    kind = "sentencepiece"
    chat_template = None

    def __init__(self, path: str | Path):
        import sentencepiece

        path = Path(path)
        self.files = [path]
        self._processor = sentencepiece.SentencePieceProcessor()
        try:
            self._processor.LoadFromSerializedProto(path.read_bytes())
            self.vocab_size = self._processor.vocab_size()
            assert self.vocab_size > 0
        except (OSError, RuntimeError, AssertionError) as error:
            raise DataError(
                f"{path} is not a SentencePiece model ({str(error) or 'it holds no pieces'})",
                hint="copy the .model file again, or train one with `megakd prepare tokenizer`",
            ) from error
        self.bos_id, self.eos_id, self.pad_id = (
            token_id if token_id >= 0 else None
            for token_id in (self._processor.bos_id(), self._processor.eos_id(), self._processor.pad_id())
        )
        self.special_texts = [self._processor.IdToPiece(i) for i in range(self.vocab_size) if self.is_special(i)]
        self._special_ids = {text: self._processor.PieceToId(text) for text in self.special_texts}
        longest_first = sorted(map(re.escape, self.special_texts), key=len, reverse=True)
        self._special_names = re.compile(f"({'|'.join(longest_first) or '(?!)'})")
        named = {"bos_token": self.bos_id, "eos_token": self.eos_id, "pad_token": self.pad_id}
        named["unk_token"] = self._processor.unk_id()
        self.named_tokens = {n: self._processor.IdToPiece(i) for n, i in named.items() if i is not None and i >= 0}
        self._space_mark_ids = None
        self._puts_space_first = puts_space_first(self)
        self._space_mark_ids = self._find_space_mark_ids()
        self.fingerprint = fingerprint_of((self.is_special(i), self.id_to_bytes(i)) for i in range(self.vocab_size))

    def _find_space_mark_ids(self) -> list[int] | None:
        """The byte pieces of U+2581, if texts may be cut around that character without changing their other ids."""
        byte_ids = {self.id_to_bytes(i): i for i in range(self.vocab_size) if self._processor.IsByte(i)}
        if len(byte_ids) < 256 or self._puts_space_first:
            return None
        return [byte_ids[bytes([value])] for value in _SPACE.encode()]

    def encode(self, text: str, *, special: bool = False, continues: bool = False) -> list[int]:
        if not special and not continues:
            return self._encode_plain(text)
        parts = self._parts(text, continues) if special else [(text, self._encode_part(text, continues))]
        return [i for _, ids in parts for i in ids]

    def encode_with_spans(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        ids, spans, place = [], [], 0
        for part, part_ids in self._parts(text, False):
            inside = [(0, len(part))] if part in self._special_ids else spans_of_spelling(self, part_ids, part)
            ids += part_ids
            spans += [(place + start, place + stop) for start, stop in inside]
            place += len(part)
        return ids, spans

    def check_chat(self) -> None:
        pass  # transformers puts no space behind special tokens of such a model either (tested)

    def _parts(self, text: str, continues: bool) -> Iterator[tuple[str, list[int]]]:
        """A text cut at the names of special tokens, with the ids of each part."""
        for number, part in enumerate(self._special_names.split(text)):
            if number % 2:
                yield part, [self._special_ids[part]]
            elif part:
                yield part, self._encode_part(part, continues or number > 0)

    def _encode_part(self, text: str, continues: bool) -> list[int]:
        if text and continues and self._puts_space_first:
            return encode_continuation(self, text)
        return self._encode_plain(text)

    def _encode_plain(self, text: str) -> list[int]:
        if self._space_mark_ids is None or _SPACE not in text:
            return self._processor.EncodeAsIds(text)
        first, *rest = map(self._processor.EncodeAsIds, text.split(_SPACE))
        return first + [i for part in rest for i in [*self._space_mark_ids, *part]]

    def decode(self, ids: Sequence[int]) -> str:
        return self._processor.DecodeIds([int(i) for i in ids])

    def id_to_bytes(self, token_id: int) -> bytes:
        piece = self._processor.IdToPiece(token_id)
        if self._processor.IsByte(token_id):
            return bytes([int(piece[3:5], 16)])  # "<0x0A>"
        return piece.encode() if self.is_special(token_id) else piece.replace(_SPACE, " ").encode()

    def is_special(self, token_id: int) -> bool:
        processor = self._processor
        return processor.IsControl(token_id) or processor.IsUnknown(token_id) or processor.IsUnused(token_id)


def train_sentencepiece(
    texts: Iterable[str], output: str | Path, *, vocab_size: int, model_type: str = "bpe", share: float = 1.0
) -> SentencePieceTokenizer:
    """Train a SentencePiece model that reproduces every text exactly, and write it.

    Bytes 0-255 have a piece each, so nothing is ever unknown; there is no normalisation and no dummy prefix; runs of
    spaces and newlines may become pieces, digits are split. Ids: 0 `<unk>`, 1 `<s>`, 2 `</s>`, 3-258 the bytes; there
    is no pad. One thread, so the same texts in the same order give the same file.

    Args:
        texts: training texts; longer ones are cut at line ends, the whole set is held in memory by the trainer.
        output: the `.model` file to write, by rename.
        vocab_size: exact number of ids.
        model_type: "bpe" or "unigram".
        share: part of the text to train on, in (0, 1], taken evenly from all of it.

    Raises:
        DataError: no text, or `vocab_size` cannot be reached with these texts (the message says what can).
    """
    import sentencepiece

    model, failures = io.BytesIO(), []
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=_sample(_cut_at_lines(_noting_failure(texts, failures)), share),
            model_writer=model,
            vocab_size=vocab_size,
            model_type=model_type,
            byte_fallback=True,
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            split_digits=True,
            max_sentence_length=1 << 20,
            num_threads=1,
            unk_id=0,
            bos_id=1,
            eos_id=2,
            pad_id=-1,
            minloglevel=2,
        )
    except RuntimeError as error:
        raise (failures[0] if failures else _explain(error, vocab_size)) from error
    with publishing(output) as incomplete:
        incomplete.write_bytes(model.getvalue())
    return SentencePieceTokenizer(output)


def _noting_failure(texts: Iterable[str], failures: list[MegakdError]) -> Iterator[str]:
    """The texts; SentencePiece turns what they raise into a RuntimeError, so it is kept in `failures`."""
    try:
        yield from texts
    except MegakdError as error:
        failures.append(error)
        raise


def _sample(blocks: Iterable[str], share: float) -> Iterator[str]:
    """Every (1 / share)-th block, in order."""
    return (block for number, block in enumerate(blocks) if int((number + 1) * share) > int(number * share))


def _cut_at_lines(texts: Iterable[str], target_characters: int = 4096) -> Iterator[str]:
    """Cut texts into blocks of whole lines (ends kept) of about `target_characters`; longer lines are cut anywhere."""
    for text in texts:
        block: list[str] = []
        size = 0
        for line in text.splitlines(keepends=True):
            for start in range(0, len(line), target_characters):
                part = line[start : start + target_characters]
                if size + len(part) > target_characters and block:
                    yield "".join(block)
                    block, size = [], 0
                block.append(part)
                size += len(part)
        if block:
            yield "".join(block)


def _explain(error: RuntimeError, vocab_size: int) -> DataError:
    """SentencePiece's message about an impossible vocabulary size as one that says what to change."""
    message = str(error)
    if too_high := re.search(r"<= (\d+)\.", message):
        return DataError(
            f"a vocabulary of {vocab_size} is too large: these texts give at most {too_high[1]} pieces",
            hint=f"--vocab-size {too_high[1]} or less, or more text",
        )
    if too_small := re.search(r"smaller than required_chars. \d+ vs (\d+)", message):
        return DataError(
            f"a vocabulary of {vocab_size} is too small: 256 bytes, 3 special ids and the characters of these texts "
            f"need {too_small[1]}",
            hint=f"--vocab-size {too_small[1]} or more",
        )
    if "sentences_.empty()" in message or "Input corpus" in message:
        return DataError("there is no text to train a tokenizer on", hint="check --input and --suffix")
    return DataError(f"SentencePiece could not train a vocabulary of {vocab_size}: {message}")
