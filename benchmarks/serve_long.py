"""Whether a server that runs for long grows: memory and open descriptors of its processes over thousands of jobs.

    python benchmarks/serve_long.py [--jobs 2000] [--warm 200] [--every 200] [--json FILE]

One client submits jobs of the bundled model, one after the other (16x16 pixels, 5 frames, one step, each another prompt), follows
each by its event stream, and gets the file. What is measured is the RSS of the server and of its worker, and their open
descriptors, as /proc has them; growth counts from the job `--warm` to the last. At the end `GET /v1/videos?limit=100` is timed,
with all jobs there. Exits with 1 where memory grew by more than 5 %, or a descriptor was left open.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

import httpx
from serve_kills import Server

MIB = 2**20
ALLOWED = 5.0  # percent
COLUMNS = ("jobs", "minutes", "server MiB", "worker MiB", "server fds", "worker fds")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=2000)
    parser.add_argument("--warm", type=int, default=200, help="jobs after which growth counts")
    parser.add_argument("--every", type=int, default=200, help="jobs between two rows")
    parser.add_argument("--json", type=Path, help="write the numbers there as well")
    asked = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as data:
        server = Server(Path(data))
        server.wait_until_ready()
        start = time.monotonic()
        with httpx.Client(base_url=f"http://127.0.0.1:{server.port}", timeout=None) as client:
            for number in range(1, asked.jobs + 1):
                make_one(client, number)
                if number == asked.warm or (
                    number > asked.warm and (number % asked.every == 0 or number == asked.jobs)
                ):
                    (worker,) = server.workers()
                    row = {"jobs": number, "seconds": time.monotonic() - start}
                    for name, pid in (("server", server.process.pid), ("worker", worker)):
                        row |= {f"{name}_{key}": value for key, value in taken(pid).items()}
                    rows.append(row)
                    print(line(row) if len(rows) > 1 else f"{'  '.join(COLUMNS)}\n{line(row)}", flush=True)
            pages = []
            for _ in range(50):
                before = time.perf_counter()
                client.get("/v1/videos", params={"limit": 100}).raise_for_status()
                pages.append(time.perf_counter() - before)
        server.process.terminate()
        server.process.wait()
    first, last = rows[0], rows[-1]
    grown = {name: 100 * (last[f"{name}_rss"] / first[f"{name}_rss"] - 1) for name in ("server", "worker")}
    opened = {name: last[f"{name}_fds"] - first[f"{name}_fds"] for name in ("server", "worker")}
    page = statistics.median(pages)
    for name in grown:
        print(
            f"{name}: {grown[name]:+.1f} % of memory, {opened[name]:+d} descriptors, from job {first['jobs']} to {last['jobs']}"
        )
    print(f"GET /v1/videos?limit=100 with {asked.jobs} jobs: {1000 * page:.1f} ms, median of {len(pages)}")
    if asked.json:
        found = {"rows": rows, "grown_percent": grown, "descriptors": opened, "page_seconds": page}
        asked.json.write_text(json.dumps(found, indent=1) + "\n")
    return 0 if max(grown.values()) <= ALLOWED and max(opened.values()) <= 0 else 1


def make_one(client: httpx.Client, number: int) -> None:
    """A job from its request to its file. Raises AssertionError where it fails."""
    body = {
        "prompt": f"a red seven moving left, take {number}",
        "size": "16x16",
        "num_frames": 5,
        "num_inference_steps": 1,
    }
    job = client.post("/v1/videos", json=body).raise_for_status().json()
    with client.stream("GET", f"/v1/videos/{job['id']}/events") as events:
        told = [line for line in events.iter_lines() if line.startswith("data: ")]
    done = json.loads(told[-1][6:])
    assert done["status"] == "completed", done
    assert len(client.get(f"/v1/videos/{job['id']}/content").content) == done["file_size"]


def taken(pid: int) -> dict[str, int]:
    """Bytes of RSS, and open descriptors, of a process."""
    status = Path(f"/proc/{pid}/status").read_text().splitlines()
    rss = next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmRSS:"))
    return {"rss": rss, "fds": len(list(Path(f"/proc/{pid}/fd").iterdir()))}


def line(row: dict[str, float]) -> str:
    cells = (
        f"{row['jobs']}",
        f"{row['seconds'] / 60:.1f}",
        f"{row['server_rss'] / MIB:.1f}",
        f"{row['worker_rss'] / MIB:.1f}",
        f"{row['server_fds']}",
        f"{row['worker_fds']}",
    )
    return "  ".join(cell.rjust(len(name)) for cell, name in zip(cells, COLUMNS, strict=True))


if __name__ == "__main__":
    sys.exit(main())
