"""`trace-async settings [NAME ...]`: meaning, default and bounds of settings."""

import argparse
import json

from trace_async.config.reference import all_settings, find_settings, settings_page, settings_schema, settings_text


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "names", nargs="*", metavar="NAME", help="a setting (budget.stage1, stage1) or a section (budget)"
    )
    form = parser.add_mutually_exclusive_group()
    form.add_argument(
        "--json-schema", action="store_true", help="print a JSON schema with which editors check YAML files"
    )
    form.add_argument("--markdown", action="store_true", help="print docs/settings.md")


def run(args: argparse.Namespace) -> int:
    if args.json_schema:
        print(json.dumps(settings_schema(), indent=1))
    elif args.markdown:
        print(settings_page(), end="")
    else:
        names = [setting for name in args.names for setting in find_settings(name)]
        print(settings_text(names or all_settings()))
    return 0
