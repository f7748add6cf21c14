"""Write docs/openapi.json, or with --check say whether it is what the server says.

python tools/openapi.py [--check]
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path

from mxdit.serve.app import make_app
from mxdit.serve.dispatch import Dispatcher
from mxdit.serve.files import Files
from mxdit.serve.jobs import Jobs
from mxdit.serve.served import Catalog

FILE = Path(__file__).parents[1] / "docs" / "openapi.json"


def text() -> str:
    """The document of a server without models, which is that of every server."""
    with tempfile.TemporaryDirectory() as folder:
        jobs = Jobs(Path(folder) / "jobs.sqlite")
        app = make_app(Catalog([]), jobs, Dispatcher(jobs, Files(Path(folder)), []))
        jobs.close()
    return json.dumps(app.openapi(), indent=1) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    if not parser.parse_args().check:
        FILE.write_text(text())
    elif FILE.read_text() != text():
        print(f"{FILE} is not what the server says: run python tools/openapi.py", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
