"""What one configuration key may hold: a declarative `Rule`, used to check a value and to write its JSON Schema.

A rule is written once, beside the dataclass field it belongs to, with `key(...)`; its limits carry the names that JSON
Schema gives them. Type and nullability come from the field's annotation.
"""

import difflib
import json
import math
import operator
import os
import re
from dataclasses import MISSING, dataclass, field, fields, replace
from types import NoneType
from typing import get_args

KINDS = {bool: "boolean", int: "integer", float: "number", str: "string", str | tuple[str, ...]: "names", object: "any"}

LIMITS = {
    "minimum": operator.ge,
    "exclusiveMinimum": operator.gt,
    "maximum": operator.le,
    "exclusiveMaximum": operator.lt,
    "minLength": lambda text, limit: len(text.strip()) >= limit,
    "pattern": lambda text, pattern: re.search(pattern, text) is not None,
}


class Broken(Exception):
    """A value breaks its rule: (rule, remedy), each a phrase of the message the user reads."""


@dataclass(frozen=True)
class Rule:
    """description: for people. choices: the only values. also: integers allowed beside the limits (-1 for "off").
    because: why the limit is what it is. limits: JSON Schema keywords. The rest is filled by `rules_of`."""

    description: str
    choices: tuple[str, ...] = ()
    also: tuple[int, ...] = ()
    because: str = ""
    limits: dict | None = None
    kind: str = "any"
    nullable: bool = False
    default: object = None

    def text(self) -> str:
        """The rule in words, as the schema document has them: "Must be between 1 and 256"."""
        words = _rule_text(self.choices, self.limits or {})
        is_null_listed = self.nullable and self.kind in ("integer", "number")
        beside = [*map(str, self.also), *["null"] * is_null_listed]
        return words + (f", or {' or '.join(beside)}" if beside else "") + self.because

    def read(self, value):
        """`value` as the configuration keeps it (whole numbers become float in float keys). Raises Broken."""
        if value is None and self.nullable or type(value) is int and value in self.also:
            return value
        required = self.default is MISSING
        if value is None:
            remedy = "give it a value" if required else "leave the key out for its default"
            raise Broken(self.text() or f"Must be a {self.kind}", remedy)
        value = READERS[self.kind](value)
        if self.choices and value not in self.choices:
            raise Broken(self.text(), f"the nearest is {show(nearest(value, self.choices))}")
        broken = {name for name, limit in self._bounds().items() if not LIMITS[name](value, limit)}
        if broken & (self.limits or {}).keys():
            raise Broken(self.text(), "give it a value" if required else "correct it, or leave the key out")
        if broken:
            raise Broken(f"Must be ≤ {MOST}", "give fewer")
        return value

    def _bounds(self) -> dict:
        """The limits, and of integers the one that goes without saying."""
        return {**({"maximum": MOST} if self.kind == "integer" else {}), **(self.limits or {})}

    def schema(self) -> dict:
        """The key as a JSON Schema (draft 2020-12) property."""
        return {
            "description": self.description,
            **_typed(self.kind, self.choices, self.also, self._bounds(), self.nullable),
            **({} if self.default is MISSING else {"default": plain(self.default)}),
        }


MOST = 2**31 - 1  # of integers that have no other limit, so that products of two can be counted with
REQUIRED = MISSING  # the default of a key that has none


def key(default, description: str, *, choices=(), also=(), because="", **limits):
    """A dataclass field with its rule. `limits`: JSON Schema keywords (minimum, exclusiveMaximum, minLength, ...)."""
    return field(default=default, metadata={"rule": Rule(description, choices, also, because, limits)})


def rules_of(cls) -> dict[str, Rule]:
    """The rule of every field made by `key`, with kind and nullability read from its annotation."""
    rules = {}
    for f in fields(cls):
        if "rule" in f.metadata:
            members = [member for member in get_args(f.type) if member is not NoneType]
            kind = KINDS[members[0] if NoneType in get_args(f.type) else f.type]
            nullable = NoneType in get_args(f.type) or kind == "any"
            rules[f.name] = replace(f.metadata["rule"], kind=kind, nullable=nullable, default=f.default)
    return rules


def show(value) -> str:
    """A value as its JSON text on one short line, the way the user wrote it."""
    text = json.dumps(value, ensure_ascii=False, default=repr)
    text = text if len(text) <= 80 else text[:77] + "..."
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def nearest(word, known) -> str:
    """The known word closest in spelling; case, dashes and camel case do not count."""
    spelling = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", str(word)).replace("-", "_").lower()
    exact = [name for name in known if name == str(word).lower()]
    return (exact or difflib.get_close_matches(spelling, list(known), n=1, cutoff=0.0))[0]


def plain(value):
    """A value as JSON has it: tuples are lists."""
    return list(value) if isinstance(value, tuple) else value


def _rule_text(choices, limits) -> str:
    if choices:
        return f"Must be in {json.dumps(list(choices))}"  # all of them, however many
    if "minLength" in limits:
        return "Cannot be empty"
    if "pattern" in limits:
        return "Must be of the form "
    low, high = limits.get("minimum"), limits.get("maximum", limits.get("exclusiveMaximum"))
    if low is not None and high is not None:
        return f"Must be between {low} and {high}"
    bounds = [f"{sign} {limits[name]}" for name, sign in _SIGNS.items() if name in limits]
    return f"Must be {' and '.join(bounds)}" if bounds else ""


_SIGNS = {"exclusiveMinimum": ">", "minimum": "≥", "exclusiveMaximum": "<", "maximum": "≤"}


def _typed(kind, choices, also, limits, nullable) -> dict:
    """Type, values and limits of a property: `anyOf` only where something is allowed beside the limits."""
    if kind == "any":
        return {}
    if kind == "names":
        name = {"type": "string", "minLength": 1}
        return {"anyOf": [{"const": "all-linear"}, {"type": "array", "items": name, "minItems": 1}]}
    if choices:
        return {"enum": [*choices, None] if nullable else list(choices)}
    own = {"type": kind, **limits}
    if also:
        return {"anyOf": [own, {"enum": [*also, None] if nullable else list(also)}]}
    return {**own, "type": [kind, "null"]} if nullable else own


def _boolean(value):
    if not isinstance(value, bool):
        word = {"true": "true", "false": "false", "1": "true", "0": "false"}.get(str(value).lower())
        raise Broken("Must be true or false", f"write {word}, without quotes" if word else "write one of the two")
    return value


def _integer(value):
    if isinstance(value, bool) or not isinstance(value, int):
        number = _number_in(value)
        whole = number is not None and number.is_integer() and abs(number) < 1e15
        raise Broken("Must be an integer", f"write {int(number)}" if whole else "write a whole number without quotes")
    return value


def _number(value):
    if isinstance(value, bool) or not isinstance(value, int | float):
        number = _number_in(value)
        raise Broken(
            "Must be a number", "write a number" if number is None else f"write {_as_json(value)} without quotes"
        )
    try:
        number = float(value)
    except OverflowError:  # an integer beyond 1.8e308
        number = math.inf
    if not math.isfinite(number):
        raise Broken("Must be a finite number", "correct it")
    return number


def _as_json(value: str) -> str:
    """The number in a string, as it is where JSON writes it so."""
    try:
        json.loads(value)
    except ValueError:
        return repr(float(value))
    return value


def _number_in(value) -> float | None:
    """The finite number a string or float holds, if any."""
    if isinstance(value, bool) or not isinstance(value, str | float):
        return None
    try:
        number = float(value)
    except ValueError:
        return None
    return number if math.isfinite(number) else None


def _string(value):
    if isinstance(value, os.PathLike):
        value = os.fspath(value)
    if not isinstance(value, str):
        raise Broken("Must be a string", "write it in quotes")
    if "\0" in value or any("\ud800" <= character <= "\udfff" for character in value):
        raise Broken("Must be text that can be written", "take out NUL, and half characters like \\ud800 alone")
    return value


def _names(value):
    rule = 'Must be "all-linear" or a list of module names'
    if isinstance(value, str) and value == "all-linear":
        return value
    if not isinstance(value, list | tuple) or not value or not all(isinstance(v, str) and v.strip() for v in value):
        raise Broken(rule, 'write for example ["q_proj", "v_proj"]')
    return tuple(map(_string, value))


def _any(value):
    try:
        json.dumps(value, allow_nan=False, ensure_ascii=False).encode()  # UnicodeEncodeError is a ValueError
    except (TypeError, ValueError, RecursionError):
        raise Broken("Must be JSON", "remove what JSON cannot hold (such as NaN, or half a character)") from None
    return value


READERS = {
    "boolean": _boolean, "integer": _integer, "number": _number, "string": _string, "names": _names, "any": _any,
}  # fmt: skip
