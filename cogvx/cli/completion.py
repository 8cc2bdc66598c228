"""`cogvx completion`: shell completion of commands, options and choices."""

import argparse
import shlex

from .arguments import Parser
from .console import Console
from .parser import make

ZSH = "autoload -Uz compinit bashcompinit && compinit && bashcompinit\n"
BASH = """_cogvx() {{
    local command=${{COMP_WORDS[1]}} word=${{COMP_WORDS[COMP_CWORD]}} words=
    local before=${{COMP_WORDS[COMP_CWORD-1]}}
    if [ "$COMP_CWORD" -eq 1 ]; then
        words={commands}
    else
        case "$command $before" in
{choices}
        esac
        case "$word" in
        -*) case "$command" in
{options}
            esac ;;
        esac
    fi
    COMPREPLY=($(compgen -W "$words" -- "$word"))
}}
complete -o default -F _cogvx cogvx
"""


def completion(options: argparse.Namespace, console: Console) -> None:
    parser = make()
    [commands] = [action for action in parser._actions if isinstance(action.choices, dict)]
    assert isinstance(commands.choices, dict)
    if options.shell == "fish":
        script = fish(commands.choices)
    else:
        script = (ZSH if options.shell == "zsh" else "") + bash(commands.choices)
    print(script, end="")


def bash(commands: dict[str, Parser]) -> str:
    """Script for bash, and with bashcompinit for zsh."""
    choices, options = [], []
    for name, parser in commands.items():
        names = [option for action in _shown(parser) for option in action.option_strings]
        options.append(f"            {name}) words={shlex.quote(' '.join(names))} ;;")
        for action in _shown(parser):
            if action.choices and action.option_strings:
                words = shlex.quote(" ".join(map(str, action.choices)))
                choices.append(f'        "{name} {action.option_strings[-1]}") words={words} ;;')
    return BASH.format(
        commands=shlex.quote(" ".join(commands)),
        choices="\n".join(choices),
        options="\n".join(options),
    )


def fish(commands: dict[str, Parser]) -> str:
    lines = []
    for name, parser in commands.items():
        about = shlex.quote((parser.description or "").split(".")[0])
        lines.append(f"complete -c cogvx -f -n __fish_use_subcommand -a {name} -d {about}")
        for action in _shown(parser):
            for option in action.option_strings:
                if not option.startswith("--"):
                    continue
                line = f"complete -c cogvx -n '__fish_seen_subcommand_from {name}' -l {option[2:]}"
                if action.choices:
                    line += f" -x -a {shlex.quote(' '.join(map(str, action.choices)))}"
                elif action.nargs is None:
                    line += " -r"
                text = (action.help or "") % {**vars(action), "prog": parser.prog}
                lines.append(f"{line} -d {shlex.quote(text)}")
    return "\n".join(lines) + "\n"


def _shown(parser: Parser) -> list[argparse.Action]:
    return [action for action in parser._actions if action.help != argparse.SUPPRESS]
