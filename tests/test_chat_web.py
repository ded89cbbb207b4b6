"""The chat server over real HTTP: OpenAI's own client, nanochat's route, batches, cancelled clients, limits and errors."""
import concurrent.futures
import contextlib
import json
import socket
import threading
import time
import urllib.error
import urllib.request

import openai
import pytest
import uvicorn
from conftest import randomize

from nanochat import serving
from nanochat.chat import visible_text
from nanochat.checkpoint_manager import build_model, save_export
from nanochat.engine import Engine
from nanochat.gpt import GPTConfig
from nanochat.hybrid_gpt import HybridConfig
from nanochat.tokenizer import Tokenizer
from scripts import chat_web

HELLO = [{"role": "user", "content": "Hello, how are you?"}]


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.train_from_iterator(["the quick brown fox jumps over the lazy dog and runs on"] * 4, 300)


@pytest.fixture(scope="module")
def model(tokenizer):
    config = GPTConfig(256, tokenizer.get_vocab_size(), 2, 4, 4, 32)
    return randomize(build_model(HybridConfig.from_base(config))).requires_grad_(False)


@contextlib.contextmanager
def serve(model, tokenizer, waiting_limit=64, timeout=60):
    """(base URL, worker) of a server in a thread."""
    listening = chat_web.free_socket("127.0.0.1", 0)
    with serving.Worker(model, tokenizer, waiting_limit=waiting_limit) as worker:
        app = chat_web.make_app(chat_web.Server(worker, "tiny", timeout))
        server = uvicorn.Server(uvicorn.Config(app, log_level="error"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{listening.getsockname()[1]}", worker
        finally:
            server.should_exit = True
            thread.join(10)


@pytest.fixture(scope="module")
def server(model, tokenizer):
    with serve(model, tokenizer) as running:
        yield running


def client(server, **options):
    return openai.OpenAI(base_url=server[0] + "/v1", api_key="none", max_retries=0, **options)


def post(url, body):
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=60) as reply:
            return reply.status, reply.read().decode()
    except urllib.error.HTTPError as e:
        return e.code, e.read().decode()


def expected(model, tokenizer, n, **options):
    ids = tokenizer.render_for_completion({"messages": [*HELLO, {"role": "assistant", "content": ""}]})
    stop = {tokenizer.encode_special("<|assistant_end|>"), tokenizer.get_bos_token_id()}
    return "".join(visible_text(tokenizer, Engine(model, tokenizer).tokens(ids, n, stop=stop, **options)))


@pytest.mark.parametrize("mode", ["ghost", "think", None])
def test_openais_client_gets_the_engines_answer(server, model, tokenizer, mode):
    extra = {"mode": mode} if mode else {}
    asked = {"model": "tiny", "messages": HELLO, "max_tokens": 20, "temperature": 0, "extra_body": extra}
    reply = client(server).chat.completions.create(**asked)
    assert reply.choices[0].message.content == expected(model, tokenizer, 20, temperature=0, mode=mode)
    assert reply.choices[0].finish_reason in ("stop", "length") and reply.usage.completion_tokens <= 20
    pieces = list(client(server).chat.completions.create(**asked, stream=True))
    assert "".join(c.choices[0].delta.content or "" for c in pieces) == reply.choices[0].message.content
    assert [c.choices[0].finish_reason for c in pieces][-1] == reply.choices[0].finish_reason


def test_seeds_reproduce_and_text_completions_stream(server):
    def ask(seed):
        return client(server).completions.create(model="tiny", prompt="the quick", max_tokens=30, temperature=1, seed=seed)
    assert ask(3).choices[0].text == ask(3).choices[0].text != ask(4).choices[0].text
    streamed = client(server).completions.create(model="tiny", prompt="the quick", max_tokens=30, temperature=1, seed=3,
                                                 stream=True)
    assert "".join(c.choices[0].text for c in streamed) == ask(3).choices[0].text


def test_a_stop_text_ends_the_answer_before_it(server):
    whole = client(server).completions.create(model="tiny", prompt="a", max_tokens=40, temperature=0).choices[0].text
    stop = whole[10:13]
    for stream in (False, True):
        got = client(server).completions.create(model="tiny", prompt="a", max_tokens=40, temperature=0, stop=[stop],
                                                stream=stream)
        text = "".join(c.choices[0].text for c in got) if stream else got.choices[0].text
        assert text == whole[:whole.index(stop)]


def test_lossless_and_auto_are_modes_like_others(server, model, tokenizer):
    reply = client(server).chat.completions.create(model="tiny", messages=HELLO, max_tokens=20, temperature=0,
                                                   extra_body={"lossless": True})
    assert reply.choices[0].message.content == expected(model, tokenizer, 20, temperature=0)
    reply = client(server).chat.completions.create(model="tiny", messages=HELLO, max_tokens=20, temperature=0,
                                                   extra_body={"mode": "auto"})
    assert reply.choices[0].message.content == expected(model, tokenizer, 20, temperature=0, mode="auto")
    assert -0.1 < reply.model_extra["compute"]["saved"] < 1 and reply.model_extra["compute"]["saved"] != 0


def test_nanochats_route_streams_depth_and_width(server):
    status, text = post(server[0] + "/chat/completions", {"messages": HELLO, "max_tokens": 20, "mode": "ghost"})
    events = [json.loads(line[6:]) for line in text.split("\n\n") if line]
    assert status == 200 and events[-1]["done"] and 0 < events[-1]["saved"] < 1
    assert all(e["depth"] == 4 and e["width"] == 8 for e in events[:-1])


def test_many_clients_lose_and_mix_nothing(model, tokenizer):
    """Fifty clients at once, of several modes and prompts: each gets what it would get alone."""
    def ask(i):
        return client(server).completions.create(model="tiny", prompt=f"the {i % 7}", max_tokens=12, temperature=0,
                                                 extra_body={"mode": ["ghost", "think"][i % 2]}).choices[0].text
    with serve(model, tokenizer) as server:
        alone = {i: ask(i) for i in range(14)}
        with concurrent.futures.ThreadPoolExecutor(50) as pool:
            together = list(pool.map(ask, range(50)))
        assert server[1].stats["largest_batch"] > 4 and server[1].stats["errors"] == 0
    assert together == [alone[i % 14] for i in range(50)]


def test_a_client_that_goes_away_ends_its_row(model, tokenizer):
    long = GPTConfig(4096, tokenizer.get_vocab_size(), 2, 4, 4, 32)
    endless = randomize(build_model(HybridConfig.from_base(long))).requires_grad_(False)
    endless.lm_head.weight[tokenizer.encode_special("<|assistant_end|>")] = 0
    with serve(endless, tokenizer) as (url, worker):
        body = json.dumps({"messages": HELLO, "max_tokens": 4000, "stream": True}).encode()
        with socket.create_connection(("127.0.0.1", int(url.rpartition(":")[2]))) as s:
            s.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: "
                      + str(len(body)).encode() + b"\r\n\r\n" + body)
            s.recv(1000)
        for _ in range(200):
            if not worker.batches:
                break
            time.sleep(0.05)
        assert not worker.batches and worker.stats["tokens"] < 3000


def test_too_many_waiting_requests_are_refused(model, tokenizer, monkeypatch):
    gate = threading.Event()
    monkeypatch.setattr(serving.Worker, "_run", lambda self, run=serving.Worker._run: gate.wait(60) and run(self))
    with serve(model, tokenizer, waiting_limit=2) as server, concurrent.futures.ThreadPoolExecutor(5) as pool:
        asked = [pool.submit(post, server[0] + "/v1/completions", {"prompt": "a", "max_tokens": 2}) for _ in range(5)]
        while sum(a.done() for a in asked) < 3:  # those that were refused
            time.sleep(0.05)
        gate.set()
        status = sorted(a.result()[0] for a in asked)
    assert status == [200, 200, 503, 503, 503]


@pytest.mark.parametrize("body, words", [
    ({"messages": []}, "messages"), ({"messages": [{"role": "robot", "content": "x"}]}, "role"), (b"{", "JSON"),
    ({"messages": [{"role": "assistant", "content": "x"}]}, "last message must be the user's"),
    ({"messages": HELLO, "temperature": 9}, "temperature"), ({"messages": HELLO, "n": 2}, "n:"),
    ({"messages": HELLO, "mode": "huge"}, "unknown mode"), ({"messages": HELLO, "budget": 0.5}, "mode auto only"),
    ({"messages": HELLO, "max_tokens": 0}, "max_tokens"),
    ({"messages": [{"role": "user", "content": "word " * 5000}]}, "shorten it"),
    ({"messages": [{"role": "user", "content": "x" * 40000}]}, "content"),
    ({"messages": [{"role": ("user", "assistant")[i % 2], "content": "x" * 30000} for i in range(9)]}, "270,000 char")])
def test_bad_requests_are_named(server, body, words):
    status, text = post(server[0] + "/v1/chat/completions", body)
    assert status == 400 and words in json.loads(text)["error"]["message"]


def test_pages_and_health(server):
    with urllib.request.urlopen(server[0] + "/") as reply:
        page = reply.read().decode()
    assert "<title>Adamba</title>" in page and "http://" not in page and "https://" not in page  # nothing from elsewhere
    with urllib.request.urlopen(server[0] + "/health") as reply:
        health = json.loads(reply.read())
    assert health["status"] == "ok" and health["modes"][-1] == "auto" and health["blocks"] == 4
    with urllib.request.urlopen(server[0] + "/stats") as reply:
        assert json.loads(reply.read())["errors"] == 0
    assert client(server).models.list().data[0].id == "tiny"


def test_the_page_offers_auto_only_where_gate_and_predictor_are_trained(model, tokenizer):
    worker = serving.Worker(model, tokenizer)
    assert "auto" in chat_web.Server(worker, "tiny", 60).modes
    weight = model.predictor.out_weight.clone()
    model.predictor.out_weight.zero_()
    try:
        assert chat_web.Server(worker, "tiny", 60).modes == [*model.config.distinct_modes]
    finally:
        model.predictor.out_weight.copy_(weight)


def test_a_port_in_use_is_named(server, model, tokenizer, tmp_path, capsys):
    save_export(tmp_path / "m", model, tokenizer, {"tag": "t", "provenance": {}})
    port = server[0].rpartition(":")[2]
    with pytest.raises(SystemExit):
        chat_web.main(["--checkpoint", str(tmp_path / "m"), "--port", port])
    assert f"cannot listen on 127.0.0.1:{port}" in capsys.readouterr().err
