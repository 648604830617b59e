"""Counters, gauges and histograms for Prometheus."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from .answers import Answer
from .ranks import Ranks

# Bucket bounds of the histograms, in seconds.
_SECONDS = (0.1, 0.3, 1, 3, 10, 30, 100, 300, 1000)
_SHORT = (0.005, 0.01, 0.03, 0.1, 0.3, 1, 3, 10)


class Metrics:
    """What the server counts."""

    def __init__(self, ranks: Ranks) -> None:
        self.registry = registry = CollectorRegistry()
        self.requests = Counter("apb_requests", "Requests by HTTP status.", ["status"], registry=registry)
        self.prompt = Counter("apb_prompt_tokens", "Tokens of answered prompts.", registry=registry)
        self.answer = Counter("apb_answer_tokens", "Tokens of answers.", registry=registry)
        self.read = Counter("apb_strategy_requests", "Answers by strategy.", ["strategy"], registry=registry)
        self.failed = Counter(
            "apb_failed_requests", "Requests that failed while they were answered.", ["error"], registry=registry
        )
        self.prefill = Histogram("apb_prefill_seconds", "Seconds of prefill.", buckets=_SECONDS, registry=registry)
        self.decode = Histogram("apb_decode_seconds", "Seconds of decode.", buckets=_SECONDS, registry=registry)
        text = "Seconds from a request's arrival to the first piece of work on it."
        self.queued = Histogram("apb_queue_seconds", text, buckets=_SECONDS, registry=registry)
        text = "Seconds from a request's arrival to the first piece of its answer."
        self.first = Histogram("apb_first_token_seconds", text, buckets=_SECONDS, registry=registry)
        text = "Seconds between pieces of an answer."
        self.between = Histogram("apb_between_tokens_seconds", text, buckets=_SHORT, registry=registry)
        for name, text, value in (
            ("apb_waiting_requests", "Requests in the queue.", lambda: ranks.waiting),
            ("apb_running_requests", "Requests that are read or answered.", lambda: ranks.running),
            ("apb_documents", "Documents that stay read.", lambda: ranks.kept.documents),
            ("apb_document_hits", "Requests whose document was read already.", lambda: ranks.kept.hits),
        ):
            Gauge(name, text, registry=registry).set_function(value)
        text = "Bytes of documents in each place, on disk of all ranks, else of the fullest one."
        size = Gauge("apb_document_bytes", text, ["place"], registry=registry)
        for place in ("device", "host", "disk"):
            size.labels(place).set_function(lambda place=place: ranks.kept.bytes.get(place, 0))  # type: ignore[misc]

    def count(self, answer: Answer) -> None:
        """Record an answer; several of one request are from one prefill."""
        result = answer.result
        if answer.index == 0:
            self.prompt.inc(result.prompt_tokens)
            self.prefill.observe(result.timing["prefill_s"])
        self.answer.inc(len(result.token_ids))
        self.read.labels(result.strategy).inc()
        self.decode.observe(result.timing["decode_s"])
