"""Counts of parameters against models that are built."""

import pytest

from megakd.config import Parallel, Pipeline
from megakd.planning.parameters import active_parameters, padded_vocab, rank_parameters, whole_parameters
from tests.planning.models import KINDS, section
from tests.ranks import run_ranks
from tests.training import small

UNEVEN = Pipeline(first_stage_layers=1)
LAYOUTS = {
    1: [({}, Pipeline())],
    2: [
        ({"tp": 2, "sp": True}, Pipeline()),
        ({"pp": 2}, Pipeline()),
        ({"pp": 2}, UNEVEN),
        ({"pp": 2, "vpp": 2}, Pipeline()),
        ({"ep": 2}, Pipeline()),
    ],
    4: [({"tp": 2, "pp": 2, "sp": True}, Pipeline()), ({"tp": 2, "ep": 2, "sp": True}, Pipeline())],
}


def built(rank, ranks, parallel, pipeline):
    """kind -> (parameters of this rank, those of its divided experts), of models without weights."""
    import torch

    train = small.config().train
    with small.layout(parallel.tp, parallel.pp, ep=parallel.ep) as groups:
        from megakd.models.gpt import build_gpt, padded_vocab_size

        counts = {}
        for kind in KINDS:
            model = section(kind)
            sizes = {"vocab_size": model.vocab_size, "padded_size": padded_vocab_size(model.vocab_size)}
            gpt = build_gpt(
                model, parallel, train, groups, **sizes, device=torch.device("cpu"), seed=None, pipeline=pipeline
            )
            parameters = [parameter for chunk in gpt.chunks for parameter in chunk.parameters()]
            divided = sum(p.numel() for p in parameters if not getattr(p, "allreduce", True))
            counts[kind] = (sum(p.numel() for p in parameters), divided)
        return groups.pp.rank(), counts


@pytest.mark.parametrize(
    ("ranks", "axes", "pipeline"), [(n, axes, pipeline) for n, several in LAYOUTS.items() for axes, pipeline in several]
)
def test_what_a_rank_has_is_counted_exactly(ranks, axes, pipeline):
    parallel = Parallel(**axes)
    for stage, counts in run_ranks(ranks, built, parallel, pipeline):
        for kind, (total, divided) in counts.items():
            model = section(kind)
            said = rank_parameters(model, parallel, padded_vocab(model.vocab_size), stage, pipeline)
            assert (said.total, said.experts) == (total, divided if parallel.ep > 1 else 0), (kind, stage)


def test_a_whole_model_has_its_real_vocabulary_and_a_tied_head_once():
    model = section("llama")
    padding = (padded_vocab(1500) - 1500) * model.hidden_size
    with_padding = rank_parameters(model, Parallel(), padded_vocab(1500), 0, Pipeline()).total
    assert whole_parameters(model) == with_padding - 2 * padding
    tied = section("llama", tie_embeddings=True)
    assert whole_parameters(tied) == whole_parameters(model) - 1500 * 48


def test_a_token_passes_the_chosen_experts_alone():
    model = section("mixtral")
    one = 3 * 24 * 48
    assert active_parameters(model) == whole_parameters(model) - 4 * 4 * one
    assert active_parameters(section("llama")) == whole_parameters(section("llama"))


def test_published_sizes():
    """As their model cards and config.json files say."""
    from megakd.config import Model

    llama = {"tie_embeddings": False, "max_sequence_length": 8192, "vocab_size": 128256, "num_query_groups": 8}
    large = Model(num_layers=80, hidden_size=8192, ffn_hidden_size=28672, num_attention_heads=64, **llama)
    little = Model(num_layers=32, hidden_size=4096, ffn_hidden_size=14336, num_attention_heads=32, **llama)
    assert (whole_parameters(large), whole_parameters(little)) == (70_553_706_496, 8_030_261_248)
