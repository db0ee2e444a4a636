"""What /metrics tells, in Prometheus' words."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from slimrt.reuse import Reading
from slimrt.server.scheduler import Scheduler

__all__ = ["Metrics"]

_FIRST_TOKEN = (0.05, 0.1, 0.25, 0.5, 1, 2, 4, 8, 16, 32, 64, 128, 256)
_BETWEEN = (0.005, 0.01, 0.02, 0.04, 0.08, 0.16, 0.25, 0.5, 1, 2, 5)


class Metrics:
    """Counted by one server; each has a registry of its own."""

    def __init__(self, scheduler: Scheduler) -> None:
        registry = self._registry = CollectorRegistry()
        self.requests = Counter("slimrt_requests", "Requests by path and status", ("path", "status"), registry=registry)
        self.first_token = Histogram(
            "slimrt_time_to_first_token_seconds", "From the request to its first token", buckets=_FIRST_TOKEN,
            registry=registry,
        )  # fmt: skip
        self.between = Histogram(
            "slimrt_inter_token_seconds", "From one token of an answer to the next", buckets=_BETWEEN, registry=registry
        )
        self.written = Counter("slimrt_generated_tokens", "Tokens written", registry=registry)
        self._prompt = Counter("slimrt_prompt_tokens", "Tokens of prompts", registry=registry)
        self._reused = Counter("slimrt_reused_prompt_tokens", "Of these, read by earlier requests", registry=registry)
        self._kept = Counter("slimrt_kept_prompt_tokens", "Of these, kept to the last layer", registry=registry)
        for name, about, value in (
            ("slimrt_requests_waiting", "Requests that wait for their turn", lambda: scheduler.waiting),
            ("slimrt_requests_running", "Requests that are read or answered", lambda: scheduler.running),
            ("slimrt_idle_kv_bytes", "Keys and values kept for prompts to come", lambda: scheduler.kv_bytes),
        ):
            Gauge(name, about, registry=registry).set_function(value)

    def read(self, tokens: int, reading: Reading) -> None:
        """A prompt of so many tokens was read."""
        self._prompt.inc(tokens)
        self._reused.inc(reading.reused)
        self._kept.inc(reading.stages[-1] if reading.stages else tokens)

    def text(self) -> bytes:
        """All of it, as Prometheus reads it."""
        return generate_latest(self._registry)
