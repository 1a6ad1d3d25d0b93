"""Who may come in, with how much, and under which name."""

import json

import pytest

from mlx_dist.errors import ConfigError
from mlx_dist.serve.settings import HttpConfig, check_address
from tests.fake_llm import FakeLLM, served

CHAT = "/v1/chat/completions"
TEXT = "/v1/completions"
ASK = {"model": "org/tiny", "messages": [{"role": "user", "content": "hi"}]}
JSON = {"content-type": "application/json"}
PAGE = "https://page.example"


@pytest.fixture
def llm():
    return FakeLLM("ok")


@pytest.fixture
def serve(llm, request):
    """Serves with the settings that the test is marked with."""
    with served(llm, **getattr(request, "param", {})) as server:
        yield server


def with_settings(**settings):
    return pytest.mark.parametrize("serve", [settings], indirect=True)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.5", "mac.local", "127.1", ""])
def test_an_address_open_to_others_needs_a_key(host):
    with pytest.raises(ConfigError, match="--api-key"):
        HttpConfig(host=host)
    HttpConfig(host=host, api_key="k")


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.9.1", "::1", "localhost"])
def test_a_loopback_address_needs_none(host):
    check_address(host, None)


@pytest.mark.parametrize(
    "wrong",
    [
        {"port": -1},
        {"port": 65536},
        {"max_body_bytes": 0},
        {"max_prompt_tokens": 0},
        {"request_timeout_s": float("nan")},
        {"api_key": ""},
        {"api_key": " k"},
        {"api_key": "schlüssel"},
        {"api_key": "a\nb"},
    ],
)
def test_impossible_settings_are_refused(wrong):
    with pytest.raises(ConfigError):
        HttpConfig(**wrong)


@with_settings(api_key="secret")
def test_every_route_but_one_needs_the_key(serve):
    http = serve.http()
    paths = ("/v1/models", "/ready", "/metrics", "/cluster", "/openapi.json", "/nothing")
    wrong = (None, "secret", "Basic secret", "Bearer", "Bearer wrong", "Bearer sécret")
    for path in paths:
        for key in wrong:
            headers = {} if key is None else {"authorization": key.encode("latin-1")}
            response = http.get(path, headers=headers)
            assert response.status_code == 401, (path, key)
            assert response.headers["www-authenticate"] == "Bearer"
            assert response.json()["error"]["code"] == "invalid_api_key"
        assert http.get(path, headers={"authorization": "bearer secret"}).status_code != 401
    assert http.get("/health").status_code == 200
    assert http.post("/health", json={}).status_code == 405


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("localhost", 200),
        ("LOCALHOST:1", 200),
        ("127.0.0.1:80", 200),
        ("[::1]:8100", 200),
        ("127.0.0.9", 200),
        ("evil.example", 403),
        ("localhost.evil.example", 403),
        ("localhost@evil.example", 403),
        ("127.0.0.1.evil.example", 403),
        ("localhost/", 403),
        ("192.168.1.5", 403),
        ("[::1", 403),
        ("", 403),
    ],
)
def test_only_names_of_this_machine_are_served(serve, host, status):
    assert serve.http().get("/health", headers={"host": host}).status_code == status


@with_settings(allowed_hosts=("Mac.local",))
def test_more_names_can_be_allowed(serve):
    http = serve.http()
    assert http.get("/health", headers={"host": "mac.LOCAL:8100"}).status_code == 200
    assert http.get("/health", headers={"host": "other.local"}).status_code == 403


@with_settings(host="0.0.0.0", api_key="k")
def test_a_wildcard_address_is_served_under_addresses(serve):
    http = serve.http(base_url=f"http://127.0.0.1:{serve.port}")
    assert http.get("/health", headers={"host": "192.168.1.5:8100"}).status_code == 200
    assert http.get("/health", headers={"host": "[fe80::1]:8100"}).status_code == 200
    assert http.get("/health", headers={"host": "evil.example"}).status_code == 403


def test_pages_of_other_sites_may_not_call(serve, llm):
    http = serve.http()
    for origin in (
        PAGE,
        "null",
        f"http://localhost:{serve.port}",
        f"https://127.0.0.1:{serve.port}",
    ):
        response = http.post(CHAT, json=ASK, headers={"origin": origin})
        assert response.status_code == 403
        assert "access-control-allow-origin" not in response.headers
    # What a page can send without asking first.
    for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data"):
        response = http.post(CHAT, content=json.dumps(ASK), headers={"content-type": kind})
        assert response.status_code == 415
    preflight = {"origin": PAGE, "access-control-request-method": "POST"}
    assert http.options(CHAT, headers=preflight).status_code == 403
    assert not llm.opened
    own = {"origin": f"http://127.0.0.1:{serve.port}"}
    assert http.post(CHAT, json=ASK, headers=own).status_code == 200


@with_settings(cors_origins=(PAGE,), api_key="k")
def test_pages_of_allowed_origins_may_call(serve):
    http = serve.http()
    preflight = {
        "origin": PAGE,
        "access-control-request-method": "POST",
        "access-control-request-headers": "authorization,content-type,x-stainless-os",
    }
    response = http.options(CHAT, headers=preflight)
    assert response.status_code == 200
    assert response.headers["access-control-allow-origin"] == PAGE
    assert "x-stainless-os" in response.headers["access-control-allow-headers"].lower()
    headers = {"origin": PAGE, "authorization": "Bearer k"}
    for asked in (ASK, ASK | {"n": 0}, ASK | {"stream": True}):
        answer = http.post(CHAT, json=asked, headers=headers)
        assert answer.headers["access-control-allow-origin"] == PAGE
    assert http.post(CHAT, json=ASK, headers={"origin": PAGE}).status_code == 401
    other = headers | {"origin": "https://other.example"}
    assert http.post(CHAT, json=ASK, headers=other).status_code == 403


@pytest.mark.parametrize(
    "kind",
    ["application/json; charset=UTF-8", 'application/json;charset="utf-8"', "APPLICATION/JSON"],
)
def test_json_goes_by_these_names(serve, kind):
    content = json.dumps(ASK)
    assert serve.http().post(CHAT, content=content, headers={"content-type": kind}).is_success


@pytest.mark.parametrize("kind", ["", "application/json; charset=utf-16", "application/jsonp"])
def test_json_does_not_go_by_others(serve, kind):
    content = json.dumps(ASK)
    response = serve.http().post(CHAT, content=content, headers={"content-type": kind})
    assert response.status_code == 415


@with_settings(max_body_bytes=1000)
def test_bodies_are_limited(serve, llm):
    http = serve.http()
    room = 1000 - len(json.dumps(ASK))
    fits = json.dumps(ASK) + " " * room
    assert http.post(CHAT, content=fits, headers=JSON).status_code == 200
    llm.opened.clear()

    def parts():
        for _ in range(100):
            yield b" " * 1000

    for content in (fits + " ", " " * 1_000_000, parts()):
        response = http.post(CHAT, content=content, headers=JSON)
        assert response.status_code == 413
        assert response.json()["error"]["code"] == "body_too_large"
    assert not llm.opened
    assert http.get("/health").status_code == 200


@with_settings(max_prompt_tokens=10)
def test_prompts_are_limited(serve, llm):
    http = serve.http()
    assert http.post(TEXT, json={"model": "tiny", "prompt": "x" * 10}).status_code == 200
    for prompt in ("x" * 11, [1] * 11, ["x", "x" * 11]):
        asked = {"model": "tiny", "prompt": prompt}
        assert http.post(TEXT, json=asked).status_code == 413
    assert len(llm.opened) == 1


@with_settings(max_header_bytes=4000)
def test_headers_are_limited(serve):
    http = serve.http()
    assert http.get("/health", headers={"x": "y" * 3000}).status_code == 200
    for size in (4000, 30_000, 300_000):
        connection = serve.raw()
        connection.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\nX: " + b"y" * size)
        connection.sendall(b"\r\n\r\n")
        status = connection.recv(100).split()[1]
        assert status in (b"400", b"431")
    assert http.get("/health?" + "x" * 4000).status_code == 431
    assert http.get("/health").status_code == 200


@pytest.mark.parametrize(
    "sent",
    [
        b"\x00\x01\x02\r\n\r\n",
        b"GET /health HTTP/1.1\r\n\r\n",
        b"GET /health HTTP/1.1\r\nHost: a\r\nHost: localhost\r\n\r\n",
        b"GET /health HTTP/9\r\nHost: localhost\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: -1\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1\r\n"
        b"Content-Length: 2\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n"
        b"Content-Type: application/json\r\n\r\nZ\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    ],
)
def test_what_is_no_request_is_refused(serve, llm, sent):
    connection = serve.raw(sent + b"\r\n\r\n")
    assert connection.recv(100).split()[1][:1] == b"4"
    assert serve.http().get("/health").status_code == 200
    assert not llm.opened
