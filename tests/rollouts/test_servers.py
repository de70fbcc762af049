"""Several servers asked at once, over real sockets: retries, the dead, the hanging, and answers that are none."""

import threading
import time

import pytest

from megakd.config import Config, Rollouts
from megakd.errors import ConfigError, TrainingError
from megakd.generation.engine import Request, sequence_seed
from megakd.generation.stops import Stops
from megakd.rollouts.completions import Completions
from megakd.rollouts.server_writer import filled
from megakd.rollouts.servers import Servers
from tests.generation.made import Spelling
from tests.rollouts.endpoint import Endpoint, choice

EOS = 2
REQUESTS = [Request(number, 0, (7, 8, number)) for number in range(12)]


def completions() -> Completions:
    server = {"urls": ["http://unused"], "reload": [{"path": "/reload"}], "timeout_seconds": 5.0}
    section = Rollouts(prompts="p", engine="server", server=server, max_new_tokens=4)
    return Completions(section, Stops(Spelling(), frozenset({EOS}), ("END",)), 50, 3, "student")


def ask_all(*endpoints, dead_seconds=1.0, requests=REQUESTS, seconds=20, renew=lambda url: None):
    ask = completions().ask
    with Servers([e.url for e in endpoints], ask, renew, threads=3, dead_seconds=dead_seconds) as servers:
        servers.begin(requests)
        assert servers.wait(seconds)
        return [servers.done[request] for request in requests]


def echo(body):
    return 200, {"choices": [choice(body, [*body["prompt"][2:], EOS], reason="stop")]}


def test_ids_go_in_and_ids_come_out():
    with Endpoint(echo) as one, Endpoint(echo) as other:
        found = ask_all(one, other)
    assert [s.ids for s in found] == [[number, EOS] for number in range(12)]
    assert {s.reason for s in found} == {"stop"} and {s.stop for s in found} == {EOS} and found[0].logprobs == [-1, -1]
    asked = one.asked + other.asked
    assert sorted(body["prompt"] for body in asked) == sorted(list(request.ids) for request in REQUESTS)
    assert one.asked and other.asked, "they share the prompts"
    body = next(body for body in asked if body["prompt"] == [7, 8, 5])
    assert body["seed"] == sequence_seed(3, REQUESTS[5]) >> 33 and body["stop_token_ids"] == [EOS]
    assert (body["max_tokens"], body["stop"], body["return_token_ids"], body["top_k"]) == (4, ["END"], True, -1)


def test_a_server_with_troubles_of_its_own_is_asked_again():
    turns = []

    def sometimes(body):
        turns.append(body)
        return (503, {"error": "starting"}) if len(turns) % 2 else echo(body)

    with Endpoint(sometimes) as endpoint:
        found = ask_all(endpoint, dead_seconds=10)
    assert len(found) == 12 and len(turns) > 12


@pytest.mark.parametrize("kind", ["closed", "hanging", "failing"])
def test_a_dead_server_is_named_and_its_prompts_go_to_the_others(kind, caplog):
    dead = Endpoint(lambda body: (500, {"error": "out of memory"}), hang=kind == "hanging")
    if kind == "closed":
        dead.__exit__()
    with Endpoint(echo) as alive:
        found = ask_all(dead, alive)
        assert [s.ids[0] for s in found] == list(range(12))
        began = time.monotonic()
        with pytest.raises(TrainingError) as refused:
            ask_all(dead, requests=REQUESTS[:2])
    assert time.monotonic() - began < 5, "within about dead_seconds"
    assert dead.url in str(refused.value) and f"{dead.url} is dead" in caplog.text
    wanted = {"closed": "refused", "hanging": "timed out", "failing": "answered 500"}
    assert wanted[kind] in str(refused.value).lower()
    if kind != "closed":
        dead.__exit__()


def test_what_a_server_was_asked_when_it_died_is_answered_by_another():
    release = threading.Event()

    def never(body):
        release.wait(20)
        return echo(body)

    with Endpoint(never) as stuck, Endpoint(echo) as alive:
        get = stuck.get
        stuck.get = lambda path: (503, {}) if path == "/health" else get(path)  # its engine is gone
        found = ask_all(stuck, alive)
        release.set()
    assert [s.ids[0] for s in found] == list(range(12)) and stuck.asked


@pytest.mark.parametrize("how", ["reset", "half an error"])
def test_a_server_that_broke_off_is_given_the_weights_again_before_it_is_asked(how):
    turns, renewed = [], []

    def breaks_once(body):
        turns.append(bool(renewed))
        return ("break", how) if len(turns) == 1 else echo(body)

    with Endpoint(breaks_once) as endpoint:
        found = ask_all(endpoint, requests=REQUESTS[:1], dead_seconds=5, renew=renewed.append)
        assert renewed == ([endpoint.url] if how == "reset" else []) and turns == [False, how == "reset"]
    assert found[0].ids == [0, EOS]


def test_logprobs_that_are_not_all_known_are_left_out_and_halves_of_characters_too():
    def answer(body):
        return 200, {"choices": [choice(body, [4, 5], [None, -0.5]) | {"text": "a\ud83d"}]}

    with Endpoint(answer) as endpoint:
        (found,) = ask_all(endpoint, requests=REQUESTS[:1])
    assert found.logprobs == [] and found.text == "a?"


WRONG = {
    "no ids": (lambda c: c.pop("token_ids"), "returns no token_ids and prompt_token_ids"),
    "no prompt": (lambda c: c.pop("prompt_token_ids"), "returns no token_ids and prompt_token_ids"),
    "other prompt": (lambda c: c.update(prompt_token_ids=[1, 7, 8, 0]), "it read the ids [1, 7, 8, 0]... of a prompt"),
    "too many": (lambda c: c.update(token_ids=[4] * 6), "6 ids between 4 and 4"),
    "no id": (lambda c: c.update(token_ids=[4, 50]), "2 ids between 4 and 50"),
    "aborted": (lambda c: c.update(finish_reason="abort"), "it ended by 'abort'"),
    "nothing": (lambda c: c.clear(), "answered something that is no completion"),
}


@pytest.mark.parametrize("case", WRONG)
def test_an_answer_that_is_none_ends_the_run_by_name(case):
    change, said = WRONG[case]

    def wrong(body):
        made = choice(body, [4, 5])
        change(made)
        return 200, {"choices": [made]}

    with Endpoint(wrong) as endpoint, pytest.raises(TrainingError) as refused:
        ask_all(endpoint, requests=REQUESTS[:1])
    assert said in str(refused.value) and endpoint.url in str(refused.value)


def test_of_an_answer_no_more_is_read_than_the_limit(monkeypatch):
    monkeypatch.setenv("MEGAKD_LIMIT_ANSWER_BYTES", "1000")
    with Endpoint(lambda body: (200, ["x" * 1000])) as endpoint, pytest.raises(TrainingError) as refused:
        ask_all(endpoint, requests=REQUESTS[:1])
    assert "1,001 bytes of an answer of a server exceed the limit ANSWER_BYTES = 1,000" in str(refused.value)

    monkeypatch.delenv("MEGAKD_LIMIT_ANSWER_BYTES")
    deep = b"[" * 100_000 + b"]" * 100_000
    with Endpoint(lambda body: (200, deep)) as endpoint, pytest.raises(TrainingError, match="JSON of too many levels"):
        ask_all(endpoint, requests=REQUESTS[:1])


def test_a_refusal_ends_the_run_by_name_and_an_eos_that_was_cut_off_is_put_back():
    with Endpoint(lambda body: (400, {"error": "prompt too long"})) as endpoint, pytest.raises(TrainingError) as no:
        ask_all(endpoint)
    assert "answered 400" in str(no.value) and "prompt too long" in str(no.value)

    def cut(body):
        return 200, {"choices": [choice(body, [4, 5, 6, 9], reason="stop", stop_reason=EOS)]}

    with Endpoint(cut) as endpoint:
        assert ask_all(endpoint, requests=REQUESTS[:1])[0].ids == [4, 5, 6, 9, EOS]


def test_the_folder_stands_where_a_reload_names_it():
    call = {"model_path": "{folder}", "options": ["{folder}/x", 3, None]}
    assert filled(call, "/w/step_1") == {"model_path": "/w/step_1", "options": ["/w/step_1/x", 3, None]}


SERVER = {"urls": ["http://node7:8000"], "reload": [{"path": "/reload", "json": {"model_path": "{folder}"}}]}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"urls": ["node7:8000"]}, "rollouts.server.urls: node7:8000; expected an address such as http://node7:8000"),
        ({"urls": ["http://node7:8000/v1"]}, "rollouts.server.urls: http://node7:8000/v1; expected an address"),
        ({"urls": []}, "rollouts.server.urls: []; expected at least one address"),
        ({"reload": []}, "rollouts.server.reload: []; a server that is never given the student's weights"),
        ({"reload": [{"json": {}}]}, "rollouts.server.reload: {'json': {}}; expected {path: /PATH, json: ANYTHING}"),
    ],
)
def test_settings_that_cannot_be_meant_are_refused(changes, said):
    from tests.training.small import config

    with pytest.raises(ConfigError) as refused:
        config(rollouts__prompts="p", rollouts__engine="server", rollouts__server=SERVER | changes,
               loss__ce_weight=0.0, rollouts__max_new_tokens=4)  # fmt: skip
    assert said in str(refused.value)
    with pytest.raises(ConfigError, match=r"rollouts\.server: given with engine megakd"):
        config(rollouts__prompts="p", rollouts__server=SERVER)
    with pytest.raises(ConfigError, match=r"rollouts\.server: missing with engine server"):
        config(rollouts__prompts="p", rollouts__engine="server")
    assert isinstance(config(rollouts__prompts="p", rollouts__max_new_tokens=4, rollouts__engine="server",
                             rollouts__server=SERVER, loss__ce_weight=0.0), Config)  # fmt: skip
