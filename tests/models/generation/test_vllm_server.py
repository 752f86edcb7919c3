"""vLLM servers, for real: started and supervised, killed, refused, slow, several."""

import json
import math
import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import psutil
import pytest
import torch
from support.vllm_models import (
    CONTEXT,
    EOS,
    RANK,
    SETTINGS,
    VOCAB,
    adapter,
    build,
    ids,
    largest_gap,
    needs_vllm,
    ragged_prompts,
    save,
    sync,
)

from irl_align.config.generation import ServerOptions
from irl_align.errors import UserError
from irl_align.models.generation.protocol import Sampling, generate
from irl_align.models.generation.vllm_backend import VLLMGenerator
from irl_align.models.generation.vllm_common import PolicyFolder
from irl_align.models.generation.vllm_process import ServerProcess
from irl_align.models.generation.vllm_server import ServerEngine

KEY = "a key of the test's own"
TOLERANCE = 1e-4


@pytest.fixture(autouse=True, scope="module")
def keys() -> Iterator[None]:
    """The environment variables of the servers' API key and of a wrong one."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_API_KEY", KEY)
        patch.setenv("WRONG_KEY", "another")
        yield


def client(log: Path, *urls: str, **options: object) -> VLLMGenerator:
    """A generator by these servers, or by one that it starts."""
    server = ServerOptions.model_validate(
        {"urls": list(urls), "timeout": 60.0, "start_timeout": 600.0, "retries": 3, **options}
    )
    return VLLMGenerator(replace(SETTINGS, lora_rank=RANK), "vllm-server", server, log)


def engine_of(generator: VLLMGenerator) -> ServerEngine:
    assert isinstance(generator.engine, ServerEngine)
    return generator.engine


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("served")


@pytest.fixture(scope="module")
def own(folder: Path) -> Iterator[VLLMGenerator]:
    """One server, started as a recipe starts it, for GPT-NeoX: vLLM runs transformers' class."""
    sampler = client(folder / "server.log")
    model = build("gpt_neox", 0)
    sync(sampler, save(model, folder / "neox-0"), "neox-0", model)
    yield sampler
    sampler.close()


def process_of(sampler: VLLMGenerator) -> ServerProcess:
    process = engine_of(sampler).process
    assert process is not None
    return process


@contextmanager
def connected(own: VLLMGenerator, **options: object) -> Iterator[VLLMGenerator]:
    """A client of the same server, as one on another machine is."""
    log = process_of(own).log
    yield client(log, process_of(own).url, **options)
    own.key = None  # the server may have other weights now


# A server for real


@pytest.mark.vllm
@needs_vllm
class TestServer:
    def test_sync_gives_the_learners_logprobs_every_time(
        self, own: VLLMGenerator, folder: Path
    ) -> None:
        prompts = ragged_prompts(8)
        for seed in range(3):
            model = build("gpt_neox", seed)
            key = f"neox-{seed}"
            sync(own, save(model, folder / key), key, model)
            samples = generate(own, prompts, Sampling(n=2, max_new_tokens=16))
            assert largest_gap(model, prompts, samples) < TOLERANCE
        assert engine_of(own).starts == 1

    def test_sync_with_a_lora_policy_loads_only_its_adapter(
        self, own: VLLMGenerator, folder: Path
    ) -> None:
        """Two adapters in turn, then the whole model again, without a merge or a restart."""
        base, prompts = build("gpt_neox", 0), ragged_prompts(6)
        where = save(base, folder / "neox-0")
        [server] = engine_of(own).servers
        for seed in range(2):
            path = folder / f"adapter-{seed}"
            policy = adapter(where, build("gpt_neox", 0), seed, path)
            sync(own, path, f"adapter {seed}", policy)
            samples = generate(own, prompts, Sampling(n=2, max_new_tokens=16))
            assert largest_gap(policy, prompts, samples) < TOLERANCE
            assert largest_gap(base, prompts, samples) > 0.1  # the adapter changes the distribution
            served = [model["id"] for model in server.call("/v1/models")["data"]]
            assert served == ["policy", f"adapter {seed}"]  # the one before it is gone
        sync(own, where, "whole again", base)
        samples = generate(own, prompts, Sampling(max_new_tokens=16))
        assert largest_gap(base, prompts, samples) < TOLERANCE
        assert engine_of(own).starts == 1

    def test_sync_refuses_an_adapter_of_too_large_a_rank(
        self, own: VLLMGenerator, folder: Path
    ) -> None:
        path = folder / "large"
        adapter(folder / "neox-0", build("gpt_neox", 0), 0, path, rank=64)
        with (
            connected(own) as other,
            pytest.raises(UserError, match=r"refused /v1/load_lora_adapter .*with --lora-rank"),
        ):
            sync(other, path, "large", build("gpt_neox", 0))
        assert process_of(own).alive

    def test_samples_have_the_seeds_and_limits_of_the_engine(
        self, own: VLLMGenerator, folder: Path
    ) -> None:
        model = build("gpt_neox", 0)
        sync(own, folder / "neox-0", "neox-0", model)
        prompts = [[7], *ragged_prompts(10), list(range(2, 2 + CONTEXT - 1 - 12)) + [3] * 11]
        one = generate(own, prompts, Sampling(max_new_tokens=16, seed=3))
        many = generate(own, prompts, Sampling(n=66, max_new_tokens=16, seed=3))
        assert ids(one) == [group[:1] for group in ids(many)]
        assert [len(group) for group in many] == [66] * len(prompts)
        for group in many:
            for completion in group:
                assert completion.truncated == (completion.token_ids[-1] != EOS)
                assert EOS not in completion.token_ids[:-1]
        greedy = generate(own, prompts[:4], Sampling(temperature=0, max_new_tokens=8))
        assert largest_gap(model, prompts[:4], greedy) < TOLERANCE

    def test_stream_gives_many_prompts_one_result_each(
        self, own: VLLMGenerator, folder: Path
    ) -> None:
        model = build("gpt_neox", 0)
        sync(own, folder / "neox-0", "neox-0", model)
        prompts = ragged_prompts(300, longest=12)
        seen = [index for index, _ in own.stream(prompts, Sampling(max_new_tokens=3))]
        assert sorted(seen) == list(range(300))

    def test_a_client_leaves_the_server_of_another_run_running(
        self, own: VLLMGenerator, folder: Path
    ) -> None:
        model = build("gpt_neox", 1)
        with connected(own) as other:
            sync(other, save(model, folder / "neox-1"), "from afar", model)
            prompts = ragged_prompts(5)
            completions = generate(other, prompts, Sampling(max_new_tokens=8))
            assert largest_gap(model, prompts, completions) < TOLERANCE
            other.close()
        assert process_of(own).alive

    def test_sync_names_a_wrong_key_and_a_wrong_model(
        self, own: VLLMGenerator, folder: Path
    ) -> None:
        path = folder / "neox-0"
        with (
            connected(own, api_key_env="WRONG_KEY") as other,
            pytest.raises(UserError) as refused,
        ):
            sync(other, path, "a", build("gpt_neox", 0))
        assert "refused the API key (401)" in str(refused.value)
        assert "another" not in str(refused.value) and KEY not in str(refused.value)
        llama = build("llama", 0)
        with (
            connected(own) as other,
            pytest.raises(UserError, match=r"cannot load .* is .* there"),
        ):
            sync(other, save(llama, folder / "llama"), "b", llama)
        assert process_of(own).alive

    def test_the_api_key_is_in_no_log_and_no_command_line(self, own: VLLMGenerator) -> None:
        process = process_of(own)
        assert KEY not in process.log.read_text(errors="replace")
        commands = [p.cmdline() for p in psutil.Process(process.process.pid).children(True)]
        commands.append(psutil.Process(process.process.pid).cmdline())
        assert not any(KEY in part for command in commands for part in command)

    def test_a_server_slower_than_the_timeout_is_dropped(
        self, own: VLLMGenerator, folder: Path
    ) -> None:
        model = build("gpt_neox", 0)
        with connected(own, retries=1) as other:
            sync(other, folder / "neox-0", "slow", model)
            engine_of(other).servers[0].timeout = 0.001
            with pytest.raises(UserError, match=r"no samples after 2 tries|no server is left"):
                generate(other, ragged_prompts(2), Sampling(n=8, max_new_tokens=60))

    def test_a_server_that_is_killed_while_sampling_is_started_again(
        self, own: VLLMGenerator, folder: Path
    ) -> None:
        """Each prompt has one result, and results after the kill are of the same weights."""
        model = build("gpt_neox", 2)
        sync(own, save(model, folder / "neox-2"), "neox-2", model)
        prompts, sampling = ragged_prompts(400), Sampling(n=2, max_new_tokens=40)
        samples = {}
        for index, group in own.stream(prompts, sampling):
            assert index not in samples
            samples[index] = group
            if len(samples) == 5:
                os.killpg(process_of(own).process.pid, signal.SIGKILL)
        assert sorted(samples) == list(range(400))
        groups = [samples[index] for index in range(400)]
        assert largest_gap(model, prompts, groups) < TOLERANCE
        assert engine_of(own).starts == 2

    def test_the_server_ends_when_its_stdin_closes(self, own: VLLMGenerator) -> None:
        """As when the process that started it is killed. This test is last: it ends the server."""
        process = process_of(own)
        family = [process.process.pid, *(p.pid for p in _children(process))]
        assert len(family) > 1
        assert process.process.stdin is not None
        process.process.stdin.close()
        deadline = time.monotonic() + 20
        while (running := [pid for pid in family if _runs(pid)]) and time.monotonic() < deadline:
            process.process.poll()
            time.sleep(0.05)
        assert not running


def _children(process: ServerProcess) -> list[psutil.Process]:
    return psutil.Process(process.process.pid).children(recursive=True)


def _runs(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


@pytest.mark.vllm
@needs_vllm
def test_a_taken_port_is_refused(folder: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        sampler = client(folder / "taken.log", port=port)
        model = build("gpt_neox", 0)
        with pytest.raises(UserError, match=rf"generation.server.port: {port} is taken"):
            sync(sampler, save(model, folder / "neox-0"), "a", model)


@pytest.mark.vllm
@needs_vllm
def test_a_server_that_does_not_start_reports_the_cause(folder: Path) -> None:
    path = save(build("gpt_neox", 0), folder / "unstarted")
    unknown = replace(SETTINGS, args={"no_such_option": 7})
    why = r"ended while it started: .*unrecognized arguments: --no-such-option 7; its output is in"
    with pytest.raises(UserError, match=why):
        ServerProcess(PolicyFolder.read(path), unknown, ServerOptions(), folder / "unstarted.log")


@pytest.mark.vllm
@needs_vllm
def test_a_server_that_is_not_ready_in_time_is_ended(folder: Path) -> None:
    sampler = client(folder / "late.log", start_timeout=0.3)
    model, before = build("gpt_neox", 0), set(psutil.Process().children())
    with pytest.raises(UserError, match=r"start_timeout: vLLM's server was not ready after 0.3 s"):
        sync(sampler, save(model, folder / "late"), "a", model)
    assert engine_of(sampler).process is None
    assert set(psutil.Process().children()) <= before


# Several servers, of which some fail: stand-ins that speak vLLM's protocol


class Listening(ThreadingHTTPServer):
    request_queue_size = 512


class StandIn:
    """A server whose samples repeat their prompt's first token; it fails on request."""

    def __init__(self) -> None:
        self.version = ""
        self.answered: list[int] = []
        self.fails = 0
        self.stale = False
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *_: object) -> None:
                pass

            def do_GET(self) -> None:
                self.reply(outer.get(self.path))

            def do_POST(self) -> None:
                body = json_body(self)
                if self.headers["Authorization"] != f"Bearer {KEY}":
                    self.reply({}, 401)
                    return
                status, answer = outer.post(self.path, body)
                self.reply(answer, status)

            def reply(self, answer: object, status: int = 200) -> None:
                data = to_json(answer)
                self.send_response(status)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

        self.http = Listening(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_address[1]}"
        threading.Thread(target=self.http.serve_forever, daemon=True).start()

    def get(self, path: str) -> object:
        if path == "/weight_info":
            return {"weight_version": self.version}
        return {"data": [{"id": "policy", "max_model_len": CONTEXT}]}

    def post(self, path: str, body: dict[str, object]) -> tuple[int, object]:
        if path == "/update_weight_version":
            self.version = str(body["new_version"])
        if path == "/collective_rpc":
            return 200, {"results": [{"output_layers": 1}]}
        if path.startswith("/inference"):
            if self.fails:
                self.fails -= 1
                return 503, {}
            version, self.stale = ("older" if self.stale else self.version), False
            if version == "older":
                self.version = "older"
            prompt = body["token_ids"]
            assert isinstance(prompt, list)
            self.answered.append(prompt[0])
            tokens = [prompt[0], EOS]
            content = [{"token_id": t, "logprob": -math.log(VOCAB)} for t in tokens]
            choice = {
                "index": 0,
                "finish_reason": "stop",
                "token_ids": tokens,
                "weight_versions": [{"version": version, "start": 0, "end": 2}],
                "logprobs": {"content": content},
            }
            return 200, {"choices": [choice]}
        return 200, {"success": True}

    def end(self) -> None:
        self.http.shutdown()
        self.http.server_close()


def json_body(handler: BaseHTTPRequestHandler) -> dict[str, object]:
    body = json.loads(handler.rfile.read(int(handler.headers["Content-Length"])) or b"{}")
    assert isinstance(body, dict)
    return body


def to_json(answer: object) -> bytes:
    return json.dumps(answer).encode()


@pytest.fixture
def pair(tmp_path: Path) -> Iterator[tuple[VLLMGenerator, StandIn, StandIn]]:
    """A client of two stand-ins, synced to a model whose distribution is uniform."""
    first, second = StandIn(), StandIn()
    sampler = client(tmp_path / "log", first.url, second.url, retries=2)
    model = build("llama", 0)
    with torch.no_grad():
        model.lm_head.weight.zero_()
    sync(sampler, save(model, tmp_path / "policy"), "now", model)
    for server in (first, second):
        server.answered.clear()
    yield sampler, first, second
    for server in (first, second):
        server.end()


PROMPTS = [[token] for token in range(2, 82)]


def answers(sampler: VLLMGenerator) -> list[int]:
    """First token of each prompt's only sample; every prompt exactly once."""
    samples = list(sampler.stream(PROMPTS, Sampling()))
    assert sorted(index for index, _ in samples) == list(range(len(PROMPTS)))
    return [group[0].token_ids[0] for _, group in sorted(samples, key=lambda item: item[0])]


def test_servers_share_the_work_and_answer_each_prompt_once(
    pair: tuple[VLLMGenerator, StandIn, StandIn],
) -> None:
    sampler, first, second = pair
    assert answers(sampler) == [prompt[0] for prompt in PROMPTS]
    assert first.answered and second.answered
    assert sorted(first.answered + second.answered) == [prompt[0] for prompt in PROMPTS]


def test_a_server_that_fails_for_a_while_is_asked_again(
    pair: tuple[VLLMGenerator, StandIn, StandIn],
) -> None:
    sampler, first, _ = pair
    first.fails = 3
    assert answers(sampler) == [prompt[0] for prompt in PROMPTS]
    assert len(engine_of(sampler).servers) == 2


def test_a_dead_server_is_dropped_and_the_other_does_its_work(
    pair: tuple[VLLMGenerator, StandIn, StandIn], caplog: pytest.LogCaptureFixture
) -> None:
    sampler, first, second = pair
    first.end()
    assert answers(sampler) == [prompt[0] for prompt in PROMPTS]
    assert sorted(second.answered) == [prompt[0] for prompt in PROMPTS]
    assert f"{first.url}: dropped" in caplog.text
    assert KEY not in caplog.text


def test_a_dropped_server_is_asked_again_for_new_weights(
    pair: tuple[VLLMGenerator, StandIn, StandIn], tmp_path: Path
) -> None:
    sampler, first, second = pair
    engine = engine_of(sampler)
    del engine.servers[0]
    answers(sampler)
    assert not first.answered
    engine.load(PolicyFolder.read(tmp_path / "policy"), "newer")
    assert first.version == second.version == "newer"
    answers(sampler)
    assert first.answered


def test_samples_of_other_weights_are_discarded(
    pair: tuple[VLLMGenerator, StandIn, StandIn],
) -> None:
    """A server that somebody restarted samples from the weights that it was started with."""
    sampler, first, second = pair
    first.stale = True
    assert answers(sampler) == [prompt[0] for prompt in PROMPTS]
    assert first.version == second.version == "now"
    assert len(first.answered + second.answered) > len(PROMPTS)  # stale samples were drawn again


def test_a_healthy_server_that_never_answers_does_not_stop_the_work(
    pair: tuple[VLLMGenerator, StandIn, StandIn],
) -> None:
    sampler, first, _ = pair
    first.fails = 10**6
    assert answers(sampler) == [prompt[0] for prompt in PROMPTS]


def test_no_server_left_is_an_error(pair: tuple[VLLMGenerator, StandIn, StandIn]) -> None:
    sampler, first, second = pair
    for server in (first, second):
        server.end()
    with pytest.raises(UserError, match=r"no server is left|no samples after 3 tries"):
        answers(sampler)


def test_server_engine_refuses_an_address_that_is_no_url(tmp_path: Path) -> None:
    options = ServerOptions(urls=["localhost:8000"])
    with pytest.raises(UserError, match=r"server.urls: found 'localhost:8000', expected http://"):
        ServerEngine(SETTINGS, options, tmp_path / "log")


def test_server_engine_refuses_a_key_variable_that_is_not_set(tmp_path: Path) -> None:
    options = ServerOptions(urls=["http://127.0.0.1:9"], api_key_env="MISSING_KEY")
    with pytest.raises(UserError, match="MISSING_KEY is not in the environment"):
        ServerEngine(SETTINGS, options, tmp_path / "log")
