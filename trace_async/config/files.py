"""Read settings from YAML and the command line, and write them. From `load_config` on there are frozen dataclasses.

A file holds only what differs from the defaults, or from the files that its `base` names; overrides are
`section.name=value` and win over it.
"""

from collections.abc import Sequence
from dataclasses import asdict, fields
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_origin

from yaml import YAMLError

from trace_async.config.run import Config
from trace_async.config.section import (
    ConfigError,
    Interpolated,
    checked,
    described,
    field_schemas,
    require,
    subsections,
)

if TYPE_CHECKING:
    from omegaconf import DictConfig

SHIPPED = Path(str(files("configs")))


def load_config(path: str | Path | None = None, overrides: Sequence[str] = ()) -> Config:
    """The defaults, then the YAML file over its `base`, then the overrides, checked. Raises ConfigError.

    A `path` that does not exist may name a file that comes with the package, with or without `configs/` before it.
    """
    if path is None:
        return config_from_yaml("", overrides)
    try:
        return _checked_config([read_config_file(path), _from_dotlist(overrides)])
    except ConfigError as error:
        prefix = "" if str(error).startswith(str(path)) else f"{path}: "
        raise ConfigError(f"{prefix}{error}") from error


def config_from_yaml(text: str, overrides: Sequence[str] = ()) -> Config:
    """As `load_config`, from the text of a file, which then can have no `base`."""
    return _checked_config([_from_text(text), _from_dotlist(overrides)])


def read_config_file(path: str | Path, above: tuple[Path, ...] = ()) -> "DictConfig":
    """What a YAML file says over the files of its `base`, neither resolved nor checked. Raises ConfigError.

    `base: FILE` or `base: [FILE, ...]`, relative to the file that names them; a later one wins over an earlier one.
    `above`: the files that led here.
    """
    from omegaconf import DictConfig, ListConfig, OmegaConf

    file = find_config(path).resolve()
    if file in above:
        raise ConfigError("base goes round in a circle: " + " → ".join(str(f) for f in (*above, file)))
    try:
        own = _from_text(file.read_text(encoding="utf-8"))
        bases = own.pop("base", [])
        bases = [bases] if isinstance(bases, str) else bases
        if not isinstance(bases, list | ListConfig) or not all(isinstance(base, str) for base in bases):
            raise ConfigError(f"base={bases}: a file or a list of files, relative to this one")
        for base in bases:
            if not (file.parent / base).is_file():
                raise ConfigError(f"base={base}: {file.parent / base} does not exist")
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error
    merged = OmegaConf.merge(*(read_config_file(file.parent / base, (*above, file)) for base in bases), own)
    assert isinstance(merged, DictConfig)
    return merged


def find_config(path: str | Path) -> Path:
    """The file of that name, or the one that comes with the package. Raises ConfigError."""
    wanted = Path(path)
    if wanted.is_file():
        return wanted
    inside = Path(*wanted.parts[1:]) if wanted.parts[:1] == ("configs",) else wanted
    if not wanted.is_absolute() and (SHIPPED / inside).is_file():
        return SHIPPED / inside
    known = ", ".join(sorted(str(file.relative_to(SHIPPED)) for file in SHIPPED.glob("quickstart/*.yaml")))
    raise ConfigError(f"config file {path} does not exist; with the package come {known} and others")


def config_to_dict(config: Config) -> dict[str, Any]:
    """Nested plain values, for YAML and MLflow. What `${…}` brought is written as that expression, never its value."""
    settings: dict[str, Any] = _forget_values(asdict(config))
    return settings


def config_to_yaml(config: Config) -> str:
    """All settings as YAML that `load_config` reads back."""
    from omegaconf import OmegaConf

    return OmegaConf.to_yaml(OmegaConf.create(config_to_dict(config)))


def _from_text(text: str) -> "DictConfig":
    from omegaconf import DictConfig, OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    try:
        settings = OmegaConf.create(text)
    except (OmegaConfBaseException, YAMLError) as error:
        raise ConfigError(_in_words(error)) from error
    if not isinstance(settings, DictConfig):
        raise ConfigError("settings are a mapping {section: {setting: value}}")
    _require_mappings(OmegaConf.to_container(settings))
    return settings


def _from_dotlist(overrides: Sequence[str]) -> "DictConfig":
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    try:
        settings = OmegaConf.from_dotlist(list(overrides))
    except (OmegaConfBaseException, YAMLError) as error:
        raise ConfigError(_in_words(error)) from error
    _require_mappings(OmegaConf.to_container(settings))
    return settings


def _checked_config(given: Sequence["DictConfig"]) -> Config:
    """Merged, resolved and checked. Imports OmegaConf here: what needs no file runs where it is not installed."""
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    for settings in given:
        require("base" not in settings, "base", settings.get("base"), "only a file has one, relative to its own place")
    try:
        # The defaults are merged too, so that an expression can name a setting that was not given.
        merged = OmegaConf.merge(OmegaConf.create(config_to_dict(Config())), *given)
        raw = OmegaConf.to_container(merged, resolve=False)
        resolved = OmegaConf.to_container(merged, resolve=True, throw_on_missing=True)
    except (OmegaConfBaseException, YAMLError) as error:
        raise ConfigError(_in_words(error)) from error
    except TypeError as error:
        # OmegaConf's words where one text has a list and another a mapping, deep inside env.args or the like.
        raise ConfigError(f"one setting is given a list here and a mapping there ({error})") from error
    return checked(Config, _remember_expressions(raw, resolved))


def _require_mappings(settings: Any, cls: type = Config, section: str = "") -> None:
    """OmegaConf would merge a number or a list into a section without a word, or raise TypeError."""
    for field in (field for field in fields(cls) if field.name in settings):
        setting, value = section + field.name, settings[field.name]
        if inner := subsections(cls).get(field.name):
            require(isinstance(value, dict), setting, value, "a section of settings, {setting: value}")
            _require_mappings(value, inner, f"{setting}.")
        elif get_origin(field.type) is dict:
            require(isinstance(value, dict), setting, value, "must be a mapping {name: value}")
        elif isinstance(value, dict):
            require(False, setting, value, f"must be {described(field_schemas(cls)[field.name])}")


def _remember_expressions(raw: Any, resolved: Any) -> Any:
    """`resolved` with every text that an interpolation of `raw` brought as Interpolated."""
    if isinstance(raw, dict):
        return {key: _remember_expressions(raw[key], value) for key, value in resolved.items()}
    if isinstance(raw, list):
        return [_remember_expressions(*pair) for pair in zip(raw, resolved, strict=True)]
    if not isinstance(raw, str) or "${" not in raw:
        return resolved
    if isinstance(resolved, dict | list):
        # Its texts would be written down with their values, and one of them may be a secret.
        raise ConfigError(f"{raw} stands for a whole section or list; only single values can be interpolated")
    return Interpolated(resolved, raw) if isinstance(resolved, str) else resolved


def _forget_values(value: Any) -> Any:
    if isinstance(value, Interpolated):
        return value.expression
    if isinstance(value, dict):
        return {key: _forget_values(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_forget_values(item) for item in value]
    return value


def _in_words(error: Exception) -> str:
    """What OmegaConf or the YAML parser found, without their internals; the setting comes first where it is known."""
    setting = getattr(error, "full_key", None)
    if not setting:
        return str(error).strip()
    found = str(error).splitlines()[0].removeprefix("KeyError raised while resolving interpolation: ").strip('"')
    return f"{setting}: {found}"
