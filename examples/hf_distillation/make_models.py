"""Stand-ins for a download: a Llama-shaped teacher that can write a little Python, and a smaller student that cannot.

    python make_models.py CORPUS.jsonl OUTPUT_FOLDER

Writes OUTPUT_FOLDER/teacher and OUTPUT_FOLDER/student as transformers saves any model, with their tokenizer (byte-level
BPE trained on the corpus). The teacher is trained here, in plain transformers; megakd sees only its folder.
"""

import json
import pathlib
import sys

import tokenizers
import torch
import transformers

VOCAB, LENGTH, STEPS, BATCH = 1536, 128, 250, 16
SHARED = {"vocab_size": VOCAB, "max_position_embeddings": LENGTH, "bos_token_id": 0, "eos_token_id": 1}
TEACHER = {"hidden_size": 192, "intermediate_size": 512, "num_hidden_layers": 4, "num_attention_heads": 6}
STUDENT = {"hidden_size": 96, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4}
ROPE = {"rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64}  # fmt: skip


def main(corpus: str, output: str) -> None:
    folder = pathlib.Path(output)
    texts = [json.loads(line)["text"] for line in open(corpus, encoding="utf-8")]  # noqa: SIM115
    tokenizer = train_tokenizer(texts[::4])
    torch.manual_seed(0)
    teacher = build(TEACHER, num_key_value_heads=2, rope_parameters=ROPE, tie_word_embeddings=False)
    ids = torch.tensor([i for text in texts[::2] for i in [*tokenizer(text).input_ids, 1]])
    train(teacher, ids[: len(ids) // LENGTH * LENGTH].view(-1, LENGTH))
    student = build(STUDENT, num_key_value_heads=2, tie_word_embeddings=True)
    for name, model in (("teacher", teacher), ("student", student)):
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
        print(f"{folder / name}: {sum(p.numel() for p in model.parameters()) / 1e6:.2f} million parameters")


def train_tokenizer(texts: list[str]) -> transformers.PreTrainedTokenizerFast:
    bpe = tokenizers.ByteLevelBPETokenizer()
    special = ["<|begin|>", "<|end|>"]
    bpe.train_from_iterator(texts, vocab_size=VOCAB, special_tokens=special, show_progress=False)
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=bpe._tokenizer, bos_token=special[0], eos_token=special[1]
    )


def build(sizes: dict, **fields) -> transformers.LlamaForCausalLM:
    config = transformers.LlamaConfig(**SHARED, **sizes, **fields, initializer_range=0.05)
    return transformers.LlamaForCausalLM(config)


def train(model, samples: torch.Tensor) -> None:
    order = torch.randperm(len(samples), generator=torch.Generator().manual_seed(0))
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, betas=(0.9, 0.95))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=2e-3, total_steps=STEPS)
    for step in range(STEPS):
        batch = samples[order[step * BATCH % len(order) :][:BATCH]]
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if step % 50 == 0 or step == STEPS - 1:
            print(f"teacher: step {step}, loss {loss.item():.2f} nats", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
