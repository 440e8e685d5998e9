"""Jobs on the lab's Slurm, and what their run folders hold."""

import json
import re
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distilcb.config import REPOSITORY

LAB_SCRIPT = Path(__file__).with_name("slurm_lab.sh")
# Steps of about half a second on two cores, in fp32, so that two runs can be compared to the last bit.
SMALL = (
    *("--deepspeed", "zero2_cpu", "--optim.global_batch", "32", "--optim.micro_batch", "4"),
    *("--train.steps", "12", "--train.save_every", "5", "--train.log_every", "3"),
    *("--train.eval_every", "4", "--train.eval_maskings", "2"),
)
# What pgrep knows a rank by; srun's own line ends like it.
RANK_PROGRAM = "^[^ ]*python[^ ]* launch/train.py"
_NOT_OVER = ("PENDING", "RUNNING", "COMPLETING", "CONFIGURING", "SIGNALING", "REQUEUED", "PREEMPTED")
# As a cluster's own, for nodes that claim GPUs; an hour, so that the warning is far away.
ONE_RANK_A_NODE = ("--nodes=2", "--ntasks-per-node=1", "--gres=gpu:1", "--cpus-per-task=1", "--time=60")


@dataclass(frozen=True)
class Job:
    """A submitted job and the file of its output."""

    lab: "Lab"
    number: str
    output: Path

    def facts(self) -> dict[str, str]:
        """What scontrol says: JobState, Restarts, ExitCode, ..."""
        shown = self.lab.run("scontrol", "-o", "show", "job", self.number).stdout
        return dict(re.findall(r"(\w+)=(\S*)", shown))

    def said(self) -> str:
        """Its output so far."""
        return self.output.read_text(errors="replace") if self.output.exists() else ""

    def wait_until(self, happened: Callable[[], Any], what: str, *, seconds: float = 120) -> None:
        """Until something has happened; a job that ends before it fails the test with its output."""
        deadline = time.monotonic() + seconds
        while not happened():
            over = self.facts()["JobState"] not in _NOT_OVER
            assert not (over and not happened()), f"it ended before: {what}\n{self.facts()}\n{self.said()}"
            assert time.monotonic() < deadline, f"not within {seconds:.0f} s: {what}\n{self.said()}"
            time.sleep(0.1)

    def wait_for_step(self, run_dir: Path, step: int) -> None:
        """Until a step is logged."""
        self.wait_until(lambda: any(n >= step for n in curve(run_dir)), f"step {step}")

    def ended(self, *, seconds: float = 240) -> dict[str, str]:
        """Its facts once it is over, requeued starts included."""
        done = self.lab.script("wait", self.number, str(int(seconds)))
        assert done.returncode != 124, f"not over within {seconds:.0f} s\n{self.said()}"
        return self.facts()


@dataclass(frozen=True)
class Lab:
    """The cluster. `shared` is a folder that all its nodes see; the rest of /tmp is each node's own."""

    folder: Path
    shared: Path
    environ: dict[str, str]

    def run(self, *words: object, check: bool = True, **more: Any) -> subprocess.CompletedProcess[str]:
        """A command on the login side."""
        ended = subprocess.run(
            list(map(str, words)), env=self.environ, cwd=REPOSITORY, capture_output=True, text=True, check=False, **more
        )
        assert not check or ended.returncode == 0, ended.stdout + ended.stderr
        return ended

    def script(self, *words: str) -> subprocess.CompletedProcess[str]:
        """slurm_lab.sh itself."""
        return self.run("bash", LAB_SCRIPT, *words, check=False)

    def submit(
        self,
        *words: object,
        options: tuple[str, ...] = ONE_RANK_A_NODE,
        script: str = "distill.sbatch",
        environ: dict[str, str] | None = None,
    ) -> Job:
        """sbatch OPTIONS slurm/SCRIPT WORDS."""
        exported = ",".join(["ALL", *(f"{name}={value}" for name, value in (environ or {}).items())])
        log = f"--output={self.shared}/%j.out"
        ended = self.run("sbatch", "--parsable", log, f"--export={exported}", *options, f"slurm/{script}", *words)
        number = ended.stdout.strip()
        return Job(self, number, self.shared / f"{number}.out")

    def on_node(self, node: str, *words: str) -> subprocess.CompletedProcess[str]:
        """A command among a node's processes, with its network."""
        first = (self.folder / node / "init.pid").read_text().strip()
        return self.run("nsenter", "--net", "--pid", "--mount", "--target", first, *words, check=False)

    @contextmanager
    def node_may_be_silent_for(self, seconds: int) -> Iterator[None]:
        """Let Slurm wait so long for a silent node before it calls it down."""
        conf = self.folder / "etc/slurm.conf"
        before = conf.read_text()
        conf.write_text(re.sub(r"(?m)^SlurmdTimeout=.*", f"SlurmdTimeout={seconds}", before))
        self.run("scontrol", "reconfigure")
        try:
            yield
        finally:
            conf.write_text(before)
            self.run("scontrol", "reconfigure")

    def signal_rank(self, node: str, name: str) -> None:
        """Signal the training process of a node."""
        found = self.on_node(node, "pgrep", "--full", "--oldest", RANK_PROGRAM)
        assert found.returncode == 0, f"no rank on {node}"
        self.on_node(node, "kill", f"-{name}", found.stdout.strip())


def records(run_dir: Path) -> list[dict[str, Any]]:
    """The whole lines of metrics.jsonl so far."""
    path = run_dir / "metrics.jsonl"
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]


def curve(run_dir: Path) -> dict[int, dict[str, float]]:
    """What was computed at each logged step; one that was logged twice fails."""
    timed = {"seconds", "tokens_per_second", "data_wait_fraction", "memory_bytes"}
    trained = [record for record in records(run_dir) if "loss" in record]
    assert len({record["step"] for record in trained}) == len(trained)
    return {record["step"]: {n: v for n, v in record.items() if n not in timed} for record in trained}


def evaluations(run_dir: Path) -> list[dict[str, Any]]:
    return [record for record in records(run_dir) if "loss" not in record]


def assert_same_run(run_dir: Path, other: Path) -> None:
    """The same figures at every step, the same evaluations and the same student, to the last bit."""
    assert curve(run_dir) == curve(other)
    assert evaluations(run_dir) == evaluations(other)
    ours, theirs = ((each / "student" / "model.safetensors").read_bytes() for each in (run_dir, other))
    assert ours == theirs


def say_of_job(lab: Lab, command: str, *options: str, exit_code: str = "0:0") -> str:
    """What a job of one command says, once it has ended with an exit code."""
    log = lab.shared / "%j.out"
    number = lab.run("sbatch", "--parsable", f"--output={log}", "--time=60", *options, "--wrap", command).stdout.strip()
    job = Job(lab, number, lab.shared / f"{number}.out")
    facts = job.ended(seconds=120)
    assert facts["ExitCode"] == exit_code, job.said()
    return job.said()
