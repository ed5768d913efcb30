"""Checking of settings, and what is wrong with them in lines that a person can act on.

Pydantic reports one error per type that it tried; here is one line per bad key, led by the key's path.
"""

from __future__ import annotations

import types
from collections.abc import Sequence
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError

from vqgen.errors import ConfigError, did_you_mean

MOST_SHOWN = 200
"""Characters of a value that a line repeats."""

S = TypeVar("S", bound=BaseModel)


def check(kind: type[S], values: Any, where: str = "") -> tuple[S | None, list[str]]:
    """``values`` as ``kind``, or None and one line per bad key, each led by ``where`` and the key's path."""
    try:
        return kind.model_validate(values), []
    except ValidationError as error:
        return None, _problem_lines(kind, error, where)


def build(kind: type[S], values: Any, where: str = "") -> S:
    """``values`` as ``kind``.

    Raises:
        ConfigError: with every problem at once.
    """
    settings, problems = check(kind, values, where)
    if settings is None:
        raise_problems(problems)
    return settings  # type: ignore[return-value]


def raise_problems(problems: Sequence[str], file: str = "") -> None:
    """Raise one `ConfigError` that lists ``problems``; does nothing where there are none."""
    if not problems:
        return
    of = f" in {file}" if file else ""
    if len(problems) == 1:
        raise ConfigError(f"Bad setting{of}: {problems[0]}")
    raise ConfigError(f"{len(problems)} bad settings{of}:" + "".join(f"\n  {line}" for line in problems))


def _problem_lines(kind: type[BaseModel], error: ValidationError, where: str = "") -> list[str]:
    """One line per bad key of a mapping that is no ``kind``, each led by ``where`` and the key's path."""
    problems: dict[str, list[dict[str, Any]]] = {}
    for detail in error.errors(include_url=False):
        path = ([where] if where else []) + _key_path(kind, detail["loc"])
        problems.setdefault(".".join(path) or "settings", []).append(dict(detail))
    return [_problem(kind, key, details) for key, details in problems.items()]


def plain_types(annotation: Any) -> set[type]:
    """The plain types somewhere in ``annotation``."""
    if get_origin(annotation) is Literal:
        return {type(value) for value in get_args(annotation)}
    parts = get_args(annotation)
    return set().union(*map(plain_types, parts)) if parts else {annotation} if isinstance(annotation, type) else set()


def _problem(kind: type[BaseModel], key: str, details: Sequence[dict[str, Any]]) -> str:
    """The line for ``key``; it has several ``details`` where none of the types it may have fits."""
    first = details[0]
    if first["type"] == "extra_forbidden":
        *above, name = map(str, first["loc"])
        known = _fields_at(kind, above)
        return f"{key}: unknown key. {did_you_mean(name, known) or 'Known: ' + ', '.join(known) + '.'}"
    message = " or ".join(dict.fromkeys(_message(detail) for detail in details))
    given = first.get("input")
    silent = isinstance(given, dict) or first["type"] in ("missing", "value_error")
    return f"{key}: {message}" if silent else f"{key}: {message}, got {_shown(given)}"


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= MOST_SHOWN else f"{text[:MOST_SHOWN]}..."


def _message(detail: dict[str, Any]) -> str:
    if detail["type"] in ("model_type", "dict_type"):
        return "expected a mapping"
    text = str(detail["msg"]).removeprefix("Value error, ")
    return text[0].lower() + text[1:]


def _key_path(kind: type[BaseModel], location: Sequence[int | str]) -> list[str]:
    """The key that an error is about: pydantic's location, without the types that it tried of a union."""
    path: list[str] = []
    here: Any = kind
    for part in location:
        if len(_members(here)) > 1:
            break
        if part != "[key]":
            path.append(str(part))
        here = _below(here, part)
    return path


def _fields_at(kind: type[BaseModel], location: Sequence[str]) -> list[str]:
    here: Any = kind
    for part in location:
        here = _below(here, part)
    members = _members(here)
    return list(members[0].model_fields) if members and _is_model(members[0]) else []


def _below(annotation: Any, part: int | str) -> Any:
    """Type of what is at ``part`` in a value of type ``annotation``; None where that is not known."""
    for member in _members(annotation):
        if _is_model(member):
            field = member.model_fields.get(str(part))
            return field.annotation if field else None
        arguments = [argument for argument in get_args(member) if argument is not ...]
        if arguments and get_origin(member) is not Literal:
            return arguments[part] if isinstance(part, int) and part < len(arguments) else arguments[-1]
    return None


def _members(annotation: Any) -> list[Any]:
    """The types that a union offers besides None, or the one type that is not a union."""
    if get_origin(annotation) is Annotated:
        return _members(get_args(annotation)[0])
    if get_origin(annotation) in (Union, types.UnionType):
        return [member for part in get_args(annotation) for member in _members(part)]
    return [] if annotation in (None, type(None)) else [annotation]


def _is_model(kind: Any) -> bool:
    # Python 3.10 takes dict[str, int] for a class.
    return get_origin(kind) is None and isinstance(kind, type) and issubclass(kind, BaseModel)
