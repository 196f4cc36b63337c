"""The OpenAPI document: what it allows is answered, what it forbids is refused, nothing breaks the server."""

import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

ANY = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 2**64) | st.floats() | st.text(max_size=6),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=5,
)
SIMPLE = {"string": st.text(max_size=12), "boolean": st.booleans(), "null": st.none(), "number": st.floats(-1, 3)}


@pytest.fixture(scope="module")
def live(serving):
    with serving() as live:
        yield live
        live.at_rest()


@pytest.fixture(scope="module")
def document(live):
    return live.http.get("/openapi.json").json()


def values(schema, document):
    """A strategy for what a schema allows, as far as our schemas go; ``KeyError`` where they go further."""
    if "$ref" in schema:
        return values(document["components"]["schemas"][schema["$ref"].rsplit("/", 1)[1]], document)
    if "anyOf" in schema:
        return st.one_of([values(option, document) for option in schema["anyOf"]])
    if "enum" in schema:
        return st.sampled_from(schema["enum"])
    kind = schema.get("type")
    if kind is None:
        return ANY
    if kind == "integer":
        return st.integers(schema.get("minimum", -2), 40)
    if kind == "array":
        return st.lists(values(schema.get("items", {}), document), min_size=schema.get("minItems", 0), max_size=4)
    if kind == "object":
        own = schema.get("properties", {})
        required = {name: values(own[name], document) for name in schema.get("required", ())}
        optional = {name: values(own[name], document) for name in own.keys() - required.keys()}
        if not own:
            more = schema.get("additionalProperties", True)
            return st.dictionaries(st.text(max_size=5), ANY if more is True else values(more, document), max_size=3)
        return st.fixed_dictionaries(required, optional=optional)
    return SIMPLE[kind]


def bodies(document):
    return {
        path: operation["post"]["requestBody"]["content"]["application/json"]["schema"]
        for path, operation in document["paths"].items()
        if "post" in operation
    }


def check(reply, body):
    """No server error, no half answer: a stream ends, a refusal has OpenAI's format."""
    assert reply.status_code in (200, 400, 404), (body, reply.status_code, reply.text)
    if reply.status_code != 200:
        assert set(reply.json()["error"]) == {"message", "type", "param", "code"}, (body, reply.text)
    elif reply.headers["content-type"].startswith("text/event-stream"):
        assert reply.text.endswith("data: [DONE]\n\n")
    return reply


def test_the_document_names_every_route(live, document):
    served = {route.path.replace(":path", "") for route in live.server.config.app.routes} - {"/openapi.json"}
    assert served == set(document["paths"]) and set(bodies(document)) == {
        "/v1/completions", "/v1/chat/completions", "/tokenize", "/detokenize"
    }  # fmt: skip


def test_routes_without_a_body(live, document):
    for path, operations in document["paths"].items():
        for method in ("GET", "PUT", "DELETE", "PATCH", "HEAD", "POST"):
            reply = live.http.request(method, path.replace("{name}", "slipstream-draft"))
            if method.lower() in operations and method != "POST":
                assert reply.status_code == 200 and reply.content
            else:
                assert reply.status_code == (400 if method.lower() in operations else 405), (method, path)


SETTINGS = settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))


@SETTINGS
@given(st.data())
def test_what_the_document_allows_is_answered(live, document, data):
    path = data.draw(st.sampled_from(sorted(bodies(document))))
    body = data.draw(values(bodies(document)[path], document))
    if "completions" in path:
        body |= {name: min(3, body.get(name) or 3) for name in ("max_tokens", "max_completion_tokens") if name in body}
        body.setdefault("max_tokens", 3)  # what is right is also quick
    reply = check(live.http.post(path, content=json.dumps(body), headers={"Content-Type": "application/json"}), body)
    if reply.status_code == 400:  # whatever is refused is refused for what it says, not for its shape
        assert "must be a JSON object" not in reply.json()["error"]["message"]


@SETTINGS
@given(st.data())
def test_what_the_document_forbids_is_refused(live, document, data):
    """A right body in which one field has a value of no type that its schema allows."""
    path = data.draw(st.sampled_from(sorted(bodies(document))))
    schema = document["components"]["schemas"][bodies(document)[path]["$ref"].rsplit("/", 1)[1]]
    right = {"prompt": "x", "messages": [{"role": "user", "content": "x"}], "tokens": [1], "max_tokens": 2}
    body = {name: value for name, value in right.items() if name in schema["properties"]}
    if path == "/tokenize":
        del body["messages"]
    name = data.draw(st.sampled_from(sorted(schema["properties"])))
    allowed = {kind for option in (schema["properties"][name], *schema["properties"][name].get("anyOf", ()))
               for kind in ([option["type"]] if "type" in option else [])}  # fmt: skip
    wrong = {"string": "x", "integer": 3, "number": 0.5, "boolean": True, "array": [[None]], "object": {"x": [None]}}
    also = {"integer"} if "number" in allowed else set()
    kinds = sorted(wrong.keys() - allowed - also)
    body[name] = wrong[data.draw(st.sampled_from(kinds))]
    reply = check(live.http.post(path, content=json.dumps(body), headers={"Content-Type": "application/json"}), body)
    assert reply.status_code in (400, 404), (body, reply.text)
