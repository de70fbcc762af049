"""`megakd train CONFIG.yaml [key=value ...]`: train a student, online from a teacher or plainly on data."""

from megakd.megatron_on_cpu import install
from megakd.runs.start import start_run


def main(argv: list[str]) -> None:
    """Run `megakd train ARGV...` on this rank."""
    with start_run(argv, reports=True) as (config, ranks):
        install(ranks.device.type)
        from megakd.training.loop import train

        train(config, ranks)
