"""Runs the scripts as one process or as several, as torchrun would, but forked from a server that has the
imports behind it: a run of two processes takes about a second."""

import contextlib
import importlib
import multiprocessing
import os
import signal
import socket
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
TINY_DIT = {"width": 32, "depth": 1, "heads": 2}
TINY_IN_CONTEXT = {"depth": 2, "head": (48, 1, 2), "time_tokens": 2, "condition_tokens": 3, "base_depth": 1}
TINY_DECODER = {"width": 32, "depth": 1, "heads": 2, "mlp_width": 48}

server = multiprocessing.get_context("forkserver")


def start_server() -> None:
    os.environ |= {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}", "OMP_NUM_THREADS": "1"}
    server.set_forkserver_preload(["preload"])


def shrink(plots: bool) -> None:
    """The sizes of a laptop become those of a test: models, validation, sample grids; and no plots."""
    import common
    import rae
    import train_t2i

    rae.DITS |= {"nano": TINY_DIT | {"condition_width": 20}, "nano-guide": TINY_DIT}
    rae.DITS["nano-in-context"] = rae.DITS["nano-guide-in-context"] = TINY_DIT | TINY_IN_CONTEXT
    rae.DECODERS["nano"] = TINY_DECODER
    rae.CAPTION_TOKENS = 4  # most captions are cut
    train_t2i.GRID_STEPS, train_t2i.VAL_SAMPLES = 1, 8
    if not plots:
        common.plot_losses = lambda *_: None


def child(script: str, flags: list[str], env: dict, log: str, patch: tuple[str, str] | None, plots: bool):
    """In the new process: its output goes to a file, and a patch (module, function) is called first."""
    os.chdir(ROOT)
    os.environ |= env
    with open(log, "w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    import torch

    import common

    torch.set_num_threads(1)
    multiprocessing.set_start_method("fork", force=True)  # of data loading processes, as on Linux by default
    shrink(plots)
    sys.argv = [script, *flags]
    if patch:
        getattr(importlib.import_module(patch[0]), patch[1])()
    common.main(importlib.import_module(script.removesuffix(".py")).main)


def compiled_cheaply() -> None:
    """A patch: compiles without the seconds of a C++ compiler, and prints that it does."""
    import torch

    compile_ = torch.compile
    torch._dynamo.config.fail_on_recompile_limit_hit = True  # or blocks would run eagerly from then on

    def cheaply(forward: Callable, **_) -> Callable:
        print("compiles")
        return compile_(forward, backend="aot_eager")

    torch.compile = cheaply


class World:
    """Processes of one run, spread equally over so many `nodes`."""

    def __init__(
        self,
        logs: Path,
        size: int,
        script: str,
        *flags,
        patch: Callable | None = None,
        nodes: int = 1,
        plots: bool = False,
    ):
        with socket.socket() as probe:
            probe.bind(("localhost", 0))
            port = probe.getsockname()[1]
        name = (patch.__module__, patch.__qualname__) if patch else None
        logs.mkdir(parents=True, exist_ok=True)
        self.logs = [logs / f"{port}-{rank}.txt" for rank in range(size)]
        self.processes = []
        for rank in range(size):
            # a machine may have fewer GPUs than a test has processes
            env = {} if os.environ.get("TEST_ON_GPUS") else {"CUDA_VISIBLE_DEVICES": ""}
            if size > 1:
                local = size // nodes
                env |= {"RANK": rank, "WORLD_SIZE": size, "MASTER_ADDR": "localhost", "MASTER_PORT": port,
                       "LOCAL_RANK": rank % local, "LOCAL_WORLD_SIZE": local}  # fmt: skip
            env = {key: str(value) for key, value in env.items()}
            args = (script, [str(flag) for flag in flags], env, str(self.logs[rank]), name, plots)
            self.processes.append(server.Process(target=child, args=args))
            self.processes[-1].start()

    def output(self) -> str:
        return "\n".join(log.read_text() for log in self.logs if log.exists())

    def wait(self, code: int | None = 0, timeout: float = 300) -> str:
        """What was printed, once all have ended; their exit status has to be `code`, unless it is None."""
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
    for run in started:
        for process in run.processes:
            if process.is_alive():
                process.kill()
