"""The reference of settings is made from the sections themselves and says something about each."""

import json
import re
from dataclasses import fields, is_dataclass

import pytest

from scripts.cli import main
from tests.support.paths import ROOT
from trace_async.config import Config, ConfigError, config_to_dict, load_config
from trace_async.config.reference import Setting, all_settings, find_settings, settings_page, settings_schema
from trace_async.config.section import subsections

# Any text is fine for these; what it names is checked where it is used (rules: tests/unit/method/test_registry.py).
FREE_TEXT = {
    "policy.path", "predictor.path", "engine.python", "engine.url", "actors.ray_address", "tracking.uri",
    "cold_start.chats",
}  # fmt: skip


def has_bounds(setting: Setting) -> bool:
    return setting.name not in FREE_TEXT and not setting.description.startswith(("true or false", "a mapping"))


def test_every_leaf_setting_is_listed_once_with_its_default():
    settings = all_settings()
    flat = {}
    for name, value in config_to_dict(Config()).items():
        flat |= {f"{name}.{k}": v for k, v in value.items()} if name in subsections(Config) else {name: value}
    assert [s.name for s in settings] == list(flat)
    assert len(settings) == sum(len(fields(f.type)) if is_dataclass(f.type) else 1 for f in fields(Config))


@pytest.mark.parametrize("setting", all_settings(), ids=lambda setting: setting.name)
def test_every_setting_has_a_meaning_and_a_bound_where_one_makes_sense(setting):
    assert setting.meaning.endswith(".")
    assert len(setting.meaning) > 10
    assert bool(setting.bounds) == has_bounds(setting), setting.bounds


@pytest.mark.parametrize("setting", [s for s in all_settings() if has_bounds(s)], ids=lambda setting: setting.name)
def test_a_value_outside_of_its_bounds_is_refused(setting):
    with pytest.raises(ConfigError, match=re.escape(f"{setting.name}=")):
        load_config(None, [f"{setting.name}={{no: such, value: 1}}"])
    if "≥" in setting.bounds or ">" in setting.bounds or "in [" in setting.bounds or "in (" in setting.bounds:
        wrong = "[-1.5]" if setting.bounds.startswith("at least") else "-1.5"
        with pytest.raises(ConfigError, match=re.escape(setting.name)):
            load_config(None, [f"{setting.name}={wrong}"])


def test_the_page_in_the_docs_is_of_these_settings():
    page = (ROOT / "docs/settings.md").read_text(encoding="utf-8")
    assert page == settings_page(), "run: trace-async settings --markdown > docs/settings.md"


def test_the_command_prints_a_setting_by_either_name_and_a_whole_section(capsys):
    assert main(["settings", "budget.stage2_rounds", "explore_share", "checkpoint"]) == 0
    text = capsys.readouterr().out
    assert re.findall(r"^(\S+) = ", text, re.MULTILINE) == [
        "budget.stage2_rounds", "budget.explore_share",
        "checkpoint.every_updates", "checkpoint.keep", "checkpoint.stop_within_s",
    ]  # fmt: skip
    assert "a whole number ≥ 1" in text
    assert "Tree-GRPO's L" in text


def test_the_command_suggests_the_nearest_name(capsys):
    assert main(["settings", "root_rolouts"]) == 2
    assert "Did you mean root_rollouts" in capsys.readouterr().err


def test_a_name_in_several_sections_finds_all():
    assert [s.name for s in find_settings("num_threads")] == [
        "predictor.num_threads", "learner.num_threads", "engine.num_threads",
    ]  # fmt: skip


def test_the_schema_for_editors_describes_every_setting_and_refuses_unknown_ones(capsys):
    assert main(["settings", "--json-schema"]) == 0
    schema = json.loads(capsys.readouterr().out)
    assert schema == json.loads(json.dumps(settings_schema()))
    assert schema["additionalProperties"] is False
    assert "base" in schema["properties"]
    budget = schema["$defs"]["BudgetConfig"]["properties"]
    assert budget["root_rollouts"] | {"title": ""} == {
        "type": "integer", "minimum": 2, "default": 64, "title": "",
        "description": "M: root rollouts of a round (alias train_batch_size × n).",
    }  # fmt: skip
    assert schema["$defs"]["EngineConfig"]["properties"]["weight_sync"]["enum"] == ["memory", "disk", "collective"]
    assert "uniform" in budget["stage1"]["anyOf"][0]["enum"]


def test_defaults_as_they_are_listed_are_defaults_as_they_are_read():
    told = [f"{s.name}={s.default}" for s in all_settings() if s.default not in ("{}", '""')]
    assert len(told) > 100
    assert load_config(None, told) == Config()
