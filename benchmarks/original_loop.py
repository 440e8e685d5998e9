"""The loop of the first Distil* scripts, written again in plain PyTorch: what benchmarks/step.py measures against.

It keeps what made those scripts slow: sequences padded to the longest of their batch, masks drawn by batch with
torch.multinomial, the vocabulary head on every position of both models, logits copied out by masked_select, each loss
read by the host after every micro-step, an unfused AdamW. Attention is what today's transformers choose, which is
faster than what there was in 2019. Sequences of like length share a batch, as there, in bins of four tokens.
"""

import copy
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

PAD, MASK, FIRST_WORD = 1, 4, 7
MASK_SHARE, BIN_TOKENS = 0.15, 4
WEIGHTS = {"kl": 0.5, "mlm": 0.2, "cos": 0.3}


class OriginalLoop:
    """Teacher, student and AdamW. `last` holds the losses of the last micro-step.

    In fp16 the student's weights are fp32 under autocast and its loss is scaled, as the first scripts did with apex;
    in other precisions all is in that one.
    """

    def __init__(
        self, teacher: Any, student: Any, *, device: torch.device, dtype: torch.dtype, masked_only: bool
    ) -> None:
        in_fp16 = dtype == torch.float16
        self.teacher = copy.deepcopy(teacher).to(device, dtype).eval()
        self.student = copy.deepcopy(student).to(device, torch.float32 if in_fp16 else dtype).train()
        self.scaler = torch.amp.GradScaler(device.type, enabled=in_fp16)
        self.autocast = torch.autocast(device.type, dtype=torch.float16, enabled=in_fp16)
        self.device, self.masked_only, self.temperature = device, masked_only, 2.0
        self.optimizer = torch.optim.AdamW(
            self.student.parameters(), lr=5e-4, betas=(0.9, 0.98), eps=1e-6, weight_decay=0.0, foreach=False
        )
        words = self.student.config.vocab_size
        self.word_weights = torch.ones(words, device=device)
        self.word_weights[:FIRST_WORD] = 0
        self.last: dict[str, float] = {}

    def step(self, batches: Sequence[tuple[Tensor, Tensor]]) -> None:
        """One optimizer step over micro-batches of padded ids and lengths."""
        for ids, lengths in batches:
            with self.autocast:
                loss = self._losses(ids.to(self.device), lengths.to(self.device))
            if bool((loss != loss).any()):
                raise FloatingPointError("the loss is NaN")
            self.scaler.scale(loss / len(batches)).backward()
        self.scaler.unscale_(self.optimizer)
        torch.nn.utils.clip_grad_norm_(self.student.parameters(), 5.0)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()

    def _losses(self, ids: Tensor, lengths: Tensor) -> Tensor:
        attended = torch.arange(ids.shape[1], device=self.device)[None, :] < lengths[:, None]
        ids, labels = self._mask(ids, lengths)
        asked: dict[str, Any] = {"input_ids": ids, "attention_mask": attended.long(), "output_hidden_states": True}
        student = self.student(**asked)
        with torch.no_grad():
            teacher = self.teacher(**asked)
        chosen = (labels > -1) if self.masked_only else attended
        selection = chosen[:, :, None].expand_as(student.logits)
        vocab = student.logits.shape[-1]
        ours = torch.masked_select(student.logits, selection).view(-1, vocab)
        theirs = torch.masked_select(teacher.logits, selection).view(-1, vocab)
        kl = F.kl_div(
            F.log_softmax(ours / self.temperature, dim=-1),
            F.softmax(theirs / self.temperature, dim=-1),
            reduction="batchmean",
        )
        kl = kl * self.temperature**2
        mlm = F.cross_entropy(student.logits.view(-1, vocab), labels.view(-1), ignore_index=-100)
        ours, theirs = student.hidden_states[-1], teacher.hidden_states[-1]
        width = ours.shape[-1]
        selection = attended[:, :, None].expand_as(ours)
        ours = torch.masked_select(ours, selection).view(-1, width)
        theirs = torch.masked_select(theirs, selection).view(-1, width)
        cos = F.cosine_embedding_loss(ours, theirs, ours.new_ones(len(ours)))
        loss = WEIGHTS["kl"] * kl + WEIGHTS["mlm"] * mlm + WEIGHTS["cos"] * cos
        named = {"loss": loss, "kl": kl, "mlm": mlm, "cos": cos}
        self.last = {name: value.item() for name, value in named.items()}
        return loss

    def _mask(self, ids: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """Ids with 15 % of the words hidden, and what stood there; -100 elsewhere."""
        weights = self.word_weights[ids.flatten()]
        count = int(torch.ceil(MASK_SHARE * lengths.sum()).item())
        places = torch.multinomial(weights / weights.sum(), count, replacement=False)
        hidden = torch.zeros(ids.numel(), dtype=torch.bool, device=self.device)
        hidden[places] = True
        hidden = hidden.view_as(ids)
        labels = torch.where(hidden, ids, -100)
        real = ids[hidden]
        other = torch.randint_like(real, self.student.config.vocab_size)
        kind = torch.multinomial(torch.tensor([0.8, 0.1, 0.1], device=self.device), len(real), replacement=True)
        shown = MASK * (kind == 0) + real * (kind == 1) + other * (kind == 2)
        return ids.masked_scatter(hidden, shown), labels


def padded_batches(lengths: Sequence[int], *, size: int, vocab: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Endless batches of random words, `size` sequences of like length padded to the longest."""
    generator = torch.Generator().manual_seed(seed)
    bins: dict[int, list[int]] = {}
    for length in lengths:
        bins.setdefault(length // BIN_TOKENS, []).append(length)
    groups = [group[at : at + size] for group in bins.values() for at in range(0, len(group) - size + 1, size)]
    while True:
        for place in torch.randperm(len(groups), generator=generator).tolist():
            group = torch.tensor(groups[place])
            ids = torch.randint(FIRST_WORD, vocab, (size, int(group.max())), generator=generator)
            yield ids.masked_fill(torch.arange(ids.shape[1])[None, :] >= group[:, None], PAD), group
