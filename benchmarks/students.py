"""A step of three students of 6, 4 and 2 layers that share the teacher's pass, beside the same three steps alone.

python benchmarks/students.py [--quick] [--json FILE] [--report FILE] [--cases real_128,mini] [SETTINGS]

The same engines take their turns alone and together, on random words, with KL on every word and on masked words only.
A ratio is that of a turn together to the sum of the three turns beside it, and the median of those is told. The
teacher's pass is timed by itself: three of it are in three steps alone, one is in a step together.
"""

import statistics
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

from side_by_side import in_turn, parser_of, table
from step import LAYERS, Case, Ours, Session, begin, random_models

from distilcb import distributed
from distilcb.config import Config
from distilcb.engine.deepspeed_config import DTYPES
from distilcb.engine.lessons import lessons
from distilcb.engine.stepper import step_together
from distilcb.models.student import build_student
from distilcb.models.teacher import Teacher
from distilcb.train.build import Place
from distilcb.train.models import Models, use_fast_layers

DEPTHS = (6, 4, 2)
TEACHER = "the teacher's pass"
POSITIONS = {"attended": "KL on every word", "masked": "KL on masked words"}


def main(words: list[str]) -> None:
    session = begin(parser_of(__doc__ or ""), words, names="real_128,mini", rounds=7, quick=2)
    parts = []
    for case in session.cases:
        students = students_of(case, session.config, session.place)
        parts += [measure(case, session, students, positions) for positions in POSITIONS]
    session.end("Three students, one teacher's pass", parts, f"python benchmarks/students.py {' '.join(words)}")


def students_of(case: Case, config: Config, place: Place) -> dict[int, Ours]:
    """Students by their depth, with engines of their own and one teacher."""
    model, _student, _family, tokenizer = random_models(case, config)
    students = {}
    for depth in DEPTHS:
        asked = replace(config.student, num_layers=depth)
        vocab = tokenizer.vocabulary.size
        students[depth] = build_student(asked, teacher=model, vocab_size=vocab, seed=config.train.seed)
    teacher = Teacher(model.to(place.device, DTYPES[place.precision]))
    models = {depth: Models(teacher, student, family, tokenizer) for depth, (student, family) in students.items()}
    for each in models.values():
        use_fast_layers(each, place, compiled=config.train.compile)
    return {depth: Ours(case, config, place, each) for depth, each in models.items()}


def measure(case: Case, session: Session, students: dict[int, Ours], positions: str) -> str:
    """Alone, together and the teacher's pass in turn, as Markdown."""
    place, rounds = session.place, session.rounds
    turns: dict[str, Callable[[], Any]] = {
        f"{depth} layers": partial(each.step, kl_positions=positions) for depth, each in students.items()
    }
    turns |= {"together": together(list(students.values())), TEACHER: teach(students[DEPTHS[0]])}
    seconds = in_turn(turns, rounds=rounds)
    sums = [sum(each) for each in zip(*(seconds[f"{depth} layers"] for depth in DEPTHS), strict=True)]
    ratios = [both / apart for both, apart in zip(seconds["together"], sums, strict=True)]
    shares = [3 * lesson / apart for lesson, apart in zip(seconds[TEACHER], sums, strict=True)]
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    ratio, share = statistics.median(ratios), statistics.median(shares)
    where = f"{case.name}, length {case.length}, {POSITIONS[positions]}"
    session.figures[where] = {
        "seconds": medians,
        "seconds_one_after_the_other": statistics.median(sums),
        "ratio": ratio,
        "ratios": ratios,
        "teachers_share_of_three_steps": share,
    }
    rows = [(f"{depth} layers, alone", f"{medians[f'{depth} layers']:.3f}", "") for depth in DEPTHS]
    rows += [
        ("the three, one after the other", f"{statistics.median(sums):.3f}", "1"),
        ("the three together", f"{medians['together']:.3f}", f"{ratio:.2f} ({min(ratios):.2f} to {max(ratios):.2f})"),
        ("the teacher's pass, three times", f"{3 * medians[TEACHER]:.3f}", f"{share:.2f}"),
    ]
    return (
        f"## {case.name} size, length {case.length}, {POSITIONS[positions]}\n\n{LAYERS} layers to 6, 4 and 2; hidden "
        f"{case.sizes['hidden_size']}, vocabulary {case.sizes['vocab_size']:,}; {place.world.size} rank(s), "
        f"{case.accumulation} micro-batch(es) of {case.micro_batch} sequences a step, {place.precision}; medians of "
        f"{rounds} in turn.\n\n" + table(["a step", "seconds", "of three steps"], rows)
    )


def together(students: list[Ours]) -> Callable[[], None]:
    """A step of all of them on one's batches."""

    def step() -> None:
        step_together([each.stepper for each in students], students[0].steps, students[0].batches)
        students[0].steps += 1

    return step


def teach(student: Ours) -> Callable[[], None]:
    """The teacher's passes of one step: hidden states, and what stands before its decoder."""

    def step() -> None:
        stepper = student.stepper
        for _ in range(stepper.cut.accumulation):
            lessons(stepper.teacher, [stepper.loss], next(student.batches).to(stepper.device))

    return step


if __name__ == "__main__":
    sys.exit(distributed.exit_code(main))
