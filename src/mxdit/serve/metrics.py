"""What Prometheus asks for."""

from __future__ import annotations

from typing import Any

from prometheus_client.core import GaugeMetricFamily

from mxdit.serve.dispatch import Dispatcher
from mxdit.serve.engine import Engines
from mxdit.serve.jobs import Jobs
from mxdit.serve.served import Catalog


class Figures:
    """A collector: jobs by state, seconds per step, the models that are loaded, or the engines that answer."""

    def __init__(self, jobs: Jobs, dispatcher: Dispatcher, offer: Catalog | Engines) -> None:
        self._jobs, self._dispatcher, self._offer = jobs, dispatcher, offer

    def collect(self) -> Any:
        counts = GaugeMetricFamily("mxdit_jobs", "Jobs by state.", labels=["status"])
        for status, count in self._jobs.counts().items():
            counts.add_metric([status], count)
        yield counts
        seconds = GaugeMetricFamily("mxdit_step_seconds", "How long the last denoising step took.", labels=["model"])
        for model, taken in dict(self._dispatcher.step_seconds).items():
            seconds.add_metric([model], taken)
        yield seconds
        if isinstance(self._offer, Engines):
            up = GaugeMetricFamily("mxdit_engine_up", "Whether an engine answered the last time.", labels=["engine"])
            for address, answers in self._offer.up().items():
                up.add_metric([address], answers)
            yield up
            return
        loaded = GaugeMetricFamily("mxdit_model_loaded", "Models that a worker has loaded.", labels=["model"])
        for model in dict(self._offer.linears):
            loaded.add_metric([model], 1)
        yield loaded
