"""`trace-async`: the console command. Each subcommand is a module of `scripts/`, imported when it is called."""

import argparse
import importlib
import io
import os
import select
import signal
import sys

from trace_async.config import ConfigError
from trace_async.env import EnvError
from trace_async.printable import printable

COMMANDS = {
    "train": ("scripts.commands.train", "train a policy; --dry-run shows the plan, --resume RUN goes on"),
    "eval": ("scripts.commands.evaluate", "evaluate a policy on held-out tasks"),
    "status": ("scripts.commands.status", "whether a run is under way, how far it is, how many generators it has"),
    "scale": ("scripts.commands.scale", "have so many generators in a run that is under way"),
    "replay": ("scripts.commands.replay", "make an update of a run again, bit for bit, to look at it"),
    "compare": ("scripts.commands.compare", "methods × seeds at equal generated tokens, with a report"),
    "chat": ("scripts.commands.chat", "talk with a run's policy, or watch it at a held-out task"),
    "tree": ("scripts.commands.tree", "show a rollout tree of a run, or write the viewer's page"),
    "view": ("scripts.commands.view", "look at a run's trees and curves in a browser, also while it trains"),
    "setup-engines": ("scripts.commands.setup_engines", "build the environments of SGLang and vLLM"),
    "settings": ("scripts.commands.settings", "print meaning, default and bounds of settings"),
    "serve-retrieval": ("scripts.commands.serve_retrieval", "serve a corpus to search, on this machine"),
    "get-policy": ("scripts.commands.get_policy", "bring a pretrained policy here, converted and checked"),
    "make-policy": ("scripts.commands.make_policy", "build the small start policy of an environment"),
    "env": ("scripts.commands.env_check", "check an environment's contract"),
    "export": ("scripts.commands.export", "write a checkpoint's policy as a Hugging Face directory"),
}


def main(argv: list[str] | None = None) -> int:
    """Returns the exit status: 0 done, 1 the run failed, 2 the command or a setting is wrong."""
    parser = argparse.ArgumentParser(prog="trace-async", description="RL of LLM agents with TRACE, asynchronously.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    arguments = sys.argv[1:] if argv is None else argv
    for name, (module, help_text) in COMMANDS.items():
        sub = commands.add_parser(name, help=help_text)
        if arguments[:1] == [name]:
            importlib.import_module(module).add_arguments(sub)
    # argparse takes positionals in one stretch only; settings may stand anywhere among the options.
    args, rest = parser.parse_known_args(arguments)
    if any(word.startswith("-") or "=" not in word for word in rest) or (rest and not hasattr(args, "overrides")):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        args.overrides = [*args.overrides, *rest]
    # What cannot be encoded (a lone surrogate from data; anything beyond ASCII where that is all) is shown escaped.
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    # What a script puts into the background inherits an ignored Ctrl-C, which is how `compare` stops its runs.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())  # an environment of one's own may lie in the working directory; Ray hands it on
    try:
        status: int = importlib.import_module(COMMANDS[args.command][0]).run(args)
        sys.stdout.flush()
        return status
    except BrokenPipeError:
        if not _nobody_reads():
            raise
        return 128 + signal.SIGPIPE
    except (ConfigError, EnvError) as error:  # an environment may break down before any run: demonstrations play it
        print(f"trace-async: {printable(str(error), 10_000)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("trace-async: stopped", file=sys.stderr)
        return 130


def _nobody_reads() -> bool:
    """Whether stdout is a pipe whose reader, such as `head`, has gone; Python is then kept from complaining at exit."""
    poll = select.poll()
    poll.register(sys.stdout.fileno(), 0)  # what is wrong is told without being asked for
    if not any(event & select.POLLERR for _, event in poll.poll(0)):
        return False
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return True


if __name__ == "__main__":
    sys.exit(main())
