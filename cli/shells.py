"""Completion in bash, zsh and fish: the scripts, and where they are installed.

A script sends the line up to the cursor to `circuit` itself, by Typer's protocol, and gets a value
and its help on each line. It replaces Typer's own, of which the one for bash completes nothing
behind the `=` of `--set field=value`; those for bash and zsh put a space behind `field=`, those for
zsh and fish do not complete `--option=value`, and the one for fish runs the program twice.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from pathlib import Path

import typer

from circuit import CircuitError

_ASK = "env _CIRCUIT_COMPLETE=complete_fish _TYPER_COMPLETE_FISH_ACTION=get-args"

BASH = f"""\
_circuit_completion() {{
    local line=${{COMP_LINE:0:COMP_POINT}} breaks= start= front= value help
    local word=${{line##*[[:space:]]}}
    # of words with = or : bash replaces what is behind them only
    [[ $COMP_WORDBREAKS == *=* ]] && breaks+==
    [[ $COMP_WORDBREAKS == *:* ]] && breaks+=:
    [[ -n $breaks && $word == *[$breaks]* ]] && start=${{word%"${{word##*[$breaks]}}"}}
    if [[ $word == --*=* ]]; then
        start=${{start#--*=}}
        [[ $breaks == *=* ]] || front=${{word%%=*}}=
    fi
    COMPREPLY=()
    while IFS=$'\\t' read -r value help; do
        [[ -n $value ]] && COMPREPLY+=("$front${{value#"$start"}}")
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
        entry=${{value//:/\\\\:}}${{help:+:$help}}
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


def answer(words: Sequence[str], variables: Mapping[str, str]) -> bool:
    """Do what is asked of completion scripts; whether anything was asked.

    That is `--install-completion [SHELL]`, `--show-completion [SHELL]`, or in `variables`
    `_CIRCUIT_COMPLETE=source_SHELL`.

    Raises:
        CircuitError: the shell is unknown, or its files cannot be written.
    """
    asked, _, shell = variables.get("_CIRCUIT_COMPLETE", "").partition("_")
    if asked == "source" and shell in SCRIPTS:
        typer.echo(SCRIPTS[shell], nl=False)
        return True
    if asked or not words or words[0] not in (INSTALL, SHOW):
        return False
    shell = words[1] if len(words) > 1 else _present_shell()
    if shell not in SCRIPTS:
        raise CircuitError(
            f"no completion for '{shell}'" if shell else "the shell is not known",
            where=words[0],
            expected=", ".join(SCRIPTS),
            fix=f"name it: circuit {words[0]} zsh",
        )
    if words[0] == SHOW:
        typer.echo(SCRIPTS[shell], nl=False)
        return True
    try:
        path = _INSTALLERS[shell]()
    except OSError as error:
        raise CircuitError(f"cannot be written ({error})", where=words[0]) from None
    typer.echo(f"{shell} completion installed in {path}; it works in the next shell")
    return True


def _present_shell() -> str:
    """The shell that this was typed into, else the user's."""
    try:
        return str(import_module("shellingham").detect_shell()[0])
    except (ImportError, OSError):
        return Path(os.environ.get("SHELL", "")).name


def _install_bash() -> Path:
    path = Path.home() / ".bash_completions" / "circuit.sh"
    _write(path, BASH)
    _append(Path.home() / ".bashrc", f"source '{path}'")
    return path


def _install_zsh() -> Path:
    path = Path.home() / ".zfunc" / "_circuit"
    _write(path, ZSH)
    rc = Path(os.environ.get("ZDOTDIR") or Path.home()) / ".zshrc"
    _append(rc, "fpath+=~/.zfunc; autoload -Uz compinit; compinit")
    return path


def _install_fish() -> Path:
    configs = Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config")
    path = configs / "fish" / "completions" / "circuit.fish"
    _write(path, FISH)
    return path


_INSTALLERS: dict[str, Callable[[], Path]] = {
    "bash": _install_bash,
    "zsh": _install_zsh,
    "fish": _install_fish,
}


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


def _append(rc: Path, line: str) -> None:
    """A line of a start-up file, once; the file may be a link, so it is not replaced."""
    present = rc.read_text(encoding="utf-8") if rc.exists() else ""
    if line not in present.splitlines():
        with rc.open("a", encoding="utf-8") as handle:
            handle.write(f"{'' if present.endswith(chr(10)) or not present else chr(10)}{line}\n")
