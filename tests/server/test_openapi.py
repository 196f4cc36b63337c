"""The OpenAPI document, and schemathesis on it: what it allows, what it forbids, nothing breaks the server."""

import re
import subprocess
import sys

import pytest

from slipstream import LLM

# All of its checks that can hold: what is too long, or cannot be asked together, is refused though its shape is right.
CHECKS = (
    "not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance,"
    "negative_data_rejection,unsupported_method,allow_header_conformance"
)
POSTS = {"/v1/completions", "/v1/chat/completions", "/tokenize", "/detokenize"}


@pytest.fixture(scope="module")
def live(serving):
    with serving(LLM("slipstream-draft", device="cpu", kv_memory="16MiB", max_model_len=64)) as live:
        yield live
        live.at_rest()


def test_the_document_names_every_route(live):
    served = {route.path.replace(":path", "") for route in live.server.config.app.routes} - {"/openapi.json"}
    paths = live.http.get("/openapi.json").json()["paths"]
    assert served == set(paths) and {path for path in paths if "post" in paths[path]} == POSTS


def test_schemathesis_finds_nothing(live, tmp_path):
    """Right and wrong requests for all routes; a request that is not answered in ten seconds is a failure."""
    done = subprocess.run(
        [sys.executable, "-m", "schemathesis.cli", "run", live.url + "/openapi.json", "--phases", "coverage,fuzzing",
         "--checks", CHECKS, "--max-examples", "30", "--request-timeout", "10", "--continue-on-failure", "--no-shrink",
         "--generation-deterministic", "--no-color"],
        cwd=tmp_path, capture_output=True, text=True, timeout=200, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert int(re.search(r"(\d+) generated", done.stdout)[1]) > 500, done.stdout
    metrics = live.http.get("/metrics").text
    counts = {
        (route, status): int(float(count))
        for route, status, count in re.findall(r'http_requests_total\{route="(.*?)",status="(.*?)"\} (\S+)', metrics)
    }
    for route in POSTS:
        assert counts[route, "200"] >= 5 and counts[route, "400"] >= 20, counts  # it was asked both
