"""Whom the doctor names from given figures, and what it advises; what it measures is in tests/slurm."""

import json
import platform
from itertools import combinations

import pytest

from distilcb.doctor import advice, disk, judgement
from distilcb.doctor.examination import confirmed
from distilcb.doctor.judgement import Finding
from distilcb.doctor.links import SIZES, bus_bandwidth, rounds_of_pairs
from distilcb.doctor.report import Report

MIB = 2**20


def ranks(*hosts):
    same = {"torch": "2.13.0"}
    facts = {"device": "CPU", "memory_bytes": 2**34, "driver": None, "cpu": "EPYC", "threads": 1, "same": same}
    facts |= {"devices_seen": 0, "cores_allowed": 2, "slurm_node": None}
    return [{"host": host, "compiled": {"fused_adam": True}, "compiler": "/usr/bin/c++"} | facts for host in hosts]


def test_the_bus_bandwidth_is_nccl_tests_own():
    # Two ranks send each byte once; of many, each sends it nearly twice.
    assert bus_bandwidth(10**9, 0.5, ranks=2) == pytest.approx(2.0)
    assert bus_bandwidth(10**9, 0.5, ranks=8) == pytest.approx(3.5)


@pytest.mark.parametrize("nodes", [2, 3, 4, 7, 8])
def test_every_two_nodes_meet_once_and_none_is_in_two_pairs_of_a_round(nodes):
    rounds = rounds_of_pairs(nodes)
    for pairs in rounds:
        taking_part = [node for pair in pairs for node in pair]
        assert len(taking_part) == len(set(taking_part))
    met = [frozenset(pair) for pairs in rounds for pair in pairs]
    assert len(met) == len(set(met))
    assert set(met) == {frozenset(pair) for pair in combinations(range(nodes), 2)}


def test_who_is_below_a_share_of_the_median_is_told_with_the_ratio_slowest_first():
    figures = {"a": 10.0, "b": 8.4, "c": 10.0, "d": 1.0, "e": 8.6}
    found = judgement.stragglers(figures, share=0.85 * 10 / 8.6)
    assert found == {"d": (pytest.approx(1 / 8.6), 8.6), "b": (pytest.approx(8.4 / 8.6), 8.6)}
    assert list(found) == ["d", "b"]


def test_of_two_the_slower_is_measured_against_the_faster():
    assert judgement.stragglers({"a": 1.0, "b": 0.8}, share=0.85) == {"b": (0.8, 1.0)}


@pytest.mark.parametrize(("slow", "named"), [(0.86, []), (0.84, ["node2"])])
def test_a_device_is_named_below_85_percent_of_the_median(slow, named):
    rates = [{"fp32": 1.0, "bf16": 2.0}, {"fp32": 1.0, "bf16": 2.0}, {"fp32": 1.0, "bf16": 2.0 * slow}]
    found = judgement.slow_devices(ranks("node1", "node1", "node2"), rates)
    assert [each.host for each in found] == named
    for each in found:
        assert "rank 2 on node2 (CPU) multiplies bf16 at 1.68 TFLOP/s, 84 % of the median 2" in each.text


def test_a_node_with_several_slow_devices_is_named_once_by_its_slowest():
    rates = [{"fp32": 1.0}, {"fp32": 1.0}, {"fp32": 0.5}, {"fp32": 0.4}]
    (found,) = judgement.slow_devices(ranks("node1", "node1", "node2", "node2"), rates)
    assert found.ratio == pytest.approx(0.4)
    assert "rank 3 on node2" in found.text
    assert found.text.endswith("(and 1 more there)")


def test_a_core_that_something_else_uses_is_told_as_the_cause():
    rates = [{"fp32": 1.0, "core_share": 0.99}, {"fp32": 0.5, "core_share": 0.5}]
    (found,) = judgement.slow_devices(ranks("node1", "node2"), rates)
    assert "it was given 50 % of its cores' time: something else runs there" in found.text
    rates[1]["core_share"] = 0.99  # a slow clock, say
    (found,) = judgement.slow_devices(ranks("node1", "node2"), rates)
    assert "something else" not in found.text


def links_of(*hosts, slow_sender=None, slow_receiver=None):
    pairs = [pair for two in combinations(hosts, 2) for pair in (two, two[::-1])]
    return {pair: 0.1 if pair[0] == slow_sender or pair[1] == slow_receiver else 1.0 for pair in pairs}


def test_links_that_are_alike_name_nobody():
    links = links_of("node1", "node2", "node3")
    links["node1", "node2"] = 0.75
    assert judgement.slow_links(links, {"node1", "node2", "node3"}) == []


def test_of_two_nodes_the_one_that_sends_slowly_is_named_with_the_doubt():
    (found,) = judgement.slow_links(links_of("node1", "node2", slow_sender="node2"), {"node1", "node2"})
    assert (found.host, found.kind, found.ratio) == ("node2", "sends", pytest.approx(0.1))
    assert "node2 sends at 0.1 GB/s, 10 % of the median 1" in found.text
    assert "a third node would tell" in found.text


@pytest.mark.parametrize(("side", "kind"), [("slow_sender", "sends"), ("slow_receiver", "receives")])
def test_of_three_nodes_only_the_slow_one_is_named_and_not_its_partners(side, kind):
    (found,) = judgement.slow_links(links_of("node1", "node2", "node3", **{side: "node3"}), {"node1", "node2", "node3"})
    assert (found.host, found.kind) == ("node3", kind)
    assert "third" not in found.text


def test_links_of_a_node_that_is_left_out_are_not_judged():
    links = links_of("node1", "node2", slow_sender="node1")
    assert judgement.slow_links(links, {"node1"}) == []


def test_a_node_whose_own_ranks_reach_each_other_slowly_is_named():
    curves = {host: {MIB: 1.0, 4 * MIB: 10.0} for host in ("node1", "node2", "node3")}
    curves["node2"] = {MIB: 0.4}  # so slow that it stopped there: compared at the size that all have
    (found,) = judgement.slow_sums(curves | {"between nodes": {MIB: 0.01}}, {"node1", "node2", "node3"})
    assert (found.host, found.ratio) == ("node2", pytest.approx(0.4))


def test_a_node_that_cannot_write_or_writes_far_slower_is_named():
    rates = {"node1": 1.0, "node2": 0.2, "node3": "No space left on device", "node4": 0.9}
    found = {each.host: each for each in judgement.slow_writes(rates)}
    assert set(found) == {"node2", "node3"}
    assert found["node3"].text == "node3 cannot write there: No space left on device"


def test_operators_that_nobody_can_compile_are_a_finding_and_compiled_ones_need_no_compiler():
    facts = ranks("node1", "node2", "node2")
    facts[0] |= {"compiler": None}
    for each in facts[1:]:
        each |= {"compiler": None, "compiled": {"fused_adam": False}}
    assert [each.host for each in judgement.missing_compilers(facts)] == ["node2"]


def figures_in_turn(*figures):
    """A measurement that gives one after the other, and how many were taken."""
    taken = []

    def measure():
        taken.append(figures[len(taken)])
        return taken[-1]

    return measure, taken


def findings_of(hosts):
    return [Finding(host, "sends", host) for host in hosts]


def test_what_looks_well_is_measured_once():
    measure, taken = figures_in_turn("", "a")
    assert confirmed(measure, findings_of) == ("", [])
    assert len(taken) == 1


def test_only_who_is_slow_every_time_is_named():
    measure, taken = figures_in_turn("ab", "bc", "abc")
    figures, found = confirmed(measure, findings_of)
    assert ([each.host for each in found], figures, len(taken)) == (["b"], "abc", 3)


def test_a_passing_disturbance_names_nobody_even_where_another_follows():
    measure, taken = figures_in_turn("a", "b", "a")
    assert confirmed(measure, findings_of)[1] == []
    assert len(taken) == 2


def test_the_header_asks_for_a_task_a_gpu_and_for_the_nodes_that_were_not_named():
    header = advice.slurm_header(nodes=2, ranks_per_node=4, gpus_per_node=4, cores_per_rank=10, avoid={"node2"})
    assert header == [
        "#SBATCH --nodes=2",
        "#SBATCH --ntasks-per-node=4",
        "#SBATCH --gres=gpu:4",
        "#SBATCH --cpus-per-task=10",
        "#SBATCH --exclude=node2",
    ]


def test_gpus_that_idle_get_a_task_and_share_the_cores():
    header = advice.slurm_header(nodes=1, ranks_per_node=1, gpus_per_node=4, cores_per_rank=40, avoid=())
    assert header[1:] == ["#SBATCH --ntasks-per-node=4", "#SBATCH --gres=gpu:4", "#SBATCH --cpus-per-task=10"]


@pytest.mark.parametrize(
    ("rates", "file"),
    [
        ({"fp32": 14, "bf16": 13, "fp16": 95}, "zero2_fp16"),  # V100: bf16 is emulated
        ({"fp32": 19, "bf16": 240, "fp16": 245}, "zero2_bf16"),
        ({"fp32": 0.1, "bf16": 0.2}, "zero2_bf16"),
        ({"fp32": 0.1, "bf16": 0.01}, "zero2_cpu"),
    ],
)
def test_the_precision_that_is_fast_here_is_advised_and_there_is_a_file_for_it(rates, file):
    from distilcb.engine.deepspeed_config import choose_file

    name, why = advice.deepspeed_file(rates)
    assert name == file
    assert choose_file(name, cuda=False, cpu_has_bf16=False)[0].name == f"{file}.json"
    assert f"{rates['bf16']:.3g}" in why


def test_the_time_of_gradients_follows_from_the_rate_and_buckets_are_left_alone_where_smaller_ones_would_do():
    full = dict(zip(SIZES, (0.5, 0.95, 1.0, 1.0), strict=True))
    told = advice.on_gradients(full, ranks=2)
    assert "in 0.14 s" in told  # 68 million of 2 bytes, each sent once by each of two ranks, at 1 GB/s
    assert "4 MiB at once are as fast as more" in told
    rising = dict(zip(SIZES, (0.1, 0.2, 0.5, 1.0), strict=True))
    assert "bucket" not in advice.on_gradients(rising, ranks=2)
    assert "bucket" not in advice.on_gradients({MIB: 0.01, 4 * MIB: 0.01}, ranks=2)


def test_advice_leaves_out_slow_nodes_and_not_those_that_lack_something():
    findings = [Finding("node1", "operators", "no compiler"), Finding("node2", "sends", "slow", 0.1)]
    told = advice.advise(ranks("node1", "node2"), [{"fp32": 1.0, "bf16": 2.0}] * 2, findings)
    assert [line for line in told if "--exclude" in line] == ["#SBATCH --exclude=node2"]
    assert told[-1].startswith("--deepspeed zero2_bf16 ")


@pytest.mark.parametrize(
    ("names", "excluded"),
    [
        (["node1", "node2"], "node2"),
        ([None, None], "node2.cluster.fr"),  # not started by Slurm
        (["node1", "node1"], "node2.cluster.fr"),  # a launcher that hands on the first node's environment
    ],
)
def test_nodes_to_leave_out_have_the_name_that_slurm_knows(names, excluded):
    facts = ranks("node1.cluster.fr", "node2.cluster.fr")
    for each, name in zip(facts, names, strict=True):
        each["slurm_node"] = name
    findings = [Finding("node2.cluster.fr", "sends", "slow", 0.1)]
    told = advice.advise(facts, [{"fp32": 1.0, "bf16": 2.0}] * 2, findings)
    assert f"#SBATCH --exclude={excluded}" in told


def test_a_rank_says_what_slurm_calls_its_node_beside_the_hosts_own_name(environ_of_nobody):
    from distilcb.doctor.devices import describe_rank

    environ_of_nobody.setattr(platform, "node", lambda: "node7.cluster.fr")
    assert describe_rank()["slurm_node"] is None
    environ_of_nobody.setenv("SLURMD_NODENAME", "node7")
    found = describe_rank()
    assert (found["host"], found["slurm_node"]) == ("node7.cluster.fr", "node7")


def report(findings=()):
    return Report(
        ranks=ranks("node1", "node2"),
        products=[{"fp32": 1.0, "core_share": 0.9}, {"fp32": 0.5, "core_share": 0.9}],
        sums={"between nodes": {MIB: 1.5}, "all ranks": {MIB: 1.25}},
        links={("node1", "node2"): 1.0, ("node2", "node1"): 0.25},
        folder="/scratch",
        writes={"node1": 0.2, "node2": "No space left on device"},
        findings=findings,
        notes=["a note"],
        advice=["#SBATCH --nodes=2"],
        seconds=12.3,
    )


def test_the_report_has_a_line_a_node_and_ends_with_verdict_and_advice():
    lines = report().as_text().splitlines()
    assert lines[1].startswith("node1, node2: CPU, 16 GiB")
    assert [line.split() for line in lines if line.startswith("node2 ")] == [
        ["node2", "1", "0.5", "-", "0.25", "1", "failed"]
    ]
    assert "verdict: OK: nothing is broken, and no node is clearly slower than the others" in lines
    assert lines[-1].strip() == "#SBATCH --nodes=2"


def test_the_verdict_names_the_slowest_node_first():
    findings = [Finding("node1", "writes", "slow", 0.3), Finding("node2", "sends", "slower", 0.25)]
    text = report(findings).as_text()
    assert "verdict: 2 finding(s); the slowest node is node2\n  slower\n  slow\n" in text


def test_the_json_report_holds_every_figure():
    whole = json.loads(report([Finding("node2", "sends", "slow", 0.25)]).as_json())
    assert whole["links"][1] == {"from": "node2", "to": "node1", "gb_per_second": 0.25}
    assert whole["findings"] == [{"host": "node2", "kind": "sends", "text": "slow", "ratio": 0.25}]
    assert whole["healthy"] is False
    assert json.loads(report().as_json())["healthy"] is True


def test_writing_is_measured_and_leaves_nothing_behind(tmp_path, monkeypatch):
    monkeypatch.setattr(disk, "_BLOCK_BYTES", 2**20)
    rate = disk.write_rate(tmp_path)
    assert isinstance(rate, float)
    assert rate > 0
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_not_there_is_told_and_not_raised(tmp_path):
    assert disk.write_rate(tmp_path / "nowhere") == "No such file or directory"
