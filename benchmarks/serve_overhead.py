"""What a job takes through the server beyond `Session.run` alone, in one run, by turns.

    python benchmarks/serve_overhead.py [--repeat 8] [--steps 20]

Both make the same video of the bundled model; the server's time is from before the request is sent to the event that says that it
is done, the session's is `run` and `Result.save`. They take turns on the same cores, so what is printed is a ratio of one run.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

import httpx
from serve_kills import Server

import mxdit


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeat", type=int, default=8)
    parser.add_argument("--steps", type=int, default=20)
    asked = parser.parse_args()
    prompt = "a red seven moving left on a blue background"
    session, took = mxdit.Session.open(), {"session": [], "server": []}
    with tempfile.TemporaryDirectory() as data:
        server = Server(Path(data))
        server.wait_until_ready()
        with httpx.Client(base_url=f"http://127.0.0.1:{server.port}", timeout=None) as client:
            for turn in range(asked.repeat + 1):
                start = time.perf_counter()
                result = session.run(session.request(prompt=prompt, steps=asked.steps, seed=turn))
                result.save(Path(data) / "x.mp4")
                alone = time.perf_counter() - start
                start = time.perf_counter()
                job = client.post(
                    "/v1/videos", json={"prompt": prompt, "num_inference_steps": asked.steps, "seed": turn}
                ).json()
                with client.stream("GET", f"/v1/videos/{job['id']}/events") as events:
                    told = [line for line in events.iter_lines() if line.startswith("data: ")]
                assert json.loads(told[-1][6:])["status"] == "completed"
                if turn:  # the first loads
                    took["session"].append(alone)
                    took["server"].append(time.perf_counter() - start)
        server.process.terminate()
        server.process.wait()
    alone, served = (statistics.median(took[name]) for name in ("session", "server"))
    print(f"median of {asked.repeat}: alone {alone:.3f} s, through the server {served:.3f} s")
    print(f"{1000 * (served - alone):+.0f} ms, {100 * (served / alone - 1):+.1f} %")


if __name__ == "__main__":
    main()
