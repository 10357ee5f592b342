"""Print a script that lets the shell complete commands, recipes, files and options: source <(sltt completion bash)"""

from collections.abc import Sequence
from importlib import import_module

from sltt.commands import COMMANDS
from sltt.commands.hints import fit_arguments
from sltt.commands.parsing import CommandOptions, shipped_recipes

# compgen -W would run what stands in a file's name. Lists have a word a line, since names may have spaces.
SCRIPT = """_sltt() {{
  local IFS=$'\\n' word="${{COMP_WORDS[COMP_CWORD]}}"
  if [[ $COMP_CWORD == 1 ]]; then
    COMPREPLY=($(compgen -W "{commands}" -- "$word"))
  elif [[ $word == --* ]]; then
    COMPREPLY=($(compgen -W "{options}" -- "$word"))
  else
    COMPREPLY=($(compgen -f -- "$word"))
    if [[ $COMP_CWORD == 2 && $word != */* && " {of_runs} " != *" ${{COMP_WORDS[1]}} "* ]]; then
      COMPREPLY+=($(compgen -W "{recipes}" -- "$word"))
    fi
  fi
}}
complete -o filenames -F _sltt sltt"""


def options() -> CommandOptions:
    parser = CommandOptions("sltt completion", __doc__)
    parser.add_argument("shell", choices=("bash", "zsh"))
    return parser


def run(words: Sequence[str]) -> None:
    known = options().parse_args(words)
    if known.shell == "zsh":
        print("autoload -Uz compinit bashcompinit; (( $+functions[compdef] )) || compinit; bashcompinit")
    modules = [import_module(f"sltt.commands.{name}") for name in COMMANDS]
    own = [word for module in modules if hasattr(module, "options") for word in module.options().own]
    every = dict.fromkeys([*(f"--{name}" for name in fit_arguments()), *(word for word in own if word[:2] == "--")])
    lists = {"commands": COMMANDS, "options": every, "recipes": shipped_recipes()}
    of_runs = "eval predict export report data doctor completion"  # which take no recipe there
    print(SCRIPT.format(of_runs=of_runs, **{name: "\n".join(words) for name, words in lists.items()}))
