"""What a model would put in the place of <mask>, or next: the quickest look at what it has learned."""

from collections.abc import Sequence
from typing import Any

import torch

from distilcb.models.families import Family


@torch.compiler.set_stance("force_eager")  # its shapes are not those that training compiled
@torch.no_grad()
def fill_masks(
    model: Any,
    family: Family,
    tokenizer: Any,
    sentences: Sequence[str],
    *,
    device: torch.device,
    top: int = 3,
) -> list[tuple[str, list[tuple[str, float]]]]:
    """For each sentence with one mask token: the sentence, and its `top` words with their probabilities.

    Sentences say "<mask>" whatever the tokenizer's own mask token is; without one they are left out, and of several
    the first is filled. A causal model reads what stands before.
    """
    was_training = model.training
    model.eval()
    answers = []
    weight, bias = family.decoder(model)
    for sentence in sentences:
        if family.causal:
            ids = torch.tensor([_before_mask(sentence, tokenizer)], device=device)
            places = torch.tensor([ids.shape[1] - 1] if "<mask>" in sentence else [], device=device)
        else:
            ids = torch.tensor(
                [tokenizer(sentence.replace("<mask>", tokenizer.mask_token))["input_ids"]], device=device
            )
            places = (ids[0] == tokenizer.mask_token_id).nonzero()[:1, 0]
        if not places.numel():
            continue
        features = family.head_features(model, family.encode(model, ids)[0, places])
        probabilities = torch.softmax(torch.nn.functional.linear(features, weight, bias).float()[0], dim=-1)
        best = probabilities.topk(top)
        words = [tokenizer.decode([index]).strip() for index in best.indices.tolist()]
        answers.append((sentence, list(zip(words, best.values.tolist(), strict=True))))
    model.train(was_training)
    return answers


def _before_mask(sentence: str, tokenizer: Any) -> list[int]:
    """Ids of a document's end, after which another one begins, and of the text before the mask."""
    ids: list[int] = tokenizer(sentence.partition("<mask>")[0].rstrip(), add_special_tokens=False)["input_ids"]
    return [tokenizer.eos_token_id, *ids]


def as_lines(answers: Sequence[tuple[str, list[tuple[str, float]]]]) -> list[str]:
    """'sentence  ->  word 42%, word 10%, …' for each answer."""
    return [
        f"{sentence}  ->  " + ", ".join(f"{word} {share:.0%}" for word, share in words) for sentence, words in answers
    ]
