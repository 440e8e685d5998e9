"""Causal attention over blocks without padding."""

from typing import Any

from transformers import AttentionInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

_WHOLE = "_of_whole_blocks"


def use_whole_blocks(model: Any) -> None:
    """Have a causal transformers model take every row for one text without padding, whatever mask it is given.

    It computes the same as without a mask. But then transformers asks the device at every call whether a row holds
    several texts (masking_utils.find_packed_sequence_indices), and the host waits for the answer; an attention that is
    registered without a way to make masks is not asked about.
    """
    used = model.config._attn_implementation
    if used in ALL_ATTENTION_FUNCTIONS and not used.endswith(_WHOLE):
        AttentionInterface.register(used + _WHOLE, ALL_ATTENTION_FUNCTIONS[used])
        model.set_attn_implementation(used + _WHOLE)
