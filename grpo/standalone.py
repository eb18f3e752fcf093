"""Responses from an engine in a process of its own, without Ray: for the tools, which have one model at a time.

    tool ──EngineSpec──────> process: make_engine
         <──── ready ────
         ──prompts, part───> reseed, add, step while there is work; then wait for the next ones
         <──── Completions as they finish ────
         ──end of the pipe──> end

The process ends with the tool, however that ends, and gives its memory back before the next model needs it. What libraries
say in it is kept out of the tool's output, and shown where it dies or hangs.
"""

import multiprocessing
import os
import signal
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait

import psutil
import torch

from grpo.errors import ActorError, DeviceMemoryError, UserError
from grpo.inference import EngineSpec, Request, Sampling, engine_environment, make_engine
from grpo.rollout import Completions

END_S = 5.0  # in which a process that has no more to do ends by itself


@dataclass(frozen=True)
class Part:
    """One pass over the prompts; what it samples depends on its seed and the prompts alone."""

    sampling: Sampling
    seed: int


class RunningEngine:
    """The tool's end of the process; `started` gives one."""

    def __init__(self, model: str, process: multiprocessing.Process, connection: Connection, timeout_s: float) -> None:
        self.model, self.process, self.connection, self.timeout_s = model, process, connection, timeout_s

    def sample(self, prompts: list[list[int]], part: Part) -> Completions:
        """The responses to `prompts`, in their order, K together; raises ActorError as `started` does."""
        with suppress(BrokenPipeError, ConnectionResetError):  # it has died, which `receive` says
            self.connection.send((prompts, part))
        finished, missing = [], len(prompts) * part.sampling.num_responses
        while missing:
            finished.append(self.receive(f"sampling responses to {len(prompts)} prompts", self.timeout_s, "ray.timeout_s"))
            missing -= len(finished[-1])
        return Completions.concatenate(finished).in_request_order()

    def receive(self, doing: str, timeout_s: float, key: str) -> Completions | None:
        """The process's next message; `key` is the setting that holds `timeout_s`."""
        if not self.connection.poll(timeout_s):
            raise ActorError(
                f"the engine of {self.model} did not answer within {timeout_s:g} s while {doing}; if that is no hang, "
                f"raise {key}"
            )
        try:
            message = self.connection.recv()
        except (EOFError, ConnectionResetError):
            self.process.join(1.0)
            raise ActorError(
                f"the engine of {self.model} died while {doing}, with exit code {self.process.exitcode}"
            ) from None
        if isinstance(message, UserError):
            raise message
        return message


@contextmanager
def started(spec: EngineSpec, start_timeout_s: float, timeout_s: float) -> Iterator[RunningEngine]:
    """An engine that is up, and is ended afterwards.

    Raises ActorError where it dies, is not up within `start_timeout_s` seconds, or finishes no response for `timeout_s`
    seconds.
    """
    with tempfile.NamedTemporaryFile(prefix="grpo-engine-") as said:
        try:
            with _started(spec, said.name, start_timeout_s, timeout_s) as engine:
                yield engine
        except ActorError:
            sys.stderr.write(said.read().decode(errors="replace"))
            raise


@contextmanager
def _started(spec: EngineSpec, output: str, start_timeout_s: float, timeout_s: float) -> Iterator[RunningEngine]:
    """The same; what the process writes goes to the file `output`."""
    context = multiprocessing.get_context("spawn")
    connection, other = context.Pipe()
    process = context.Process(target=_serve, args=(other, spec, output), name="engine")
    # vLLM's warnings are for every start alike.
    with _environment(engine_environment(spec) | {"VLLM_LOGGING_LEVEL": "ERROR"}), _blocked(signal.SIGINT):
        process.start()
    other.close()
    try:
        engine = RunningEngine(spec.model, process, connection, timeout_s)
        engine.receive("starting", start_timeout_s, "ray.start_timeout_s")
        yield engine
        connection.close()  # which it takes as the end, and gives back what a kill would leave behind
        process.join(END_S)
    finally:
        with suppress(psutil.NoSuchProcess):  # it may end by itself meanwhile
            for child in psutil.Process(process.pid).children(recursive=True):  # of an engine on several GPUs
                child.kill()
        process.kill()
        process.join()
        connection.close()


@contextmanager
def _blocked(number: signal.Signals) -> Iterator[None]:
    """Hold a signal back here, and for good in what is started meanwhile: Ctrl-C is the tool's while an engine imports."""
    resource_tracker.ensure_running()  # whose own start would let it through
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {number})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def sample(
    spec: EngineSpec, prompts: list[list[int]], parts: list[Part], start_timeout_s: float, timeout_s: float
) -> list[Completions]:
    """For each part the responses to `prompts`, of an engine that is started for them; ActorError as `started` has it."""
    with started(spec, start_timeout_s, timeout_s) as engine:
        return [engine.sample(prompts, part) for part in parts]


@contextmanager
def _environment(variables: dict[str, str]) -> Iterator[None]:
    """Have what starts meanwhile see `variables`: libraries read them while they are imported."""
    before = dict(os.environ)
    os.environ.update(variables)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def _serve(connection: Connection, spec: EngineSpec, output: str) -> None:
    """The process's life."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the tool's, which ends its engine
    file = os.open(output, os.O_WRONLY | os.O_APPEND)
    for stream in (1, 2):  # of this process and those that it starts, libraries in C too
        os.dup2(file, stream)
    threading.Thread(target=_end_with_the_tool, daemon=True).start()
    try:
        engine = make_engine(spec)
        connection.send(None)
        while True:
            try:
                prompts, part = connection.recv()
            except EOFError:  # the tool has no more to ask
                return
            engine.reseed(part.seed)
            for i, prompt in enumerate(prompts):
                engine.add(Request(i, prompt, part.sampling))
            while engine.has_work():
                finished = engine.step()
                if finished is not None:
                    connection.send(finished)
    except UserError as error:
        connection.send(error)
    except torch.OutOfMemoryError as error:
        connection.send(DeviceMemoryError.of(f"the engine of {spec.model}", "starting or sampling", error))


def _end_with_the_tool() -> None:
    wait([multiprocessing.parent_process().sentinel])
    os._exit(1)
