"""What is measured per served name and version, on vLLM's own /metrics. Label values are bounded: names that are followed, versions that are loaded.

Time to first token is given twice: from the HTTP request's arrival (with parsing, image work and waiting) and from the engine's (vLLM's own).
"""

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from pipeline.serving.engine import lora_id
from pipeline.serving.followed_model import FollowedModel
from pipeline.serving.residents import Resident
from pipeline.serving.traffic import Request
from pipeline.serving.wanted import RegisteredVersion

BASE_VERSION = "base"
UNKNOWN = "-"
FIRST_TOKEN_SECONDS = (0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 5.0, 10.0, 30.0)
TOKEN_SECONDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.2, 0.5, 1.0)
REQUEST_SECONDS = (0.05, 0.1, 0.2, 0.5, 1.0, 1.5, 2.0, 3.0, 5.0, 10.0, 30.0, 60.0, 300.0)
LOAD_SECONDS = (0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0)
VLLM_LORA_INFO = "vllm:lora_requests_info"


class Metrics:
    """The observer of a follower, and of requests. One per Prometheus registry."""

    def __init__(self, registry: CollectorRegistry, known: Callable[[str], bool] = lambda name: True) -> None:
        """`known`: whether a model's name may be a label value."""
        self._registry = registry
        self._known = known
        self._used: dict[int, set[tuple[str, str]]] = {}
        """By adapter number in the engine: the labels that its requests were counted under."""
        by_version = ("served", "version")
        self.requests = Counter(
            "tuneserve_requests",
            "Generations that ended, by how (abort: the client went away; invalid: the request was wrong; error: we failed).",
            (*by_version, "finish"),
            registry=registry,
        )
        self.prompt_tokens = Counter("tuneserve_prompt_tokens", "Tokens of prompts, images included.", by_version, registry=registry)
        self.output_tokens = Counter("tuneserve_output_tokens", "Tokens generated.", by_version, registry=registry)
        self.slot_misses = Counter("tuneserve_slot_misses", "Generations whose adapter was not among the max_loras used last.", by_version, registry=registry)
        self.slot_waits = Counter("tuneserve_slot_waits", "Generations that had to wait: max_loras other adapters were running.", by_version, registry=registry)
        self.first_token = Histogram(
            "tuneserve_time_to_first_token_seconds",
            "From the arrival of the HTTP request.",
            by_version,
            buckets=FIRST_TOKEN_SECONDS,
            registry=registry,
        )
        self.engine_first_token = Histogram(
            "tuneserve_engine_time_to_first_token_seconds", "From the request's arrival in vLLM.", by_version, buckets=FIRST_TOKEN_SECONDS, registry=registry
        )
        self.per_token = Histogram(
            "tuneserve_time_per_output_token_seconds", "Mean over an answer, after its first token.", by_version, buckets=TOKEN_SECONDS, registry=registry
        )
        self.request = Histogram(
            "tuneserve_request_seconds", "From the arrival of the HTTP request to its last token.", by_version, buckets=REQUEST_SECONDS, registry=registry
        )
        self._by_version = (self.prompt_tokens, self.output_tokens, self.slot_misses, self.slot_waits)
        self._timings = (self.first_token, self.engine_first_token, self.per_token, self.request)
        self.http_errors = Counter(
            "tuneserve_http_errors",
            "HTTP answers of 400 and above; served and version are - where they are not known, version also where none was chosen.",
            (*by_version, "status_class"),
            registry=registry,
        )
        self.samples = Counter(
            "tuneserve_samples",
            "Answered requests that were drawn to be sampled, by what became of them: kept, or why not (busy, too-large, full, failed: dropped; redacted; unusable).",
            ("outcome",),
            registry=registry,
        )
        self.refusals = Counter("tuneserve_refusals", "Versions refused, by reason.", ("served", "code"), registry=registry)
        self.wanted_version = Gauge("tuneserve_wanted_version", "The number under the alias champion; 0 for none.", ("served",), registry=registry)
        self.live_version = Gauge("tuneserve_live_version", "The number that the served name answers with; 0 for none.", ("served",), registry=registry)
        self.candidate_version = Gauge("tuneserve_candidate_version", "The canary's number; 0 for none.", ("served",), registry=registry)
        self.candidate_share = Gauge("tuneserve_candidate_share", "The canary's share of requests, 0 to 1.", ("served",), registry=registry)
        self.disabled = Gauge("tuneserve_disabled", "1 while the served name is switched off.", ("served",), registry=registry)
        self.load_seconds = Histogram("tuneserve_load_seconds", "Loading and verifying an adapter.", ("served",), buckets=LOAD_SECONDS, registry=registry)
        self.resident_adapters = Gauge("tuneserve_resident_adapters", "Adapters in the engine.", registry=registry)
        self.last_sync_age = Gauge(
            "tuneserve_last_sync_age_seconds", "Since MLflow last answered, for the model that it left longest; NaN if it never did.", registry=registry
        )

    def watch(self, last_sync_age_seconds: Callable[[], float | None], resident: Callable[[], int]) -> None:
        """Has the gauges that only a look can tell look when they are scraped."""

        def age() -> float:
            seconds = last_sync_age_seconds()
            return float("nan") if seconds is None else seconds

        self.last_sync_age.set_function(age)
        self.resident_adapters.set_function(resident)

    def used(self, lora_id: int, served: str, version: str) -> None:
        """Remembers that an adapter's requests are counted under these labels."""
        self._used.setdefault(lora_id, set()).add((served, version))

    def finished(self, served: str, version: str, finish: str, prompt_tokens: int, output_tokens: int) -> None:
        self.requests.labels(served, version, finish).inc()
        self.prompt_tokens.labels(served, version).inc(prompt_tokens)
        self.output_tokens.labels(served, version).inc(output_tokens)

    def http_error(self, request: Request, status: int) -> None:
        """Counts an answer of 400 or above, under the version that the request had chosen by then."""
        if request.lora_id is not None:
            self.used(request.lora_id, request.served, request.version)
        self.http_errors.labels(request.served, request.version, f"{status // 100}xx").inc()

    def sampled(self, outcome: str) -> None:
        self.samples.labels(outcome).inc()

    def refused(self, model: str, code: str) -> None:
        self.refusals.labels(model if self._known(model) else UNKNOWN, code).inc()

    def loaded(self, resident: Resident) -> None:
        self.load_seconds.labels(resident.source.name).observe(resident.verification.seconds)

    def state(self, model: FollowedModel) -> None:
        """What is wanted and live of a model now."""
        if not self._known(model.name):
            return
        wanted, saved, name = model.wanted, model.saved, model.name
        self.wanted_version.labels(name).set(_number(wanted.champion if wanted else None))
        self.live_version.labels(name).set(int(saved.champion.version) if saved.champion else 0)
        self.candidate_version.labels(name).set(int(saved.candidate.version) if saved.candidate else 0)
        self.candidate_share.labels(name).set(saved.percent / 100 if saved.candidate else 0)
        self.disabled.labels(name).set(bool(model.off_reason))

    def forgotten(self, resident: Resident) -> None:
        """Takes away every series of a version that is gone, and vLLM's own, which it adds for each combination of adapters and never removes."""
        for served, version in self._used.pop(lora_id(resident.digest), ()):
            for metric in (self.requests, self.http_errors, *self._by_version, *self._timings):
                metric.remove_by_labels({"served": served, "version": version})
        info = self._registry._names_to_collectors.get(VLLM_LORA_INFO)
        if isinstance(info, Gauge):
            info.clear()


def _number(version: RegisteredVersion | None) -> int:
    return int(version.version) if version and version.version.isdecimal() else 0
