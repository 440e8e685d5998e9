"""Settings for every test."""

import os

# Threads that wait should sleep: on a machine that does other work too, spinning ones make a step take seconds. Read
# when torch is loaded.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch

if not torch.cuda.is_available():
    # Triton's kernels then run in its interpreter; read when Triton is loaded.
    os.environ.setdefault("TRITON_INTERPRET", "1")
