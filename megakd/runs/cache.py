"""`megakd cache CONFIG.yaml [key=value ...]`: record what a teacher says about the samples a config reads.

The samples are those that `megakd train` with the same config would read; any other batch size, order, subset or layout
may read them later. Each data-parallel rank writes whole shards. A recording that was stopped or killed goes on where
it was when the same command is given again. `megakd cache stat|verify|merge|import|export` are tools for its result.
"""

from megakd.runs import cache_tools


def main(argv: list[str]) -> int:
    """Run `megakd cache ARGV...`: one of the tools, or this rank of a recording."""
    if not argv or argv[0] in (*cache_tools.TOOLS, "-h", "--help"):
        return cache_tools.main(argv)
    from megakd.config.checks import check_layout
    from megakd.megatron_on_cpu import install
    from megakd.runs.start import start_run

    with start_run(argv, check=check_layout) as (config, ranks):  # whatever the batch: a recording has none
        install(ranks.device.type)
        from megakd.recording.record import record

        record(config, ranks, " ".join(["megakd cache", *argv]))
    return 0
