"""What takes the place of `WorkerProc._async_output_loop` (vLLM-Omni 0.30.0), which runs where there are several workers.

The engine's own copies outputs on a side stream of `torch.accelerator.current_accelerator()`, which is None on a CPU: its
thread ends, and every request waits for ever. Outputs are in memory already, so there is no stream, no event, and no copy.
"""

from __future__ import annotations

from vllm_omni.diffusion.data import AsyncDiffusionOutput, AsyncOutputKind
from vllm_omni.diffusion.ipc import pack_diffusion_output_shm
from vllm_omni.diffusion.worker.diffusion_worker import WorkerProc


def async_output_loop(self: WorkerProc) -> None:
    """Send each output that is queued, until None is. What fails is sent as an error, so that its request ends."""
    queue = self._async_output_queue
    assert queue is not None, "the engine makes the queue before it starts this thread"
    while (item := queue.get()) is not None:
        output, output_id, _event = item
        ready = AsyncDiffusionOutput(kind=AsyncOutputKind.OUTPUT_READY, async_output_id=output_id, output=output)
        try:
            pack_diffusion_output_shm(output)
        except Exception as error:
            ready.output, ready.error = None, f"packing the output failed: {error!r}"
        self._enqueue_result(ready)
        with self._async_output_done:
            self._async_output_pending -= 1
            self._async_output_done.notify_all()
