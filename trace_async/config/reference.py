"""The settings as a reference, made from the sections: for the terminal, for docs/settings.md and for editors."""

import difflib
import inspect
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import TypeAdapter

from trace_async.config.run import Config
from trace_async.config.section import ConfigError, bounds_text, described, field_schemas, subsections

PAGE_HEAD = """\
# Settings

Made by `trace-async settings --markdown` from the meanings and bounds that stand under each field in
`trace_async/config`; do not edit it here. A YAML file holds only what differs from the defaults, `base:` names the
files it builds on, and `section.name=value` on the command line wins over both. `${oc.env:NAME}` takes a value from the
environment; only the expression is ever written down. `trace-async settings NAME` prints a setting or a section, and
`trace-async settings --json-schema` a schema with which editors check YAML files.
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """One leaf setting. `name` has its section; `default` is as it would be written in YAML."""

    name: str
    default: str
    bounds: str
    description: str
    meaning: str


def all_settings(cls: type = Config, section: str = "") -> list[Setting]:
    """Every leaf setting, in the order of its declaration."""
    inner, found = subsections(cls), []
    for name, schema in field_schemas(cls).items():
        if name in inner:
            found += all_settings(inner[name], f"{section}{name}.")
            continue
        value = schema.get("default", {})  # only mappings have a factory in place of a default
        found.append(
            Setting(
                name=section + name,
                default=value if isinstance(value, str) and value else json.dumps(value),
                bounds=bounds_text(schema),
                description=described(schema),
                meaning=" ".join(schema["description"].split()),
            )
        )
    return found


def find_settings(name: str) -> list[Setting]:
    """The setting of that name, with or without its section, or all of a section. Raises ConfigError."""
    known = all_settings()
    for matches in (
        [s for s in known if s.name == name],
        [s for s in known if s.name.startswith(f"{name}.")],
        [s for s in known if s.name.rpartition(".")[2] == name],
    ):
        if matches:
            return matches
    names = [s.name for s in known] + [s.name.rpartition(".")[2] for s in known] + list(subsections(Config))
    near = difflib.get_close_matches(name, names, n=3, cutoff=0.5)
    hint = f"Did you mean {', '.join(dict.fromkeys(near))}" if near else f"Sections: {', '.join(subsections(Config))}"
    raise ConfigError(f"there is no setting or section {name}. {hint}")


def settings_text(settings: Sequence[Setting]) -> str:
    """For the terminal: `name = default`, type and bounds, meaning."""
    return "\n\n".join(f"{s.name} = {s.default}\n    {s.description}\n    {s.meaning}" for s in settings)


def settings_page() -> str:
    """docs/settings.md."""
    known = all_settings()
    lines = [PAGE_HEAD]
    for name, cls in {"": Config, **subsections(Config)}.items():
        own = [s for s in known if s.name.rpartition(".")[0] == name]
        lines += [f"## {name or 'The run'}", "", inspect.getdoc(cls) or "", ""]
        lines += ["| setting | default | bounds | meaning |", "|---|---|---|---|"]
        lines += [f"| `{s.name}` | `{s.default}` | {_cell(s.bounds)} | {_cell(s.meaning)} |" for s in own]
        lines.append("")
    return "\n".join(lines)


def settings_schema() -> dict[str, Any]:
    """JSON schema of a settings file, with `base`, which is resolved before settings are checked."""
    schema = TypeAdapter(Config).json_schema()
    files = {"type": "string"}
    schema["properties"]["base"] = {
        "anyOf": [files, {"type": "array", "items": files}],
        "description": "Files that this one builds on, relative to it; later ones win over earlier ones.",
    }
    return schema


def _cell(text: str) -> str:
    return text.replace("|", "\\|")
