"""One small tokenizer for all data tests."""

import pytest

from megakd.data.tokenizers.sentencepiece import train_sentencepiece

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
