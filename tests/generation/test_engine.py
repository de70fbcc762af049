"""Generation against transformers' generate, token for token, at every layout, batched and not."""

import pytest
import torch

from megakd.checkpoints import folder
from megakd.converters.huggingface.importing import import_hf, open_hf
from tests.converters import hf_models
from tests.generation.made import generate
from tests.ranks import run_ranks

CASES = (
    "llama31", "gpt2", "gemma2", "gemma3", "qwen3_moe", "deepseek_v2_lite", "deepseek_v3", "mistral_window", "smollm3",
    "olmo2", "falcon_one_norm", "granite",
)  # fmt: skip
LENGTHS = (11, 3, 17, 1, 5)  # of prompts; windows of the cases are 8 tokens
NEW = 29


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    """case -> (Hugging Face folder, torch_dist folder, model section); each made once."""
    made = {}

    def make(case: str):
        if case not in made:
            root = tmp_path_factory.mktemp(case)
            opened = open_hf(hf_models.build(case, root / "hf"))
            target = folder.begin(root / "megatron")
            import_hf(opened, target)
            made[case] = root / "hf", target, opened.model
        return made[case]

    return make


def prompts():
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(251, (length,), generator=generator).tolist() for length in LENGTHS]


def by_transformers(path, asked) -> list[tuple[list[int], torch.Tensor]]:
    """Greedy ids and their log-probabilities, each prompt alone."""
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="eager")
    model.generation_config.eos_token_id = None
    found = []
    for ids in asked:
        given = torch.tensor([ids])
        out = model.generate(
            given, attention_mask=torch.ones_like(given), do_sample=False, max_new_tokens=NEW, pad_token_id=0,
            return_dict_in_generate=True, output_logits=True,
        )  # fmt: skip
        new = out.sequences[0, len(ids) :]
        logprobs = torch.cat(out.logits).log_softmax(1).gather(1, new[:, None])[:, 0]
        found.append((new.tolist(), logprobs))
    return found


def check(done, wanted):
    assert sorted(done) == [(i, 0) for i in range(len(wanted))]
    for i, (ids, logprobs) in enumerate(wanted):
        assert done[i, 0][0] == ids, f"prompt {i}"
        torch.testing.assert_close(torch.tensor(done[i, 0][1]), logprobs, atol=2e-4, rtol=0)
        assert done[i, 0][2] == "length"


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_greedy_is_transformers(case, converted):
    source, target, model = converted(case)
    asked = prompts()
    requests = [(i, 0, tuple(ids)) for i, ids in enumerate(asked)]
    wanted = by_transformers(source, asked)
    assert len({tuple(ids) for ids, _ in wanted}) > 1, "every prompt has the same completion"
    for slots in (1, 3):  # alone; and with others that join and leave, of other lengths
        (done,) = run_ranks(1, generate, target, model, requests, 1, {"max_new_tokens": NEW, "slots": slots})
        check(done, wanted)
    for done in run_ranks(2, generate, target, model, requests, 1, {"max_new_tokens": NEW, "slots": 3}):
        check(done, wanted)


@pytest.mark.parametrize("case", ["llama31", "gpt2", "gemma2", "qwen3_moe", "deepseek_v3"])
def test_greedy_over_pipeline_stages(case, converted):
    source, target, model = converted(case)
    asked = prompts()
    wanted = by_transformers(source, asked)
    requests = [(i, 0, tuple(ids)) for i, ids in enumerate(asked)]
    for done in run_ranks(2, generate, target, model, requests, 2, {"max_new_tokens": NEW, "slots": 4}):
        check(done, wanted)


def test_first_tokens_follow_the_softmax(converted):
    """3,001 completions of one prompt, read once: chi-square over the likely ids and one bin of the others."""
    source, target, model = converted("llama31")
    ids, draws, temperature = prompts()[0], 3001, 1.5
    engine = {"max_new_tokens": 1, "slots": 700, "choice": {"temperature": temperature}}
    (done,) = run_ranks(1, generate, target, model, [(0, i, tuple(ids)) for i in range(draws)], 1, engine)
    counts = torch.bincount(torch.tensor([new[0] for new, _, _ in done.values()]), minlength=251).double()
    logits = hf_models.logits(source, torch.tensor([ids]))[0, -1].double()
    expected = (logits / temperature).softmax(0) * draws
    likely = expected >= 5
    found = torch.cat([counts[likely], counts[~likely].sum()[None]])
    wanted = torch.cat([expected[likely], expected[~likely].sum()[None]])
    freedom = len(wanted) - 1
    statistic = float(((found - wanted).square() / wanted).sum())
    bound = freedom * (1 - 2 / (9 * freedom) + 3.719 * (2 / (9 * freedom)) ** 0.5) ** 3  # 99.99 %, Wilson and Hilferty
    assert freedom > 5 and statistic < bound, (statistic, bound, freedom)


def test_draws_do_not_depend_on_what_is_beside_them(converted):
    """Every completion is the same in any order, batch and layout, and whether its prompt is read alone or once for
    several."""
    _, target, model = converted("llama31")
    asked, engine = prompts(), {"max_new_tokens": 13, "choice": {"temperature": 0.9, "top_p": 0.9}}
    requests = [(i, c, tuple(ids)) for i, ids in enumerate(asked) for c in range(3)]
    (alone,) = run_ranks(1, generate, target, model, requests, 1, {**engine, "slots": 1})
    assert len({tuple(ids) for ids, _, _ in alone.values()}) == len(requests)
    for ranks, pp, slots, order in ((1, 1, 4, requests), (1, 1, 15, requests[::-1]), (2, 1, 5, requests),
                                    (2, 2, 6, requests[::-1])):  # fmt: skip
        for done in run_ranks(ranks, generate, target, model, order, pp, {**engine, "slots": slots}):
            assert {k: v[0] for k, v in done.items()} == {k: v[0] for k, v in alone.items()}


def test_a_stop_token_ends_and_its_slot_is_used_again(converted):
    _, target, model = converted("llama31")
    requests = [(i, 0, tuple(ids)) for i, ids in enumerate(prompts())]
    (whole,) = run_ranks(1, generate, target, model, requests, 1, {"max_new_tokens": NEW, "slots": 2})
    stop = whole[0, 0][0][6]
    (done,) = run_ranks(1, generate, target, model, requests, 1, {"max_new_tokens": NEW, "slots": 2, "stops": [stop]})
    for place, (ids, _, _) in whole.items():
        end = ids.index(stop) + 1 if stop in ids else NEW
        assert done[place][0] == ids[:end] and done[place][2] == ("stop" if stop in ids else "length")
