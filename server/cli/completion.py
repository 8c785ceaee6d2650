"""`openchat completion`: scripts with which shells complete commands and options."""

import click
from click.shell_completion import get_completion_class

from server.cli.arguments import Command, OneOf
from server.core import config
from server.core.terminal import say

SHELLS = ("bash", "zsh", "fish")


@click.command(
    "completion",
    cls=Command,
    examples="""
        openchat completion bash > ~/.local/share/bash-completion/completions/openchat
        eval "$(openchat completion zsh)"                      # in ~/.zshrc
        openchat completion fish > ~/.config/fish/completions/openchat.fish
    """,
)
@click.argument("shell", type=OneOf(SHELLS), metavar="SHELL", help="One of bash, zsh and fish.")
@click.pass_context
def completion(ctx: click.Context, shell: str) -> None:
    """Print a script that completes commands on Tab.

    It takes effect in shells that start afterwards. Bash has to be 4.4 or later.
    """
    kind = get_completion_class(shell)
    assert kind is not None  # noqa: S101 - click supports all of SHELLS
    root = ctx.find_root()
    for line in kind(root.command, {}, "openchat", config.COMPLETION).source().splitlines():
        say(line)
