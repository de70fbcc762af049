"""Conversations as transformers' `apply_chat_template` tokenizes them, and what of them is learnt, kind by kind."""

import json
import re

import pytest
from tokenizers import Tokenizer, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from megakd.data.chat_template import REWRITTEN, BadRecord
from megakd.data.formats import SampleFormat, check_format
from megakd.data.tokenizers.load import load_tokenizer
from megakd.errors import DataError
from tests.data import chat_templates, hf_tokenizers
from tests.data.encoding import encode_with_notes

SYSTEM = {"role": "system", "content": "Be brief,\nplease."}
TURNS = [
    {"role": "user", "content": "hello  Fuchs"},
    {"role": "assistant", "content": "7 Zäune 漢"},
    {"role": "user", "content": "(name)"},
    {"role": "assistant", "content": "return name"},
]
CONFIG = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}


def byte_level(folder):
    return hf_tokenizers.byte_level(folder)


def prepend(folder):
    return hf_tokenizers.metaspace(folder)


def metaspace_first(folder):
    """As transformers saves Llama 2 and Mistral today: a space before the first text only."""
    description = json.loads((hf_tokenizers.metaspace(folder) / "tokenizer.json").read_text())
    description["normalizer"] = None
    tokenizer = Tokenizer.from_str(json.dumps(description))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    return hf_tokenizers.save(tokenizer, folder, {})


def lower_case(folder):
    """Normalization that changes texts."""
    return hf_tokenizers.word_piece(folder)


@pytest.fixture(scope="module", params=[byte_level, prepend, metaspace_first, lower_case])
def folder(request, tmp_path_factory):
    """A tokenizer with the special tokens of all templates."""
    made = request.param(tmp_path_factory.mktemp("chat") / request.param.__name__)
    tokenizer = Tokenizer.from_file(str(made / "tokenizer.json"))
    tokenizer.add_special_tokens(chat_templates.SPECIAL)
    unknown = "[UNK]" if request.param is lower_case else "<unk>"
    if tokenizer.token_to_id(unknown) is None:
        tokenizer.add_special_tokens([unknown])
    return hf_tokenizers.save(tokenizer, made, CONFIG | {"unk_token": unknown})


def theirs(folder, messages, template, **more):
    """What transformers makes of a conversation."""
    config = json.loads((folder / "tokenizer_config.json").read_text())
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"), **config)
    return tokenizer.apply_chat_template(messages, chat_template=template, tokenize=True, return_dict=False, **more)


def conversation(name):
    return [*([] if name in ("MISTRAL", "GEMMA") else [SYSTEM]), *TURNS]


def supervised(ids, mask, tokenizer):
    return b"".join(tokenizer.id_to_bytes(i) for i, learnt in zip(ids, mask, strict=True) if learnt).decode()


@pytest.mark.parametrize("name", list(chat_templates.ENDINGS))
def test_ids_are_those_of_transformers_and_only_answers_with_their_end_are_learnt(folder, name):
    template, messages, tokenizer = getattr(chat_templates, name), conversation(name), load_tokenizer(folder)
    ids, mask, notes = encode_with_notes({"messages": messages}, tokenizer, chat_template=template)
    assert ids == theirs(folder, messages, template)
    learnt = [t["content"] for t in messages if t["role"] == "assistant"]
    if name == "THINKING":
        learnt = [f"<think>\n\n</think>\n\n{learnt[-1]}"]
        assert notes == [REWRITTEN]
    else:
        assert notes == []
    assert letters_of(supervised(ids, mask, tokenizer), folder) == letters_of(
        "".join(text + chat_templates.ENDINGS[name] for text in learnt), folder
    )


def letters_of(text, folder):
    """A text without its white space; of the tokenizer that keeps neither case nor accents, what it keeps."""
    if "lower_case" in folder.name:
        text = re.sub(r"[^a-z0-9_|]|unk", "", text.lower().replace("ä", "a"))
    return "".join(text.split())


def test_thoughts_are_learnt_where_the_model_would_write_them(folder):
    """The last answer with its thoughts; an earlier one, which stands without them then, is context and named."""
    tokenizer, template = load_tokenizer(folder), chat_templates.THINKING
    messages = [TURNS[0], {**TURNS[1], "content": "<think>\nname\n</think>\n\nhello"}, TURNS[2],
                {**TURNS[3], "reasoning_content": "def"}]  # fmt: skip
    ids, mask, notes = encode_with_notes({"messages": messages}, tokenizer, chat_template=template)
    assert ids == theirs(folder, messages, template)
    answer = "<think>\ndef\n</think>\n\nreturn name<|im_end|>"
    assert letters_of(supervised(ids, mask, tokenizer), folder) == letters_of(answer, folder)
    assert REWRITTEN in notes
    with pytest.raises(BadRecord, match="writes differently once more"):
        encode_with_notes({"messages": messages}, tokenizer, chat_template=template, strict=True)


def test_arguments_of_the_template(folder):
    """With enable_thinking=false the empty thoughts are part of what is asked; a record's own arguments come first."""
    tokenizer, template, messages = load_tokenizer(folder), chat_templates.THINKING, TURNS[:2]
    spelled = []
    for own in ({}, {"chat_template_kwargs": {"enable_thinking": True}}):
        ids, mask, _ = encode_with_notes({"messages": messages, **own}, tokenizer, chat_template=template,
                                         chat_template_kwargs={"enable_thinking": False})  # fmt: skip
        assert ids == theirs(folder, messages, template, enable_thinking=False)
        spelled.append("think" in supervised(ids, mask, tokenizer))
    assert spelled == [False, True]
    with pytest.raises(DataError, match=r"does not use enable_thinkng of data\.chat_template_kwargs"):
        check_format(
            SampleFormat("messages", chat_template=template, chat_template_kwargs={"enable_thinkng": False}), tokenizer
        )


def test_tools_and_how_they_are_written(folder):
    """The arguments of `tojson` are those that transformers knows."""
    tools = [{"type": "function", "function": {"name": "greet", "parameters": {"é": "a"}}}]
    for how in ("indent=2", "separators=(',', ':')", "sort_keys=true, ensure_ascii=true"):
        template = chat_templates.LLAMA_3.replace("indent=4", how)
        ids, _, _ = encode_with_notes(
            {"messages": TURNS, "tools": json.dumps(tools)}, load_tokenizer(folder), chat_template=template
        )
        assert ids == theirs(folder, TURNS, template, tools=tools)


def test_named_tokens_reach_the_template(folder):
    template = "{% for m in messages %}{{ unk_token + m.content + eos_token }}{% endfor %}"
    ids, _, _ = encode_with_notes({"messages": TURNS}, load_tokenizer(folder), chat_template=template)
    assert ids == theirs(folder, TURNS, template)


def test_a_header_that_cannot_be_told_is_refused(folder):
    with pytest.raises(BadRecord, match="nothing tells it from the turn's end"):
        encode_with_notes({"messages": TURNS}, load_tokenizer(folder),
                          chat_template=chat_templates.ALWAYS_ASKS_AND_REFUSES)  # fmt: skip


def test_a_class_that_does_not_keep_to_tokenizer_json_is_refused(tmp_path):
    """transformers 5 reads `LlamaTokenizer` its own way; the hint's ways out both lead to equal ids."""
    prepend(tmp_path / "t")
    (tmp_path / "t" / "tokenizer_config.json").write_text(json.dumps(CONFIG | {"tokenizer_class": "LlamaTokenizer"}))
    sample_format = SampleFormat("messages", chat_template=chat_templates.ZEPHYR)
    with pytest.raises(DataError, match=r"as its LlamaTokenizer makes .* does not read tokenizer\.json as written"):
        check_format(sample_format, load_tokenizer(tmp_path / "t"))
    check_format(SampleFormat("text"), load_tokenizer(tmp_path / "t"))
    from transformers import AutoTokenizer

    own = AutoTokenizer.from_pretrained(tmp_path / "t")
    own.save_pretrained(tmp_path / "t")
    check_format(sample_format, load_tokenizer(tmp_path / "t"))
    ids, _, _ = encode_with_notes(
        {"messages": TURNS}, load_tokenizer(tmp_path / "t"), chat_template=chat_templates.ZEPHYR
    )
    assert ids == own.apply_chat_template(TURNS, chat_template=chat_templates.ZEPHYR, tokenize=True, return_dict=False)


def test_a_sentencepiece_model_as_transformers_reads_it(tmp_path):
    """No tokenizer.json: a space before the first text, none behind a special token."""
    import sentencepiece
    from transformers import AutoTokenizer

    (tmp_path / "text").write_text("\n".join(hf_tokenizers.TEXTS))
    sentencepiece.SentencePieceTrainer.train(
        input=str(tmp_path / "text"), model_prefix=str(tmp_path / "tokenizer"), vocab_size=300, byte_fallback=True,
        model_type="bpe", minloglevel=2, remove_extra_whitespaces=False, normalization_rule_name="identity",
    )  # fmt: skip
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(CONFIG | {"tokenizer_class": "LlamaTokenizer"}))
    tokenizer = load_tokenizer(tmp_path / "tokenizer.model")
    for name in ("LLAMA_2", "ZEPHYR", "MISTRAL"):
        template, messages = getattr(chat_templates, name), conversation(name)
        ids, mask, _ = encode_with_notes({"messages": messages}, tokenizer, chat_template=template)
        other = AutoTokenizer.from_pretrained(tmp_path)
        assert ids == other.apply_chat_template(messages, chat_template=template, tokenize=True, return_dict=False)
        ending = chat_templates.ENDINGS[name]
        expected = "".join(t["content"] + ending for t in TURNS if t["role"] == "assistant")
        assert letters_of(supervised(ids, mask, tokenizer), tmp_path) == letters_of(expected, tmp_path)
