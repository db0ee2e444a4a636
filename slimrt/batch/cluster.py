"""A batch on a Ray cluster: its requests as blocks of Ray Data, a pool of actors that each have the model loaded.

What may be lost is Ray's to mend: the block that an actor worked on when it or its node died goes to another one, and
a node that is left goes on with the rest. This process alone writes answers, each once, so a run that is killed goes on
as one without a cluster does.
"""

from __future__ import annotations

import json
import logging
import socket
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import slimrt
from slimrt.batch.answering import Answerer, Counts, Work, model_mark
from slimrt.errors import SettingError

__all__ = ["RayCluster"]

_MOST_LINES = 16  # of a block: what an actor's death costs at most
_SECONDS = 10.0  # that a cluster may take to answer at all
_BLOCKS = 4  # for each actor at least, so that all of them end at about the same time


class _Actor:
    """In a process of the cluster: answers blocks of requests with a model of its own."""

    def __init__(self, path: str | None, options: Mapping[str, Any], mark: int, version: str) -> None:
        if slimrt.__version__ != version:
            raise RuntimeError(f"this node has slimrt {slimrt.__version__}, the batch was begun by {version}")
        llm = slimrt.load(path, **options)
        if model_mark(llm) != mark:
            raise RuntimeError(f"{path or 'the default model'} is another model on this node; copy the same file there")
        self._answerer = Answerer(llm)

    def __call__(self, block: dict[str, Any]) -> dict[str, Any]:
        """``block["work"]``: lists of requests as JSON -> "answers": lists of answers as JSON, "counts"."""
        told: dict[str, list[str]] = {"answers": [], "counts": []}
        for requests in block["work"]:
            before = self._answerer.counts
            self._answerer.counts = Counts()
            found = [self._answerer.answer(Work(**work)) for work in json.loads(requests)]
            told["answers"].append(json.dumps(found))
            told["counts"].append(json.dumps(asdict(self._answerer.counts)))
            before.add(self._answerer.counts)
            self._answerer.counts = before
        return told


def _reach(address: str) -> None:
    """Raise OSError where nobody listens at host:port: Ray itself tries for two minutes, and then ends the process."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if host and port.isdecimal():
        socket.create_connection((host.strip("[]"), int(port)), timeout=_SECONDS).close()


class RayCluster:
    """The cluster at ``address`` (host:port, ray://host:port, "auto": the one that runs on this machine, "local": this
    machine alone), with ``workers`` actors (None: one a node, or one a GPU) that load the model of ``path`` with
    ``options`` (those of ``slimrt.load``). ``mark``: what ``model_mark`` must say of it.

    Raises SettingError where Ray is missing, the cluster cannot be reached, or has fewer workers than asked for.
    """

    def __init__(
        self, address: str, path: str | None, options: Mapping[str, Any], mark: int, workers: int | None = None
    ) -> None:
        try:
            import ray
        except ImportError:
            raise SettingError("--ray needs Ray, not installed here; run: pip install 'slimrt[ray]'") from None
        self.counts = Counts()
        self._ray, self._begun = ray, not ray.is_initialized()
        if self._begun:
            try:
                _reach(address)
                ray.init(address=address, logging_level=logging.ERROR, log_to_driver=False)
            except (OSError, ValueError, RuntimeError) as error:
                raise SettingError(
                    f"--ray {address}: {' '.join(str(error).split())[:200]}; give the address of a cluster that runs "
                    "(ray start --head), or local"
                ) from None
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"] and node["Resources"].get("CPU")]
        gpus = int(sum(node.get("GPU", 0) for node in nodes)) if options.get("device") in ("auto", "cuda") else 0
        self.workers = workers or gpus or len(nodes)
        if not nodes or (gpus and self.workers > gpus):
            raise SettingError(
                f"--ray {address}: {len(nodes)} nodes with processors and {gpus} GPUs, {self.workers} workers asked for"
            )
        each = -(-self.workers // len(nodes))  # workers of a node
        cores = options.get("threads") or max(1, min(int(node["CPU"]) for node in nodes) // each)
        self._needs = {"num_cpus": cores, **({"num_gpus": 1} if gpus else {})}
        self._given = {
            "path": path, "options": {**options, "threads": cores}, "mark": mark, "version": slimrt.__version__
        }  # fmt: skip

    def answers(self, work: Sequence[Callable[[], Work]]) -> Generator[dict[str, Any], None, None]:
        """The answers to ``work``, in the order in which they come. Raises SettingError where no node can answer."""
        if not work:
            return
        size = max(1, min(_MOST_LINES, len(work) // (_BLOCKS * self.workers)))
        blocks = [
            {"work": json.dumps([asdict(one()) for one in work[at : at + size]])} for at in range(0, len(work), size)
        ]
        data = self._ray.data
        data.DataContext.get_current().enable_progress_bars = False
        dataset = data.from_items(blocks, override_num_blocks=len(blocks)).map_batches(
            _Actor, fn_constructor_kwargs=self._given, batch_size=1, compute=data.ActorPoolStrategy(size=self.workers),
            **self._needs,
        )  # fmt: skip
        try:
            for row in dataset.iter_rows():
                self.counts.add(Counts(**json.loads(row["counts"])))
                yield from json.loads(row["answers"])
        except self._ray.exceptions.RayError as error:
            lines = [line for line in str(error).splitlines() if line.strip()]
            raise SettingError(f"the cluster cannot go on: {lines[-1].strip()[:300]}") from None

    def close(self) -> None:
        """Leave the cluster."""
        if self._begun:
            self._ray.shutdown()
