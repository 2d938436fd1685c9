"""The server, asked by the OpenAI client as any program would: the answers are those that the model was taught."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import uvicorn
from transformers import AutoTokenizer

from sft_dist.checkpoint.source import find_newest_source
from sft_dist.cli import main
from sft_dist.generate.api import Service, make_app
from sft_dist.generate.engine import Generation
from sft_dist.generate.load import load
from tests.helpers.taught import PAIRS, teach
from tests.helpers.tiny_model import build_base

KEY = "schlüssel-鍵"
ASKED, ANSWERED = PAIRS[0]
REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


@dataclass
class Server:
    """A server in a thread, and the generations that it began."""

    url: str
    name: str
    generations: list[Generation] = field(default_factory=list)

    def client(self, key: str = "any") -> openai.OpenAI:
        return openai.OpenAI(base_url=self.url, api_key=key, max_retries=0, timeout=30)


@contextmanager
def served(folder: Path, *, api_key: str | None = None, max_new_tokens: int = 64) -> Iterator[Server]:
    loaded = load(find_newest_source(str(folder)), device="cpu", dtype="fp32")
    listening = socket.create_server(("127.0.0.1", 0))
    server = Server(f"http://127.0.0.1:{listening.getsockname()[1]}/v1", loaded.name)
    start = loaded.engine.start

    def recorded(*arguments: Any) -> Generation:
        server.generations.append(start(*arguments))
        return server.generations[-1]

    loaded.engine.start = recorded  # type: ignore[method-assign]
    hosts = None if api_key else ("127.0.0.1", "localhost")
    service = Service(loaded, frozenset({"default"}), api_key, hosts, max_new_tokens, created=1)
    running = uvicorn.Server(uvicorn.Config(make_app(service), log_level="warning", timeout_graceful_shutdown=2))
    thread = threading.Thread(target=running.run, kwargs={"sockets": [listening]})
    thread.start()
    try:
        yield server
    finally:
        running.should_exit = True
        thread.join(timeout=20)
        assert not thread.is_alive()


@pytest.fixture(scope="module")
def taught(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return teach(tiny_base, tmp_path_factory.mktemp("models") / "taught")


@pytest.fixture(scope="module")
def server(taught: Path) -> Iterator[Server]:
    with served(taught) as running:
        yield running


@pytest.fixture(scope="module")
def slow(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Answers of 400 tokens that take seconds."""
    with served(build_base(tmp_path_factory.mktemp("slow"), num_layers=24), max_new_tokens=400) as running:
        yield running


def chat(server: Server, text: str = ASKED, **options: Any) -> Any:
    messages = [{"role": "user", "content": text}]
    settings = {"model": server.name, "messages": messages, "temperature": 0, **options}
    return server.client().chat.completions.create(**settings)


def test_an_answer(server: Server, taught: Path) -> None:
    answer = chat(server)
    tokenizer = AutoTokenizer.from_pretrained(taught)
    prompt = tokenizer.apply_chat_template([{"role": "user", "content": ASKED}], add_generation_prompt=True)[
        "input_ids"
    ]
    (choice,) = answer.choices
    assert (choice.message.role, choice.message.content, choice.finish_reason) == ("assistant", ANSWERED, "stop")
    assert answer.object == "chat.completion"
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (len(prompt), len(ANSWERED.encode()) + 1)
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens


@pytest.mark.parametrize("pair", PAIRS)
def test_a_stream_has_whole_characters(server: Server, pair: tuple[str, str]) -> None:
    chunks = list(chat(server, pair[0], stream=True))
    deltas = [chunk.choices[0].delta for chunk in chunks]
    assert deltas[0].role == "assistant"
    assert "".join(delta.content or "" for delta in deltas) == pair[1]
    assert not any(REPLACEMENT in (delta.content or "") for delta in deltas)
    assert len(chunks) > len(pair[1]), "each character by itself: one that waits for others is no stream"
    reasons = [chunk.choices[0].finish_reason for chunk in chunks]
    assert reasons == [None] * (len(chunks) - 1) + ["stop"]
    assert len({chunk.id for chunk in chunks}) == 1
    assert {chunk.object for chunk in chunks} == {"chat.completion.chunk"}


def test_the_lines_of_a_stream(server: Server) -> None:
    body = {"model": "default", "messages": [{"role": "user", "content": ASKED}], "temperature": 0, "stream": True}
    with httpx.stream("POST", f"{server.url}/chat/completions", json=body, timeout=30) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        lines = [line for line in response.iter_lines() if line]
    assert all(line.startswith("data: ") for line in lines)
    assert lines[-1] == "data: [DONE]"
    assert '"usage"' not in "".join(lines)


def test_usage_at_the_end_of_a_stream(server: Server) -> None:
    *chunks, last = chat(server, stream=True, stream_options={"include_usage": True})
    assert last.choices == []
    assert last.usage.completion_tokens == len(ANSWERED.encode()) + 1
    assert all(chunk.usage is None for chunk in chunks)


def test_turns_and_parts_reach_the_model(server: Server) -> None:
    """Both of the same text are the same prompt."""
    history = [{"role": "user", "content": ASKED}, {"role": "assistant", "content": ANSWERED}]
    parts = [{"type": "text", "text": "大阪"}, {"type": "text", "text": "は？"}]
    answers = [
        chat(server, messages=[*history, {"role": "user", "content": content}]).usage.prompt_tokens
        for content in ("大阪は？", parts)
    ]
    assert answers[0] == answers[1] > chat(server, "大阪は？").usage.prompt_tokens


@pytest.mark.parametrize("streams", [False, True])
@pytest.mark.parametrize(("stop", "shown"), [("首都", "日本の"), (["です", "本の"], "日"), (["ない"], ANSWERED)])
def test_stop_strings(server: Server, stop: Any, shown: str, streams: bool) -> None:
    answer = chat(server, stop=stop, stream=streams)
    if streams:
        assert "".join(chunk.choices[0].delta.content or "" for chunk in answer) == shown
    else:
        assert (answer.choices[0].message.content, answer.choices[0].finish_reason) == (shown, "stop")


@pytest.mark.parametrize("name", ["max_tokens", "max_completion_tokens"])
def test_a_limit_cuts_no_character_in_half(server: Server, name: str) -> None:
    choice = chat(server, **{name: 4}).choices[0]
    assert (choice.message.content, choice.finish_reason) == ("日", "length")


def test_completions(server: Server, taught: Path) -> None:
    prompt = f"<|im_start|>user\n{ASKED}<|im_end|>\n<|im_start|>assistant\n"
    client = server.client()
    answer = client.completions.create(model="default", prompt=prompt, temperature=0)
    assert (answer.choices[0].text, answer.choices[0].finish_reason) == (ANSWERED, "stop")
    chunks = list(client.completions.create(model="default", prompt=prompt, temperature=0, stream=True))
    assert "".join(chunk.choices[0].text for chunk in chunks) == ANSWERED
    assert chunks[-1].choices[0].finish_reason == "stop"
    assert {chunk.object for chunk in chunks} == {"text_completion"}
    for wrong, param in (("あ" * 200, "prompt"), ("", None)):
        with pytest.raises(openai.BadRequestError) as caught:
            client.completions.create(model="default", prompt=wrong, stream=True)
        assert caught.value.param == param


def test_a_seed_draws_the_same_again(slow: Server) -> None:
    texts = [chat(slow, temperature=1.5, seed=seed, max_tokens=12).choices[0].message.content for seed in (7, 7, 8)]
    assert texts[0] == texts[1] != texts[2]
    free = {chat(slow, temperature=1.5, max_tokens=12).choices[0].message.content for _ in range(2)}
    assert len(free) == 2


def test_models(server: Server) -> None:
    client = server.client()
    (model,) = client.models.list().data
    assert (model.id, model.owned_by) == (server.name, "sft-dist")
    assert client.models.retrieve("default").id == server.name
    assert httpx.get(server.url.replace("/v1", "/health")).json() == {"status": "ok"}


@pytest.mark.parametrize(
    ("options", "param", "code"),
    [
        ({"n": 2}, "n", "unsupported_parameter"),
        ({"n": True}, "n", "unsupported_parameter"),
        ({"logprobs": True}, "logprobs", "unsupported_parameter"),
        ({"frequency_penalty": 0.5}, "frequency_penalty", "unsupported_parameter"),
        ({"response_format": {"type": "json_object"}}, "response_format", "unsupported_parameter"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools", "unsupported_parameter"),
        ({"extra_body": {"repetition_penalty": 1.1}}, "repetition_penalty", "unknown_parameter"),
        ({"temperature": 2.5}, "temperature", "invalid_value"),
        ({"top_p": 0}, "top_p", "invalid_value"),
        ({"max_tokens": 0}, "max_tokens", "invalid_value"),
        ({"max_tokens": 5, "max_completion_tokens": 5}, "max_tokens", None),
        ({"stop": [""]}, "stop[0]", "invalid_value"),
        ({"messages": []}, "messages", "invalid_value"),
        ({"messages": [{"role": "tool", "content": "a", "tool_call_id": "b"}]}, "messages[0].role", "invalid_value"),
        ({"messages": [{"role": "user", "content": "あ" * 200}]}, "messages", "context_length_exceeded"),
    ],
)
def test_what_is_not_honoured_is_refused(server: Server, options: dict[str, Any], param: str, code: str) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        chat(server, **options)
    assert (caught.value.param, caught.value.code) == (param, code)
    assert caught.value.type == "invalid_request_error"


def test_what_asks_for_nothing_is_accepted(server: Server) -> None:
    neutral = {"n": 1, "frequency_penalty": 0.0, "presence_penalty": 0, "logprobs": False, "tools": [], "user": "me"}
    assert chat(server, response_format={"type": "text"}, **neutral).choices[0].message.content == ANSWERED


def test_an_unknown_model(server: Server) -> None:
    with pytest.raises(openai.NotFoundError) as caught:
        chat(server, model="gpt-4o")
    assert caught.value.code == "model_not_found"


def test_a_key(taught: Path) -> None:
    with served(taught, api_key=KEY) as server:

        def status(header: str | None) -> int:
            headers = {} if header is None else {b"Authorization": header.encode()}
            return httpx.get(f"{server.url}/models", headers=headers).status_code

        with pytest.raises(openai.AuthenticationError) as caught:
            server.client("wrong").models.list()
        assert (caught.value.code, caught.value.type) == ("invalid_api_key", "invalid_request_error")
        statuses = [
            status(header) for header in (f"Bearer {KEY}", f"bearer {KEY}", f"Basic {KEY}", f"Bearer {KEY}x", None)
        ]
        assert statuses == [200, 200, 401, 401, 401]
        assert httpx.get(server.url.replace("/v1", "/health")).status_code == 200


def test_a_web_page_does_not_get_in(server: Server) -> None:
    body = '{"model": "default", "messages": [{"role": "user", "content": "a"}]}'
    assert (
        httpx.post(f"{server.url}/chat/completions", content=body, headers={"Content-Type": "text/plain"}).status_code
        == 415
    )
    assert httpx.get(f"{server.url}/models", headers={"Host": "evil.example"}).status_code == 421
    assert httpx.get(f"{server.url}/nothing").json()["error"]["message"] == "Not Found"
    broken = httpx.post(f"{server.url}/chat/completions", content="{", headers={"Content-Type": "application/json"})
    assert (broken.status_code, broken.json()["error"]["type"]) == (400, "invalid_request_error")


def ended(generation: Generation) -> str:
    assert generation._done.wait(20)
    return generation.answer.finish_reason


def test_who_leaves_a_stream_stops_it(slow: Server) -> None:
    stream = chat(slow, stream=True)
    for _ in range(3):
        next(iter(stream))
    stream.close()
    assert ended(slow.generations[-1]) == "cancelled"
    assert slow.generations[-1].answer.num_tokens < 400
    assert chat(slow, max_tokens=1).usage.completion_tokens == 1, "the next one has its turn"


def test_who_leaves_while_it_waits_or_is_answered_is_forgotten(slow: Server) -> None:
    before = len(slow.generations)
    body = {"model": "default", "messages": [{"role": "user", "content": "あ"}], "temperature": 0}

    def leave_after(seconds: float) -> None:
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(f"{slow.url}/chat/completions", json=body, timeout=httpx.Timeout(20, read=seconds))

    with ThreadPoolExecutor(2) as pool:
        answered = pool.submit(leave_after, 0.8)
        time.sleep(0.2)
        waiting = pool.submit(leave_after, 0.2)
        waiting.result()
        answered.result()
    assert chat(slow, max_tokens=1).usage.completion_tokens == 1
    first, last = slow.generations[before:]
    assert (ended(first), ended(last)) == ("cancelled", "length"), "the one that waited never began"


def test_requests_at_once_are_answered_one_after_the_other(server: Server) -> None:
    with ThreadPoolExecutor(6) as pool:
        answers = list(pool.map(lambda pair: chat(server, pair[0]).choices[0].message.content, PAIRS * 2))
    assert answers == [answered for _, answered in PAIRS] * 2


# the command


def exit_code(*arguments: str) -> int:
    with pytest.raises(SystemExit) as caught:
        main(list(arguments))
    return int(caught.value.code or 0)


@pytest.mark.ci
def test_the_command(taught: Path) -> None:
    """What it prints works as it stands there; Ctrl-C ends it."""
    environment = {**os.environ, "SFT_DIST_API_KEY": "secret", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "sft_dist", "serve", str(taught), "--port", "0", "--host", "0.0.0.0"]
    with subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stderr is not None
            lines = [process.stderr.readline().rstrip() for _ in range(4)]
            assert lines[0] == f"taught: model {taught}, fp32 on CPU"
            url = re.fullmatch(r"base_url (http://127\.0\.0\.1:\d+/v1)  model taught  api_key the one .*", lines[1])
            assert url is not None, lines
            client = openai.OpenAI(base_url=url[1], api_key="secret", max_retries=5)
            messages: Any = [{"role": "user", "content": ASKED}]
            answer = client.chat.completions.create(model="taught", messages=messages, temperature=0)
            assert answer.choices[0].message.content == ANSWERED
            told = subprocess.run(lines[2], shell=True, env=environment, capture_output=True, text=True, check=True)
            assert '"chat.completion"' in told.stdout
            assert "sft-dist export" in lines[3]
            assert "vllm serve" in lines[3]
            process.send_signal(signal.SIGINT)
            assert process.stderr.read().splitlines() == ["stopped"]
            assert process.wait(timeout=20) == 0
        finally:
            process.kill()


def test_other_machines_need_a_key(
    taught: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("SFT_DIST_API_KEY", raising=False)
    assert exit_code("serve", str(taught), "--host", "0.0.0.0") == 2
    assert capsys.readouterr().err.startswith("error: --host 0.0.0.0 lets other machines ask, and there is no API key")
    assert exit_code("serve", str(taught), "--api-key", "") == 2


def test_a_port_that_is_taken(taught: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        assert exit_code("serve", str(taught), "--port", str(taken.getsockname()[1])) == 2
    assert "cannot be listened on: Address already in use" in capsys.readouterr().err


def test_without_its_packages(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    assert exit_code("serve", "x") == 2
    assert (
        capsys.readouterr().err
        == "error: serve needs uvicorn, which is not installed\n  fix: pip install 'sft-dist[serve]'\n"
    )
