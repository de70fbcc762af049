"""Tiny models with the architectures of an example, and data, for its --tiny: what a download would bring.

    python make_tiny.py llama|nemotron FOLDER

Writes FOLDER/hf/teacher and FOLDER/hf/student as transformers saves them, with one tokenizer and random weights, and
FOLDER/train.jsonl and FOLDER/validation.jsonl.
"""

import json
import pathlib
import shutil
import sys

import torch
import transformers

VOCAB = 384
SHARED = {"vocab_size": VOCAB, "num_attention_heads": 4, "tie_word_embeddings": False, "initializer_range": 0.1,
          "bos_token_id": 1, "eos_token_id": 2, "max_position_embeddings": 128}  # fmt: skip
TEACHER, STUDENT = {"hidden_size": 64, "num_hidden_layers": 4}, {"hidden_size": 32, "num_hidden_layers": 2}
ROPE = {"rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64}  # fmt: skip


def main(kind: str, output: str) -> None:
    folder = pathlib.Path(output)
    folder.mkdir(parents=True, exist_ok=True)
    records = [
        {"input": f"What is {a} plus {b}?", "output": f"{a} plus {b} is {a + b}."} for a in range(8) for b in range(12)
    ]
    for name, part in (("train", records[8:]), ("validation", records[:8])):
        text = "".join(json.dumps(record) + "\n" for record in part)
        (folder / f"{name}.jsonl").write_text(text, encoding="utf-8")
    torch.manual_seed(0)
    for name, config in {"llama": llama, "nemotron": nemotron}[kind]().items():
        model = transformers.AutoModelForCausalLM.from_config(config)
        model.save_pretrained(folder / "hf" / name)
    texts = [f"{record['input']} {record['output']}" for record in records]
    {"llama": byte_level, "nemotron": sentencepiece_model}[kind](texts, folder / "hf")


def llama() -> dict:
    """Llama 3.1: grouped queries, SwiGLU, stretched rope."""
    sizes = {"num_key_value_heads": 2, "rope_parameters": ROPE}
    return {
        "teacher": transformers.LlamaConfig(**SHARED | TEACHER, **sizes, intermediate_size=160),
        "student": transformers.LlamaConfig(**SHARED | STUDENT, **sizes, intermediate_size=96),
    }


def nemotron() -> dict:
    """Nemotron-3 8B: squared ReLU. GPT-2B-001: SwiGLU. Both: layernorm1p, half of the channels rotated."""
    rope = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}
    sizes = {"num_key_value_heads": 4, "rope_parameters": rope}
    return {
        "teacher": transformers.NemotronConfig(**SHARED | TEACHER, **sizes, intermediate_size=160),
        "student": transformers.StableLmConfig(**SHARED | STUDENT, **sizes, intermediate_size=96),
    }


def byte_level(texts: list[str], folder: pathlib.Path) -> None:
    """tokenizer.json, byte-level BPE as Llama 3's."""
    import tokenizers

    bpe = tokenizers.ByteLevelBPETokenizer()
    bpe.train_from_iterator(texts, vocab_size=VOCAB, special_tokens=["<pad>", "<s>", "</s>"], show_progress=False)
    wrapped = transformers.PreTrainedTokenizerFast(
        tokenizer_object=bpe._tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )
    for name in ("teacher", "student"):
        wrapped.save_pretrained(folder / name)


def sentencepiece_model(texts: list[str], folder: pathlib.Path) -> None:
    """tokenizer.model, SentencePiece as Nemotron's."""
    import sentencepiece

    prefix = folder / "teacher" / "tokenizer"
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts), model_prefix=str(prefix), vocab_size=VOCAB, byte_fallback=True,
        hard_vocab_limit=False, model_type="bpe", minloglevel=2,
    )  # fmt: skip
    prefix.with_suffix(".vocab").unlink()
    shutil.copy(prefix.with_suffix(".model"), folder / "student" / "tokenizer.model")


if __name__ == "__main__":
    main(*sys.argv[1:])
