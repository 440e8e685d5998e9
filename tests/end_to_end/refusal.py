"""How a user's mistake ends."""

import re
import subprocess


def assert_refused(ended: subprocess.CompletedProcess[str], *parts: str) -> None:
    """One message with these parts, exit code 2, no traceback."""
    assert ended.returncode == 2, ended.stdout + ended.stderr
    assert "Traceback" not in ended.stdout + ended.stderr
    assert len(re.findall(r"(?m)^(?:\[rank \d+\] )?\w+Error: ", ended.stderr)) == 1, ended.stderr
    for part in parts:
        assert part in ended.stderr, ended.stderr
