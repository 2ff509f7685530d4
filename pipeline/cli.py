"""The command line: one table of commands, each a config dataclass and a function of `pipeline.api` or `.chain`."""

from __future__ import annotations

import json
import re
import sys
import traceback
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass
from difflib import get_close_matches
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from jsonargparse import ArgumentParser, set_parsing_settings

from pipeline import __version__
from pipeline import config as options
from pipeline.config.checks import Checked
from pipeline.errors import CasesFailedError, InputError, StoppedError, VoxfitError
from pipeline.log import configure_logging
from pipeline.rank_place import find_place
from pipeline.requeue import requeue_after
from pipeline.stop_signals import STOPPED_LINE, StopSignal, raised_signal, stop_signals_raised


class Command(NamedTuple):
    """A command: its options, the function that does it, and the one that shows its result as text."""

    config: type[Any]
    function: str
    show: str = ""


COMMANDS = {
    "run": Command(options.RunConfig, "pipeline.chain:run", "pipeline.chain:describe_run"),
    "inspect": Command(
        options.InspectConfig, "pipeline.api:inspect", "pipeline.datasets.inspection:describe_inspection"
    ),
    "plan": Command(options.PlanConfig, "pipeline.api:plan", "pipeline.planning.explain:describe_plan"),
    "preprocess": Command(options.PreprocessConfig, "pipeline.api:preprocess"),
    "train": Command(options.TrainConfig, "pipeline.api:train"),
    "status": Command(options.StatusConfig, "pipeline.api:status", "pipeline.status:describe_status"),
    "predict": Command(options.PredictConfig, "pipeline.api:predict"),
    "evaluate": Command(
        options.EvaluateConfig, "pipeline.api:evaluate", "pipeline.evaluation.explain:describe_metrics"
    ),
    "compare": Command(
        options.CompareConfig, "pipeline.api:compare", "pipeline.evaluation.comparison_table:describe_comparison"
    ),
    "postprocess": Command(
        options.PostprocessConfig, "pipeline.api:postprocess", "pipeline.inference.postprocess:describe_postprocessing"
    ),
    "export": Command(options.ExportConfig, "pipeline.api:export"),
    "doctor": Command(options.DoctorConfig, "pipeline.api:doctor", "pipeline.doctor.explain:describe_examination"),
    "slurm": Command(
        options.SlurmConfig, "pipeline.job_scripts:slurm", "pipeline.job_scripts.writing:describe_job_scripts"
    ),
}


class Positional(NamedTuple):
    """The option that is given without its name, what it is for, and whether several values of it may follow."""

    name: str
    help: str
    is_many: bool = False


POSITIONAL = {
    "inspect": Positional(
        "path", "A dataset (folder, dataset.json, CSV or JSON list), or a folder with DICOM series at any depth."
    ),
    "status": Positional("path", "A run folder, or a work folder with several folds."),
    "compare": Positional(
        "runs",
        "Run folders of `voxfit train` or `voxfit run`; the others are compared with the first.",
        is_many=True,
    ),
}
PROGRAM = "voxfit"
NUMBER = re.compile(r"-?(\d+\.?\d*|\.\d+)(e-?\d+)?")
LIST = re.compile(r"tuple\[(\w+), \.\.\.\]")
UNION_ERROR = re.compile(
    r'Parser key "(?P<key>[^"]+)":\s+Does not validate.*?Subtypes: \[(?P<kinds>[^\n]*)\]'
    r".*?Given value: (?P<value>[^\n]*)",
    re.DOTALL,
)


class Parser(ArgumentParser):
    """A parser whose errors are one short message instead of the whole usage."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Print what is wrong and where to read more; exit code 2."""
        print(f"error: {_shorten(message)}\nSee `{self.prog} --help`.", file=sys.stderr)
        sys.exit(2)


def build_parsers(names: Iterable[str]) -> tuple[Parser, dict[str, Parser]]:
    """The parser, and its subparsers by command, made from the config dataclasses.

    Args:
        names: Commands that it knows; one alone is made in a tenth to a quarter of the time of all.
    """
    set_parsing_settings(docstring_parse_attribute_docstrings=True, subclasses_disabled=[Checked])
    parser = Parser(prog=PROGRAM, description=sys.modules["pipeline"].__doc__)
    parser.add_argument("--version", action="version", version=f"{PROGRAM} {__version__}")
    subcommands = parser.add_subcommands()
    subparsers = {}
    for name in names:
        command = COMMANDS[name]
        sub = Parser(description=command.config.__doc__)
        sub.add_argument("--config", action="config", help="YAML file; flags override it.")
        positional = POSITIONAL.get(name)
        if positional is not None:
            many: dict[str, Any] = {"nargs": "+"} if positional.is_many else {}
            sub.add_argument(positional.name, type=str, help=positional.help, **many)
        sub.add_class_arguments(command.config, skip={positional.name} if positional is not None else None)
        subcommands.add_subcommand(name, sub, help=command.config.__doc__)
        sub.prog = f"{PROGRAM} {name}"
        subparsers[name] = sub
    return parser, subparsers


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse, build the frozen config, import the command's module, run it; returns the exit code."""
    try:
        # A scheduler's signals end a command like Ctrl-C does; a training finishes its step first.
        with stop_signals_raised():
            name, config = parse(sys.argv[1:] if arguments is None else arguments)
            # Of the commands only this one is started several times to do one thing together.
            configure_logging(find_place().rank if name == "train" else 0)
            return run_command(COMMANDS[name], config)
    except StoppedError as error:
        _say("stopped", error)
        requeue_after(error.signal)
        return error.exit_code
    except KeyboardInterrupt as stop:
        return _stopped(stop.number if isinstance(stop, StopSignal) else 0)
    except Exception as error:
        if raised_signal():
            # An error that it became on its way, in code that knows no signals.
            return _stopped(raised_signal())
        if isinstance(error, VoxfitError):
            _say("error", error)
            return error.exit_code
        traceback.print_exc()
        return 1


def _say(word: str, error: VoxfitError) -> None:
    """Say how a command ended, in one place where several processes end for the same reason."""
    if not error.is_said_elsewhere:
        print(f"{word}: {error}", file=sys.stderr)


def _stopped(number: int) -> int:
    print(STOPPED_LINE, file=sys.stderr)
    requeue_after(number)
    return StoppedError.exit_code


def run_command(command: Command, config: Any) -> int:
    """Run a command and show its result; what was done is shown as well when some cases failed."""
    try:
        function = _load(command.function)
        if lost := raised_signal():
            raise StopSignal(lost)
        result = function(config)
        _show(command, result)
    except CasesFailedError as error:
        _show(command, error.result)
        raise
    return int(getattr(result, "exit_code", 0))


def _show(command: Command, result: Any) -> None:
    if command.show and result is not None:
        from rich.console import Console

        shown = _load(command.show)(result)
        # Text may be meant for a program and is not wrapped; a batch job has no terminal to ask for a table's width.
        console = Console() if sys.stdout.isatty() else Console(width=120)
        print(shown) if isinstance(shown, str) else console.print(shown)


def parse(arguments: Sequence[str]) -> tuple[str, Any]:
    """The command's name and its config; ends the program with one message and code 2 where options are wrong."""
    name = next((word for word in arguments if not word.startswith("-")), "")
    parser, subparsers = build_parsers([name] if name in COMMANDS else COMMANDS)
    if name in COMMANDS:
        config = COMMANDS[name].config
        _refuse_unknown(subparsers[name], arguments, set(option_names(config)))
        lists = {f"--{key}": kind for key, kind in _lists(config)}
        arguments = list(_spell_out(_files_first(arguments), {f"--{key}" for key in _switches(config)}, lists))
    parsed = parser.parse_args(arguments)
    values = vars(parser.instantiate(parsed)[parsed.subcommand])
    values.pop("config", None)
    return parsed.subcommand, COMMANDS[parsed.subcommand].config(**values)


def option_names(config: type[Any], prefix: str = "") -> Iterator[str]:
    """Dotted names of all options of a config dataclass, groups included."""
    for item in fields(config):
        yield prefix + item.name
        group: object = item.default_factory
        if isinstance(group, type) and is_dataclass(group):
            yield from option_names(group, f"{prefix}{item.name}.")


def _refuse_unknown(parser: Parser, arguments: Sequence[str], known: set[str]) -> None:
    """End with every misspelt flag and YAML key at once, each with the nearest name that exists."""
    own = {"help", "config", "print_config"}
    flags = [word[2:].split("=", 1)[0].rstrip("+") for word in arguments if word.startswith("--")]
    problems = [("option --", flag) for flag in flags if flag not in known | own]
    for path in _config_files(arguments):
        problems += [(f"key in {path}: ", key) for key in _yaml_keys(path) if key not in known]
    if problems:
        parser.error("; ".join(f"unknown {kind}{name}{_suggest(name, known)}" for kind, name in problems))


def _suggest(name: str, known: set[str]) -> str:
    if name in COMMANDS:
        return f" (there is a command `{PROGRAM} {name}`)"
    close = get_close_matches(name, known, n=1)
    return f" (did you mean {close[0]}?)" if close else ""


def _files_first(arguments: Sequence[str]) -> list[str]:
    """The YAML files before all flags, which override them wherever they stand; the parser takes what comes last."""
    files, others = _split_files(arguments)
    command = next(index for index, word in enumerate(others) if not word.startswith("-"))
    flags = [f"--config={name}" for name in files]
    return [*others[: command + 1], *flags, *others[command + 1 :]]


def _split_files(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """The names that `--config` gives, and all other words."""
    files, others, words = [], [], list(arguments)
    while words:
        word = words.pop(0)
        if word == "--config" and words:
            files.append(words.pop(0))
        elif word.startswith("--config="):
            files.append(word.split("=", 1)[1])
        else:
            others.append(word)
    return files, others


def _config_files(arguments: Sequence[str]) -> list[Path]:
    return [path for path in map(Path, _split_files(arguments)[0]) if path.is_file()]


def _yaml_keys(path: Path) -> Iterator[str]:
    import yaml

    try:
        yield from _dotted(yaml.safe_load(path.read_text(encoding="utf-8")), "")
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"is not valid YAML ({' '.join(str(error).split())})", where=path) from error


def _dotted(value: Any, prefix: str) -> Iterator[str]:
    if isinstance(value, dict):
        for key, item in value.items():
            yield f"{prefix}{key}"
            yield from _dotted(item, f"{prefix}{key}.")


def _switches(config: type[Any]) -> set[str]:
    return {item.name for item in fields(config) if item.type in ("bool", bool)}


def _lists(config: type[Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Dotted names of the options that take any number of values, and of which kind these are."""
    for item in fields(config):
        group: object = item.default_factory
        if isinstance(group, type) and is_dataclass(group):
            yield from _lists(group, f"{prefix}{item.name}.")
        elif found := LIST.search(str(item.type)):
            yield prefix + item.name, found[1]


def _spell_out(arguments: Sequence[str], switches: set[str], lists: Mapping[str, str]) -> Iterator[str]:
    """Write `--switch` as `--switch true` and `--key 1 2 3`, `--key 1,2,3` or `--key a b` as `--key [...]`."""
    words = list(arguments)
    while words:
        word = words.pop(0)
        yield word
        if word in switches and (not words or words[0].lower() not in ("true", "false")):
            yield "true"
        if word.startswith("--") and words:
            yield from _word_list(words) if lists.get(word) == "str" else _number_list(words, always=word in lists)


def _number_list(words: list[str], *, always: bool) -> list[str]:
    """The numbers at the beginning, which are taken off, as one word; a single one as a list too if `always`."""
    numbers: list[str] = []
    while words and all(NUMBER.fullmatch(part) for part in words[0].split(",")):
        numbers += words.pop(0).split(",")
    if not numbers:
        return []
    return [numbers[0] if len(numbers) == 1 and not always else f"[{','.join(numbers)}]"]


def _word_list(words: list[str]) -> list[str]:
    """The words before the next option, which are taken off, as one word; a single one stays as it is."""
    count = next((index for index, word in enumerate(words) if word.startswith("--")), len(words))
    taken = [words.pop(0) for _ in range(count)]
    return [json.dumps(taken)] if len(taken) > 1 else taken


def _shorten(message: str) -> str:
    """One line for what jsonargparse says over several about unions, and option names as they are typed."""
    found = UNION_ERROR.search(message)
    if found:
        kinds = re.sub(r"<class '(\w+)'>", r"\1", found["kinds"])
        kinds = re.sub(r"tuple\[(\w+), \1, \1\]", r"three values of \1", kinds)
        kinds = re.sub(r"typing\.Literal\[([^\]]*)\]", r"\1", kinds).replace(", ", " or ")
        return f"{found['key']}: expected {kinds}, got {found['value']}"
    message = re.sub(r"arguments are required: \w+\.", "arguments are required: --", message)
    message = re.sub(r"typing\.Literal\[([^\]]*)\]", r"one of \1", message)
    message = message.replace("Parser key ", "").replace("Expected a ", "expected ")
    return " ".join(message.split())


def _load(target: str) -> Any:
    module, function = target.split(":")
    return getattr(import_module(module), function)


if __name__ == "__main__":
    sys.exit(main())
