import copy

import pytest

from megakd.config import Config

SMALLEST = {
    "run": {"dir": "runs/x"},
    "student": {
        "model": {
            "num_layers": 2,
            "hidden_size": 64,
            "ffn_hidden_size": 96,
            "num_attention_heads": 4,
            "num_query_groups": 2,
            "max_sequence_length": 128,
        }
    },
    "data": {"train": "train", "tokenizer": "tok.model", "sequence_length": 128},
    "train": {"steps": 20, "global_batch_size": 12},
    "optimizer": {"lr": 0.001},
}


@pytest.fixture
def build():
    """Config of the smallest valid YAML with dotted changes: build({"train.steps": 3}); DROP removes a key."""

    def build(changes=None):
        values = copy.deepcopy(SMALLEST)
        for key, value in (changes or {}).items():
            *parents, last = key.split(".")
            section = values
            for parent in parents:
                section = section.setdefault(parent, {})
            if value is DROP:
                del section[last]
            else:
                section[last] = value
        return Config.from_dict(values, where="here.yaml")

    return build


DROP = object()
