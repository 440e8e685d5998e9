"""Our step as it is, beside what else it could do: torch.compile, overlap_comm the other way, coalesced gradients.

python benchmarks/variants.py [--quick] [--json FILE] [--report FILE] [--cases real,mini] [SETTINGS]
torchrun --nproc_per_node 2 benchmarks/variants.py …

Coalesced gradients (DeepSpeed's coalesce_grad_reduction) are reduced once a step and added up in the model's precision
before, so on one rank their gain is that of the sums in fp32 which they leave out. They are here to tell what reducing
and adding up at each micro-step costs, not to be used.
"""

import copy
import sys
from dataclasses import replace
from typing import Any

from side_by_side import medians, parser_of, table, tell
from step import Case, Ours, cases, random_models, recipe_words

from distilcb import distributed
from distilcb.command_line import parse_command_line
from distilcb.config import Config
from distilcb.engine.deepspeed_config import DTYPES
from distilcb.engine.optimizer import learning_rate
from distilcb.models.cpu_dropout import use_cpu_dropout
from distilcb.models.teacher import Teacher
from distilcb.train.build import Place, take_place
from distilcb.train.models import Models, compile_layers


def main(words: list[str]) -> None:
    parser = parser_of(__doc__ or "")
    parser.add_argument("--cases", default="real,mini", help="of real and mini (default: both)")
    parser.add_argument("--rounds", type=int, help="turns of each (default: 7, with --quick 2)")
    parser.add_argument("--local_rank", help="set by launchers")
    options, settings = parser.parse_known_args(words)
    command = parse_command_line([*recipe_words(), *settings])
    place = take_place(command)
    rounds = options.rounds or (2 if options.quick else 7)
    figures: dict[str, Any] = {"precision": place.precision, "ranks": place.world.size}
    parts = []
    for case in cases(options.cases, on_cuda=place.device.type == "cuda", quick=options.quick):
        parts.append(measure(case, command.config, place, rounds, figures))
    if place.world.is_main:
        tell("Variants of a step", "\n\n".join(parts), figures, options, f"benchmarks/variants.py {' '.join(words)}")
    distributed.stop()


class Coalesced(Ours):
    """Gradients stay in the weights until the last micro-batch, and are reduced together."""

    def step(self, *, kl_positions: str = "attended") -> tuple[int, int]:
        stepper, engine = self.stepper, self.engine
        for group in engine.optimizer.param_groups:
            group["lr"] = learning_rate(stepper.optim, step=self.steps, steps=stepper.steps)
        self.steps += 1
        with engine.coalesce_grad_reduction():
            for _ in range(stepper.cut.accumulation):
                batch = next(self.batches).to(stepper.device)
                loss, _sums = engine(batch, stepper.teach(batch), stepper.coefficients)
                engine.backward(loss.clone(), scale_wrt_gas=False)
        engine.set_gradient_accumulation_boundary(True)
        engine.step()
        return self.tokens, self.tokens


def measure(case: Case, config: Config, place: Place, rounds: int, figures: dict[str, Any]) -> str:
    """All variants of a case in turn, as Markdown."""
    teacher, student, family, tokenizer = random_models(case, config)
    teacher.to(place.device, DTYPES[place.precision])

    def models(*, compiled: bool = False) -> Models:
        made = Models(Teacher(copy.deepcopy(teacher)), copy.deepcopy(student), family, tokenizer)
        if compiled:
            compile_layers(made)
        elif place.device.type == "cpu":
            use_cpu_dropout(made.student)
        return made

    zero = place.settings["zero_optimization"]
    other_way = replace(
        place, settings=place.settings | {"zero_optimization": zero | {"overlap_comm": not zero.get("overlap_comm")}}
    )
    variants = {
        "as it is": Ours(case, config, place, models()),
        "train.compile": Ours(case, config, place, models(compiled=True)),
        f"overlap_comm: {str(not zero.get('overlap_comm')).lower()}": Ours(case, config, other_way, models()),
        "coalesced gradients": Coalesced(case, config, place, models()),
    }
    seconds = medians({name: lambda each=each: each.step() for name, each in variants.items()}, rounds=rounds)
    base, rows = seconds["as it is"], []
    for name, each in variants.items():
        figures[f"{case.name}, length {case.length}: {name}"] = {
            "tokens_per_second": each.tokens / seconds[name],
            "speed": base / seconds[name],
            "skipped_steps": each.engine.skipped_steps,
        }
        speed = f"{base / seconds[name]:.3f}"
        rows.append((name, f"{each.tokens / seconds[name]:,.0f}", speed, each.engine.skipped_steps))
    return (
        f"## {case.name} size, length {case.length}\n\n{place.world.size} rank(s), {case.accumulation} micro-batches "
        f"of {case.micro_batch} sequences a step, {place.precision}; median of {rounds} in turn.\n\n"
        + table(["", "tokens/s", "as it is = 1", "steps that fp16 skipped"], rows)
    )


if __name__ == "__main__":
    sys.exit(distributed.exit_code(main))
