"""The rooms' ports over Ray: how Tolaria's process reaches Tamiyo and Urza by name.

A handle is looked up anew after its actor was lost, so a restarted actor is found again.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from typing import Any, Generic, TypeVar

import ray
from ray.exceptions import GetTimeoutError, RayActorError, RayError, RayTaskError

from esper_ray.actors import kernel_parts
from esper_ray.actors.line import Address, Line, LineAnswer
from esper_ray.actors.shared import SharedKernel
from esper_ray.contracts.keys import KeyRing
from esper_ray.contracts.ports import Answer, Kernel, KernelSpec, RunOpening
from esper_ray.errors import AuthenticityError, EnvironmentFault, EsperError, KernelMissing, StoreUnavailable
from esper_ray.tezzeret import seal

T = TypeVar("T")
log = logging.getLogger(__name__)
_OPEN_SECONDS = 60.0
_PAUSE_SECONDS = 0.2
_LINE_SECONDS = 2.0


class ByName:
    """Calls methods of a named actor without waiting."""

    def __init__(self, name: str, namespace: str) -> None:
        self._name, self._namespace = name, namespace
        self._handle: Any = None

    def call(self, method: str, *arguments: Any) -> Any:
        """The reference of the call's result.

        Raises:
            EnvironmentFault: there is no actor of that name now.
        """
        try:
            if self._handle is None:
                self._handle = ray.get_actor(self._name, namespace=self._namespace)
            return getattr(self._handle, method).remote(*arguments)
        except (ValueError, RayActorError) as error:
            self.forget()
            raise EnvironmentFault(f"The actor {self._name} is not there.", why=str(error).splitlines()[0]) from None

    def forget(self) -> None:
        """Look the actor up anew at the next call."""
        self._handle = None

    def result(self, reference: Any, timeout: float | None) -> Any:
        """The result, or None when it is not there in time.

        Raises:
            EsperError: the actor's own, or that it was lost.
        """
        try:
            return ray.get(reference, timeout=timeout)
        except GetTimeoutError:
            return None
        except RayTaskError as error:
            cause = error.cause
            raise (
                cause
                if isinstance(cause, EsperError)
                else EnvironmentFault(f"{self._name} met a fault of its own.", why=str(error).strip().splitlines()[-1])
            ) from None
        except RayActorError as error:
            self.forget()
            raise EnvironmentFault(f"The actor {self._name} was lost.", why=str(error).splitlines()[0]) from None


class RayAnswer(Generic[T]):
    """One call that is out."""

    def __init__(self, actor: ByName, method: str, *arguments: Any) -> None:
        self._actor, self._reference = actor, actor.call(method, *arguments)

    def wait(self, timeout: float | None) -> T | None:
        answer: T | None = self._actor.result(self._reference, timeout)
        return answer


class NoAnswer(Generic[T]):
    """A call that could not be made: the fault comes where the answer is waited for."""

    def __init__(self, fault: EsperError) -> None:
        self._fault = fault

    def wait(self, timeout: float | None) -> T | None:  # noqa: ARG002
        raise self._fault


class OwnLine:
    """An actor's line, looked for without waiting and again after it broke. For one thread.

    Args:
        actor: answers `line` with its address.
        whose: its name, for the log.
    """

    def __init__(self, actor: ByName, whose: str) -> None:
        self._actor, self._whose = actor, whose
        self._line: Line | None = None
        self._sought: Any = None

    def call(self, parts: Sequence[bytes]) -> OnLine | None:
        """Send a request; None where there is no line now."""
        if self._line is None:
            self.seek(0.0)
        if self._line is not None:
            try:
                return OnLine(self, self._line, self._line.call(parts))
            except OSError:
                self.hang_up(self._line)
        return None

    def hang_up(self, line: Line) -> None:
        """That line is broken: the next calls go through Ray until there is a new one, if there is none yet."""
        line.close()
        if self._line is line:
            self._line = None

    def seek(self, timeout: float) -> None:
        """Ask for the line's address and take the line up, if the answer is there within ``timeout`` seconds."""
        try:
            if self._sought is None:
                self._sought = self._actor.call("line")
            address: Address | None = self._actor.result(self._sought, timeout)
            if address is not None:
                self._sought, self._line = None, Line(address)
        except (OSError, EsperError) as fault:
            self._sought = None
            log.info("%s is called through Ray: %s", self._whose, fault)


class OnLine:
    """An answer that comes over the line."""

    def __init__(self, owner: OwnLine, line: Line, answer: LineAnswer) -> None:
        self._owner, self._line, self._answer = owner, line, answer

    def wait(self, timeout: float | None) -> list[bytes] | None:
        try:
            return self._answer.wait(timeout)
        except EnvironmentFault:
            self._owner.hang_up(self._line)
            raise


class RemoteDecider:
    """Tamiyo in her own process: over her line where that can be reached, else through Ray."""

    def __init__(self, namespace: str) -> None:
        self._tamiyo = ByName("tamiyo", namespace)
        self._line = OwnLine(self._tamiyo, "Tamiyo")

    def open_run(self, opening: RunOpening) -> None:
        until_done(lambda: RayAnswer[bool](self._tamiyo, "open_run", opening).wait(_OPEN_SECONDS))
        self._line.seek(_OPEN_SECONDS)

    def reopen(self, opening: RunOpening) -> Answer[bool]:
        try:
            return RayAnswer(self._tamiyo, "open_run", opening)
        except EnvironmentFault as fault:
            return NoAnswer(fault)

    def decide(self, run: str, state: Sequence[bytes]) -> Answer[list[bytes]]:
        on_line = self._line.call([run.encode(), *state])
        if on_line is not None:
            return on_line
        try:
            return RayAnswer(self._tamiyo, "decide", run, list(state))
        except EnvironmentFault as fault:
            return NoAnswer(fault)

    def close_run(self, run: str) -> None:
        until_done(lambda: RayAnswer[bool](self._tamiyo, "close_run", run).wait(_OPEN_SECONDS))


class RemoteKernels:
    """Urza in its own process: a kernel that is there comes over his line where that can be reached, else through Ray.
    One that the forge has not made yet is waited for, not an error.

    Args:
        keys: whose seal a kernel must have. One without a seal, or with that of a key that is gone, is waited for too:
            the forge makes it anew.
    """

    def __init__(self, namespace: str, keys: KeyRing) -> None:
        self._urza, self._keys = ByName("urza", namespace), keys
        self._line = OwnLine(self._urza, "Urza")

    def fetch(self, spec: KernelSpec) -> KernelAnswer:
        on_line = self._line.call(kernel_parts.asked(spec))
        return KernelAnswer(self._urza, spec, self._keys, on_line)


class KernelAnswer:
    """Asks until the kernel is there; one call is out at a time.

    Args:
        on_line: what may come over the line. It says nothing but a kernel; why there is none is asked through Ray.
    """

    def __init__(self, urza: ByName, spec: KernelSpec, keys: KeyRing, on_line: OnLine | None = None) -> None:
        self._urza, self._spec, self._keys, self._on_line = urza, spec, keys, on_line
        self._line_until = time.monotonic() + _LINE_SECONDS
        self._reference: Any = None
        self._next = 0.0

    def wait(self, timeout: float | None) -> Kernel | None:
        """The kernel, or None when it is not there in time.

        Raises:
            EsperError: Urza refused for good, for a corrupt artifact say, or the kernel has a false seal.
        """
        deadline = float("inf") if timeout is None else time.monotonic() + timeout
        while True:
            kernel = self._try(max(0.0, min(1.0, deadline - time.monotonic())))
            if kernel is not None or time.monotonic() >= deadline:
                return kernel
            time.sleep(min(_PAUSE_SECONDS, max(0.0, deadline - time.monotonic())))

    def _try(self, timeout: float) -> Kernel | None:
        try:
            parts = self._from_line(timeout)
            if parts is None:
                return None
            if parts:
                kernel = kernel_parts.given(self._spec, parts)
                seal.check(kernel, self._keys)
                return kernel
            if self._reference is None:
                if time.monotonic() < self._next:
                    return None
                self._reference = self._urza.call("fetch", self._spec)
            found: Kernel | SharedKernel | None = self._urza.result(self._reference, timeout)
            if found is None:
                return None
            kernel = found.open(_OPEN_SECONDS) if isinstance(found, SharedKernel) else found
            seal.check(kernel, self._keys)
        except AuthenticityError as fault:
            if fault.reason == "invalid_signature":
                raise
            self._reference, self._next = None, time.monotonic() + _PAUSE_SECONDS
            return None
        except (KernelMissing, StoreUnavailable, EnvironmentFault, RayError):
            self._reference, self._next = None, time.monotonic() + _PAUSE_SECONDS
            return None
        return kernel

    def _from_line(self, timeout: float) -> list[bytes] | None:
        """The kernel's parts; none of them where Ray has to be asked; None as long as it may still come."""
        if self._on_line is None:
            return []
        try:
            parts = self._on_line.wait(timeout)
        except EsperError:
            parts = []
        if parts is None and time.monotonic() < self._line_until:
            return None
        self._on_line = None
        return parts or []


def until_done(call: Callable[[], T | None]) -> T:
    """Repeat an idempotent call while its actor is being restarted; returns what it gave.

    Raises:
        EnvironmentFault: it is still away after a minute.
    """
    give_up = time.monotonic() + _OPEN_SECONDS
    while True:
        try:
            answer = call()
            if answer is not None:
                return answer
            raise EnvironmentFault("An actor does not answer.", remedy="Look at `esper status`.")
        except EnvironmentFault:
            if time.monotonic() > give_up:
                raise
            time.sleep(_PAUSE_SECONDS)
