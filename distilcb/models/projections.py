"""What modules inside a model give while it runs."""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import TypeVar

from torch import Tensor, nn

Key = TypeVar("Key")


@contextmanager
def outputs_of(modules: Mapping[Key, nn.Module]) -> Iterator[dict[Key, Tensor]]:
    """{key: the tensor that its module gave last}, filled while a model runs within the context."""
    found: dict[Key, Tensor] = {}
    with ExitStack() as hooks:
        for key, module in modules.items():

            def keep(_module: nn.Module, _inputs: object, output: Tensor, key: Key = key) -> None:
                found[key] = output

            hooks.callback(module.register_forward_hook(keep).remove)
        yield found
