"""Environments such as each launcher makes."""

import os
import re

TORCHRUN = {
    "RANK": "5",
    "WORLD_SIZE": "8",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "4",
    "MASTER_ADDR": "node1",
    "MASTER_PORT": "12345",
}
OPENMPI = {
    "OMPI_COMM_WORLD_RANK": "2",
    "OMPI_COMM_WORLD_SIZE": "4",
    "OMPI_COMM_WORLD_LOCAL_RANK": "2",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "4",
}
BATCH_SHELL = {
    "SLURM_JOB_ID": "1000",
    "SLURM_JOB_NODELIST": "jz[012-015,020],x1",
    "SLURM_NTASKS": "9",
    "SLURM_PROCID": "0",
    "SLURM_NODEID": "0",
    "SLURM_LOCALID": "0",
}
SRUN = BATCH_SHELL | {
    "SLURM_STEP_ID": "3",
    "SLURM_STEP_NUM_TASKS": "9",
    "SLURM_STEP_TASKS_PER_NODE": "4(x2),1",
    "SLURM_STEP_NODELIST": "jz[012-013,020]",
    "SLURM_PROCID": "6",
    "SLURM_NODEID": "1",
    "SLURM_LOCALID": "2",
}


def clean_environ() -> dict[str, str]:
    """os.environ without a trace of a launcher."""
    launchers = r"SLURM_.*|OMPI_.*|MV2_.*|PMI_.*|MPI_LOCAL.*|MASTER_.*|(LOCAL_|GROUP_)?RANK|.*WORLD_SIZE|LOCAL_SIZE"
    settings = r"TORCHELASTIC_.*|DS_ACCELERATOR|OMP_NUM_THREADS"
    return {name: text for name, text in os.environ.items() if not re.fullmatch(f"{launchers}|{settings}", name)}
