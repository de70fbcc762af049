"""megakd, killed in the middle of writing completions: WRITES begun before it and TOKENS of the one under way, by the
environment."""

import os
import signal

COUNTS = {"writes": 0, "tokens": 0}


def main(arguments):
    import megakd.cli
    from megakd.generation.engine import Engine

    run, go_on = Engine.run, Engine._go_on

    def counted_run(self, requests):
        COUNTS["writes"] += 1
        return run(self, requests)

    def counted_token(self, sequences, cache):
        go_on(self, sequences, cache)
        COUNTS["tokens"] += COUNTS["writes"] > int(os.environ["WRITES"])
        if COUNTS["tokens"] == int(os.environ["TOKENS"]):
            os.kill(os.getpid(), signal.SIGKILL)

    Engine.run, Engine._go_on = counted_run, counted_token
    return megakd.cli.main(arguments)
