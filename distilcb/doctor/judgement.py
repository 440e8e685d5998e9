"""Who is clearly slower than the rest: pure functions from figures to findings."""

from collections.abc import Hashable, Mapping, Sequence, Set
from dataclasses import dataclass
from statistics import median_high
from typing import Any, TypeVar

# Of the median. Devices of one kind differ by a few percent; a link that came up at a lower speed has half of it or
# less; file systems are shared with others, whose work comes and goes.
DEVICE_SHARE = 0.85
LINK_SHARE = 0.7
WRITE_SHARE = 1 / 3

K = TypeVar("K", bound=Hashable)


@dataclass(frozen=True)
class Finding:
    """Something that is wrong.

    Attributes:
        host: where; "" where it is not of one node.
        kind: what was looked at; with the host it tells whether two measurements found the same.
        text: for the user, with figures.
        ratio: to the median, where there is one.
    """

    host: str
    kind: str
    text: str
    ratio: float | None = None


def stragglers(figures: Mapping[K, float], *, share: float) -> dict[K, tuple[float, float]]:
    """Those whose figure is below a share of the median: their ratio to it, and the median; the slowest first.

    The upper median (of two, the faster), so that one of two nodes, or half of the ranks, can be told from the rest.
    """
    if not figures:
        return {}
    usual = median_high(figures.values())
    ratios = {name: figure / usual for name, figure in figures.items() if figure < share * usual}
    return {name: (ratios[name], usual) for name in sorted(ratios, key=lambda name: ratios[name])}


def slow_devices(ranks: Sequence[Mapping[str, Any]], rates: Sequence[Mapping[str, float]]) -> list[Finding]:
    """A finding for each node with slow devices, about the slowest of them.

    Args:
        ranks: each rank's "host" and "device".
        rates: each rank's, by precision, and on a CPU its "core_share".
    """
    starved = stragglers({rank: each.get("core_share", 1.0) for rank, each in enumerate(rates)}, share=DEVICE_SHARE)
    worst: dict[int, tuple[float, str]] = {}
    for precision in rates[0].keys() - {"core_share"}:
        figures = {rank: each[precision] for rank, each in enumerate(rates)}
        for rank, (ratio, usual) in stragglers(figures, share=DEVICE_SHARE).items():
            text = f"rank {rank} on {ranks[rank]['host']} ({ranks[rank]['device']}) multiplies {precision} at "
            text += f"{figures[rank]:.3g} TFLOP/s, {_percent(ratio)} of the median {usual:.3g}"
            if rank in starved:
                share = _percent(rates[rank]["core_share"])
                text += f"; it was given {share} of its cores' time: something else runs there"
            worst[rank] = min(worst.get(rank, (ratio, text)), (ratio, text))
    slow: dict[str, list[tuple[float, str]]] = {}
    for rank in sorted(worst, key=lambda rank: worst[rank]):
        slow.setdefault(ranks[rank]["host"], []).append(worst[rank])
    return [
        Finding(host, "products", text + (f" (and {len(each) - 1} more there)" if len(each) > 1 else ""), ratio)
        for host, each in slow.items()
        for ratio, text in each[:1]
    ]


def slow_sums(curves: Mapping[str, Mapping[int, float]], hosts: Set[str]) -> list[Finding]:
    """A finding for each node whose own ranks reach each other slowly.

    Args:
        curves: bus bandwidth by bytes, by the node's name.
        hosts: the nodes to judge.
    """
    judged = {host: curves[host] for host in hosts if host in curves}
    size = min((max(curve) for curve in judged.values()), default=0)  # a slow one stopped at a smaller one
    figures = {host: curve[size] for host, curve in judged.items()}
    return [
        Finding(host, "sums", f"{host} sums within the node at {_figure(figures[host], *place)}", place[0])
        for host, place in stragglers(figures, share=LINK_SHARE).items()
    ]


def slow_links(links: Mapping[tuple[str, str], float], hosts: Set[str]) -> list[Finding]:
    """A finding for each node that sends slowly to whomever, or receives slowly from whomever.

    The best of a node's partners counts, so that a slow one among them does not make it slow.

    Args:
        links: GB/s by (sender, receiver).
        hosts: the nodes to judge, and to judge by.
    """
    judged = {pair: rate for pair, rate in links.items() if set(pair) <= hosts}
    found = []
    # Of two nodes, one receives slowly if the other sends slowly: told once, of the one that sends.
    for kind, end in [("sends", 0), ("receives", 1)][: 1 if len(judged) <= 2 else 2]:
        best: dict[str, float] = {}
        for pair, rate in judged.items():
            best[pair[end]] = max(best.get(pair[end], 0.0), rate)
        for host, place in stragglers(best, share=LINK_SHARE).items():
            text = f"{host} {kind} at {_figure(best[host], *place)}"
            if len(judged) <= 2:
                text += " (the other node's receiving may be the cause: a third node would tell)"
            found.append(Finding(host, kind, text, place[0]))
    return found


def slow_writes(rates: Mapping[str, float | str]) -> list[Finding]:
    """A finding for each node that cannot write, or writes far slower than the others.

    Args:
        rates: GB/s of each node, or why it cannot.
    """
    found = [
        Finding(host, "writes", f"{host} cannot write there: {why}")
        for host, why in rates.items()
        if isinstance(why, str)
    ]
    figures = {host: rate for host, rate in rates.items() if not isinstance(rate, str)}
    return found + [
        Finding(host, "writes", f"{host} writes at {_figure(figures[host], *place)}", place[0])
        for host, place in stragglers(figures, share=WRITE_SHARE).items()
    ]


def missing_compilers(ranks: Sequence[Mapping[str, Any]]) -> list[Finding]:
    """A finding for each node that would have to compile DeepSpeed's operators and cannot."""
    unable = {each["host"] for each in ranks if not all(each["compiled"].values()) and not each["compiler"]}
    return [
        Finding(host, "operators", f"{host}: DeepSpeed's operators are not compiled, and no compiler is there")
        for host in sorted(unable)
    ]


def in_order(findings: Sequence[Finding]) -> list[Finding]:
    """The gravest first: what has no figure, then the slowest."""
    return sorted(findings, key=lambda each: -1.0 if each.ratio is None else each.ratio)


def _figure(rate: float, ratio: float, usual: float) -> str:
    return f"{rate:.3g} GB/s, {_percent(ratio)} of the median {usual:.3g}"


def _percent(ratio: float) -> str:
    return f"{100 * ratio:.2g} %"
