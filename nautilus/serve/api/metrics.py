"""Counters for Prometheus under vLLM's names, so that its dashboards and routers work, and some of our own.

Nothing of a client is a label: neither keys nor users nor texts. The label `engine` is the number of the replica that
did the work, as in vLLM; what was refused before it reached one counts for the first.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

OURS = "nautilus:"
SHORT = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1, 2.5, 5, 10)
LONG = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 40, 80, 160, 320, 640, 1800)
SIZES = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10_000, 20_000, 50_000, 100_000, 200_000, 1_000_000)

HISTOGRAMS = {
    "time_to_first_token_seconds": (LONG, "from a request to its first token"),
    "inter_token_latency_seconds": (SHORT, "between the tokens of an answer"),
    "request_time_per_output_token_seconds": (SHORT, "the same, averaged over each answer"),
    "e2e_request_latency_seconds": (LONG, "from a request to its end"),
    "request_decode_time_seconds": (LONG, "from the first token of a request to its last"),
    "request_prompt_tokens": (SIZES, "tokens of prompts"),
    "request_generation_tokens": (SIZES, "tokens of answers"),
    "request_params_n": ((1, 2, 4, 8, 16), "answers asked for"),
    "request_params_max_tokens": (SIZES, "longest answers asked for"),
}
COUNTERS = {
    "prompt_tokens": "tokens of prompts",
    "prompt_tokens_cached": "tokens of prompts that were not read again",
    "prefix_cache_queries": "tokens of prompts that were looked for among known prefixes",
    "prefix_cache_hits": "tokens of prompts that were found there",
    "generation_tokens": "tokens of answers",
}
# Name: the field of the service's load that it shows. A service tells of some of these only.
LOADS = {
    "num_requests_running": ("running", "requests that run"),
    "num_requests_waiting": ("waiting", "requests that wait"),
    "kv_cache_usage_perc": ("pages", "share of the pages of keys and values in use"),
    "num_preemptions_total": ("preempted", "requests that had to begin again"),
    OURS + "num_tokens_waiting": ("waiting_tokens", "tokens of prompts that wait"),
    OURS + "ssm_state_slots_used": ("slots", "slots for states in use"),
    OURS + "engine_steps_total": ("steps", "steps of the engine"),
    OURS + "ssm_checkpoints": ("checkpoints", "saved states"),
    OURS + "ssm_checkpoints_bytes": ("checkpoint_bytes", "bytes of these"),
    OURS + "ssm_checkpoints_hits_total": ("checkpoint_hits", "prompts that began from one"),
    OURS + "ssm_checkpoints_evictions_total": ("checkpoint_evictions", "saved states that gave way"),
    "spec_decode_num_drafts_total": ("drafts", "drafts verified"),
    "spec_decode_num_draft_tokens_total": ("draft_tokens", "tokens of these"),
    "spec_decode_num_accepted_tokens_total": ("accepted_tokens", "tokens of these that were right"),
}
# The same of each kind of draft: the field of its counts.
ARMS = {
    OURS + "spec_decode_drafts_total": ("drafts", "drafts of one kind verified"),
    OURS + "spec_decode_draft_tokens_total": ("drafted", "tokens of these"),
    OURS + "spec_decode_accepted_tokens_total": ("accepted", "tokens of these that were right"),
}


class Meters:
    """One set per application, in a registry of its own."""

    def __init__(self, model: str, prefix: str = "vllm:"):
        self.registry, self.prefix = CollectorRegistry(), prefix
        self.labels = {"model_name": model, "engine": "0"}
        self.loads: dict[str, Any] = {}
        self.histograms = {
            name: self.one(Histogram, name, text, buckets=buckets) for name, (buckets, text) in HISTOGRAMS.items()
        }
        self.counters = {name: self.one(Counter, name, text) for name, text in COUNTERS.items()}
        names = [*self.labels]
        self.success = self.any(Counter, "request_success", "requests by how they ended", [*names, "finished_reason"])
        self.rejected = self.any(Counter, OURS + "http_rejected", "requests refused, by reason", [*names, "reason"])
        gone, slow = "clients that left before their answer was there", "streams cut off because nobody read them"
        self.gone = self.one(Counter, OURS + "client_disconnects", gone).labels(**self.labels)
        self.slow = self.one(Counter, OURS + "slow_readers", slow).labels(**self.labels)
        for metric in (*self.histograms.values(), *self.counters.values()):
            metric.labels(**self.labels)  # there from the start, at zero

    def any(self, kind: Callable, name: str, text: str, labels: list[str], **more) -> Any:
        full = name if name.startswith(OURS) else self.prefix + name
        return kind(full, text, labels, registry=self.registry, **more)

    def one(self, kind: Callable, name: str, text: str, **more) -> Any:
        return self.any(kind, name, text, [*self.labels], **more)

    def count(self, name: str, amount: float = 1, engine: str = "0") -> None:
        self.counters[name].labels(**{**self.labels, "engine": engine}).inc(amount)

    def observe(self, name: str, value: float, engine: str = "0") -> None:
        self.histograms[name].labels(**{**self.labels, "engine": engine}).observe(value)

    def reject(self, reason: str) -> None:
        self.rejected.labels(**self.labels, reason=reason or "other").inc()

    def ended(self, reason: str, engine: str = "0") -> None:
        self.success.labels(**{**self.labels, "engine": engine}, finished_reason=reason).inc()

    def text(self, loads: Mapping[str, Any]) -> bytes:
        """All of it as Prometheus reads it, with what the service tells of its load right now, by replica."""
        for name, (field, about) in LOADS.items():
            told = [({"engine": engine}, getattr(load, field, None)) for engine, load in loads.items()]
            self.show(name, about, [(labels, value) for labels, value in told if value is not None])
        arms = [
            ({"engine": engine, "arm": arm}, counts)
            for engine, load in loads.items()
            for arm, counts in (getattr(load, "arms", None) or {}).items()
        ]
        for name, (field, about) in ARMS.items():
            self.show(name, about, [(labels, getattr(counts, field)) for labels, counts in arms])
        return generate_latest(self.registry)

    def show(self, name: str, about: str, values: Sequence[tuple[dict[str, str], float]]) -> None:
        """These and no others, which may be of replicas that are gone."""
        if name not in self.loads and values:
            self.loads[name] = self.any(Gauge, name, about, [*(self.labels | values[0][0])])
        if name in self.loads:
            self.loads[name].clear()
        for labels, value in values:
            self.loads[name].labels(**(self.labels | labels)).set(value)
