"""Names of the Hugging Face hub: model folders, on disk or fetched, and data sets.

On a machine without network a name is what the hub's cache on disk holds of it (HF_HOME).
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distilcb.errors import DataError, ModelError

HUB_PREFIX = "hub:"

_MODEL_FILES = ["*.json", "*.safetensors", "*.model", "*.txt"]
_PICKLES = ["pytorch_model*.bin"]


def model_folder(name: str, *, what: str = "model", pickle: bool = False) -> Path:
    """The folder, or file, of a model or tokenizer: `name` itself, or where the hub's files of it lie.

    Args:
        name: a path, or a hub name such as almanach/camembert-base.
        what: "model" or "tokenizer", for messages.
        pickle: fetch pickled weights too.

    Raises:
        ModelError: no such path; or a hub name that is neither in the cache nor to be had.
    """
    path = Path(name).expanduser()
    if path.exists():
        return path
    if name.startswith(("/", ".", "~")) or name.count("/") > 1 or name.endswith(".json"):
        raise ModelError(
            f"{what} folder {name} does not exist. Give the folder of a {what} as save_pretrained writes it, or a hub "
            "name."
        )
    from huggingface_hub import snapshot_download

    patterns = _MODEL_FILES + (_PICKLES if pickle else [])
    try:
        return Path(snapshot_download(name, allow_patterns=patterns, ignore_patterns=["*/*"], etag_timeout=10))
    except (OSError, ValueError) as error:  # what huggingface_hub and its HTTP client raise are all of these
        raise ModelError(
            f"{what} {name}: there is no such folder, and the hub does not give it ({first_line(error)}). Without "
            "network: fetch it where there is one, with `hf download`, and give the local folder."
        ) from error


@dataclass(frozen=True)
class HubDataset:
    """A data set that the `datasets` library loads: hub:NAME, hub:NAME:CONFIG or hub:NAME:CONFIG:SPLIT.

    NAME is one of the hub, or a local folder.
    """

    name: str
    config: str | None = None
    split: str = "train"

    @classmethod
    def parse(cls, text: str) -> "HubDataset":
        """The data set that 'hub:…' names.

        Raises:
            DataError: more parts than three, or no name.
        """
        parts = text.removeprefix(HUB_PREFIX).split(":")
        if not parts[0] or len(parts) > 3:
            raise DataError(f"{text}: needed hub:NAME, hub:NAME:CONFIG or hub:NAME:CONFIG:SPLIT.")
        name, config, split = [*parts, "", ""][:3]
        return cls(name, config or None, split or "train")

    def __str__(self) -> str:
        return f"{HUB_PREFIX}{self.name}:{self.config or ''}:{self.split}"

    def load(self) -> Any:
        """The datasets.Dataset, fetched into the cache of `datasets` where it is not there yet.

        Raises:
            DataError: it cannot be had, or only a program could make it.
        """
        import datasets

        try:
            return datasets.load_dataset(self.name, self.config, split=self.split)
        except Exception as error:  # datasets raises kinds of its own, of the hub's, and plain ones
            if "scripts are no longer supported" in str(error):
                raise DataError(
                    f"{self}: a program (a loading script) makes this data set, and `datasets` runs none any more. "
                    "Fetch the files that it reads and give those; docs/distilcamembert.md shows how for OSCAR."
                ) from error
            raise DataError(
                f"{self} cannot be loaded ({first_line(error)}). Without network: fetch its files where there is "
                "one, and give those files."
            ) from error


def first_line(error: BaseException) -> str:
    """The first line of what an error says, without its full stop."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
