"""`sltt completion`: what a shell needs to complete commands, recipes and options."""

from collections.abc import Sequence

from sltt.commands import COMMANDS
from sltt.commands.hints import fit_arguments
from sltt.commands.parsing import CommandOptions, shipped_recipes

HELP = "Print a script that lets the shell complete commands, recipes and options: source <(sltt completion bash)"
OWN = (
    "rules",
    "seeds",
    "save",
    "json",
    "repeats",
    "budget",
    "split",
    "checkpoint",
    "mirror",
    "to",
    "out",
    "batches",
    "help",
)

SCRIPT = """_sltt() {{
  local word="${{COMP_WORDS[COMP_CWORD]}}"
  if [[ $COMP_CWORD == 1 ]]; then
    COMPREPLY=($(compgen -W "{commands}" -- "$word"))
  elif [[ $word == --* ]]; then
    COMPREPLY=($(compgen -W "{options}" -- "$word"))
  else
    COMPREPLY=($(compgen -W "{recipes}" -- "$word") $(compgen -f -- "$word"))
  fi
}}
complete -o filenames -F _sltt sltt"""


def run(words: Sequence[str]) -> None:
    """`sltt completion bash|zsh`: print a script for the shell."""
    options = CommandOptions("sltt completion", HELP)
    options.add_argument("shell", choices=("bash", "zsh"))
    known = options.parse_args(words)
    if known.shell == "zsh":
        print("autoload -U +X bashcompinit && bashcompinit")
    print(
        SCRIPT.format(
            commands=" ".join(COMMANDS),
            options=" ".join(f"--{name}" for name in (*fit_arguments(), *OWN)),
            recipes=" ".join(shipped_recipes()),
        )
    )
