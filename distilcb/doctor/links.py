"""How fast ranks reach each other: all-reduce within nodes, between them and over all, and node to node."""

import statistics
import time
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from distilcb.distributed import device, gather_objects
from distilcb.doctor.devices import synchronize
from distilcb.watchdog import Place, at

_MIB = 2**20
SIZES = (_MIB, 4 * _MIB, 16 * _MIB, 64 * _MIB)
_REPEATS = 5
# A size that takes longer is the last: on a slow link larger ones tell no more, and fewer repeats must do.
_LONG_SECONDS = 0.25
_FEW_REPEATS = 3
# Nodes that each node exchanges with: enough to tell a slow node from a slow partner.
_PARTNERS = 4


class Groups:
    """The ranks of each node, and the first rank of each node, as process groups. Every rank must make one."""

    def __init__(self, hosts: Sequence[str]) -> None:
        """hosts: each rank's."""
        self.hosts = list(dict.fromkeys(hosts))
        self.rank = dist.get_rank() if len(hosts) > 1 else 0
        self.host = hosts[self.rank]
        members = {host: [rank for rank, each in enumerate(hosts) if each == host] for host in self.hosts}
        self.leaders = [members[host][0] for host in self.hosts]
        groups = {host: dist.new_group(ranks) for host, ranks in members.items() if len(ranks) > 1}
        self.node = groups.get(self.host)
        self.between = dist.new_group(self.leaders) if len(self.hosts) > 1 else None

    @property
    def is_leader(self) -> bool:
        return self.rank in self.leaders


def measure_sums(groups: Groups) -> dict[str, dict[int, float]]:
    """Bus bandwidth of an all-reduce in GB/s, by bytes: of each node by its name, "between nodes", "all ranks".

    Nodes measure themselves at the same time, as they train. Every rank must call it.
    """
    curves = gather_objects(_sum_curve(groups.node) if groups.node else {})
    found = {host: curves[leader] for host, leader in zip(groups.hosts, groups.leaders, strict=True) if curves[leader]}
    if groups.between:
        between = _sum_curve(groups.between) if groups.is_leader else {}
        found["between nodes"] = gather_objects(between)[groups.leaders[0]]
    if len(curves) > 1:
        found["all ranks"] = _sum_curve(dist.group.WORLD)
    return found


def bus_bandwidth(size: int, seconds: float, *, ranks: int) -> float:
    """GB/s that each rank's link carries while `ranks` of them all-reduce `size` bytes in `seconds`.

    Of the bytes each rank sends and receives 2 (n - 1) / n, whatever the algorithm: a number that can be compared
    with what the hardware promises, for any number of ranks.

    Source: NVIDIA, nccl-tests, doc/PERFORMANCE.md, "Bus bandwidth".
    """
    return size / seconds * 2 * (ranks - 1) / ranks / 1e9


def rounds_of_pairs(nodes: int) -> list[list[tuple[int, int]]]:
    """Rounds of disjoint pairs in which each of `nodes` meets each other once: the circle method of tournaments."""
    circle: list[int | None] = [*range(nodes), *([None] if nodes % 2 else [])]
    rounds = []
    for _ in range(len(circle) - 1):
        half = len(circle) // 2
        opposite = zip(circle[:half], reversed(circle[half:]), strict=True)
        rounds.append([(first, second) for first, second in opposite if first is not None and second is not None])
        circle = [circle[0], circle[-1], *circle[1:-1]]
    return rounds


def measure_links(groups: Groups) -> dict[tuple[str, str], float]:
    """GB/s from one node to another, one way at a time, by (sender, receiver); the median of several transfers.

    Pairs of a round work at the same time and share no node, so that the time does not grow with the number of nodes.
    Every rank must call it.
    """
    if not groups.between:
        return {}
    rounds = rounds_of_pairs(len(groups.hosts))[:_PARTNERS]
    _exchange(groups, rounds, SIZES[0])  # two nodes' first exchange connects them
    for size in SIZES:
        longest = max(max(each.values(), default=0.0) for each in gather_objects(_exchange(groups, rounds, size)))
        if longest > _LONG_SECONDS:
            break
    count = _REPEATS if longest < _LONG_SECONDS else _FEW_REPEATS
    repeats = gather_objects([_exchange(groups, rounds, size) for _ in range(count)])
    return {
        pair: size / statistics.median(each[pair] for each in repeats[leader]) / 1e9
        for leader in groups.leaders
        for pair in repeats[leader][0]
    }


def _exchange(groups: Groups, rounds: list[list[tuple[int, int]]], size: int) -> dict[tuple[str, str], float]:
    """Seconds of what this rank sent to each partner, all partners and both ways in turn."""
    seconds: dict[tuple[str, str], float] = {}
    if not groups.is_leader:
        return seconds
    at(Place.LINKS)
    data = torch.zeros(size // 4, device=device())
    for first, second in (pair for pairs in rounds for pair in pairs):
        for sender, receiver in ((first, second), (second, first)):
            if groups.rank == groups.leaders[sender]:
                pair = groups.hosts[sender], groups.hosts[receiver]
                seconds[pair] = _send(data, groups.leaders[receiver], groups.between)
            elif groups.rank == groups.leaders[receiver]:
                _receive(data, groups.leaders[sender], groups.between)
    return seconds


def _send(data: Tensor, receiver: int, group: Any) -> float:
    """Seconds from the receiver's word that it is ready to its word that it has everything."""
    word = torch.zeros(1, device=device())
    dist.recv(word, receiver, group)
    synchronize()
    started = time.perf_counter()
    dist.send(data, receiver, group)
    dist.recv(word, receiver, group)
    synchronize()
    return time.perf_counter() - started


def _receive(data: Tensor, sender: int, group: Any) -> None:
    word = torch.zeros(1, device=device())
    dist.send(word, sender, group)
    dist.recv(data, sender, group)
    dist.send(word, sender, group)
    synchronize()


def _sum_curve(group: Any) -> dict[int, float]:
    """Bus bandwidth by bytes; the slowest rank's, so that all of the group have the same."""
    curve = {}
    for size in SIZES:
        at(Place.SUMS)
        data = torch.zeros(size // 4, device=device())
        seconds = []
        for _ in range(_REPEATS + 1):
            dist.barrier(group)
            synchronize()
            started = time.perf_counter()
            dist.all_reduce(data, group=group)
            synchronize()
            seconds.append(time.perf_counter() - started)
        slowest = torch.tensor(statistics.median(seconds[1:]), device=device())
        dist.all_reduce(slowest, op=dist.ReduceOp.MAX, group=group)
        curve[size] = bus_bandwidth(size, slowest.item(), ranks=dist.get_world_size(group))
        if slowest.item() > _LONG_SECONDS:
            break
    return curve
