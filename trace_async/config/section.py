"""How a section of settings is made: a frozen dataclass that pydantic checks, with a meaning under every field.

    @section("eval")
    class EvalConfig:
        '''Held-out evaluation.'''

        num_tasks: Annotated[int, Field(ge=1)] = 600
        '''How many held-out tasks an evaluation takes.'''

The string under a field is its meaning and `Field(...)` its bounds. Checks, error messages, `trace-async settings`, the
JSON schema for editors and docs/settings.md are all made from these two, so that none can contradict another.
"""

import dataclasses
import difflib
import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar, dataclass_transform

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError, ValidationInfo, field_validator
from pydantic.dataclasses import dataclass
from pydantic_core import PydanticCustomError

T = TypeVar("T")


OWN = r"^[\w.]+:\w+$"
"""How a class of one's own is named: package.module:Class."""


class ConfigError(ValueError):
    """A setting is unknown, ill-typed or impossible; the message names it and says what to do."""


class Interpolated(str):
    """A text that `${…}` brought into a setting. It remembers the expression, and only that is ever written down.

    The value itself may be a secret (`${oc.env:TOKEN}`): `repr` shows the expression, and so do config.yaml and MLflow.
    """

    expression: str

    def __new__(cls, value: str, expression: str) -> "Interpolated":
        text = super().__new__(cls, value)
        text.expression = expression
        return text

    def __getnewargs__(self) -> tuple[str, str]:  # type: ignore[override]
        return str(self), self.expression

    def __repr__(self) -> str:
        return self.expression


def _check(cls: type, value: object, check: Callable[[object], object], info: ValidationInfo) -> object:
    """Wrapped around pydantic's own check of every field."""
    assert info.field_name is not None
    # Python counts True as 1, so `num_updates: true` would pass as one update.
    if isinstance(value, bool) and cls.__annotations__[info.field_name] is not bool:
        raise PydanticCustomError("int_type", "a truth value is no number")
    checked = check(value)
    # pydantic makes a plain str of every text, and the expression would be lost.
    return value if isinstance(value, Interpolated) and checked == value else checked


_CHECKED = ConfigDict(
    extra="forbid",
    use_attribute_docstrings=True,
    allow_inf_nan=False,
    coerce_numbers_to_str=True,
    validate_default=True,
)


@dataclass_transform(kw_only_default=True, frozen_default=True, field_specifiers=(dataclasses.field, Field))
def section(name: str) -> Callable[[type[T]], type[T]]:
    """Make a class the section `name` of the settings (`""`: the settings at the top)."""

    def decorate(cls: type[T]) -> type[T]:
        cls._check = field_validator("*", mode="wrap")(classmethod(_check))  # type: ignore[attr-defined]
        checked: Any = dataclass(cls, frozen=True, slots=True, kw_only=True, config=_CHECKED)
        plain_init = checked.__init__

        @functools.wraps(plain_init)
        def init(self: Any, *args: Any, **settings: Any) -> None:
            try:
                plain_init(self, *args, **settings)
            except ValidationError as error:
                raise as_config_error(error, cls=checked, name=name) from None

        checked.__init__ = init
        made: type[T] = checked
        return made

    return decorate


def built_in_or_own(built_in: Iterable[str]) -> Any:
    """Return what editors are told of a setting that names one of those built in, or a class of one's own."""
    own: dict[str, Any] = {"type": "string", "pattern": OWN, "examples": ["package.module:Class"]}
    return Field(json_schema_extra={"anyOf": [{"type": "string", "enum": [*built_in]}, own]})


def require(condition: bool, setting: str, found: object, rule: str) -> None:
    """Raise ConfigError `setting=found: rule` unless the condition holds; for rules between several settings."""
    if not condition:
        raise ConfigError(f"{setting}={_shown(found)}: {rule}")


def checked(cls: type[T], settings: Mapping[str, Any]) -> T:
    """The section with these plain nested values. Raises ConfigError."""
    try:
        return TypeAdapter(cls).validate_python(dict(settings))
    except ValidationError as error:
        raise as_config_error(error, cls=cls, name="") from None


def as_config_error(error: ValidationError, *, cls: type, name: str) -> ConfigError:
    """What pydantic found, a line per setting: `section.name=value: rule`."""
    lines: dict[str, str] = {}
    for found in error.errors(include_url=False):
        cause = found.get("ctx", {}).get("error")
        if isinstance(cause, ConfigError):
            lines[str(cause)] = str(cause)
            continue
        owner, path, rest = _resolve(cls, found["loc"])
        setting = ".".join(filter(None, [name, *path])) + "".join(f"[{i}]" for i in rest if isinstance(i, int))
        # One line per setting: of a union, pydantic reports every member that did not fit.
        lines.setdefault(setting, f"{setting}={_shown(found['input'])}: {_rule(owner, path, found['type'])}")
    return ConfigError("\n".join(lines.values()))


def _resolve(cls: type, loc: Sequence[int | str]) -> tuple[type, list[str], Sequence[int | str]]:
    """The section that owns the setting, the setting's path, and what of `loc` lies inside its value."""
    path: list[str] = []
    for depth, part in enumerate(loc):
        path.append(str(part))
        inner = subsections(cls).get(str(part))
        if inner is None or depth + 1 == len(loc):
            return cls, path, loc[depth + 1 :]
        cls = inner
    return cls, path, ()


def subsections(cls: type) -> dict[str, type]:
    """The settings of a section that are sections themselves."""
    fields = dataclasses.fields(cls)
    return {f.name: f.type for f in fields if isinstance(f.type, type) and dataclasses.is_dataclass(f.type)}


def field_schemas(cls: type) -> dict[str, dict[str, Any]]:
    """JSON schema of each setting of a section: type, bounds, default and meaning."""
    return dict(TypeAdapter(cls).json_schema()["properties"])


def _rule(owner: type, path: Sequence[str], kind: str) -> str:
    name = path[-1]
    known = [f.name for f in dataclasses.fields(owner)]
    if name not in known:
        near = difflib.get_close_matches(name, known, n=3)
        names = ", ".join(f"'{n}'" for n in near or known)
        return f"unknown setting. {'Did you mean one of' if near else 'There are'}: {names}"
    if name in subsections(owner):
        return f"{name} is a section of settings, a mapping {{setting: value}}"
    schema = field_schemas(owner)[name]
    if "enum" in schema:
        return f"expected one of {bounds_text(schema)}"
    if "type" in schema and kind.startswith(("greater_than", "less_than", "multiple_of")):
        return f"must be {bounds_text(schema)}"
    return f"must be {described(schema)}"


_KINDS = {
    "integer": "a whole number",
    "number": "a number",
    "string": "text",
    "boolean": "true or false",
    "object": "a mapping {name: value}",
    "null": "null",
}


def described(schema: Mapping[str, Any]) -> str:
    """Type and bounds of a setting in words: `a whole number ≥ 2`, `a number: 0 or > 1`, `one of uniform | beta`."""
    if "enum" in schema:
        return f"one of {bounds_text(schema)}"
    if "anyOf" in schema:
        members = schema["anyOf"]
        if any(member.get("type") == "null" for member in members):
            return " or ".join(described(member) for member in members)
        kinds = {member["type"] for member in members}
        kind = "text" if "string" in kinds else "a number" if "number" in kinds else "a whole number"
        return f"{kind}: {bounds_text(schema)}"
    if schema["type"] == "array":
        least = f" of at least {schema['minItems']}" if "minItems" in schema else ""
        return f"a list{least}, each {described(schema['items'])}"
    if schema["type"] == "string":
        return "text that is not empty" if "minLength" in schema else "text"
    return " ".join(filter(None, [_KINDS[schema["type"]], bounds_text(schema)]))


def bounds_text(schema: Mapping[str, Any]) -> str:
    """A setting's bounds: `≥ 2`, `in (0, 1]`, `0 or ≥ 16`, `uniform | beta`; empty where there are none."""
    if "enum" in schema:
        return " | ".join(map(str, schema["enum"]))
    if "const" in schema:
        return str(schema["const"])
    if "anyOf" in schema:
        return " or ".join(
            "null" if member.get("type") == "null" else bounds_text(member) for member in schema["anyOf"]
        )
    if schema.get("type") == "array":
        least = f"at least {schema['minItems']}" if "minItems" in schema else ""
        each = bounds_text(schema["items"])
        return ", ".join(filter(None, [least, each and f"each {each}"]))
    if "minLength" in schema:
        return "not empty"
    if "pattern" in schema:
        return " or ".join(schema["examples"])
    multiple = f"a multiple of {schema['multipleOf']}" if "multipleOf" in schema else ""
    return ", ".join(filter(None, [_interval(schema), multiple]))


def _interval(schema: Mapping[str, Any]) -> str:
    low, above = schema.get("minimum"), schema.get("exclusiveMinimum")
    high, below = schema.get("maximum"), schema.get("exclusiveMaximum")
    if (low is None and above is None) or (high is None and below is None):
        signs = {"≥": low, ">": above, "≤": high, "<": below}
        return "".join(f"{sign} {value:g}" for sign, value in signs.items() if value is not None)
    left = f"[{low:g}" if low is not None else f"({above:g}"
    right = f"{high:g}]" if high is not None else f"{below:g})"
    return f"in {left}, {right}"


def _shown(value: object) -> str:
    """A value as it may be shown: never what an interpolation brought."""
    if isinstance(value, Interpolated):
        return value.expression
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key}: {_shown(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(_shown, value)) + "]"
    return str(value)
