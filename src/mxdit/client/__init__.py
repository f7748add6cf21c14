"""A client of `/v1/videos`, as `mxdit serve` and vLLM-Omni answer it: `Client`, and `AsyncClient` for asyncio.

    with Client("http://127.0.0.1:8091") as client:
        video = client.submit("a red seven moving left", seed=1)
        client.wait(video.id)
        client.download(video.id, "seven.mp4")

docs/serving.md says which fields there are.
"""

from mxdit.client.asynchronous import AsyncClient
from mxdit.client.protocol import ServerError, Unreachable, Video, VideoFailed
from mxdit.client.synchronous import Client

__all__ = ["AsyncClient", "Client", "ServerError", "Unreachable", "Video", "VideoFailed"]
