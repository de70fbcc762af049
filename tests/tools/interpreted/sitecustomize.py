"""What Python imports as it starts, in the processes of a dry run: they interpret as the kernels' own tests do."""

from tests.kernels import quick_interpreter

quick_interpreter.install()
