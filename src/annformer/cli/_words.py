"""From the words of a command line to the arguments of a typed function."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable
from difflib import get_close_matches
from itertools import pairwise
from typing import Any, get_type_hints

from annformer.errors import InputError, input_error

ALWAYS = ("--help", "-h", "--config", "--print_config")


def arguments(name: str, command: Callable[..., int | None], words: list[str]) -> dict[str, Any] | None:
    """Parse `words` by the signature of `command`.

    Positional parameters are the bare words, keyword-only ones the options; their text is the docstring's.

    Returns
    -------
    The keyword arguments, or None when the words asked for help, which is then printed.
    """
    from jsonargparse import ArgumentError, ArgumentParser

    command.__annotations__ = get_type_hints(command)  # else jsonargparse runs the module's TYPE_CHECKING imports, which are heavy
    options = {f"--{p.name}": p.annotation for p in inspect.signature(command).parameters.values() if p.kind is p.KEYWORD_ONLY}
    words = _gather_lists(_normalise(name, words, options), command, options)
    parser = ArgumentParser(prog=f"annformer {name}", exit_on_error=False, allow_abbrev=False, description=_first_lines(command))
    parser.add_argument("--config", action="config", help="YAML file with any of the options below; what is typed wins")
    parser.add_function_arguments(command, as_group=False, as_positional=True)
    for action in parser._actions:
        if not action.option_strings:
            action.metavar = action.dest.upper()
    if "--help" in words or "-h" in words:
        parser.print_help()
        return None
    try:
        values = parser.parse_args(words).as_dict()
    except ArgumentError as error:
        raise _wrong_words(name, str(error), command, words) from None
    except SystemExit:  # --print_config, answered by jsonargparse
        return None
    values.pop("config", None)
    return values


def _normalise(name: str, words: list[str], options: dict[str, Any]) -> list[str]:
    """Spell options with underscores, let a bare flag stand for true, refuse options that do not exist."""
    known = [*options, *ALWAYS]
    result = []
    for position, word in enumerate(words):
        if not word.startswith("-") or word == "-" or _is_number(word):
            result.append(word)
            continue
        option, equals, value = word.partition("=")
        option = option if option == "-h" else "--" + option.lstrip("-").replace("-", "_")
        if option not in known:
            near = get_close_matches(option, known, n=2, cutoff=0.5)
            remedy = f"did you mean {' or '.join(near)}?" if near else f"`annformer {name} --help` says what each one does"
            found = f"`annformer {name}` has no option {word.partition('=')[0]}"
            raise input_error(found, "one of " + ", ".join(options), remedy)
        following = words[position + 1].lower() if position + 1 < len(words) else ""
        if options.get(option) is bool and not equals and following not in ("true", "false"):
            equals, value = "=", "true"
        result.append(option + equals + value)
    return result


def _gather_lists(words: list[str], command: Callable[..., int | None], options: dict[str, Any]) -> list[str]:
    """Write the values of every list as one JSON word, so that `--exclude A B` and several bare words need no brackets."""
    positional = [p.annotation for p in inspect.signature(command).parameters.values() if p.kind is not p.KEYWORD_ONLY]
    target = "" if positional == [list[str]] else None  # the list that a bare word belongs to; "": the positional one
    lists = {option for option, annotation in options.items() if str(annotation).startswith("list[")}
    result: list[str] = []
    gathered: dict[str, list[str]] = {}
    now, taken = target, False
    for word in words:
        if word.startswith("--"):
            option, equals, value = word.partition("=")
            now, taken = (option if option in lists else target), option not in lists and not equals
            if now == option:
                gathered.setdefault(option, []).extend([value] if equals else [])
            else:
                result.append(word)
        elif taken or now is None:
            result.append(word)
            taken = False
        else:
            gathered.setdefault(now, []).append(word)
    named = [f"{option}={json.dumps(values)}" for option, values in gathered.items() if option]
    return [*result, *named, *([json.dumps(gathered[""])] if "" in gathered else [])]


def _is_number(word: str) -> bool:
    try:
        float(word)
    except ValueError:
        return False
    return True


def _first_lines(command: Callable[..., int | None]) -> str:
    text = inspect.getdoc(command) or ""
    return text.split("\n\nParameters\n")[0].split("\n\nReturns\n")[0]


def _wrong_words(name: str, text: str, command: Callable[..., int | None], words: list[str]) -> InputError:
    """Say what jsonargparse refused in the words that the user typed."""
    remedy = f"see `annformer {name} --help`"
    parameters = inspect.signature(command).parameters.values()
    spelt = {p.name: f"--{p.name}" if p.kind is p.KEYWORD_ONLY else p.name.upper() for p in parameters}
    if text.startswith("the following arguments are required: "):
        missing = [spelt.get(word, word) for word in text.partition(": ")[2].split(", ")]
        usage = " ".join(f"--{p.name} ..." if p.kind is p.KEYWORD_ONLY else p.name.upper() for p in parameters if p.default is p.empty)
        return input_error(f"`annformer {name}` was called without {', '.join(missing)}", f"annformer {name} {usage}", remedy)
    if text.startswith("Problems parsing config: "):
        recipe = next((value for option, value in pairwise(words) if option == "--config"), "the recipe")
        return input_error(f"{recipe} cannot be read: {' '.join(text.partition(': ')[2].split())}", "a YAML file", "correct it")
    for key, word in spelt.items():
        text = text.replace(f'Parser key "{key}":', f"{word}:")
    return input_error(" ".join(text.split()).rstrip("."), "words and options as the help describes them", remedy)
