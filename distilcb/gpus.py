"""What is known of GPUs before one has them. Source: NVIDIA's data sheets, SXM variants where there are several."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Gpu:
    """One device.

    memory: bytes. flops: dense half-precision peak, FLOP/s; fp32_flops: in fp32, without TF32, which nothing here turns
    on. link: bytes/s to its neighbours in a node, one direction.
    """

    name: str
    memory: float
    flops: float
    fp32_flops: float
    link: float


GPUS = {
    gpu.name: gpu
    for gpu in (
        Gpu("H200", 141e9, 989e12, 67e12, 450e9),
        Gpu("H100", 80e9, 989e12, 67e12, 450e9),
        Gpu("A100", 80e9, 312e12, 19.5e12, 300e9),
        Gpu("V100", 32e9, 125e12, 15.7e12, 150e9),
        Gpu("L40S", 48e9, 362e12, 91.6e12, 32e9),
        Gpu("A40", 48e9, 150e12, 37.4e12, 56e9),
    )
}
