"""What hostile clients send, and how slowly: nothing of it becomes a job, stays in the server, or keeps others out."""

from __future__ import annotations

import json
import random
import socket
import struct
import time
import zlib
from collections.abc import Iterator

import pytest

import tiny
from serving import SMALL, Process, ended, png, wait_for

pytestmark = pytest.mark.slow

LIMIT = 3  # seconds that the server waits for a client
VALUES = (
    *(None, True, -1, 0, 2**63, 10**400, 1.5, "1e999", "NaN", "9" * 5000, "", "x" * 30_000, "\ud800", "\0", [], {}),
    *("../../etc/passwd", "16x-16", {"a": {"b": []}}, [[[[]]]] * 1000),
)
FIELDS = (*SMALL, "seed", "fps", "guidance_scale", "flow_shift", "seconds", "model", "extra_params", "image_reference", "width", "unknown")  # fmt: skip
IDS = ("..", "%2e%2e%2f", "..%5c..", "video_" + "0" * 32, "x" * 5000, "%00", "video_';--", "%ff%fe", "%c0%ae%c0%ae", "video_/../../lock")  # fmt: skip
FILLING = 16 << 10  # bytes that a request with a body has at least: were they kept, it would be seen


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Process]:
    root = tmp_path_factory.mktemp("models")
    models = [tiny.save(root / f"tiny-{task}", task) for task in ("t2v", "i2v")]
    found = Process(tmp_path_factory.mktemp("data"), *models, args=("--request-timeout", str(LIMIT))).ready()
    yield found
    found.kill()


def bomb(kind: str) -> bytes:
    """A PNG: 60,000 x 60,000 pixels in a few bytes, or 8,500 x 8,500 that are all there, or few beside text of 64 MiB."""
    side = {"size": 60_000, "pixels": 8_500, "text": 16}[kind]

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    text = chunk(b"zTXt", b"Comment\0\0" + zlib.compress(b"\0" * (64 << 20))) if kind == "text" else b""
    pixels = zlib.compress(b"\0" * (side * (3 * side + 1) if kind == "pixels" else 1000))
    head = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + text + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


BOMBS = tuple(bomb(kind) for kind in ("size", "pixels", "text"))


def hostile(chance: random.Random, kind: int) -> tuple[str, str, dict[str, str], bytes]:
    """Method, path, headers and body of a request that no server should take."""
    filling = bytes(chance.randbytes(FILLING))
    if kind == 0:  # JSON of wrong values
        wrong = {chance.choice(FIELDS): chance.choice(VALUES) for _ in range(3)}
        body = {**SMALL, **wrong, "num_frames": "many", "user": filling.hex()}
        return "POST", "/v1/videos", {"content-type": "application/json"}, json.dumps(body).encode("ascii")
    if kind == 1:  # what is no JSON, and often no UTF-8 either
        text = json.dumps({**SMALL, "size": "x"})
        cut = text[: chance.randrange(len(text))].encode()
        return "POST", "/v1/videos", {"content-type": "application/json"}, cut + filling
    if kind == 2:  # ids that are paths
        id = chance.choice(IDS)
        if chance.random() < 0.3:
            return "DELETE", f"/v1/videos/{id}", {}, b""
        return "GET", f"/v1/videos/{id}{chance.choice(['', '/content', '/events', '/input'])}", {}, b""
    if kind == 3:  # images that are none, in forms that are often not whole
        edge = "b" * chance.randrange(1, 80)
        text = f'--{edge}\r\nContent-Disposition: form-data; name="prompt"\r\n\r\na\r\n'.encode()
        part = f'--{edge}\r\nContent-Disposition: form-data; name="input_reference"; filename="../x"\r\n\r\n'.encode()
        file = chance.choice([*BOMBS, b"GIF89a" + filling, b"<svg/>" + filling, png()[:20], filling])
        whole = text + part + file + f"\r\n--{edge}--\r\n".encode()
        cut = whole if chance.random() < 0.5 else whole[: chance.randrange(len(whole))]
        return "POST", "/v1/videos", {"content-type": f"multipart/form-data; boundary={edge}"}, cut
    if kind == 4:  # queries
        name = chance.choice(["limit", "order", "after"])
        value = chance.choice(["-1", "101", "1e9", "9" * 400, "%00", "%ed%9f%bf", "%ff", "x", "';DROP%20TABLE%20jobs"])
        return "GET", f"/v1/videos?{name}={value}", {}, b""
    types = ["text/plain", "application/xml", "", "multipart/form-data", "multipart/form-data; boundary="]
    return "POST", chance.choice(["/v1/videos", "/v1/videos/sync"]), {"content-type": chance.choice(types)}, filling


def test_a_thousand_hostile_requests_are_refused_and_leave_nothing(server):
    """None is an error of ours, none becomes a job, and the second thousand finds the server as the first one left it.

    The bound on memory is half of what was sent, so that keeping the bodies alone would break it; and no request may take 64 MiB
    meanwhile, as each of the bombs would if it were opened.
    """

    def thousand() -> int:
        chance, sent = random.Random(0), 0
        for number in range(1000):
            method, path, headers, body = hostile(chance, number % 6)
            answer = server.client.request(method, path, headers=headers, content=body)
            assert 400 <= answer.status_code < 500, (number, answer.status_code, answer.text[:300])
            assert set(answer.json()["error"]) == {"message", "type", "param", "code"}, (number, answer.text[:300])
            sent += len(body)
        return sent

    thousand()
    memory, descriptors = server.memory(), server.descriptors()
    server.most_memory(from_now=True)
    sent = thousand()
    assert sent > 8 << 20
    assert server.most_memory() - memory < 64 << 20
    assert server.memory() - memory < sent // 2
    assert server.descriptors() <= descriptors
    assert server.client.get("/v1/videos").json()["data"] == []


# -- without a client that keeps the rules -----------------------------------------------------------------------------


def connected(server: Process, sent: bytes = b"", room: int | None = None) -> socket.socket:
    """A connection; with `room`, one that takes in as few bytes as the system lets it."""
    found = socket.socket()
    if room is not None:
        found.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, room)
    found.settimeout(60)
    found.connect(server.address)
    found.sendall(sent)
    return found


def rest(connection: socket.socket) -> bytes:
    """What comes up to the end of a connection."""
    got = b""
    try:
        while more := connection.recv(1 << 16):
            got += more
    except ConnectionResetError:
        pass
    return got


def drip(connections: list[socket.socket], byte: bytes) -> None:
    """Send a byte at a time over all of them, until the server has ended each."""
    left, until = list(connections), time.monotonic() + 20 * LIMIT
    for connection in left:
        connection.setblocking(False)
    while left:
        assert time.monotonic() < until, f"{len(left)} are still served"
        for connection in list(left):
            try:
                connection.send(byte)
                if connection.recv(1, socket.MSG_PEEK) == b"" or b"close" in connection.recv(1 << 16, socket.MSG_PEEK):
                    left.remove(connection)
            except BlockingIOError:
                pass
            except OSError:
                left.remove(connection)
        time.sleep(0.1)  # between two bytes
    for connection in connections:
        connection.settimeout(60)


MALFORMED = {
    "no HTTP": b"\x16\x03\x01\x02\x00\x01\x00\r\n\r\n",
    "a header without an end": b"GET / HTTP/1.1\r\nHost: x\r\nX: " + b"x" * (64 << 10),
    "two lengths": b"POST /v1/videos HTTP/1.1\r\nHost: x\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\nx",
    "no length": b"POST /v1/videos HTTP/1.1\r\nHost: x\r\nContent-Length: -5\r\n\r\n",
    "a zero in a header": b"GET / HTTP/1.1\r\nHost: x\r\nX: \0\r\n\r\n",
}


@pytest.mark.parametrize("sent", MALFORMED.values(), ids=MALFORMED.keys())
def test_what_is_no_http_gets_an_error_in_the_same_shape(server, sent):
    with connected(server, sent) as connection:
        head, _, body = rest(connection).partition(b"\r\n\r\n")
    assert head.startswith((b"HTTP/1.1 400 ", b"HTTP/1.1 431 ")), head
    assert json.loads(body)["error"]["type"] == "invalid_request_error"


def test_who_goes_in_the_middle_leaves_nothing(server):
    head = b"POST /v1/videos HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 100000\r\n\r\n"
    server.client.get("/health")
    before = server.descriptors()
    for number in range(100):
        connected(server, (head + b"{" * 50_000)[: 20 * number]).close()
    wait_for(lambda: server.descriptors() <= before, deadline=10 * LIMIT)
    assert server.client.get("/v1/videos").json()["data"] == []


def test_who_sends_a_byte_at_a_time_is_ended_and_keeps_nobody_out(server):
    head = b"POST /v1/videos HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 100000\r\n"
    begun = {
        "nothing": b"",
        "a head": b"GET /health HTTP/1.1\r\nHost: x\r\nX: ",
        "a body": head + b"\r\n",
        "a body in pieces": head.replace(b"Content-Length: 100000", b"Transfer-Encoding: chunked") + b"\r\n",
        "a second head": b"GET /health HTTP/1.1\r\nHost: x\r\n\r\nGET /health HTTP/1.1\r\nX: ",
        "a body that nobody wants": head.replace(b"/v1/videos", b"/nowhere") + b"\r\n",
    }
    server.client.get("/health")
    before = server.descriptors()
    connections = {name: [connected(server, sent) for _ in range(10)] for name, sent in begun.items()}
    assert server.client.get("/ready").status_code == 200  # with sixty of them here
    drip([one for name, some in connections.items() if name != "nothing" for one in some], b"1")
    for name, some in connections.items():
        for connection in some:
            with connection:
                answered = rest(connection)
            if name in ("a head", "a body", "a body in pieces", "nothing"):
                assert answered.startswith(b"HTTP/1.1 408 "), (name, answered)
                assert b'"code": "request_timeout"' in answered and b"connection: close" in answered.lower()
    wait_for(lambda: server.descriptors() <= before, deadline=10 * LIMIT)


def test_who_reads_nothing_holds_no_memory_and_no_worker(server):
    """Of files of 64 MiB, and of events: twenty clients each take a few buffers of the system's, and then their end."""
    job = ended(server.client, server.client.post("/v1/videos", json=SMALL).json()["id"])
    with (server.data / "made" / f"{job['id']}.mp4").open("r+b") as file:
        file.truncate(64 << 20)
    running = server.client.post("/v1/videos", json={**SMALL, "num_inference_steps": 1000}).json()["id"]
    wait_for(lambda: server.client.get(f"/v1/videos/{running}").json()["step"])
    memory, before = server.memory(), server.descriptors()
    paths = [f"/v1/videos/{job['id']}/content"] * 20 + [f"/v1/videos/{running}/events"] * 20
    idle = [connected(server, f"GET {path} HTTP/1.1\r\nHost: x\r\n\r\n".encode(), room=4096) for path in paths]
    wait_for(lambda: server.descriptors() >= before + 40)
    # The files are closed and their connections ended, though none of the clients has gone; the events go on.
    wait_for(lambda: server.descriptors() <= before + 20, deadline=20 * LIMIT)
    assert server.memory() - memory < 32 << 20
    asked = server.client.get(f"/v1/videos/{running}").json()
    assert asked["status"] == "in_progress"
    server.client.post(f"/v1/videos/{running}/cancel")
    assert ended(server.client, running)["error"]["code"] == "cancelled"
    assert ended(server.client, server.client.post("/v1/videos", json=SMALL).json()["id"])["status"] == "completed"
    for connection in idle:
        connection.close()
    wait_for(lambda: server.descriptors() <= before, deadline=10 * LIMIT)
    for id in (job["id"], running):
        server.client.delete(f"/v1/videos/{id}")
