"""A batch on a cluster of Ray's on this machine: two nodes, one of which dies. Runs where Ray is installed
(``make clients``)."""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import slimrt
from slimrt.batch.answering import model_mark
from slimrt.batch.cluster import RayCluster
from slimrt.batch.run import answer_batch
from slimrt.errors import OutputError, SettingError
from tests.tiny_gguf import write_tiny_llama

os.environ["RAY_USAGE_STATS_ENABLED"] = "0"  # Ray tells nobody about these tests
ray = pytest.importorskip("ray")
from ray.cluster_utils import Cluster  # noqa: E402

LINES = 48


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_llama(tmp_path_factory.mktemp("tiny") / "tiny.gguf", n_layers=4, ctx=4096)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Questions on six documents, in turns."""
    path = tmp_path_factory.mktemp("batch") / "in.jsonl"
    with path.open("w") as file:
        for number in range(LINES):
            words = np.random.default_rng(number % 6).choice(["the", "world", "hello", "there"], 600)
            body = {
                "messages": [{"role": "user", "content": f"{' '.join(words)} {number}?"}], "max_tokens": 24,
                "temperature": 1, "seed": number, "ignore_eos": True,
            }  # fmt: skip
            line = {"custom_id": str(number), "method": "POST", "url": "/v1/chat/completions", "body": body}
            file.write(json.dumps(line) + "\n")
    return path


@pytest.fixture
def cluster() -> Iterator[Any]:
    """A head without processors, and two nodes of one each."""
    found = Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
    try:
        yield found
    finally:
        ray.shutdown()
        found.shutdown()


def texts(target: Path) -> dict[str, str]:
    answers = [json.loads(line) for line in target.read_text().splitlines()]
    assert len({answer["id"] for answer in answers}) == len(answers)
    return {answer["custom_id"]: answer["response"]["body"]["choices"][0]["message"]["content"] for answer in answers}


def test_a_node_that_dies_costs_no_line(cluster: Any, model: Path, source: Path, tmp_path: Path) -> None:
    options = {"device": "numpy", "prune": "off", "threads": 1}
    llm = slimrt.load(model, **options)
    answer_batch(llm, source, tmp_path / "alone.jsonl")
    nodes = [cluster.add_node(num_cpus=1) for _ in range(2)]
    cluster.wait_for_nodes()
    pool = RayCluster(cluster.address, str(model), options, model_mark(llm))
    assert pool.workers == 2
    target, killed, died = tmp_path / "out.jsonl", threading.Event(), threading.Event()

    def kill() -> None:
        killed.wait(120)
        cluster.remove_node(nodes[0], allow_graceful=False)
        died.set()

    def progress(done: int, total: int, what: str) -> None:
        if done == 6:
            killed.set()
            died.wait(60)  # so that it is in the midst of the batch

    thread = threading.Thread(target=kill)
    thread.start()
    report = answer_batch(llm, source, target, None, progress, pool)
    thread.join()
    assert died.is_set() and len(cluster.list_all_nodes()) == 2
    assert (report.lines, report.before, report.failed) == (LINES, 0, 0)
    assert report.written == 24 * LINES and report.reused > 0
    assert texts(target) == texts(tmp_path / "alone.jsonl")
    # Torn and cut short, as by a kill of this process: the next run goes on, on the cluster or without it.
    whole = target.read_bytes().splitlines(keepends=True)
    target.write_bytes(b"".join(whole[:20]) + whole[20][:50])
    again = RayCluster(cluster.address, str(model), options, model_mark(llm), workers=1)
    report = answer_batch(llm, source, target, elsewhere=again)
    assert (report.lines, report.before) == (LINES, 20)
    assert texts(target) == texts(tmp_path / "alone.jsonl")


def test_what_cannot_be_is_told_in_a_line(cluster: Any, model: Path, source: Path, tmp_path: Path) -> None:
    options = {"device": "numpy", "prune": "off", "threads": 1}
    llm = slimrt.load(model, **options)
    cluster.add_node(num_cpus=1)
    cluster.wait_for_nodes()
    ray.init(address=cluster.address, log_to_driver=False)
    other = write_tiny_llama(tmp_path / "other.gguf", n_layers=4, ctx=4096, seed=1)
    pool = RayCluster(cluster.address, str(other), options, model_mark(llm))
    began = time.monotonic()
    with pytest.raises(SettingError, match="another model on this node"):
        answer_batch(llm, source, tmp_path / "out.jsonl", elsewhere=pool)
    assert time.monotonic() - began < 120 and (tmp_path / "out.jsonl").read_bytes() == b""
    answer_batch(llm, source, tmp_path / "mine.jsonl")
    with pytest.raises(OutputError, match="answers of another model"):
        answer_batch(slimrt.load(other, **options), source, tmp_path / "mine.jsonl")


def test_no_cluster_at_an_address(model: Path) -> None:
    with pytest.raises(SettingError, match=r"--ray 127\.0\.0\.1:9: "):
        RayCluster("127.0.0.1:9", str(model), {}, 0)
