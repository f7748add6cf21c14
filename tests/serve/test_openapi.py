"""What the server says of itself: that it is OpenAPI, that it is the copy in docs/, and that real answers are as it says."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from jsonschema import Draft202012Validator
from openapi_spec_validator import OpenAPIV31SpecValidator
from PIL import Image

import serving
import tiny
from serving import KEY, SMALL, ended

pytestmark = pytest.mark.slow

FILE = Path(__file__).parents[2] / "docs" / "openapi.json"
MADE = {**SMALL, "num_inference_steps": 2}


@pytest.fixture(scope="module")
def document() -> dict[str, Any]:
    return json.loads(FILE.read_text())


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    root = tmp_path_factory.mktemp("served")
    models = [serving.served(tiny.save(root / "t2v")), serving.served(tiny.save(root / "i2v", "i2v"), "i2v")]
    with serving.client(root, models, keys=(KEY,)) as found:
        found.headers["authorization"] = f"Bearer {KEY}"
        yield found


def test_the_copy_in_docs_is_what_a_server_says(client, document):
    assert client.get("/openapi.json").json() == document, "run python tools/openapi.py"


def test_it_is_openapi_and_says_something_of_everything(document):
    assert document["openapi"].startswith("3.1")
    OpenAPIV31SpecValidator(document).validate()
    assert not re.findall(r'"#/\$defs', json.dumps(document))
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            assert operation["summary"] and "200" in operation["responses"], path
            assert "422" not in operation["responses"], path
            assert (method == "post" and "{id}" not in path) == ("requestBody" in operation), path
            assert "{id}" not in path or "404" in operation["responses"], path
    form = document["components"]["schemas"]["VideoForm"]["properties"]
    assert form["input_reference"]["format"] == "binary" and "prompt" in form


def check(document: dict[str, Any], answer: Any, path: str | None = None) -> Any:
    """An answer is of a status, a media type and a shape that its route may have. Gives its JSON."""
    request = answer.request
    path = path or request.url.path
    operation = document["paths"][path][request.method.lower()]
    content = operation["responses"][str(answer.status_code)]["content"]
    kind = answer.headers["content-type"].partition(";")[0]
    assert kind in content, (path, kind)
    if kind != "application/json":
        return None
    Draft202012Validator({**content[kind]["schema"], "components": document["components"]}).validate(answer.json())
    return answer.json()


def test_real_answers_are_as_it_says(client, document):
    """Of every route, and an error of most."""
    file = io.BytesIO()
    Image.fromarray(np.zeros((16, 16, 3), np.uint8)).save(file, "PNG")
    form = {name: str(value) for name, value in MADE.items()}
    video = "/v1/videos/{id}"
    with_frame = check(document, client.post("/v1/videos", data=form, files={"input_reference": file.getvalue()}))
    made = check(document, client.post("/v1/videos", json=MADE))
    check(document, client.post("/v1/videos", json={**MADE, "size": "x"}))
    check(document, client.post("/v1/videos", json={**MADE, "model": "sora"}))
    check(document, client.post("/v1/videos", content=b"x", headers={"content-type": "text/plain"}))
    check(document, client.post("/v1/videos", json=MADE, headers={"authorization": "Bearer wrong"}))
    check(document, client.post("/v1/videos", content=b"x" * (2 << 20), headers={"content-type": "application/json"}))
    running = check(document, client.post("/v1/videos", json={**MADE, "num_inference_steps": 1000}))["id"]
    check(document, client.get(f"/v1/videos/{running}/content"), f"{video}/content")  # 409
    check(document, client.post(f"/v1/videos/{running}/cancel"), f"{video}/cancel")
    ended(client, running)
    check(document, client.post(f"/v1/videos/{running}/cancel"), f"{video}/cancel")  # 409
    for job in (with_frame, made):
        ended(client, job["id"])
        assert check(document, client.get(f"/v1/videos/{job['id']}"), video)["status"] == "completed"
        check(document, client.get(f"/v1/videos/{job['id']}/content"), f"{video}/content")
        check(document, client.get(f"/v1/videos/{job['id']}/events"), f"{video}/events")
    check(document, client.get(f"/v1/videos/{with_frame['id']}/input"), f"{video}/input")
    check(document, client.get(f"/v1/videos/{made['id']}/input"), f"{video}/input")  # 404
    assert len(check(document, client.get("/v1/videos"))["data"]) == 3
    check(document, client.get("/v1/videos", params={"limit": 0}))
    check(document, client.delete(f"/v1/videos/{made['id']}"), video)
    check(document, client.get(f"/v1/videos/{made['id']}"), video)
    check(document, client.post("/v1/videos/sync", json=MADE))
    check(
        document, client.post("/v1/images/generations", json={"prompt": "a", "size": "16x16", "num_inference_steps": 2})
    )
    check(document, client.post("/v1/images/generations", json={"prompt": "a", "n": 0}))
    for path in ("/v1/models", "/health", "/ready", "/metrics"):
        check(document, client.get(path))
