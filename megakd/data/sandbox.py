"""Jinja for chat templates that strangers wrote: it cannot reach Python, and it ends.

Jinja's own sandbox keeps a template from attributes and files. It does not keep it from looping for ever or from
making a text larger than the memory; what can grow or repeat is therefore counted here while it happens: turns of
loops, calls, texts that are put together, and what is written.
"""

import functools
import re
import time

import jinja2
from jinja2 import nodes
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer

from megakd.errors import DataError
from megakd.limits import advice, check_limit, excess, limit

LARGEST_NUMBER = 1_000_000  # that a call may be given: a width, a count
LARGEST_BITS = 100_000  # of a number that arithmetic makes
_WIDTH = re.compile(r"\d{7}")  # in a format


class BoundedEnvironment(ImmutableSandboxedEnvironment):
    """Jinja's immutable sandbox within TEMPLATE_SECONDS and TEMPLATE_CHARACTERS; `render` applies them.

    Raises:
        DataError: from `render`, and from `from_string` for a source above TEMPLATE_BYTES.
    """

    intercepted_binops = frozenset(["+", "*", "**", "%"])

    def __init__(self, **options):
        super().__init__(**options, optimized=False, finalize=self.written)
        self.start()
        del self.globals["lipsum"], self.filters["urlize"]
        for name, function in self.filters.items():
            self.filters[name] = self._bounded(function)
        join = self.filters["join"]

        @functools.wraps(join)
        def join_all(context, value, *rest, **named):
            return join(context, self._all(value), *rest, **named)

        self.filters["join"] = join_all

    def start(self) -> None:
        self.deadline, self.most = time.monotonic() + limit("TEMPLATE_SECONDS"), limit("TEMPLATE_CHARACTERS")
        self.characters = 0

    def render(self, template: jinja2.Template, **variables) -> str:
        """What a template of this environment makes of its variables."""
        self.start()
        return template.render(**variables)

    def from_string(self, source: str, *args, **kwargs) -> jinja2.Template:
        check_limit("TEMPLATE_BYTES", len(source), "the chat template", DataError)
        return super().from_string(source, *args, **kwargs)

    def _parse(self, source, name, filename):
        return _Counted().visit(super()._parse(source, name, filename))

    def tick(self, characters: int = 0) -> None:
        """One more turn of a loop or call, which writes at least so much."""
        if time.monotonic() > self.deadline:
            raise DataError(
                f"the chat template is not done after TEMPLATE_SECONDS = {limit('TEMPLATE_SECONDS')}",
                hint=advice("TEMPLATE_SECONDS"),
            )
        self.characters += characters
        self.check_length(self.characters)

    def check_length(self, length: int) -> None:
        if length > self.most and (words := excess("TEMPLATE_CHARACTERS", length)):
            raise DataError(f"the chat template: {words}", hint=advice("TEMPLATE_CHARACTERS"))

    def written(self, value):
        """Counts what an expression writes; Jinja calls it for each."""
        self.tick(len(value) if isinstance(value, str) else len(str(value)))
        return value

    def concatenate(self, *values) -> str:
        """The operator `~`."""
        texts = [str(value) for value in values]
        self.check_length(sum(map(len, texts)))
        return "".join(texts)

    def call(__self, __context, __obj, *args, **kwargs):
        __self.tick()
        own = getattr(getattr(__obj, "__wrapped__", __obj), "__self__", None)
        __self._check_arguments(getattr(__obj, "__name__", ""), [own, *args, *kwargs.values()])
        return __self._checked(super().call(__context, __obj, *args, **kwargs))

    def call_binop(self, context, operator, left, right):
        sizes = [len(value) if isinstance(value, str | list | tuple) else None for value in (left, right)]
        numbers = [value for value in (left, right) if isinstance(value, int)]
        if operator == "+":
            self.check_length(sum(size or 0 for size in sizes))
        elif operator == "*" and len(numbers) == 1 and sizes != [None, None]:
            self.check_length((sizes[0] or sizes[1] or 0) * max(0, numbers[0]))
        elif operator == "%" and isinstance(left, str):
            self._check_arguments("format", [left, *(right if isinstance(right, tuple) else [right])])
        elif len(numbers) == 2 and operator in ("*", "**"):
            bits = [abs(number).bit_length() for number in numbers]
            if (sum(bits) if operator == "*" else bits[0] * abs(right)) > LARGEST_BITS:
                raise DataError("the chat template makes a number of more than 30,000 digits", hint="mend the template")
        return super().call_binop(context, operator, left, right)

    def _bounded(self, function):
        @functools.wraps(function)
        def bounded(*args, **kwargs):
            self.tick()
            self._check_arguments(function.__name__, [*args, *kwargs.values()])
            return self._checked(function(*args, **kwargs))

        return bounded

    def _check_arguments(self, name: str, values: list) -> None:
        if any(isinstance(value, int) and abs(value) > LARGEST_NUMBER for value in values):
            raise DataError(
                f"the chat template calls {name} with a number above {LARGEST_NUMBER:,}", hint="mend the template"
            )
        texts = [value for value in values if isinstance(value, str | list | tuple)]
        if "format" in name and any(isinstance(text, str) and _WIDTH.search(text) for text in texts):
            raise DataError("the chat template formats to a width above 1,000,000", hint="mend the template")
        if "join" in name or "replace" in name:  # at most every character or element with another text
            two = sorted((len(text) for text in texts), reverse=True)[:2]
            self.check_length(two[0] * max(two[1], 1) if len(two) == 2 else 0)
            self.check_length(sum(_length(part) for text in texts if not isinstance(text, str) for part in text))

    def _all(self, values) -> list:
        """What a generator makes, while it keeps within the limit."""
        found, characters = [], 0
        for value in values:
            characters += _length(value)
            self.check_length(characters)
            found.append(value)
        return found

    def _checked(self, value):
        if isinstance(value, str | list | tuple):
            self.check_length(len(value))
        return value


def _length(value) -> int:
    """Characters of a text, or of the texts in a dictionary."""
    if isinstance(value, dict):
        return sum(_length(inner) for inner in value.values() if isinstance(inner, str))
    return len(value) if isinstance(value, str) else 0


class _Counted(NodeTransformer):
    """Puts a call of `tick` into every body that may be run again, and `concatenate` in the place of `~`."""

    def visit_For(self, node):
        return self._ticking(node)

    visit_Macro = visit_CallBlock = visit_For

    def _ticking(self, node):
        self.generic_visit(node)
        text = sum(len(data.data) for data in node.find_all(nodes.TemplateData))
        tick = nodes.Call(nodes.EnvironmentAttribute("tick"), [nodes.Const(text)], [], None, None)
        node.body.insert(0, nodes.ExprStmt(tick).set_lineno(node.lineno))
        return node

    def visit_Concat(self, node):
        self.generic_visit(node)
        return nodes.Call(nodes.EnvironmentAttribute("concatenate"), node.nodes, [], None, None).set_lineno(node.lineno)
