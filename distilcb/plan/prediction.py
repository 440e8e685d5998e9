"""Memory, time, communication and disk of a run, by arithmetic; every assumption is a field or stands in a comment."""

from dataclasses import dataclass, replace

from distilcb.config import Config
from distilcb.losses.head import rows_per_chunk
from distilcb.losses.relation import blocks_at_once
from distilcb.monitor.metrics import flops_per_token
from distilcb.plan.sizes import ModelSizes, Sizes

# Of the memory of a GPU, for the CUDA context, NCCL and what fragments.
RESERVED = 0.08


@dataclass(frozen=True)
class Machine:
    """What the run is to have.

    memory: bytes a device. flops: peak of one in the run's precision. efficiency: share of it that a step reaches.
    link, node_link: bytes/s in one direction, of a device inside its node and of a whole node to the others.
    buckets: numbers that DeepSpeed's buffers for gradients hold, whatever the model's size.
    """

    gpus: int
    gpus_per_node: int
    memory: float
    flops: float
    efficiency: float
    link: float
    node_link: float
    buckets: float
    device_type: str = "cuda"

    @property
    def nodes(self) -> int:
        return -(-self.gpus // self.gpus_per_node)

    @property
    def bus(self) -> float:
        """Bytes/s at which a ring over all devices moves: its slowest link. Inside several nodes all links of a node
        carry rings side by side."""
        return self.link if self.nodes == 1 else min(self.link, self.node_link)


@dataclass(frozen=True)
class Memory:
    """Bytes on one device, by part."""

    parts: dict[str, float]

    @property
    def total(self) -> float:
        return sum(self.parts.values())


def memory(config: Config, sizes: Sizes, machine: Machine, *, micro_batch: int, width: int) -> Memory:
    """What one device holds at the peak of a step.

    Args:
        micro_batch: sequences a pass.
        width: bytes of a number in the run's precision.
    """
    student, teacher = sizes.student, sizes.teacher
    rows = micro_batch * config.data.seq_len
    soft, head_rows = _head_rows(config, rows)
    vocab, hidden = student.shape.vocab, student.shape.hidden
    # Not shared out evenly: the rows of a batch are about head_rows, and one more may make of two chunks' rows one's.
    chunk = min(head_rows, rows_per_chunk(vocab, machine.device_type))
    parts = {
        "student: weights": width * student.parameters,
        # DeepSpeed's, in fp32, sharded: master weights and Adam's two moments.
        "optimizer states": 12.0 * student.trained / machine.gpus,
        # In fp32 and sharded, over the micro-batches; and those on their way.
        "gradients": 4.0 * student.trained / machine.gpus + width * machine.buckets,
        "student: activations": rows * activation_bytes(student, width, machine.device_type, config),
        # Logits of both models, the decoder's gradient in fp32 twice, features and their gradients.
        "head": 2.0 * width * chunk * vocab + 8.0 * vocab * hidden + head_rows * hidden * (4 + 6 * width),
    }
    if teacher is not None:
        shape = teacher.shape
        # Kept for the loss: hidden states and features. While it runs: a layer's widest tensors.
        passing = rows * width * (4 * shape.hidden + 2 * shape.intermediate)
        parts["teacher: weights"] = width * teacher.parameters
        parts["teacher: outputs"] = width * shape.hidden * (rows + soft) + passing
        if config.loss.relation:
            # Of one kind and some blocks, in the backward pass: scores, and as measured five times as many numbers in
            # fp32; and the projections of both models.
            blocks = min(micro_batch, blocks_at_once(config.loss.relation_heads, config.data.seq_len))
            pairs = blocks * config.data.seq_len**2 * config.loss.relation_heads
            parts["relations"] = pairs * (5 * 4.0 + width) + 3.0 * width * rows * (hidden + shape.hidden)
    return Memory(parts)


def activation_bytes(model: ModelSizes, width: int, device_type: str, config: Config) -> float:
    """What the backward pass of a BERT-like encoder needs of one token.

    Of each layer with a fused attention: its input, q, k, v and the attention's output, what the two layer norms are
    given, the first one's output, and both sides of the activation: 8 hidden and 2 intermediate; the attention's
    log-sum-exp and the norms' statistics; the masks of two dropouts, a byte a number on CUDA. On a CPU the weights of
    an attention with dropout (models/cpu_layers.py). tests/unit/test_plan.py counts them.
    """
    shape = model.shape
    mask = (1 if device_type == "cuda" else width) if model.dropout else 0
    weights = width * config.data.seq_len if model.dropout and device_type == "cpu" else 4  # or the log-sum-exp
    attention = model.heads * weights
    layer = width * (8 * shape.hidden + 2 * shape.intermediate) + attention + 4 * width + 2 * mask * shape.hidden
    embeddings = (width + mask) * shape.hidden + 24
    if config.train.activation_checkpointing:  # every layer's input, and all of the one that is computed again
        return embeddings + shape.layers * width * shape.hidden + layer
    return embeddings + shape.layers * layer


def room(machine: Machine) -> float:
    """Bytes of a device that a run may take."""
    return machine.memory * (1 - RESERVED)


def largest_micro_batch(config: Config, sizes: Sizes, machine: Machine, *, width: int) -> int:
    """The most sequences a pass that cut a device's share of the batch evenly and fit; 0: not one fits."""
    share = config.optim.global_batch // machine.gpus
    fitting = [
        size
        for size in range(1, share + 1)
        if share % size == 0 and memory(config, sizes, machine, micro_batch=size, width=width).total <= room(machine)
    ]
    return max(fitting, default=0)


@dataclass(frozen=True)
class Step:
    """Seconds of one optimizer step by part; communication is what it takes if nothing hides it."""

    computing: float
    communication: float
    tokens: int

    @property
    def seconds(self) -> float:
        """The reduction of gradients runs beside the backward pass, half of the computing; the rest shows."""
        return self.computing + max(0.0, self.communication - self.computing / 2)


def step(
    config: Config, sizes: Sizes, machine: Machine, *, micro_batch: int, width: int, token_rate: float | None = None
) -> Step:
    """One optimizer step.

    token_rate: tokens/s of one device as measured; None: peak times efficiency.
    """
    tokens = config.optim.global_batch * config.data.seq_len
    rate = token_rate or machine.flops * machine.efficiency / flop_per_token(config, sizes)
    micros = -(-config.optim.global_batch // (micro_batch * machine.gpus))
    moved = bytes_per_step(sizes, machine, width=width, micro_batches=micros)
    return Step(tokens / machine.gpus / rate, moved / machine.bus, tokens)


def bytes_per_step(sizes: Sizes, machine: Machine, *, width: int, micro_batches: int) -> float:
    """What each device sends in a step under ZeRO 2, by rings: gradients in every micro-batch, since shards are all
    that is kept of them, and once the new weights to all. DeepSpeed all-reduces its buckets, which is twice what a
    shard's owner needs (use_multi_rank_bucket_allreduce; without it a bucket is as many reductions as owners)."""
    whole = width * sizes.student.trained * (machine.gpus - 1) / machine.gpus
    return whole * (2 * micro_batches + 1)


def flop_per_token(config: Config, sizes: Sizes) -> float:
    """Floating-point operations of one training token, the mean over the steps."""
    until = config.loss.kl_until
    if until < 1:
        first, last = replace(config.loss, kl_until=1.0), replace(config.loss.at(1, 1), kl_until=1.0)
        parts = [flop_per_token(replace(config, loss=loss), sizes) for loss in (first, last)]
        return until * parts[0] + (1 - until) * parts[1]
    soft, head = _head_rows(config, 1_000_000)
    loss, seq_len = config.loss, config.data.seq_len
    total = flops_per_token(
        sizes.student.shape,
        sizes.teacher.shape if sizes.teacher and loss.needs_teacher else None,
        seq_len=seq_len,
        soft_share=soft / 1e6,
        head_share=head / 1e6,
        relates=bool(loss.relation),
    )
    if config.train.activation_checkpointing:  # the layers' forward pass once more, a third of what they take
        layers = flops_per_token(sizes.student.shape, None, seq_len=seq_len, soft_share=0, head_share=0)
        total += layers / 3
    return total


def checkpoint_bytes(sizes: Sizes, *, width: int) -> float:
    """Of one checkpoint: weights, and what the optimizer keeps of each trained one in fp32."""
    return width * sizes.student.parameters + 12.0 * sizes.student.trained


def _head_rows(config: Config, rows: int) -> tuple[int, int]:
    """Rows that need the teacher's distribution, and the student's."""
    loss = config.loss
    labelled = rows - rows // config.data.seq_len if loss.clm else round(rows * config.masking.rate)
    if not (loss.kl or loss.mse):
        return 0, labelled if loss.mlm or loss.clm else 0
    soft = rows if loss.kl_positions == "attended" else labelled
    return soft, max(soft, labelled)
