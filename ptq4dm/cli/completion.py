"""`ptq4dm completion bash | zsh | fish`: a script that completes commands in a shell.

    eval "$(ptq4dm completion bash)"         in ~/.bashrc; likewise zsh in ~/.zshrc
    ptq4dm completion fish | source          in ~/.config/fish/config.fish

Shells run this each time they start, and the parser with all its flags would import PyTorch, which takes seconds. So
words.json, beside this file, holds what the parser says; a test compares the two. To write it anew:

    python -m ptq4dm.cli.completion
"""

from __future__ import annotations

import argparse
import json

from .output import result, say
from .parser import WORDS, known_words, names_file

SHELLS = ("bash", "zsh", "fish")


def add(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("shell", choices=SHELLS, help="which shell")


def run(args: argparse.Namespace) -> None:
    words = known_words()
    script = {"bash": _bash, "zsh": _zsh, "fish": _fish}[args.shell](words)
    say(script)
    result(shell=args.shell, script=script)


# --- what there is to complete ------------------------------------------------------------------------------


def words_of(parser: argparse.ArgumentParser, path: str = "") -> dict[str, dict]:
    """Command ("", "info", "bench tune") -> {"commands": names, "flags": {flag: what may follow it}}, all sorted, and
    "arguments" where it takes some without a flag.

    What may follow: null (nothing), or {"choices": words, "files": whether it names a file, "many": more than one}.
    For `refuse` of verbs.py also argparse's "nargs", the name of its "type", and "closed": that there are no other
    choices.
    """
    flags: dict[str, dict | None] = {}
    commands: list[str] = []
    arguments: dict[str, dict] = {}
    found: dict[str, dict] = {}
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            commands = list(action.choices)
            for name, below in action.choices.items():
                found |= words_of(below, f"{path} {name}".strip())
        elif action.option_strings:
            flags |= {flag: _value(action) for flag in action.option_strings if flag.startswith("--")}
        elif action.choices:  # the shells
            commands = [str(choice) for choice in action.choices]
        else:
            arguments[action.dest] = {"nargs": action.nargs, "metavar": action.metavar}
    here = {"commands": commands, "flags": dict(sorted(flags.items()))}
    return {path: here | ({"arguments": arguments} if arguments else {}), **found}


def _value(action: argparse.Action) -> dict | None:
    if action.nargs == 0:
        return None
    known = action.choices or getattr(action, "known", None) or ()
    return {
        "choices": [str(choice) for choice in known],
        "files": names_file(action),
        "many": action.nargs in ("+", "*"),
        "nargs": action.nargs,
        "type": getattr(action.type, "__name__", "str"),
        "closed": bool(action.choices),
    }


# --- the scripts --------------------------------------------------------------------------------------------

BASH = """\
# Completion of ptq4dm for bash. In ~/.bashrc: eval "$(ptq4dm completion bash)"
_ptq4dm() {{
    local current="${{COMP_WORDS[COMP_CWORD]}}" command="" flag="" word offered="" files="" last i
    for ((i = 1; i < COMP_CWORD; i++)); do
        word="${{COMP_WORDS[i]}}"
        [[ $word == = ]] && continue
        case "$word" in
            -*) flag="$word" ;;
            *) case "$command $word" in {commands}) command="${{command:+$command }}$word"; flag="" ;; esac ;;
        esac
    done
    if [[ $flag && $current != -* ]]; then
        last="${{COMP_WORDS[COMP_CWORD - 1]}}"
        [[ $last == = || $current == = ]] && last="$flag"
        [[ $current == = ]] && current=""
        case "$command $flag" in
{values}
        esac
        if [[ $last != "$flag" ]]; then
            case "$command $flag" in {many}) ;; *) offered=""; files="" ;; esac
        fi
    fi
    if [[ -z $offered && -z $files ]]; then
        case "$command" in
{flags}
        esac
    fi
    COMPREPLY=($(compgen -W "$offered" -- "$current"))
    if [[ $files ]]; then
        local IFS=$'\\n'
        compopt -o filenames 2>/dev/null
        COMPREPLY+=($(compgen -f -- "$current"))
    fi
}}
complete -F _ptq4dm ptq4dm"""


def _bash(words: dict) -> str:
    commands = [f"{path} {name}" for path, one in words.items() for name in one["commands"] if one["commands"]]
    values, many, flags = [], [], []
    for path, one in words.items():
        offered = " ".join([*one["commands"], *one["flags"]])
        flags.append(f'            "{path}") offered="{offered}" ;;')
        for flag, value in one["flags"].items():
            if value is None:
                continue
            files = " files=1" if value["files"] else ""
            if value["choices"] or files:
                choices = " ".join(value["choices"])
                values.append(f'            "{path} {flag}") offered="{choices}"{files} ;;')
            else:
                values.append(f'            "{path} {flag}") [[ $last == "$flag" ]] && return ;;')
            if value["many"]:
                many.append(f'"{path} {flag}"')
    names = " | ".join(f'"{name}"' for name in commands)
    return BASH.format(commands=names, values="\n".join(values), many=" | ".join(many), flags="\n".join(flags))


ZSH = """\
# Completion of ptq4dm for zsh. In ~/.zshrc, after compinit: eval "$(ptq4dm completion zsh)"
autoload -U +X bashcompinit && bashcompinit
"""


def _zsh(words: dict) -> str:
    """zsh reads bash's scripts, but for two lines of this one."""
    return ZSH + _bash(words).partition("\n")[2]


def _fish(words: dict) -> str:
    lines = [
        "# Completion of ptq4dm for fish. In ~/.config/fish/config.fish: ptq4dm completion fish | source",
        "complete -c ptq4dm -f",
    ]
    for path, one in words.items():
        when = _fish_condition(path, words)
        if one["commands"]:
            lines.append(f"complete -c ptq4dm -n '{when}' -a '{' '.join(one['commands'])}'")
        for flag, value in one["flags"].items():
            more = ""
            if value is not None:
                more = " -r" if value["files"] else " -x"
                more += " -F" if value["files"] else ""
                more += f" -a '{' '.join(value['choices'])}'" if value["choices"] else ""
            lines.append(f"complete -c ptq4dm -n '{when}' -l {flag.removeprefix('--')}{more}")
    return "\n".join(lines)


def _fish_condition(path: str, words: dict) -> str:
    """True where the line has this command, and none of those below it."""
    parts = path.split()
    conditions = [f"__fish_seen_subcommand_from {part}" for part in parts]
    if words[path]["commands"] and any(f"{path} {name}".strip() in words for name in words[path]["commands"]):
        conditions.append(f"not __fish_seen_subcommand_from {' '.join(words[path]['commands'])}")
    return "; and ".join(conditions) or "true"


if __name__ == "__main__":
    from .verbs import build_parser

    WORDS.write_text(json.dumps(words_of(build_parser()), indent=1) + "\n")
