"""How long answers, connections and the server live."""

import json
import socket
import threading
import time
from http.client import HTTPConnection

import openai
import pytest

from mlx_dist.errors import ConfigError
from mlx_dist.serve.http import HttpServer
from mlx_dist.serve.settings import HttpConfig
from mlx_dist.serve.sockets import listen
from tests.fake_llm import FakeLLM, post, served

MODEL = "org/tiny"
ASK = {"model": MODEL, "messages": [{"role": "user", "content": "hi"}]}
CHAT = "/v1/chat/completions"


@pytest.fixture
def llm():
    return FakeLLM()


def wait_for(condition, timeout_s=5.0):
    until = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.005)


def test_none_is_left_if_the_last_of_many_is_refused(llm):
    llm.open_limit = 2
    llm.run.clear()
    with served(llm) as server:
        assert server.http().post(CHAT, json=ASK | {"n": 3}).status_code == 429
        assert len(llm.opened) == 2
        assert llm.wait_until_idle()


def test_a_full_server_reads_no_requests(llm):
    llm.is_full = True
    with served(llm) as server:
        http = server.http()
        for path, body in ((CHAT, ASK), (CHAT, {"model": 1}), ("/v1/completions", {"no": "field"})):
            answer = http.post(path, json=body)
            assert answer.status_code == 429
            assert answer.headers["retry-after"] == "2"
            assert answer.json()["error"]["code"] == "queue_full"
        # Everything else is answered, on the same connection.
        assert http.post(CHAT, content=b"{}", headers={"content-type": "x/y"}).status_code == 415
        assert http.get("/v1/models").status_code == 200
        assert http.get(CHAT).status_code == 405
        assert not llm.opened
        llm.is_full = False
        assert http.post(CHAT, json=ASK).status_code == 200


@pytest.mark.parametrize("is_held", [False, True], ids=["generating", "before the first token"])
@pytest.mark.parametrize("is_streamed", [False, True], ids=["whole", "stream"])
def test_everything_is_cancelled_when_the_client_goes(llm, is_streamed, is_held):
    llm.text, llm.step_s = "x" * 100_000, 0.01
    if is_held:
        llm.run.clear()
    with served(llm) as server:
        connection = server.raw(post(CHAT, ASK | {"n": 2, "stream": is_streamed}))
        wait_for(lambda: len(llm.opened) == 2)
        connection.close()
        assert llm.wait_until_idle(1.0)


def test_nothing_is_opened_for_a_client_that_went_while_its_prompt_was_encoded(llm):
    is_encoding, may_go_on = threading.Event(), threading.Event()

    def encode(text):
        is_encoding.set()
        may_go_on.wait(5)
        return (1,)

    llm.tokenizer.encode_text = encode
    with served(llm) as server:
        connection = server.raw(post(CHAT, ASK))
        is_encoding.wait(5)
        connection.close()
        time.sleep(0.1)
        may_go_on.set()
        time.sleep(0.1)
    assert not llm.opened


def test_a_client_that_does_not_read_holds_nothing_past_the_request_time(llm):
    llm.text = "x" * 1_000_000
    with served(llm, request_timeout_s=0.5) as server:
        server.raw(post(CHAT, ASK | {"stream": True}))
        wait_for(lambda: llm.opened)
        time.sleep(0.2)
        assert llm.active
        assert llm.wait_until_idle(2.0)


def test_comments_keep_a_waiting_stream_alive(llm):
    llm.run.clear()
    lines = []
    with (
        served(llm, keep_alive_s=0.05) as server,
        server.http().stream("POST", CHAT, json=ASK | {"stream": True}) as response,
    ):
        assert response.headers["content-type"].startswith("text/event-stream")
        for line in response.iter_lines():
            lines.append(line)
            if lines.count(": keep-alive") == 3:
                llm.run.set()
    data = [line.removeprefix("data: ") for line in lines if line.startswith("data: ")]
    assert data.pop() == "[DONE]"
    assert json.loads(data[-1])["choices"][0]["finish_reason"] == "stop"


def test_the_request_time_is_limited(llm):
    llm.run.clear()
    with served(llm, request_timeout_s=0.2) as server:
        with pytest.raises(openai.InternalServerError, match="longer than") as caught:
            server.openai(max_retries=2).chat.completions.create(**ASK)
        assert (caught.value.status_code, caught.value.code) == (504, "timeout")
        assert len(llm.opened) == 1, "the client was told not to retry"
        with pytest.raises(openai.APIError, match="longer than"):
            list(server.openai().chat.completions.create(**ASK, stream=True))
        assert llm.wait_until_idle()


@pytest.mark.parametrize("is_streamed", [False, True], ids=["whole", "stream"])
def test_an_answer_that_the_engine_ends_is_an_error(llm, is_streamed):
    llm.run.clear()
    with served(llm) as server:
        connection = server.raw(post(CHAT, ASK | {"stream": is_streamed}, "Connection: close"))
        wait_for(lambda: llm.opened)
        llm.opened[0].cancel()
        answer = connection.makefile("rb").read()
    assert answer.startswith(b"HTTP/1.1 200" if is_streamed else b"HTTP/1.1 503")
    assert b'"code":"not_ready"' in answer
    assert b"[DONE]" not in answer


def test_500_connections_at_once(llm):
    with served(llm) as server:
        connections = [server.raw() for _ in range(500)]
        for connection in connections:
            connection.sendall(post(CHAT, ASK, "Connection: close"))
        answers = [connection.recv(100) for connection in connections]
    assert all(answer.startswith(b"HTTP/1.1 200") for answer in answers)


def test_connections_are_limited(llm):
    with served(llm, max_connections=2) as server:
        resting = [server.raw(), server.raw()]
        time.sleep(0.1)
        response = server.http().get("/health")
        assert response.status_code == 503
        assert response.json()["error"]["code"] == "not_ready"
        assert "retry-after" in response.headers
        resting[0].close()
        time.sleep(0.1)
        assert server.http().get("/health").status_code == 200


@pytest.mark.parametrize("sent", [b"", b"GET /health HT", post(CHAT, ASK)[:-1]])
def test_a_request_must_arrive_in_time(llm, sent):
    with served(llm, body_timeout_s=0.2) as server:
        answer = server.raw(sent).makefile("rb").read()
    assert answer == b"" or answer.startswith(b"HTTP/1.1 408")
    assert not llm.opened


def test_a_connection_that_rests_between_requests_stays(llm):
    with served(llm, body_timeout_s=0.1) as server:
        connection = HTTPConnection(server.host, server.port, timeout=20)
        for _ in range(3):
            connection.request("GET", "/health")
            assert connection.getresponse().read() == b'{"status":"ok"}'
            time.sleep(0.15)
        connection.close()


def test_parts_of_an_answer_do_not_wait_for_the_client_to_acknowledge_others():
    listener = listen("127.0.0.1", 0)
    with listener, socket.create_connection(listener.getsockname()), listener.accept()[0] as there:
        assert there.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


def test_a_port_in_use_is_named(llm):
    with served(llm) as server, pytest.raises(ConfigError, match=rf"port {server.port}.*--port"):
        HttpServer(llm, HttpConfig(port=server.port)).start()


def test_an_address_that_is_not_here_is_named(llm):
    for host in ("192.0.2.1", "no.such.host.invalid"):
        with pytest.raises(ConfigError, match=f"{host} port 0.*--host"):
            HttpServer(llm, HttpConfig(host=host, port=0, api_key="k")).start()


def test_the_other_loopback(llm):
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        pytest.skip("this host has no IPv6")
    with served(llm, host="::1") as server:
        http = server.http(base_url=f"http://[::1]:{server.port}")
        assert http.post(CHAT, json=ASK).status_code == 200


def test_stopping_waits_for_answers_under_way(llm):
    llm.text, llm.step_s = "x" * 20, 0.02
    with served(llm) as server:
        chunks = iter(server.openai().chat.completions.create(**ASK, stream=True))
        next(chunks)
        stopping = threading.Thread(target=server.stop)
        stopping.start()
        assert list(chunks)[-1].choices[0].finish_reason == "stop"
        stopping.join()
        with pytest.raises(OSError):
            server.raw()


def test_stopping_does_not_wait_for_ever(llm):
    llm.run.clear()
    with served(llm, stop_timeout_s=1) as server:
        server.raw(post(CHAT, ASK))
        wait_for(lambda: llm.opened)
        server.stop()
        assert llm.wait_until_idle()
