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

from side_by_side import medians, parser_of, table
from step import Case, Ours, Session, begin, random_models

from distilcb import distributed
from distilcb.engine.deepspeed_config import DTYPES
from distilcb.engine.optimizer import learning_rate
from distilcb.models.teacher import Teacher
from distilcb.train.models import Models, use_fast_layers


def main(words: list[str]) -> None:
    session = begin(parser_of(__doc__ or ""), words, names="real,mini", rounds=7, quick=2)
    parts = [measure(case, session) for case in session.cases]
    session.end("Variants of a step", parts, f"benchmarks/variants.py {' '.join(words)}")


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


def measure(case: Case, session: Session) -> str:
    """All variants of a case in turn, as Markdown."""
    config, place, rounds = session.config, session.place, session.rounds
    teacher, student, family, tokenizer = random_models(case, config)
    teacher.to(place.device, DTYPES[place.precision])

    def models(*, compiled: bool = False) -> Models:
        made = Models(Teacher(copy.deepcopy(teacher)), copy.deepcopy(student), family, tokenizer)
        use_fast_layers(made, place, compiled=compiled)
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
        session.figures[f"{case.name}, length {case.length}: {name}"] = {
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
