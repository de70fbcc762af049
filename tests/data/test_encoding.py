"""Which tokens of a text that is encoded whole are supervised where tokens and answers do not end together."""

import pytest

from megakd.data.chat_template import BadRecord, Segment
from megakd.data.encoding import STRADDLING, encode_whole
from megakd.errors import DataError


class Words:
    """A tokenizer of given spans: id n is the n-th."""

    def __init__(self, *spans):
        self.spans = spans

    def encode_with_spans(self, text):
        return list(range(len(self.spans))), list(self.spans)


YES, NO = True, False
PROMPT = Segment("Q:  ", NO)


@pytest.mark.parametrize(
    ("segments", "spans", "expected", "notes"),
    [
        ([PROMPT, Segment("ab", YES)], [(0, 2), (2, 4), (4, 5), (5, 6)], [NO, NO, YES, YES], []),
        # white space of the template before the answer's first letter: learnt, or no first word ever would be
        ([PROMPT, Segment("ab", YES)], [(0, 2), (2, 3), (3, 6)], [NO, NO, YES], []),
        # more than white space: not learnt, and said
        ([PROMPT, Segment("ab", YES)], [(0, 1), (1, 5), (5, 6)], [NO, NO, YES], [STRADDLING]),
        # white space of the answer alone: not learnt, not said
        ([PROMPT, Segment("\nb", YES)], [(0, 2), (2, 5), (5, 6)], [NO, NO, YES], []),
        # an end that goes on into the template
        ([PROMPT, Segment("ab", YES), Segment("\nQ", NO)], [(0, 4), (4, 5), (5, 7), (7, 8)], [NO, YES, NO, NO],
         [STRADDLING]),
        ([PROMPT, Segment("a\n", YES), Segment("\nQ", NO)], [(0, 4), (4, 5), (5, 7), (7, 8)], [NO, YES, NO, NO], []),
        # bytes of one character, each with its span; a space that the tokenizer has put there, without one
        ([PROMPT, Segment("é", YES), Segment("x", NO)], [(0, 4), (4, 5), (4, 5), (5, 6)], [NO, YES, YES, NO], []),
        ([PROMPT, Segment("a", YES), Segment("x", NO)], [(0, 4), (4, 4), (4, 5), (5, 5), (5, 6)],
         [NO, YES, YES, NO, NO], []),
        # neighbours are one range
        ([Segment("a", YES), Segment("b", YES)], [(0, 2)], [YES], []),
    ],
)  # fmt: skip
def test_tokens_at_the_borders(segments, spans, expected, notes):
    ids, mask, found = encode_whole(segments, Words(*spans))
    assert ids.tolist() == list(range(len(spans))) and mask.tolist() == expected and found == notes


def test_half_a_surrogate_pair_is_refused():
    with pytest.raises(BadRecord, match="half of a surrogate pair"):
        encode_whole([Segment("a\ud83d", YES)], Words((0, 2)))


def test_a_tokenizer_that_changes_texts_is_refused(tmp_path):
    """A SentencePiece model with its default normalization, of a text that it shortens."""
    import sentencepiece

    from megakd.data.tokenizers.load import load_tokenizer
    from tests.data import hf_tokenizers

    (tmp_path / "text").write_text("\n".join(hf_tokenizers.TEXTS))
    sentencepiece.SentencePieceTrainer.train(
        input=str(tmp_path / "text"), model_prefix=str(tmp_path / "t"), vocab_size=300, byte_fallback=True,
        minloglevel=2,
    )  # fmt: skip
    tokenizer = load_tokenizer(tmp_path / "t.model")
    assert encode_whole([Segment("a b", YES)], tokenizer)[1].all()
    with pytest.raises(DataError, match="changes the text 'a  b', so which of its tokens"):
        encode_whole([Segment("a  b", YES)], tokenizer)
