"""API documentation in the browser: Swagger UI over the application's own description, all of it from this server."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

from fastapi import FastAPI
from fastapi.responses import FileResponse, Response
from fastapi.staticfiles import StaticFiles

DOCS = Path(__file__).with_name("page") / "docs.html"


def mount_docs(app: FastAPI) -> None:
    """Serve /docs. It is the same on every server, as /openapi.json is, so that neither needs a key."""

    @app.get("/docs", include_in_schema=False)
    def docs() -> Response:
        return FileResponse(DOCS)

    # Of fastapi-offline only the files are used: its own page has a script in it, which the page's policy forbids.
    app.mount("/page/swagger-ui", StaticFiles(directory=str(files("fastapi_offline") / "static")))
