"""Requests made from the OpenAPI description, right and wrong: none breaks the server, every answer is described."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

# Not in the tests' extra: 400 MB, and LangChain wants an older openai than the other tests.
pytest.importorskip("schemathesis", reason="needs the environment of make test-clients")

from real_server import Server

CHECKS = (
    "not_a_server_error",
    "status_code_conformance",
    "content_type_conformance",
    "response_schema_conformance",
    "response_headers_conformance",
    "unsupported_method",
    "allow_header_conformance",
)
FEWEST = 500


def test_generated_requests(server: Server, tmp_path: Path) -> None:
    """At least 500 cases. Whether a request is accepted is not compared: sentences refuse more than a schema can."""
    run = "from schemathesis.cli import schemathesis; schemathesis()"
    asked = ["run", f"{server.address}/openapi.json", "--checks", ",".join(CHECKS), "--max-examples", "30"]
    asked += ["--phases", "coverage,fuzzing", "--seed", "27", "--request-timeout", "60", "--no-color"]
    done = subprocess.run(
        [sys.executable, "-c", run, *asked], capture_output=True, text=True, check=False, cwd=tmp_path
    )
    assert done.returncode == 0, done.stdout[-5000:]
    cases = re.search(r"(\d[\d,]*) generated", done.stdout)
    assert cases is not None and int(cases[1].replace(",", "")) >= FEWEST, done.stdout[-2000:]
