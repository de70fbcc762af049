"""Two small tokenizers for all data tests."""

import pytest

from megakd.data.tokenizers.sentencepiece import train_sentencepiece
from tests.data.byte_tokenizer import byte_tokenizer

CODE = '''def greet(name):
    """Say hello."""
\tprint(f"hello, {name}!",   end="\\n\\n")

class Counter:
    def __init__(self, start=0):
        self.count = start
'''


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory):
    """A SentencePiece BPE model of 300 ids."""
    path = tmp_path_factory.mktemp("tokenizer") / "code.model"
    return train_sentencepiece([CODE] * 20, path, vocab_size=300)


@pytest.fixture(scope="session")
def letters(tmp_path_factory):
    """A tokenizer whose ids are bytes."""
    return byte_tokenizer(tmp_path_factory.mktemp("bytes"))
