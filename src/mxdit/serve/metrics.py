"""What Prometheus asks for."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path
from typing import Any

from prometheus_client.core import GaugeMetricFamily

from mxdit.serve.dispatch import Dispatcher
from mxdit.serve.engine import Engines
from mxdit.serve.jobs import Jobs
from mxdit.serve.served import Catalog

PEAK = "The most memory of a device that its last job held; on a CPU, of its process beside mapped files."


class Figures:
    """A collector: jobs by state, seconds per step, the models that are loaded and each worker's memory, or engines."""

    def __init__(self, jobs: Jobs, dispatcher: Dispatcher, offer: Catalog | Engines) -> None:
        self._jobs, self._dispatcher, self._offer = jobs, dispatcher, offer

    def collect(self) -> Any:
        counts = GaugeMetricFamily("mxdit_jobs", "Jobs by state.", labels=["status"])
        for status, count in self._jobs.counts().items():
            counts.add_metric([status], count)
        yield counts
        yield from self._dispatcher.step_seconds.collect()
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
        held = GaugeMetricFamily("mxdit_worker_memory_bytes", "RSS of the process of a device.", labels=["device"])
        for device, pid in dict(self._dispatcher.workers).items():
            with suppress(OSError):  # it has ended, or this system has no /proc
                pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
                held.add_metric([device], pages * os.sysconf("SC_PAGESIZE"))
        yield held
        peaks = GaugeMetricFamily("mxdit_job_peak_bytes", PEAK, labels=["device"])
        for device, peak in dict(self._dispatcher.peak_bytes).items():
            peaks.add_metric([device], peak)
        yield peaks
