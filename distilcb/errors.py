"""The faults a user can cause. Each message says where, what came, what was needed and what to do."""

import os
import sys
from collections.abc import Callable


class UserError(Exception):
    """A fault that the user can mend; ends the program with its message and exit code 2, without a traceback."""

    on_this_rank_only = False


class ConfigError(UserError):
    """An option, a recipe or a DeepSpeed file asks for something that cannot be."""


class DataError(UserError):
    """Text or prepared blocks that cannot be used."""


class ModelError(UserError):
    """A model or tokenizer folder that cannot be used."""


class CheckpointError(UserError):
    """A run folder or checkpoint that cannot be used."""


class LaunchError(UserError):
    """The processes were not started in a way from which ranks can be told."""


class TrainingError(Exception):
    """Training cannot go on (a loss that is not finite, say); what was saved stays good. Exit code 1."""


def exit_code(main: Callable[[list[str]], None]) -> int:
    """Run a command's `main` on the command line's words: 0, or 2 after a user's mistake, or 1 where training failed.

    Every rank meets a user's mistake; the first one prints it.
    """
    try:
        main(sys.argv[1:])
    except UserError as error:
        if os.environ.get("RANK", "0") == "0" or error.on_this_rank_only:
            print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
        return 2
    except TrainingError as error:
        if os.environ.get("RANK", "0") == "0":
            print(f"TrainingError: {error}", file=sys.stderr, flush=True)
        return 1
    return 0
