"""What a model is to go on from: by hand for every format, and transformers' ids for conversations."""

import pytest
from tokenizers import Tokenizer

from megakd.data.chat_template import BadRecord
from megakd.data.fields import Fields
from megakd.data.formats import SampleFormat, build_formatter
from megakd.data.nemo_chat import ChatTokens
from megakd.data.prompts import build_prompter, prompt_format
from megakd.data.tokenization import encode_sample
from megakd.data.tokenizers.load import load_tokenizer
from megakd.errors import DataError
from tests.data import chat_templates, hf_tokenizers
from tests.data.byte_tokenizer import BOS, START
from tests.data.encoding import turns

CONFIG = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
SYSTEM = {"role": "system", "content": "Be brief,\nplease."}
QUESTION = {"role": "user", "content": "hello  Fuchs"}
ANSWER = {"role": "assistant", "content": "7 Zäune 漢"}
MORE = {"role": "user", "content": "(name)"}


def prompt(record, tokenizer, **choices):
    name = choices.pop("name", None) or prompt_format(record, choices.get("columns", {}), "here")
    return build_prompter(SampleFormat(name, **choices), tokenizer)(record)


@pytest.mark.parametrize(
    ("record", "choices", "expected"),
    [
        ({"text": "ab <|im_start|>\n"}, {}, b"ab <|im_start|>\n"),
        ({"prompt": "Q"}, {}, b"Q"),
        ({"prompt": "Q", "completion": "A"}, {}, b"Q"),
        ({"input": "Q", "output": "A"}, {"template": "Q: {input}\nA:  {output}"}, b"Q: Q\nA:"),
        ({"question": "Q"}, {"columns": {"input": "question"}, "name": "prompt_response"}, b"Q"),
        ({"instruction": "Do", "input": "it"}, {}, b"Do\n\nit"),
        ({"instruction": "Do", "input": "", "output": "done"}, {"template": "{instruction}!{input} {output}"}, b"Do!"),
    ],
)
def test_texts(letters, record, choices, expected):
    assert bytes(prompt(record, letters, **choices).ids) == expected


def test_special_tokens_and_bos(letters):
    choices = {"template": "<|im_start|>{input} {output}", "add_bos": True}
    assert prompt({"prompt": "Q"}, letters, **choices).ids == [BOS, START, ord("Q")]


def test_it_is_the_beginning_of_what_is_learnt(letters):
    """The ids that a model is asked with are those it is trained on, whatever the format."""
    tokens = ChatTokens("<S>", "<T>", "<L>", "|", ":")
    nemo = {"system": "s", "mask": "User", "conversations": turns(("User", "a"), ("Assistant", "b"))}
    records = [({"input": "Q", "output": "A"}, {"add_bos": True}), (nemo, {"chat_tokens": tokens})]
    for record, choices in records:
        made = prompt(record, letters, **choices)
        name = prompt_format(record, {}, "here")
        sample = build_formatter(SampleFormat(name, **choices), letters)(record)
        ids, mask, _ = encode_sample(sample, letters, SampleFormat(name, **choices))
        first = int(mask.argmax())
        assert made.ids == ids[:first].tolist() and not mask[:first].any()
    waiting = {**nemo, "conversations": turns(("User", "a"), ("Assistant", "b"), ("User", "c"))}
    with pytest.raises(BadRecord, match="the last turn is masked"):
        prompt(waiting, letters, chat_tokens=tokens)


@pytest.mark.parametrize("name", ["LLAMA_3", "CHATML", "GEMMA", "THINKING"])
def test_conversations_are_asked_as_by_transformers(name, tmp_path):
    from transformers import PreTrainedTokenizerFast

    template = getattr(chat_templates, name)
    tokenizer = Tokenizer.from_file(str(hf_tokenizers.byte_level(tmp_path) / "tokenizer.json"))
    tokenizer.add_special_tokens([*chat_templates.SPECIAL, "<unk>"])
    folder = hf_tokenizers.save(tokenizer, tmp_path, CONFIG)
    theirs = PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"), **CONFIG)
    ours = load_tokenizer(folder)
    asked = [QUESTION, ANSWER, MORE] if name == "GEMMA" else [SYSTEM, QUESTION, ANSWER, MORE]
    wanted = theirs.apply_chat_template(
        asked, chat_template=template, tokenize=True, add_generation_prompt=True, return_dict=False
    )
    choices = {"name": "messages", "chat_template": template}
    for messages in (asked, [*asked, ANSWER]):
        made = prompt({"messages": messages}, ours, **choices)
        assert made.ids == wanted
        assert made.text == theirs.apply_chat_template(
            asked, chat_template=template, tokenize=False, add_generation_prompt=True
        )
    assert prompt({"prompt": asked, "completion": [ANSWER]}, ours, **choices).ids == wanted
    assert prompt({"prompt": asked}, ours, chat_template=template).ids == wanted
    alone = theirs.apply_chat_template(
        [QUESTION], chat_template=template, tokenize=True, add_generation_prompt=True, return_dict=False
    )
    assert prompt({"prompt": QUESTION["content"]}, ours, **choices).ids == alone
    with pytest.raises(BadRecord, match="nobody asks anything"):
        prompt({"messages": [ANSWER]}, ours, **choices)


def test_ids_as_they_are(letters):
    record = {"prompt_ids": [5, 6], "completion_ids": [7], "prompt": "x", "tokenizer": letters.fingerprint[:12]}
    assert prompt(record, letters).ids == [5, 6]
    for wrong, message in (
        ({"prompt_ids": [5, 260]}, "holds 260"),
        ({"prompt_ids": "5 6"}, "is a str, not a list of ids"),
        ({"prompt_ids": [True]}, "not a list of ids"),
        ({"tokenizer": "0" * 12}, "those of tokenizer"),
        ({"tokenizer": letters.fingerprint[:3]}, "those of tokenizer"),
    ):
        with pytest.raises(BadRecord, match=message):
            prompt(record | wrong, letters)
    sample = build_formatter(SampleFormat("ids"), letters)(record)
    ids, mask, notes = encode_sample(sample, letters, SampleFormat("ids"))
    assert (ids.tolist(), mask.tolist(), notes, sample.notes) == ([5, 6, 7], [False, False, True], [], [])
    whole = SampleFormat("ids", answer_only_loss=False)
    assert encode_sample(build_formatter(whole, letters)(record), letters, whole)[1].all()
    assert Fields(record, {}).unused()


def test_a_format_that_nobody_knows_is_not_taken_for_text(letters):
    for build in (build_formatter, build_prompter):
        with pytest.raises(DataError, match="unknown format 'txt'\nhint: one of text, "):
            build(SampleFormat("txt"), letters)
