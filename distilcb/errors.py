"""The faults a user can cause. Each message says where, what came, what was needed and what to do."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class UserError(Exception):
    """A fault that the user can mend; ends the program with its message and exit code 2, without a traceback."""


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


class RankZeroLostError(TrainingError):
    """The rank that tells what is wrong is gone itself, so another one does."""


class MachineError(TrainingError):
    """Something is wrong with the machines of an allocation; the message names where. Exit code 1."""


class ReplayError(TrainingError):
    """A step that was taken again came out otherwise than it was logged. Exit code 1."""


@contextmanager
def writing(path: Path, kind: type[UserError], advice: str) -> Iterator[None]:
    """Turn what the file system says while `path` is written into a message of `kind` that ends with `advice`."""
    try:
        yield
    except OSError as error:
        raise kind(f"{path} cannot be written ({error.strerror or error}). {advice}") from error


def first_line(error: BaseException) -> str:
    """The first line of what an error says, without its full stop."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
