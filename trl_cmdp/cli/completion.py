"""`trl-cmdp completion`: a script with which bash or zsh completes commands, options and their values."""

import argparse
import shlex
from collections.abc import Mapping
from functools import partial

from ._options import training_options
from ._parser import Parser
from ._tasks import task_names
from ._training_arguments import FILE_OPTIONS
from .training import COMMANDS


_SCRIPT = """\
_trl_cmdp() {
    local current="${COMP_WORDS[COMP_CWORD]}" before="${COMP_WORDS[COMP_CWORD-1]}" words=""
    if [ "$COMP_CWORD" -eq 1 ]; then
        words=%(commands)s
    else
        case "${COMP_WORDS[1]} $before" in
%(values)s
            *)
                case "$current" in
                    -*)
                        case "${COMP_WORDS[1]}" in
%(options)s
                        esac ;;
                esac ;;
        esac
    fi
    COMPREPLY=($(compgen -W "$words" -- "$current"))
}
complete -o bashdefault -o default -F _trl_cmdp trl-cmdp
"""
# zsh runs bash's scripts.
_FOR_SHELL = {"bash": "", "zsh": "autoload -U +X compinit && compinit\nautoload -U +X bashcompinit && bashcompinit\n"}


def add_parser(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the command to the command line."""
    parser = commands.add_parser(
        "completion",
        help="print a script with which a shell completes commands and options",
        description='Print a script for the shell. For bash, add to ~/.bashrc: eval "$(trl-cmdp completion bash)"',
    )
    parser.add_argument("shell", choices=list(_FOR_SHELL))
    parser.set_defaults(run=partial(run, commands.choices))


def run(parsers: Mapping[str, Parser], arguments: argparse.Namespace) -> int:
    """Print the script."""
    options = {command: _options(command, parser) for command, parser in parsers.items()}
    commands = " ".join([*options, "--help", "--version"])
    listed = [
        f"{24 * ' '}    {command}) words={shlex.quote(' '.join(f'--{name}' for name in names))} ;;"
        for command, names in options.items()
    ]
    values = [
        f"{12 * ' '}{shlex.quote(f'{command} --{name}')}) words={shlex.quote(' '.join(choices))} ;;"
        for command, names in options.items()
        for name, choices in names.items()
        if choices
    ]
    filled = {"commands": shlex.quote(commands), "values": "\n".join(values), "options": "\n".join(listed)}
    print(_FOR_SHELL[arguments.shell] + _SCRIPT % filled, end="")
    return 0


def _options(command: str, parser: Parser) -> dict[str, list[str]]:
    """Options of a command, with the values of those that have a few."""
    if command in COMMANDS:
        own = {name: list(option.choices) for name, option in training_options(command).items()}
        own |= {name: [] for name in (*FILE_OPTIONS, "help", "help_all")}
    else:
        own = {name: list(map(str, action.choices or ())) for name, action in parser.options.items()}
    return own | ({"task": task_names()} if "task" in own else {})
