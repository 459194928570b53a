"""Run a checkpoint's Jinja chat template as Hugging Face does, without trusting it.

The environment is Jinja's immutable sandbox: no file, no import, no private attribute, nothing handed in is changed.
Beyond that a template may take `LIMIT_SECONDS`, and spell `LIMIT_CHARACTERS` and a few times what it is given. The
clock is read in every turn of a loop, call and filter (Jinja repeats work in no other way), so it holds in any thread
and under any debugger. What can grow in a single step (operators, filters, calls, joined and captured text) is checked
at that step.
"""

import json
import re
import time
from collections.abc import Callable
from contextvars import ContextVar
from datetime import date
from functools import wraps

import jinja2
from jinja2 import nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

from mini_forge.errors import CheckpointError

LIMIT_SECONDS = 10.0
LIMIT_CHARACTERS = 4_000_000
LIMIT_REPEATS = 8
LIMIT_INTEGER_BITS = 4096

FILE_NAME = "<chat template>"
# What an expression of a template can raise: Jinja's own errors, and those of the Python operations behind them.
FAILURES = (jinja2.TemplateError, ArithmeticError, LookupError, TypeError, ValueError, AttributeError, RecursionError,
            MemoryError, NameError)  # fmt: skip

_CHECKED = "_checked"  # no name that a template can write: ours begin with no underscore
_deadline: ContextVar[float] = ContextVar("deadline", default=float("inf"))
_most_characters: ContextVar[int] = ContextVar("most_characters", default=LIMIT_CHARACTERS)


class TemplateFailure(ValueError):
    """A template did not compile or would not render; the message is its reason, with the template's line."""


class TemplateTimeout(CheckpointError):
    """A template ran too long. No `TemplateFailure`: whatever it is asked next, it would most likely do so again."""


def compile_template(source: str, today: date | None = None) -> Callable[..., str]:
    """`render(**variables) -> str` of a Jinja chat template. Compiling and rendering raise TemplateFailure, rendering
    for too long TemplateTimeout.

    `today` is what `strftime_now` tells, at 0:00, so that a template spells the same text throughout a run."""
    environment = _Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", _Generation])
    moment = today or date.today()
    environment.filters = {name: _guarded(function) for name, function in environment.filters.items()}
    environment.filters["tojson"] = _guarded(_to_json)
    environment.filters[_CHECKED] = _checked
    del environment.globals["lipsum"]  # text by the megabyte
    environment.globals["namespace"] = _Namespace
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = lambda form: moment.strftime(form)
    try:
        tree = _with_checks(environment.parse(source), environment)
        code = environment.compile(tree, filename=FILE_NAME)
    except FAILURES as error:
        raise TemplateFailure(_reason(error)) from error
    template = environment.template_class.from_code(environment, code, environment.make_globals(None))

    def render(**variables) -> str:
        most = LIMIT_CHARACTERS + LIMIT_REPEATS * _characters(variables)
        before = _deadline.set(time.monotonic() + LIMIT_SECONDS), _most_characters.set(most)
        pieces, length = [], 0
        try:
            for piece in template.generate(**variables):
                pieces.append(piece)
                length += len(piece)
                _check_length(length)
        except _OutOfTime as error:
            raise TemplateTimeout(f"{_reason(error)}; set chat_template to another") from error
        except FAILURES as error:
            raise TemplateFailure(_reason(error)) from error
        finally:
            _deadline.reset(before[0])
            _most_characters.reset(before[1])
        return "".join(pieces)

    return render


class _OutOfTime(SecurityError):
    pass


class _Sandbox(ImmutableSandboxedEnvironment):
    intercepted_binops = frozenset({"+", "*", "**", "%"})

    def tick(self) -> None:
        """Raises once the time is over; `_with_checks` calls it in every loop."""
        if time.monotonic() > _deadline.get():
            raise _OutOfTime(f"stopped: it ran longer than {LIMIT_SECONDS:g} s")

    def call_binop(self, context, operator, left, right):
        if isinstance(left, int) and isinstance(right, int):
            bits = left.bit_length() * right if operator == "**" else left.bit_length() + right.bit_length()
            if bits > LIMIT_INTEGER_BITS:
                raise SecurityError(f"stopped: it computes an integer of more than {LIMIT_INTEGER_BITS} bits")
        elif operator == "*":
            _check_length(_size(left) * right if isinstance(right, int) else _size(right) * int(left))
        elif operator == "+":
            _check_length(_size(left) + _size(right))
        elif operator == "%":
            _check_widths(left)
        return super().call_binop(context, operator, left, right)

    def call(self, context, function, /, *args, **kwargs):
        self.tick()
        owner = getattr(getattr(function, "__wrapped__", function), "__self__", None)
        if isinstance(owner, (str, bytes, int)):  # "x".ljust(10**9), "{:1000000000}".format(1)
            if function.__name__.startswith("format"):
                _check_widths(owner)
            if function.__name__ == "translate":
                raise SecurityError("stopped: translate can make text of any length")
            _check_arguments(*args, *kwargs.values())
        result = super().call(context, function, *args, **kwargs)
        _check_length(_size(result))
        return result


class _Namespace(Namespace):
    """Jinja's, for names without a leading underscore: Python's own are no business of a template."""

    def __init__(*args, **kwargs):  # no `self`, which is a name that a template may use
        self, *args = args
        names = dict(*args, **kwargs)
        for name in names:
            _check_name(name)
        Namespace.__init__(self, names)

    def __setitem__(self, name: str, value):
        _check_name(name)
        super().__setitem__(name, value)


class _Generation(Extension):
    """`{% generation %}…{% endgeneration %}` marks what the model writes. We find that ourselves."""

    tags = {"generation"}

    def parse(self, parser):
        line = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True)).set_lineno(line)


def _with_checks(tree: nodes.Template, environment: _Sandbox) -> nodes.Template:
    """The same template with a look at the clock in every loop, and joined and captured text made filters' work."""
    for loop in tree.find_all(nodes.For):
        tick = nodes.Call(nodes.EnvironmentAttribute("tick"), [], [], None, None)
        loop.body.insert(0, nodes.ExprStmt(tick, lineno=loop.lineno))
    for capture in tree.find_all(nodes.AssignBlock):
        capture.filter = nodes.Filter(capture.filter, "string", [], [], None, None, lineno=capture.lineno)
    for node in [tree, *tree.find_all(nodes.Node)]:
        for name, value in list(node.iter_fields()):
            if isinstance(value, nodes.Node):
                setattr(node, name, _held(value))
            elif isinstance(value, list):
                value[:] = [_held(item) for item in value]
    return tree.set_environment(environment)


def _held(node):
    """Joined text made a filter's work; lists of what is there already, held to the limits: they double."""
    if isinstance(node, nodes.Concat):
        return _joined(node)
    is_literal = isinstance(node, (nodes.List, nodes.Dict)) or isinstance(node, nodes.Tuple) and node.ctx == "load"
    if is_literal and node.find(nodes.Name) is not None:
        return nodes.Filter(node, _CHECKED, [], [], None, None, lineno=node.lineno)
    return node


def _joined(concat: nodes.Concat) -> nodes.Filter:
    return nodes.Filter(nodes.List(concat.nodes), "join", [], [], None, None, lineno=concat.lineno)


def _guarded(function: Callable) -> Callable:
    """The filter with its arguments and its result held to the limits."""

    @wraps(function)  # keeps Jinja's mark that the first argument is the context or environment
    def guarded(*args, **kwargs):
        _Sandbox.tick(None)
        if function.__name__ == "do_format":
            _check_widths(args[0])
        elif function.__name__ != "do_default":
            _check_arguments(*args[1:], *kwargs.values())
        _check_length(_size(args))
        if function.__name__ == "do_indent":
            widths = [value for value in (*args[1:], *kwargs.values()) if isinstance(value, int)]
            _check_length(str(args[0]).count("\n") * max(widths, default=4))
        result = function(*args, **kwargs)
        _check_length(_size(result))
        return result

    return guarded


def _size(value) -> int:
    """How many characters and members there are in it, counted as often as they are spelled, up to the limit."""
    count, rest = 0, [value]
    while rest and count <= _most_characters.get():
        value = rest.pop()
        if isinstance(value, (str, bytes)):
            count += len(value)
        elif isinstance(value, (list, tuple, dict)):
            count += len(value)
            rest += value.values() if isinstance(value, dict) else value
    return count


def _checked(value):
    _check_length(_size(value))
    return value


def _check_name(name) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise SecurityError(f"a namespace may have no name that begins with an underscore, as {name!r} does")


def _check_length(length) -> None:
    most = _most_characters.get()
    if length > most:
        raise SecurityError(f"stopped: it spells more than {most} characters")


def _characters(variables: dict) -> int:
    """About how many characters it takes to spell all that is in them once. No recursion: a row may nest deeply."""
    count, rest = 0, [variables]
    while rest:
        value = rest.pop()
        if isinstance(value, dict):
            rest += [*value, *value.values()]
        elif isinstance(value, (list, tuple)):
            rest += value
        count += len(value) if isinstance(value, str) else 8
    return count


def _check_arguments(*values) -> None:
    for value in values:
        if isinstance(value, int):
            _check_length(abs(value))  # the width of a padding, the count of a repetition


def _check_widths(form) -> None:
    """A format such as "%9999999d" or "{:9999999}" is a repetition in disguise."""
    if isinstance(form, str) and re.search(r"%[^%]{0,4}\*|[%:][^%{}]{0,4}\d{7}", form):
        raise SecurityError("stopped: it pads text to millions of characters")


def _to_json(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False) -> str:
    """JSON as models were trained on it: Jinja's own filter escapes it for HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message):
    raise jinja2.TemplateError(message)


def _reason(error: BaseException) -> str:
    """The error in one line, with the line of the template it arose in."""
    line = getattr(error, "lineno", None)
    traceback = error.__traceback__
    while traceback is not None:
        if traceback.tb_frame.f_code.co_filename == FILE_NAME:
            line = traceback.tb_lineno
        traceback = traceback.tb_next
    reason = " ".join(str(error).split()) or type(error).__name__
    return reason if line is None else f"{reason} (line {line} of the template)"
