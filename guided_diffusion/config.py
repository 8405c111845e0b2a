"""
The command line of the programs: what an option is, the options that every program has, and the flags made from them.

The others stand in `network_options`, `training_options` and `sampling_options`, each written once (name, default,
help). A program takes a few groups of them: `args = parse("...", TrainOptions, ModelOptions, DiffusionOptions)`. To be
imported, all of these need the standard library alone (and `presets`, which needs no more).
"""

import argparse
import contextlib
import dataclasses
import difflib
import math
import os
import sys
from dataclasses import dataclass

from . import presets


def option(default, help, choices=None, kind=None):
    """
    A field of an options dataclass: what a flag of that name needs. The type is that of the default, or what `kind`, a
    function, makes of the text.
    """
    return dataclasses.field(default=default, metadata={"help": help, "choices": choices, "kind": kind})


def changed(group, name, default, help=None):
    """The option `name` of another group with another default, and other help if given."""
    metadata = group.__dataclass_fields__[name].metadata
    return dataclasses.field(default=default, metadata={**metadata, "help": help or metadata["help"]})


@dataclass
class RunOptions:
    """run"""

    seed: int = option(0, "seed of everything random: the same seed and options give the same run")
    preset: str = option(
        "",
        "take the flags of a published model, but for those typed: of its network and its process; in sampling also its"
        " files, which are downloaded once, its steps and its scale of guidance; in training a cascade from text to"
        " image, those of a recipe",
        (*presets.PRESETS, *presets.RECIPES),
    )
    device: str = option("", "cpu, cuda, cuda:1, mps...; empty: a GPU if there is one")
    precision: str = option(
        "",
        "arithmetic in the bodies of the networks; their norms, embeddings, softmaxes and ends, and all checkpoints,"
        " are fp32 always; empty: as --use_fp16 and --classifier_use_fp16 say",
        ("", "fp32", "bf16", "fp16"),
    )
    log_dir: str = option("", "folder for everything written; empty: $OPENAI_LOGDIR, else a new temporary folder")
    log_formats: str = option(
        "",
        "where the log goes: stdout, log, csv, json, jsonl, tensorboard, wandb, with commas between; empty:"
        " $OPENAI_LOG_FORMAT, else stdout,log,csv",
    )


def options(*groups):
    """{name: field} over the groups. Raises ValueError if two groups give one name different defaults."""
    found = {}
    for field in (field for group in groups for field in dataclasses.fields(group)):
        other = found.setdefault(field.name, field)
        if repr(other.default) != repr(field.default):
            raise ValueError(f"option {field.name} has two defaults: {other.default!r} and {field.default!r}")
    return found


def defaults(*groups):
    """{name: default} over the groups."""
    return {name: field.default for name, field in options(*groups).items()}


def str2bool(text):
    """True for yes, true, t, y, 1; False for no, false, f, n, 0, in any case; else argparse.ArgumentTypeError."""
    if isinstance(text, bool):
        return text
    if text.lower() in ("yes", "true", "t", "y", "1"):
        return True
    if text.lower() in ("no", "false", "f", "n", "0"):
        return False
    raise argparse.ArgumentTypeError(f"boolean value expected, got {text!r}")


def parse_int(text):
    """A whole number, also as 1e5 or 100_000; else argparse.ArgumentTypeError."""
    for read in (int, float):
        try:
            number = read(text)
        except ValueError:
            continue
        if number == number // 1:
            return int(number)
    raise argparse.ArgumentTypeError(f"whole number expected, got {text!r}")


def parse_float(text):
    """A finite number; else argparse.ArgumentTypeError."""
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise argparse.ArgumentTypeError(f"number expected, got {text!r}")
    return number


def add_flag(parser, name, default, help=None, choices=None, kind=None):
    """
    Add --NAME VALUE, of the type of its default (None counts as text; a bare boolean flag means True; a tuple takes
    one text or more) or as the function `kind` reads it, to an argparse parser. What was not typed is absent from the
    parsed namespace unless the parser fills it in.
    """
    kind = kind or {bool: str2bool, int: parse_int, float: parse_float}.get(type(default), str)
    several = isinstance(default, tuple)
    bare = {"nargs": "?", "const": True} if kind is str2bool else {"nargs": "+"} if several else {}
    metavar = None if choices else "STR" if default is None or several else type(default).__name__.upper()
    shown = f"{help or ''} (default: {default if str(default) else repr('')})".replace("%", "%%")
    parser.add_argument(f"--{name}", type=kind, choices=choices, metavar=metavar, help=shown, **bare)


class _Parser(argparse.ArgumentParser):
    """A parser whose errors are one ValueError, not a page of usage."""

    def error(self, message):
        raise ValueError(f"{message} (see --help)")


def parse(description, *groups, argv=None, positional=None):
    """
    Parse the command line.

    :param description: one sentence for --help.
    :param groups: options dataclasses; a name in several groups is one flag.
    :param argv: list of words; None takes those of the process.
    :param positional: {name: help} of texts that are typed without a flag.
    :return: argparse.Namespace of every option, and `explicit`: the set of names that were typed.
    :raises ValueError: for an unknown flag (with the nearest names) or a value that cannot be read.
    """
    known = options(*groups)
    positional = positional or {}
    parser = _Parser(
        description=description,
        usage=" ".join(["%(prog)s", *map(str.upper, positional), "[--name value] ..."]),
        argument_default=argparse.SUPPRESS,
        epilog="GD_DEBUG=1 in the environment shows the traceback of an error.",
    )
    for name, help in positional.items():
        parser.add_argument(name, metavar=name.upper(), help=help)
    left = dict(known)
    for group in groups:
        section = parser.add_argument_group(group.__doc__)
        for field in dataclasses.fields(group):
            if left.pop(field.name, None):
                add_flag(section, field.name, field.default, **field.metadata)
    typed, unknown = parser.parse_known_args(argv)
    if unknown:
        word = unknown[0].split("=")[0]
        parser.error(f"unknown flag {word}{nearest(word, [f'--{name}' for name in known])}")
    values = {name: field.default for name, field in known.items()} | from_preset(vars(typed), known) | vars(typed)
    values = {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}
    return argparse.Namespace(**values, explicit=set(vars(typed)) - set(positional))


def answer_help(module, description, *groups, positional=None):
    """
    Where a module named `module` is the program that runs, and --help was typed: answer it and end the process. For
    programs to call before they import what takes seconds. Of a command line with an error, `parse` tells in its turn.
    """
    with contextlib.suppress(ValueError):
        help_first(module, lambda: parse(description, *groups, positional=positional))


def help_first(module, parse):
    """`answer_help` for programs with an argparse parser of their own: parse() is what reads their command line."""
    if module == "__main__" and {"-h", "--help"} & set(sys.argv[1:]):
        parse()


def from_preset(typed, known):
    """{name: value} that the --preset among the typed flags gives a program of these flags; {} without one."""
    return presets.typed_for(typed["preset"], known) if typed.get("preset") else {}


def nearest(word, names):
    """'; did you mean a or b?' for the names most like the word, or nothing if none is near."""
    close = difflib.get_close_matches(word, list(names), n=3)
    return f"; did you mean {' or '.join(close)}?" if close else ""


def flags_of(args, *groups):
    """{name: value} of the options of the groups, for a builder or a config.json."""
    return {name: getattr(args, name) for name in options(*groups)}


def explicit_flags(args):
    """{name: value} of the options that were typed, and the steps to sample in that --preset has."""
    steps = {"timestep_respacing"} & from_preset(vars(args), vars(args)).keys()
    return {name: getattr(args, name) for name in args.explicit | steps}


def log_formats(args, main):
    """The names of log writers that --log_formats asks for on the main process, or None for the usual ones."""
    return args.log_formats.split(",") if args.log_formats and main else None


def describe(args):
    """A text with a line for each option, aligned; * marks those that were typed."""
    values = {name: value for name, value in vars(args).items() if name != "explicit"}
    width = max(map(len, values))
    return "\n".join(
        f"{'*' if name in args.explicit else ' '} {name:<{width}}  {value!r}" for name, value in values.items()
    )


def run_program(main):
    """
    Run a program: bad input ends it with one line on stderr and exit code 2, an interrupt with 130.
    GD_DEBUG=1 in the environment lets the traceback through.
    """
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
    except (ValueError, OSError, ImportError, NotImplementedError, ArithmeticError) as error:
        if os.environ.get("GD_DEBUG") == "1":
            raise
        print("error:", " ".join(str(error).split()) or type(error).__name__, file=sys.stderr)
        sys.exit(2)
