"""What Prometheus asks for."""

from __future__ import annotations

from typing import Any

from prometheus_client.core import GaugeMetricFamily

from mxdit.serve.dispatch import Dispatcher
from mxdit.serve.jobs import Jobs


class Figures:
    """A collector: jobs by state, seconds per step, the models that are loaded."""

    def __init__(self, jobs: Jobs, dispatcher: Dispatcher) -> None:
        self._jobs, self._dispatcher = jobs, dispatcher

    def collect(self) -> Any:
        counts = GaugeMetricFamily("mxdit_jobs", "Jobs by state.", labels=["status"])
        for status, count in self._jobs.counts().items():
            counts.add_metric([status], count)
        yield counts
        seconds = GaugeMetricFamily("mxdit_step_seconds", "How long the last denoising step took.", labels=["model"])
        for model, taken in dict(self._dispatcher.step_seconds).items():
            seconds.add_metric([model], taken)
        yield seconds
        loaded = GaugeMetricFamily("mxdit_model_loaded", "Models that a worker has loaded.", labels=["model"])
        for model in dict(self._dispatcher.linears):
            loaded.add_metric([model], 1)
        yield loaded
