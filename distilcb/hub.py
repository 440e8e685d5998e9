"""Names of the Hugging Face hub: model folders, on disk or fetched, and data sets.

On a machine without network a name is what the hub's cache on disk holds of it (HF_HOME).
"""

from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from distilcb.errors import DataError, ModelError, first_line

HUB_PREFIX = "hub:"

_DESCRIPTIONS = ("*.json", "*.model", "*.txt")
_WEIGHTS = ("*.safetensors",)
_PICKLES = ("pytorch_model*.bin",)
# huggingface_hub itself waits for ever for a network that swallows what it is sent.
_HUB_ANSWERS_WITHIN_SECONDS = 15.0


def model_folder(name: str, *, what: str = "model", weights: bool = True, pickle: bool = False) -> Path:
    """The folder, or file, of a model or tokenizer: `name` itself, or where the hub's files of it lie.

    Args:
        name: a path, or a hub name such as almanach/camembert-base.
        what: "model" or "tokenizer", for messages.
        weights: whether a name of the hub is to bring its weights too.
        pickle: pickled ones as well.

    Raises:
        ModelError: no such path; or a hub name that is neither in the cache nor to be had.
    """
    try:
        path = Path(name).expanduser()
        if (path / "student" / "config.json").is_file():
            raise ModelError(f"{what} {name} is a run folder. Give {path / 'student'}.")
        if path.exists():
            return path
    except (OSError, RuntimeError) as error:  # a closed folder of somebody else; the home of nobody
        raise ModelError(f"{what} {name} cannot be read: {first_line(error)}.") from error
    if name.startswith(("/", ".", "~")) or name.count("/") > 1 or name.endswith(".json"):
        raise ModelError(
            f"{what} folder {name} does not exist. Give the folder of a {what} as save_pretrained writes it, or a hub "
            "name."
        )
    try:
        return _from_hub(name, _DESCRIPTIONS + (_WEIGHTS if weights else ()) + (_PICKLES if pickle else ()))
    except Exception as error:  # of httpx, of the hub's client, of the file system: no common kind
        raise ModelError(
            f"{what} {name}: there is no such folder, and the hub does not give it ({first_line(error)}). Without "
            "network: fetch it where there is one, with `hf download`, and give the local folder."
        ) from error


def public_name(name: str) -> str:
    """What a card, which is read elsewhere, calls a model or text: a hub name as it is, of a path the last part."""
    plain = name.removeprefix(HUB_PREFIX).split(":")[0] if name.startswith(HUB_PREFIX) else name
    path = Path(plain).expanduser()
    if path.exists():
        return path.resolve().name
    return path.name if plain.startswith(("/", ".", "~")) else name


@cache
def _from_hub(name: str, patterns: tuple[str, ...]) -> Path:
    """The hub's newest files of a model; those that are in the cache where the hub does not answer."""
    from huggingface_hub import HfApi, snapshot_download

    wanted: dict[str, Any] = {"allow_patterns": list(patterns), "ignore_patterns": ["*/*"]}
    try:
        HfApi().repo_info(name, timeout=_HUB_ANSWERS_WITHIN_SECONDS)
        return Path(snapshot_download(name, **wanted))
    except Exception as error:
        try:
            return Path(snapshot_download(name, local_files_only=True, **wanted))
        except Exception:
            raise error from None


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
            DataError: no name.
        """
        parts = text.removeprefix(HUB_PREFIX).split(":", 2)  # a split may have a colon: train[:10%]
        if not parts[0]:
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
