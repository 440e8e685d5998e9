"""What the last bits of a result depend on beside what was asked for: libraries, commit, device, threads."""

import platform
import subprocess
from typing import Any

from distilcb.config import REPOSITORY
from distilcb.machine import uses_cuda


def surroundings() -> dict[str, Any]:
    """{"git_commit", "versions", "device", "threads", "own_cpp"}, as they are now in this process."""
    import datasets
    import deepspeed
    import torch
    import transformers

    import distilcb
    from distilcb import native

    libraries = {"distilcb": distilcb, "torch": torch, "deepspeed": deepspeed}
    libraries |= {"transformers": transformers, "datasets": datasets}
    return {
        "git_commit": _git_commit(),
        "versions": {"python": platform.python_version()}
        | {name: str(module.__version__) for name, module in libraries.items()},
        "device": torch.cuda.get_device_name() if uses_cuda() else "cpu",
        "threads": torch.get_num_threads(),
        "own_cpp": not uses_cuda() and native.library() is not None,
    }


def _git_commit() -> str | None:
    """The commit of this code, '+changes' where the tree differs from it; None outside a checkout."""
    if not (REPOSITORY / ".git").exists():
        return None

    def git(*words: str) -> str:
        return subprocess.run(
            ["git", "-C", str(REPOSITORY), *words], capture_output=True, text=True, check=True, timeout=10
        ).stdout.strip()

    try:
        return git("rev-parse", "HEAD") + ("+changes" if git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.SubprocessError):
        return None
