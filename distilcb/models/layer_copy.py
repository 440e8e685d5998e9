"""Student layers from teacher layers."""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import nn

from distilcb.errors import ConfigError, ModelError
from distilcb.models.families import Family


def spread_layers(source_layers: int, num_layers: int) -> tuple[int, ...]:
    """Source layers spread evenly over the depth, the first and the last included.

    12 -> 6 gives 0, 2, 4, 7, 9, 11, which the original Distil* students copied.
    """
    if num_layers == 1:
        return (0,)
    return tuple(round(i * (source_layers - 1) / (num_layers - 1)) for i in range(num_layers))


def layers_of_groups(source_layers: int, num_layers: int, *, last: bool) -> tuple[int, ...]:
    """The first or the last source layer of each of `num_layers` groups of neighbours, as equal as can be.

    12 -> 6 gives 0, 2, 4, 6, 8, 10 or 1, 3, 5, 7, 9, 11.
    """
    ends = [i * source_layers // num_layers for i in range(num_layers + 1)]
    return tuple(end - 1 for end in ends[1:]) if last else tuple(ends[:-1])


def source_layers_of(
    asked: tuple[int, ...] | Literal["first_of_pairs", "last_of_pairs"] | None, source_layers: int, num_layers: int
) -> tuple[int, ...]:
    """What student.init_layers stands for.

    Raises:
        ConfigError: groups of a source that has fewer layers than the student.
    """
    if isinstance(asked, tuple):
        return asked
    if asked is None:
        return spread_layers(source_layers, num_layers)
    if num_layers > source_layers:
        raise ConfigError(
            f"student.init_layers={asked}: the source has {source_layers} layers, the student {num_layers}. Give a "
            "list."
        )
    return layers_of_groups(source_layers, num_layers, last=asked == "last_of_pairs")


@torch.no_grad()
def copy_weights(
    source: nn.Module, source_family: Family, target: nn.Module, family: Family, layers: Sequence[int]
) -> None:
    """Copy embeddings, the whole head, and for target layer i the source layer layers[i].

    source_family, family: of the source and of the target.

    Raises:
        ConfigError: a layer that the source does not have, or a map of another length than the target's depth.
        ModelError: weights of different shapes.
    """
    source_layers, target_layers = source_family.layers(source), family.layers(target)
    beyond = [layer for layer in layers if layer >= len(source_layers)]
    if beyond:
        raise ConfigError(
            f"student.init_layers={list(layers)}: the source has layers 0 to {len(source_layers) - 1}, not {beyond}."
        )
    if len(layers) != len(target_layers):
        raise ConfigError(
            f"student.init_layers={list(layers)} lists {len(layers)} layers, the student has {len(target_layers)}. "
            "Give one source layer for each."
        )
    for from_module, to_module in family.pairs(source, source_family, target, layers):
        weights = {name: value.to(torch.float32) for name, value in from_module.state_dict().items()}
        try:
            to_module.load_state_dict(weights)
        except RuntimeError as error:
            raise ModelError(
                f"the student's {type(to_module).__name__} differs from the source's: "
                f"{str(error).splitlines()[-1].strip()}. Only the depth may differ; check student.config."
            ) from error
    family.finish_copy(source, target)
