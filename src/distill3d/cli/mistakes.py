"""What is wrong with a command line, in one line: what was got, what is allowed, what to type.

tyro frames its messages for a terminal and speaks of its own types; here they are unframed and put in a user's words.
A message that no pattern knows is passed on as it is, so nothing is lost when tyro changes its sentences.
"""

from __future__ import annotations

import difflib
import re

_DUMMY = r"(?:__tyro[-_]dummy[-_]inner__\.?)"
_NUMBERS = {"INT": "a whole number", "FLOAT": "a number", "STR": "a word", "PATH": "a path", "{None}": "None"}
_SUGGESTIONS = 3


def one_line(panel: str, command: str = "") -> str:
    """The message inside tyro's framed error.

    Args:
        panel: what tyro wrote on stderr, with frame, colors and line breaks.
        command: the command it is about, whose help is named; "" where there is none.
    """
    lines = [_unframed(line) for line in re.sub(r"\x1b\[[0-9;]*m", "", panel).splitlines()]
    message = " ".join(line for line in lines if line).split(" Argument helptext:")[0]
    message = re.sub(r"^(Value error|Required options|Parsing error|Missing argument|Invalid choice) ", "", message)
    message, *usage = re.split(r" For full helptext, (?:run|see):? ", message, maxsplit=1)
    program = f"distill3d {command}".strip()
    told = _in_words(message) or "this command line cannot be read"
    return f"{told}; see {usage[0].replace('distill3d --', f'{program} --') if usage else f'{program} --help'}"


def _unframed(line: str) -> str:
    """A line without the frame, which is of box characters or of ASCII; "" for what is frame alone."""
    line = line.strip()
    if found := re.fullmatch(r"[╭+]?[─-]+ (.*?) [─-]+[╮+]?", line):  # the frame's title
        return found[1]
    return "" if re.fullmatch(r"[│┃|╰+ ]*[─-]{4,}[│┃|╯+ ]*", line) else re.sub(r"^[│┃|] *| *[│┃|]$", "", line).strip()


def _in_words(message: str) -> str:
    if found := re.match(
        r"Unrecognized (?:or misplaced )?options:? (?:Unrecognized (?:or misplaced )?options: )?", message
    ):
        return _unknown(message[found.end() :])
    if found := re.match(
        r"Error parsing (\S+): no type matching (\S+) could be instantiated from \['(.*?)'\]", message
    ):
        flag, kinds, got = found.groups()
        return f"{flag} takes {_kinds(kinds)}, got {got!r}"
    if found := re.match(r"Error parsing (\S+): invalid literal for int\(\) with base 10: '(.*)'$", message):
        return f"{found[1]} takes a whole number, got {found[2]!r}"
    if found := re.match(r"Error parsing (\S+): could not convert string to float: '(.*)'$", message):
        return f"{found[1]} takes a number, got {found[2]!r}"
    if found := re.match(r"Error parsing (\S+): Could not find valid parse for arguments: \[(.*)\]", message):
        return f"{found[1]} takes another number of values or other values, got {found[2]}"
    if found := re.match(r"Error parsing (\S+): Could not parse arguments \[(.*)\] into", message):
        return f"{found[1]} takes other values, got {found[2]}"
    if found := re.match(rf"Error parsing {_DUMMY}\S*: (.*)$", message):  # a recipe refuses its values, in our words
        return found[1]
    if found := re.match(r"invalid choice '(.*)' for argument '(\S+)'\. Expected one of \((.*)\)", message):
        return f"{found[2]} cannot be {found[1]!r}; allowed: {found[3].replace(chr(39), '').rstrip(',').rstrip('.')}"
    if found := re.match(r"Missing subcommand Expected one of \{(.*)\}", message):
        return f"which? {found[1]}"
    if found := re.match(r"Missing from distill3d [\w ]*: (.*)$", message):
        told = re.sub(r"(?:^|(?<= ))(?:STR|PATH|INT|FLOAT) ", "", found[1])
        return f"missing: {told.replace(' (required)', '').rstrip('.')}"
    if found := re.match(r"Missing value for argument '(\S+)'\. Expected (\S+) values?", message):
        return f"{found[1]} takes {'a value, got none' if found[2] == '1' else found[2] + ' values'}"
    return message


def _unknown(rest: str) -> str:
    """Unknown words, and what they may mean."""
    words, *hints = re.split(
        r"(?:^|\s)(?:Available subcommands:|Perhaps you meant:|Arguments similar to \S+:?|Arguments are )", rest
    )
    unknown = [word.rstrip(",") for word in re.sub(r"\(applied to [^)]*\)", "", words).split()]
    unknown = [word for word in unknown if word] or ["a lone comma or an empty word"]
    told = f"unknown: {' '.join(unknown)}"
    if found := re.search(r"Available subcommands: ((?:[\w-]+, )*[\w-]+)", rest):
        names = found[1].split(", ")
        near = difflib.get_close_matches(unknown[0], names, n=1)
        return f"{told}; allowed: {', '.join(names)}" + (f"; perhaps you mean {near[0]}" if near else "")
    flags = list(dict.fromkeys(flag for hint in hints for flag in re.findall(r"--[\w.-]+", hint)))
    flags = [flag for flag in flags if flag not in unknown and flag != "--help"][:_SUGGESTIONS]
    return told + (f"; perhaps you mean {', '.join(flags)}" if flags else "")


def _kinds(metavar: str) -> str:
    return " or ".join(_NUMBERS.get(kind, kind) for kind in reversed(metavar.split("|")))
