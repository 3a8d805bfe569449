"""Metrics of the service, in a registry of its own; `GET /metrics` shows them to Prometheus."""

from __future__ import annotations

from itertools import chain

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Info

from codebook import __version__
from codebook.pruning import Schedule
from codebook.pruning.ownership import codebooks_of
from codebook.store.folder import PROTOTYPES

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)
"""Bounds of the buckets of durations."""
BATCH_SIZES = (1, 2, 4, 8, 16, 32)
"""Bounds of the buckets of batch sizes."""


class Metrics:
    """The metrics of one running service.

    Attributes
    ----------
    registry
        Holds all of them and nothing else.
    """

    def __init__(self) -> None:
        self.registry = own = CollectorRegistry()
        self.requests = Counter("codebook_requests_total", "Requests answered.", ["endpoint", "status"], registry=own)
        self.request_seconds = Histogram(
            "codebook_request_seconds", "Seconds from a request to the end of its answer.", ["endpoint"],
            buckets=SECONDS, registry=own,
        )  # fmt: skip
        self.generate_seconds = Histogram(
            "codebook_generate_seconds", "Seconds of one batch in the model.", buckets=SECONDS, registry=own
        )
        self.batch_size = Histogram(
            "codebook_batch_size", "Requests answered in one batch.", buckets=BATCH_SIZES, registry=own
        )
        self.waiting = Gauge("codebook_waiting_requests", "Prompts that wait for the model.", registry=own)
        self.visual_tokens = Counter(
            "codebook_visual_tokens_total", "Visual tokens of prompts, and those kept to the end.", ["state"],
            registry=own,
        )  # fmt: skip
        self.generate_errors = Counter(
            "codebook_generate_errors_total", "Prompts that the model failed to answer.", registry=own
        )
        self.score_seconds = Histogram(
            "codebook_score_seconds", "Seconds of scoring one request against a codebook.", ["codebook"],
            buckets=SECONDS, registry=own,
        )  # fmt: skip
        self.info = Info("codebook", "What runs: version, method, keep, SHA-256 of the codebook.", registry=own)

    def describe(self, schedule: Schedule, keep: float | None) -> None:
        """Say what runs: `codebook_info`."""
        found = chain.from_iterable(codebooks_of(stage.pruner) for stage in schedule.stages)
        books = {book.config.get("sha256", {}).get(PROTOTYPES, "") for book in found}
        self.info.info({
            "version": __version__, "method": str(schedule), "keep": "" if keep is None else str(keep),
            "codebook_sha256": ",".join(sorted(books)),
        })  # fmt: skip
