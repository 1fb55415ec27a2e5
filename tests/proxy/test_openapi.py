"""The OpenAPI document, and requests made up from it: whatever comes, the answer is one that it describes."""

from __future__ import annotations

from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from tests.proxy.conftest import Stack

CHECKS = [not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance]
# An endpoint that is always 501 would fail the first of them.
PATHS = (
    "/v1/chat/completions",
    "/v1/completions",
    "/v1/models",
    "/v1/models/{model}",
    "/tokenize",
    "/detokenize",
    "/tokenizer_info",
    "/health",
    "/health/live",
    "/health/ready",
    "/metrics",
    "/ledger",
    "/ledger/{request_id}",
    "/nodes",
    "/totals",
)


@pytest.fixture(scope="module")
def document(shared_stack: Stack) -> Any:
    return schemathesis.openapi.from_url(f"{shared_stack.url}/openapi.json")


def test_every_endpoint_is_tried(document: Any):
    # Nor does a stream of events end.
    assert set(document) == {*PATHS, "/v1/embeddings", "/events"}


@pytest.mark.parametrize("path", PATHS)
def test_every_answer_is_described(document: Any, stack: Stack, path: str):
    operation = next(iter(document[path].values()))

    @settings(max_examples=30, deadline=None, phases=[Phase.generate], suppress_health_check=list(HealthCheck))
    @given(case=operation.as_strategy())
    def answers(case: Any) -> None:
        if isinstance(case.body, dict) and "model" in case.body:
            case.body["model"] = "tiny"
        case.call_and_validate(base_url=stack.url, checks=CHECKS)

    answers()


def test_bodies_and_errors_are_in_the_document(stack: Stack):
    found = stack.http.get("/openapi.json").json()
    operation = found["paths"]["/v1/chat/completions"]["post"]
    assert operation["requestBody"]["content"]["application/json"]["schema"]["$ref"].endswith("/ChatBody")
    fields = found["components"]["schemas"]["ChatBody"]["properties"]
    assert {"messages", "tools", "response_format", "logprobs", "n", "stop", "seed"} <= set(fields)
    assert {"400", "401", "429", "503"} <= set(operation["responses"])
    assert stack.http.get("/docs").status_code == 200
