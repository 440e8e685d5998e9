"""What the doctor has measured and thinks of it, as text and as JSON."""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from distilcb.doctor.judgement import Finding, in_order


@dataclass(frozen=True)
class Report:
    """Figures, findings, advice.

    Attributes:
        ranks: what each runs on.
        products: each rank's TFLOP/s by precision.
        sums: all-reduce bus bandwidth in GB/s by bytes, of each node, "between nodes" and over "all ranks".
        links: GB/s by (sender, receiver).
        folder, writes: the folder written to, and each node's GB/s, or why it cannot write.
        notes: what is worth knowing and not wrong.
        advice: header lines for Slurm, and the option for DeepSpeed.
    """

    ranks: Sequence[Mapping[str, Any]]
    products: Sequence[Mapping[str, float]]
    sums: Mapping[str, Mapping[int, float]]
    links: Mapping[tuple[str, str], float]
    folder: str
    writes: Mapping[str, float | str]
    findings: Sequence[Finding]
    notes: Sequence[str]
    advice: Sequence[str]
    seconds: float

    @property
    def hosts(self) -> list[str]:
        return list(dict.fromkeys(each["host"] for each in self.ranks))

    def as_json(self) -> str:
        """Every figure, rank by rank and pair by pair."""
        whole = {**vars(self), "findings": [vars(each) for each in self.findings]}
        whole["links"] = [{"from": pair[0], "to": pair[1], "gb_per_second": rate} for pair, rate in self.links.items()]
        whole["healthy"] = not self.findings
        return json.dumps(whole, indent=2) + "\n"

    def as_text(self) -> str:
        """A line a node, so that many nodes stay readable; the verdict last but for the advice."""
        versions = ", ".join(f"{name} {text}" for name, text in self.ranks[0]["same"].items())
        lines = [
            f"{len(self.ranks)} rank(s) on {len(self.hosts)} node(s), examined in {self.seconds:.0f} s: {versions}",
            *self._kinds_of_nodes(),
            f"writes: to {self.folder}",
            "",
            *_table(self._node_rows()),
            "",
            *(_table(self._sum_rows()) if self.sums else ["one rank: no sums to measure"]),
            "",
            f"verdict: {self.verdict()}",
            *(f"  {each.text}" for each in in_order(self.findings)),
            *(f"note: {note}" for note in self.notes),
            "",
            "for this allocation:",
            *(f"  {line}" for line in self.advice),
        ]
        return "\n".join(lines)

    def verdict(self) -> str:
        """OK, or how much is wrong and which node is the slowest."""
        if not self.findings:
            return "OK: nothing is broken, and no node is clearly slower than the others"
        slow = [each for each in in_order(self.findings) if each.ratio is not None]
        slowest = f"; the slowest node is {slow[0].host}" if slow else ""
        return f"{len(self.findings)} finding(s){slowest}"

    def _kinds_of_nodes(self) -> list[str]:
        """A line for each kind of node, after the names of those that are of it."""
        kinds: dict[str, list[str]] = {}
        for each in self.ranks:
            compiled = ", ".join(name if there else f"{name} NOT" for name, there in each["compiled"].items())
            kind = f"{each['device']}, {each['memory_bytes'] / 2**30:.0f} GiB"
            kind += f", driver {each['driver']}" if each["driver"] else ""
            kind += f"; {each['cpu']}, {each['threads']} thread(s) a rank; compiled: {compiled}"
            kind += f"; compiler: {each['compiler'] or 'none'}"
            kinds.setdefault(kind, []).append(each["host"])
        return [f"{listed(hosts)}: {kind}" for kind, hosts in kinds.items()]

    def _node_rows(self) -> list[list[str]]:
        precisions = [name for name in self.products[0] if name != "core_share"]
        head = ["node", "ranks", *(f"{name} TFLOP/s" for name in precisions), "within GB/s"]
        rows = [[*head, "sends GB/s", "receives GB/s", "writes GB/s"]]
        for host in self.hosts:
            mine = [rates for rank, rates in zip(self.ranks, self.products, strict=True) if rank["host"] == host]
            slowest = [_short(min(rates[name] for rates in mine)) for name in precisions]
            within = max(self.sums.get(host, {0: None}).items())[1]
            sends = max((rate for pair, rate in self.links.items() if pair[0] == host), default=None)
            receives = max((rate for pair, rate in self.links.items() if pair[1] == host), default=None)
            figures = [within, sends, receives, self.writes[host]]
            rows.append([host, str(len(mine)), *slowest, *map(_short, figures)])
        return rows

    def _sum_rows(self) -> list[list[str]]:
        sizes = sorted({size for curve in self.sums.values() for size in curve})
        rows = [["all-reduce, bus bandwidth in GB/s", *(f"{size >> 20} MiB" for size in sizes)]]
        within = [self.sums[host] for host in self.hosts if host in self.sums]
        curves = {"within nodes, the slowest": within} if within else {}
        curves |= {name: [self.sums[name]] for name in ("between nodes", "all ranks") if name in self.sums}
        for name, found in curves.items():
            rows.append([name, *(_short(min((c[size] for c in found if size in c), default=None)) for size in sizes)])
        return rows


def listed(hosts: Iterable[str]) -> str:
    """The first few, each once."""
    each = list(dict.fromkeys(hosts))
    return ", ".join(each[:8]) + (f" and {len(each) - 8} more" if len(each) > 8 else "")


def _short(figure: float | str | None) -> str:
    if figure is None:
        return "-"
    return "failed" if isinstance(figure, str) else f"{figure:.3g}"


def _table(rows: list[list[str]]) -> list[str]:
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
