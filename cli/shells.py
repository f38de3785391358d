"""Completion in bash, zsh and fish: the scripts, and where they are installed.

A script sends the line up to the cursor to `circuit` itself, by Typer's protocol, and gets a value
and its help on each line. It replaces Typer's own, of which the one for bash completes nothing
behind the `=` of `--set field=value`; those for bash and zsh put a space behind `field=`, those for
zsh and fish do not complete `--option=value`, and the one for fish runs the program twice.
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import typer

from circuit import CircuitError

from .parsing import Group

ASKED = "_CIRCUIT_COMPLETE"
UNBROKEN = "9999"
"""Columns of a terminal in which the help of no value is broken: a line is one value."""
_ASK = "env _CIRCUIT_COMPLETE=complete_fish _TYPER_COMPLETE_FISH_ACTION=get-args"

BASH = rf"""_circuit_completion() {{
    local line=${{COMP_LINE:0:COMP_POINT}} quote= word= start= outer= front= value help c i at=0
    # the last word without its quotes; of it bash leaves `start` as it is
    for ((i = 0; i < ${{#line}}; i++)); do
        c=${{line:i:1}}
        case $quote$c in
            [\"\']) quote=$c outer=$start start=$word ;;
            \"\"|\'\') quote= start=$outer ;;
            \'*) word+=$c ;;
            *\\) i=$((i + 1)) word+=${{line:i:1}} ;;
            \"*) word+=$c ;;
            [[:space:]]) word= start= at=$((i + 1)) ;;
            *) word+=$c; [[ $COMP_WORDBREAKS == *"$c"* ]] && start=${{word%@}} ;;
        esac
    done
    [[ $word == --*=* ]] && front=${{word%%=*}}=
    line=${{line:0:at}}\'${{word//\'/\'\\\'\'}}\'
    COMPREPLY=()
    while IFS=$'\t' read -r value help; do
        [[ -n $value ]] || continue
        value=$front$value
        value=${{value#"$start"}}
        case $quote in
            \') value=${{value//\'/\'\\\'\'}} ;;
            \") value=${{value//\\/\\\\}} value=${{value//\"/\\\"}}
                value=${{value//\$/\\\$}} value=${{value//\`/\\\`}} ;;
            *) [[ $value == *[!a-zA-Z0-9_.,:=/+@%-]* ]] && printf -v value %q "$value" ;;
        esac
        COMPREPLY+=("$value")
    done < <({_ASK} _TYPER_COMPLETE_ARGS="$line" "$1" 2>/dev/null)
    if [[ ${{#COMPREPLY[@]}} == 1 && ${{COMPREPLY[0]}} == *[=:,] ]]; then
        compopt -o nospace 2>/dev/null
    fi
}}
complete -o default -F _circuit_completion circuit
"""

ZSH = f"""\
#compdef circuit
_circuit() {{
    local line="${{(j: :)words[1,CURRENT-1]}} $PREFIX" value help entry found=1
    local -a whole open
    while IFS=$'\\t' read -r value help; do
        [[ -n $value ]] || continue
        entry=${{${{value//\\\\/\\\\\\\\}}//:/\\\\:}}${{help:+:$help}}
        if [[ $value == *[=:,] ]]; then open+=("$entry"); else whole+=("$entry"); fi
    done < <({_ASK} _TYPER_COMPLETE_ARGS="$line" ${{~${{(Q)words[1]}}}} 2>/dev/null)
    if (( ! $#whole && ! $#open )); then
        _files
        return
    fi
    [[ $PREFIX == --*=* ]] && compset -P 1 '--*='
    (( $#whole )) && _describe -t values value whole && found=0
    (( $#open )) && _describe -t fields field open -S '' && found=0
    return found
}}
if [[ $funcstack[1] == _circuit ]]; then
    _circuit "$@"
else
    (( $+functions[compdef] )) || {{ autoload -Uz compinit && compinit }}
    compdef _circuit circuit
fi
"""

FISH = f"""\
function __circuit_ask
    set -l line (commandline -cp | string collect)
    set -l program (commandline -opc)[1]
    set -l front (string match -r -- '^--[^=]*=' (commandline -ct))
    set -g __circuit_found "$front"({_ASK} _TYPER_COMPLETE_ARGS="$line" $program 2>/dev/null \\
        | string match -v '')
    set -q __circuit_found[1]
end
complete --command circuit --no-files --condition __circuit_ask --arguments '$__circuit_found'
"""

SCRIPTS = {"bash": BASH, "zsh": ZSH, "fish": FISH}
INSTALL, SHOW = "--install-completion", "--show-completion"


class Program(Group):
    """The whole program, whose help says that these two options take a shell."""

    def get_params(self, ctx: Any) -> list[Any]:
        params = super().get_params(ctx)
        for param in params:
            if param.opts[0] in (INSTALL, SHOW):
                param.metavar = "SHELL"
        return params


def typed(variables: Mapping[str, str]) -> list[str]:
    """The words of a line that is being completed, but for the one that is being typed."""
    line = variables.get("_TYPER_COMPLETE_ARGS", "")
    return line.split()[1:] if line.endswith(" ") else line.split()[1:-1]


def answer(words: Sequence[str], variables: Mapping[str, str]) -> bool:
    """Do what is asked of completion scripts; whether anything was asked.

    That is `--install-completion [SHELL]` or `--show-completion [SHELL]`, or in `variables`
    `_CIRCUIT_COMPLETE=source_SHELL`.

    Raises:
        CircuitError: the shell is unknown, there are more words, or its files cannot be written.
    """
    action, _, shell = variables.get(ASKED, "").partition("_")
    if action == "source" and shell in SCRIPTS:
        typer.echo(SCRIPTS[shell], nl=False)
        return True
    option, sign, shell = words[0].partition("=") if words else ("", "", "")
    if action or option not in (INSTALL, SHOW):
        return False
    shells = [*([shell] if sign else []), *words[1:]]
    if len(shells) > 1:
        raise CircuitError(
            f"unexpected '{shells[1]}'", where=option, expected="one shell and nothing else"
        )
    shell = shells[0] if shells else _present_shell()
    if shell not in SCRIPTS:
        raise CircuitError(
            f"no completion for '{shell}'" if shell else "the shell is not known",
            where=option,
            expected=", ".join(SCRIPTS),
            fix=f"name it: circuit {option} zsh",
        )
    if option == SHOW:
        typer.echo(SCRIPTS[shell], nl=False)
        return True
    try:
        path = _INSTALLERS[shell]()
    except OSError as error:
        raise CircuitError(f"cannot be written ({error})", where=option) from None
    typer.echo(f"{shell} completion installed in {path}; it works in the next shell")
    return True


def _present_shell() -> str:
    """The shell that this was typed into, else the user's."""
    try:
        return str(import_module("shellingham").detect_shell()[0])
    except (ImportError, OSError):
        return Path(os.environ.get("SHELL", "")).name


def _home() -> Path:
    try:
        home = Path.home() if os.environ.get("HOME") != "" else Path()  # "" would be /
    except RuntimeError:  # no HOME, and the user is not known
        home = Path()
    if not home.is_absolute():
        raise CircuitError("HOME names no folder", where=INSTALL, expected="an absolute path")
    return home


def _install_bash() -> Path:
    path = _home() / ".bash_completions" / "circuit.sh"
    _write(path, BASH, _home() / ".bashrc", f"source {shlex.quote(str(path))}")
    return path


def _install_zsh() -> Path:
    path = _home() / ".zfunc" / "_circuit"
    rc = Path(os.environ.get("ZDOTDIR") or _home()) / ".zshrc"
    _write(path, ZSH, rc, "fpath+=~/.zfunc; autoload -Uz compinit; compinit")
    return path


def _install_fish() -> Path:
    configs = Path(os.environ.get("XDG_CONFIG_HOME") or _home() / ".config")
    path = configs / "fish" / "completions" / "circuit.fish"
    _write(path, FISH)
    return path


_INSTALLERS: dict[str, Callable[[], Path]] = {
    "bash": _install_bash,
    "zsh": _install_zsh,
    "fish": _install_fish,
}


def _write(path: Path, script: str, rc: Path | None = None, line: str = "") -> None:
    """The script, and once its line in a start-up file; neither if one cannot be written.

    The start-up file may be a link, so it is not replaced, and is in whatever encoding.
    """
    encoded = os.fsencode(line)
    present = rc.read_bytes() if rc is not None and rc.exists() else None
    if rc is None or encoded in (present or b"").splitlines():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(script, encoding="utf-8")
        return
    with rc.open("ab") as handle:  # first, as no script is of use without it
        try:
            _write(path, script)
        except OSError:
            if present is None:
                rc.resolve().unlink()
            raise
        handle.write((b"\n" if present and not present.endswith(b"\n") else b"") + encoded + b"\n")
