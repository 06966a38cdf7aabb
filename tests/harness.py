"""Runs the scripts as one process or as several, as torchrun would, but forked from a server that has the
imports behind it: a run of two processes costs about a second."""

import contextlib
import importlib
import multiprocessing
import os
import runpy
import signal
import socket
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PRELOAD = (
    "common", "data", "datasets", "nano.shapes", "torch._dynamo", "torch.distributed.checkpoint",
    "torch.distributed.fsdp", "transformers.models.auto.modeling_auto",
    "transformers.models.qwen2.modeling_qwen2", "transformers.models.siglip.modeling_siglip",
    "transformers.tokenization_utils_tokenizers",
)  # fmt: skip

server = multiprocessing.get_context("forkserver")


def start_server() -> None:
    os.environ |= {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}", "OMP_NUM_THREADS": "1"}
    server.set_forkserver_preload(list(PRELOAD))


def child(script: str, flags: list[str], env: dict, log: str, patch: tuple[str, str] | None) -> None:
    """In the new process: its output goes to a file, and a patch (module, function) is called first."""
    os.chdir(ROOT)
    os.environ |= env
    with open(log, "w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    import torch

    torch.set_num_threads(1)
    sys.argv = [script, *flags]
    if patch:
        getattr(importlib.import_module(patch[0]), patch[1])()
    runpy.run_path(str(ROOT / script), run_name="__main__")


def compiled_cheaply() -> None:
    """A patch: without a C++ compiler's seconds, and said in the output."""
    import torch

    compile_ = torch.compile

    def cheaply(forward: Callable) -> Callable:
        print("compiles")
        return compile_(forward, backend="aot_eager")

    torch.compile = cheaply


class World:
    """Processes of one run. `machines` of them share the processes equally."""

    def __init__(self, logs: Path, size: int, script: str, *flags, patch: Callable | None = None, machines=1):
        with socket.socket() as probe:
            probe.bind(("localhost", 0))
            port = probe.getsockname()[1]
        name = (patch.__module__, patch.__qualname__) if patch else None
        logs.mkdir(parents=True, exist_ok=True)
        self.logs = [logs / f"{port}-{rank}.txt" for rank in range(size)]
        self.processes = []
        for rank in range(size):
            env = {}
            if size > 1:
                local = size // machines
                env = {"RANK": rank, "WORLD_SIZE": size, "MASTER_ADDR": "localhost", "MASTER_PORT": port,
                       "LOCAL_RANK": rank % local, "LOCAL_WORLD_SIZE": local}  # fmt: skip
            env = {key: str(value) for key, value in env.items()}
            args = (script, [str(flag) for flag in flags], env, str(self.logs[rank]), name)
            self.processes.append(server.Process(target=child, args=args))
            self.processes[-1].start()

    def output(self) -> str:
        return "\n".join(log.read_text() for log in self.logs if log.exists())

    def wait(self, code: int | None = 0, timeout: float = 120) -> str:
        """What was printed, once all have ended; their exit status has to be `code`, if one is given."""
        for process in self.processes:
            process.join(timeout)
        codes = [process.exitcode for process in self.processes]
        for process in self.processes:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
        assert code is None or codes == [code] * len(codes), f"{codes}\n{self.output()}"
        return self.output()

    def signal(self, number: signal.Signals, rank: int = 0) -> None:
        os.kill(self.processes[rank].pid, number)


@pytest.fixture
def world(tmp_path) -> Callable[..., World]:
    """world(2, "train_t2i.py", "--steps", 3).wait()"""
    started = []

    def start(size: int, script: str, *flags, **kwargs) -> World:
        started.append(World(tmp_path / "logs", size, script, *flags, **kwargs))
        return started[-1]

    yield start
    for each in started:
        for process in each.processes:
            if process.is_alive():
                process.kill()
