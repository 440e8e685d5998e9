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
from typing import Any

from side_by_side import in_turn, parser_of, table, tell
from step import LAYERS, Case, Ours, cases, random_models, recipe_words

from distilcb import distributed
from distilcb.command_line import parse_command_line
from distilcb.config import Config
from distilcb.engine.deepspeed_config import DTYPES
from distilcb.engine.lessons import lessons
from distilcb.engine.stepper import step_together
from distilcb.losses.triplet import coefficients
from distilcb.models.cpu_dropout import use_cpu_dropout
from distilcb.models.student import build_student
from distilcb.models.teacher import Teacher
from distilcb.train.build import Place, take_place
from distilcb.train.models import Models

DEPTHS = (6, 4, 2)
TEACHER = "the teacher's pass"
POSITIONS = {"attended": "KL on every word", "masked": "KL on masked words"}


def main(words: list[str]) -> None:
    parser = parser_of(__doc__ or "")
    parser.add_argument("--cases", default="real_128,mini", help="of real, real_128, real_512, mini")
    parser.add_argument("--rounds", type=int, help="turns of each (default: 7, with --quick 2)")
    parser.add_argument("--local_rank", help="set by launchers")
    options, settings = parser.parse_known_args(words)
    command = parse_command_line([*recipe_words(), *settings])
    place = take_place(command)
    rounds = options.rounds or (2 if options.quick else 7)
    figures: dict[str, Any] = {"precision": place.precision, "ranks": place.world.size}
    parts = []
    for case in cases(options.cases, on_cuda=place.device.type == "cuda", quick=options.quick):
        students = students_of(case, command.config, place)
        parts += [measure(case, place, students, positions, rounds, figures) for positions in POSITIONS]
    if place.world.is_main:
        text = "\n\n".join(parts)
        tell(
            "Three students, one teacher's pass",
            text,
            figures,
            options,
            f"python benchmarks/students.py {' '.join(words)}",
        )
    distributed.stop()


def students_of(case: Case, config: Config, place: Place) -> dict[int, Ours]:
    """Students by their depth, with engines of their own and one teacher."""
    model, _student, _family, tokenizer = random_models(case, config)
    students = {}
    for depth in DEPTHS:
        asked = replace(config.student, num_layers=depth)
        vocab = tokenizer.vocabulary.size
        students[depth] = build_student(asked, teacher=model, vocab_size=vocab, seed=config.train.seed)
    teacher = Teacher(model.to(place.device, DTYPES[place.precision]))
    if place.device.type == "cpu":
        for student, _family in students.values():
            use_cpu_dropout(student)
    return {
        depth: Ours(case, config, place, Models(teacher, student, family, tokenizer))
        for depth, (student, family) in students.items()
    }


def measure(
    case: Case, place: Place, students: dict[int, Ours], positions: str, rounds: int, figures: dict[str, Any]
) -> str:
    """Alone, together and the teacher's pass in turn, as Markdown."""
    for each in students.values():
        learn_at(each, positions)
    turns: dict[str, Callable[[], Any]] = {f"{depth} layers": alone(each) for depth, each in students.items()}
    turns |= {"together": together(list(students.values())), TEACHER: teach(students[DEPTHS[0]])}
    seconds = in_turn(turns, rounds=rounds)
    sums = [sum(each) for each in zip(*(seconds[f"{depth} layers"] for depth in DEPTHS), strict=True)]
    ratios = [both / apart for both, apart in zip(seconds["together"], sums, strict=True)]
    shares = [3 * lesson / apart for lesson, apart in zip(seconds[TEACHER], sums, strict=True)]
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    ratio, share = statistics.median(ratios), statistics.median(shares)
    where = f"{case.name}, length {case.length}, {POSITIONS[positions]}"
    figures[where] = {
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


def learn_at(student: Ours, positions: str) -> None:
    """Take kl there from now on."""
    stepper = student.stepper
    loss = replace(stepper.loss, kl_positions=positions)
    stepper.loss = student.engine.module.loss = loss
    stepper.coefficients = coefficients(loss, student.counts, world_size=stepper.cut.world_size)


def alone(student: Ours) -> Callable[[], None]:
    """A step of one student, which runs the teacher for itself."""

    def step() -> None:
        student.stepper.step(student.steps, student.batches)
        student.steps += 1

    return step


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
