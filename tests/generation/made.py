"""What tests of generation run on ranks: an engine over a converted checkpoint, and a tokenizer that spells ids."""

import pathlib

import torch

from tests.converters.gpt_ranks import groups_of


class Spelling:
    """Every id is written as one character; a stand-in for tests of the engine, whose models have no tokenizer."""

    vocab_size, eos_id, bos_id = 251, None, None
    files = (pathlib.Path("spelling"),)

    def decode(self, ids):
        return "".join(chr(0x4E00 + i) for i in ids)


def load(megatron_path, model, groups, tp: int, pp: int):
    """This rank's part of a checkpoint of tests/converters, as generation builds it."""
    from megakd.assembly.models import build_model
    from megakd.config import Parallel, Train
    from megakd.converters.parity.gate import as_checkpoint

    return build_model(
        model, as_checkpoint(megatron_path, model), Parallel(tp=tp, pp=pp),
        Train(steps=1, global_batch_size=1, precision="fp32"), groups,
        vocab_size=model.vocab_size, padded_size=1024, device=torch.device("cpu"), local=True,
    )  # fmt: skip


def generate(rank, ranks, megatron_path, model, requests, pp=1, engine=None):
    """Args:
        engine: what Engine is given; `choice` as keyword arguments of Choice, `stops` as ids.
    Returns:
        (prompt, completion) -> (ids, log-probabilities, reason), on every rank."""
    with groups_of(ranks // pp, pp) as groups:
        from megakd.generation.engine import Engine, Request
        from megakd.generation.stops import Stops
        from megakd.kernels.next_tokens import Choice

        gpt = load(megatron_path, model, groups, ranks // pp, pp)
        given = {"seed": 7, **(engine or {})}
        choice, stops = Choice(**given.pop("choice", {})), Stops(Spelling(), frozenset(given.pop("stops", ())))
        made = Engine(gpt, groups, torch.device("cpu"), choice, stops, **given)
        done = {}
        for finished in made.run([Request(*request) for request in requests]):
            for sequence in finished:
                place = sequence.request.prompt, sequence.request.completion
                assert place not in done, f"{place} was finished twice"
                done[place] = sequence.ids, sequence.logprobs, sequence.reason
        return done
