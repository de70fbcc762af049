"""Tokens a second of generation: `python tools/benchmarks/generate.py [--hidden 256 --layers 4 ...]`.

A Llama of random weights is made with transformers and converted. The same prompts are completed greedily three ways:
by megakd with its KV cache, by megakd running the whole prefix again for every token, and by transformers' `generate`
(SDPA attention, its own cache). All three must write the same tokens before anything is reported. Every round does all
kinds, in turns; seconds are those of this process's CPU time (the wall clock of a shared machine says little), figures
are medians, and ratios are of the same round. On CUDA, wall seconds.
"""

import argparse
import json
import pathlib
import statistics
import tempfile
import time

import torch
import torch.distributed as dist

from megakd.megatron_on_cpu import install

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
install(DEVICE.type)

import transformers  # noqa: E402

from megakd.assembly.models import build_model  # noqa: E402
from megakd.config import Parallel, Train  # noqa: E402
from megakd.converters.direct import open_checkpoint  # noqa: E402
from megakd.generation.engine import Engine, Request  # noqa: E402
from megakd.generation.stops import Stops  # noqa: E402
from megakd.kernels.next_tokens import Choice, choose_next  # noqa: E402
from megakd.models.forward_only import forward_only  # noqa: E402
from megakd.models.gpt import padded_vocab_size  # noqa: E402
from megakd.models.groups import build_groups  # noqa: E402
from megakd.models.micro_batch import MicroBatch  # noqa: E402


class NoText:
    """Models of random weights have no tokenizer; texts are no part of what is timed."""

    def decode(self, ids) -> str:
        return ""


def build(arguments, folder: pathlib.Path):
    """The same weights as transformers' model and as ours, and the groups of one rank."""
    config = transformers.LlamaConfig(
        vocab_size=arguments.vocab, hidden_size=arguments.hidden, intermediate_size=3 * arguments.hidden,
        num_hidden_layers=arguments.layers, num_attention_heads=arguments.hidden // 64,
        num_key_value_heads=max(arguments.hidden // 128, 1), head_dim=64, tie_word_embeddings=False,
        max_position_embeddings=arguments.prompt + arguments.new, initializer_range=0.1, eos_token_id=None,
    )  # fmt: skip
    torch.manual_seed(1)
    theirs = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    theirs.save_pretrained(folder / "hf")
    checkpoint = open_checkpoint(folder / "hf")
    groups = build_groups(1, 1, seed=0)
    dtype = "bf16" if arguments.bf16 else "fp32"
    ours = build_model(
        checkpoint.model, checkpoint, Parallel(), Train(steps=1, global_batch_size=1, precision=dtype), groups,
        vocab_size=arguments.vocab, padded_size=padded_vocab_size(arguments.vocab), device=DEVICE, local=True,
    )  # fmt: skip
    return theirs.to(DEVICE, torch.bfloat16 if arguments.bf16 else None).eval(), ours, groups


def with_cache(gpt, groups, prompts, new: int) -> list[list[int]]:
    engine = Engine(
        gpt, groups, DEVICE, Choice(), Stops(NoText(), frozenset()), max_new_tokens=new, slots=len(prompts), seed=0
    )
    requests = [Request(number, 0, tuple(prompt)) for number, prompt in enumerate(prompts)]
    done = [sequence for finished in engine.run(requests) for sequence in finished]
    return [sequence.ids for sequence in sorted(done, key=lambda sequence: sequence.request.prompt)]


@torch.no_grad()
def with_prefixes(gpt, groups, prompts, new: int) -> list[list[int]]:
    """Prompts of one length, the whole batch again for every token."""
    ids_BS = torch.tensor(prompts, device=DEVICE)
    batch, length = ids_BS.shape
    for _ in range(new):
        rows_T = (ids_BS.shape[1] - 1) * batch + torch.arange(batch, device=DEVICE)

        def keep(hidden_SBH, _, rows_T=rows_T):
            return choose_next(gpt.logits(hidden_SBH, rows_T), gpt.shard, Choice()).id_T

        (next_B,) = forward_only(gpt, [MicroBatch(ids_BS, ids_BS)], keep, groups)
        ids_BS = torch.cat([ids_BS, next_B[:, None]], 1)
    return ids_BS[:, length:].tolist()


def by_transformers(model, prompts, new: int) -> list[list[int]]:
    ids_BS = torch.tensor(prompts, device=DEVICE)
    out = model.generate(
        ids_BS, attention_mask=torch.ones_like(ids_BS), do_sample=False, max_new_tokens=new, pad_token_id=0
    )
    return out[:, ids_BS.shape[1] :].tolist()


def clock() -> float:
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
        return time.perf_counter()
    return time.process_time()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, default in (("hidden", 256), ("layers", 4), ("vocab", 8192), ("batch", 8), ("prompt", 32), ("new", 256),
                          ("rounds", 3)):  # fmt: skip
        parser.add_argument(f"--{name}", type=int, default=default, help="default: %(default)s")
    parser.add_argument("--bf16", action="store_true", help="weights and activations; then tokens may differ, and do")
    parser.add_argument("--no-prefixes", action="store_true", help="leave out the slow way")
    parser.add_argument("--output", type=pathlib.Path, metavar="FILE.json")
    arguments = parser.parse_args()
    dist.init_process_group("nccl" if DEVICE.type == "cuda" else "gloo", store=dist.HashStore(), rank=0, world_size=1)
    generator = torch.Generator().manual_seed(2)
    prompts = torch.randint(arguments.vocab, (arguments.batch, arguments.prompt), generator=generator).tolist()
    with tempfile.TemporaryDirectory() as folder:
        theirs, ours, groups = build(arguments, pathlib.Path(folder))
    ways = {
        "megakd, KV cache": lambda: with_cache(ours, groups, prompts, arguments.new),
        "transformers generate": lambda: by_transformers(theirs, prompts, arguments.new),
        "megakd, whole prefixes": lambda: with_prefixes(ours, groups, prompts, arguments.new),
    }
    if arguments.no_prefixes:
        del ways["megakd, whole prefixes"]
    report(measure(ways, arguments), arguments)
    dist.destroy_process_group()


def measure(ways: dict, arguments) -> dict[str, list[float]]:
    """Seconds of each round by way, after tokens have been compared."""
    seconds, written = {name: [] for name in ways}, {}
    for round_ in range(arguments.rounds + 1):  # the first warms up
        for name, way in ways.items():
            if round_ == 0 and "prefixes" in name:
                continue
            started = clock()
            written[name] = way()
            if round_:
                seconds[name].append(clock() - started)
    first = next(iter(written.values()))
    for name, tokens in written.items():
        if tokens != first and not arguments.bf16:
            raise SystemExit(f"{name} wrote other tokens than {next(iter(written))}: nothing is reported")
    return seconds


def report(seconds: dict[str, list[float]], arguments) -> None:
    tokens = arguments.batch * arguments.new
    dtype = "bf16" if arguments.bf16 else "fp32"
    print(
        f"{arguments.batch} prompts of {arguments.prompt} tokens, {arguments.new} new ones, Llama of hidden "
        f"{arguments.hidden} x {arguments.layers} layers, {arguments.vocab} ids, {dtype}, {DEVICE.type}, "
        f"{torch.get_num_threads()} threads, torch {torch.__version__}, transformers {transformers.__version__}"
    )
    ours = next(iter(seconds))
    rows = {}
    for name, laps in seconds.items():
        ratio = statistics.median(theirs / mine for theirs, mine in zip(laps, seconds[ours], strict=True))
        median = statistics.median(laps)
        rows[name] = {"seconds": median, "tokens_per_second": tokens / median, "seconds_over_ours": ratio}
        print(f"  {name:24s} {median:8.2f} s {tokens / median:9.1f} tokens/s   {ratio:6.2f} times the first's seconds")
    if arguments.output:
        arguments.output.write_text(
            json.dumps({"arguments": vars(arguments) | {"output": None}, "rows": rows}, indent=1)
        )


if __name__ == "__main__":
    main()
