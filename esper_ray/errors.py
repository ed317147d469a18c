"""Every error a user can meet: what happened, why, and what to do about it.

Raise these for users' mistakes and for the outside world's faults. Our own invariants use ``assert``.
The command line prints them as one sentence and leaves with ``exit_code``; nothing else does.
"""

from __future__ import annotations


class EsperError(Exception):
    """A fault with a remedy.

    Args:
        what: what happened.
        why: the cause, as far as it is known.
        remedy: what the reader can do about it.
    """

    exit_code = 2

    def __init__(self, what: str, *, why: str = "", remedy: str = "") -> None:
        self.what, self.why, self.remedy = what, why, remedy
        super().__init__(" ".join(part for part in (what, why, remedy) if part))

    def __reduce__(self) -> tuple[object, ...]:
        # Exceptions cross process borders; keyword arguments would be lost by the default pickling.
        return _rebuild, (type(self), self.what, self.why, self.remedy)


def _rebuild(kind: type[EsperError], what: str, why: str, remedy: str) -> EsperError:
    return kind(what, why=why, remedy=remedy)


class ConfigError(EsperError):
    """A key or value of the configuration is unknown or out of bounds."""


class DataError(EsperError):
    """A data set's file is missing, cut off, or holds something else."""


class HostError(EsperError):
    """A model cannot be grown as it was given: its slots, its shapes, its size, or the function that made it."""


class EnvironmentFault(EsperError):
    """The machine lacks something: a port, a permission, memory, a version, a server."""


class StorageFault(EnvironmentFault):
    """A file, a folder or a journal cannot be written: no space, no permission."""


class ContractError(EsperError):
    """Bytes that are no valid message. ``reason`` is one word, counted by Nissa."""

    reason = "malformed"


class WrongVersion(ContractError):
    """The message carries no version or another one than ours."""

    reason = "wrong_version"


class WrongSchema(ContractError):
    """The peer was built from another schema."""

    reason = "wrong_schema"


class WrongType(ContractError):
    """A message carries another payload than its type says, or than its receiver takes."""

    reason = "wrong_type"


class MessageTooLarge(ContractError):
    """A message exceeds its size limit; the text lists the fields' sizes."""

    reason = "too_large"


class AuthenticityError(ContractError):
    """A signature, key, nonce or time stamp was refused. ``reason`` says which."""

    def __init__(self, what: str, *, why: str = "", remedy: str = "", reason: str = "invalid_signature") -> None:
        super().__init__(what, why=why, remedy=remedy)
        self.reason = reason

    def __reduce__(self) -> tuple[object, ...]:
        return _rebuild_authenticity, (self.what, self.why, self.remedy, self.reason)


def _rebuild_authenticity(what: str, why: str, remedy: str, reason: str) -> AuthenticityError:
    return AuthenticityError(what, why=why, remedy=remedy, reason=reason)


class BusError(EsperError):
    """The bus could not be reached or refused a message."""


class BlueprintError(EsperError):
    """A blueprint does not exist, does not fit the slot, or is not approved."""


class KernelError(EsperError):
    """A kernel could not be built, checked or fetched."""


class CorruptArtifact(KernelError):
    """Stored bytes do not match their digest."""


class KernelMissing(KernelError):
    """The store has no such kernel (yet)."""


class StoreUnavailable(KernelError):
    """The store cannot read or write its disk, or its breaker is open after repeated failures."""


class LifecycleError(EsperError):
    """A transition that the lifecycle table does not have."""


class CheckpointError(EsperError):
    """A checkpoint is missing, damaged, or belongs to something else."""


class RunError(EsperError):
    """A run cannot be started, found, stopped or resumed."""


class EnvironmentRefused(EsperError):
    """An environment to learn in does not exist, has unsupported spaces, or gave values that are no numbers."""


class ReplayError(EsperError):
    """The replay cannot give or take what was asked for."""


class PolicyRefused(EsperError):
    """A policy may not decide. ``reason`` is one of missing, damaged, foreign, not_finite, illegal, not_validated."""

    def __init__(self, what: str, *, why: str = "", remedy: str = "", reason: str = "damaged") -> None:
        super().__init__(what, why=why, remedy=remedy)
        self.reason = reason

    def __reduce__(self) -> tuple[object, ...]:
        return _rebuild_refusal, (self.what, self.why, self.remedy, self.reason)


def _rebuild_refusal(what: str, why: str, remedy: str, reason: str) -> PolicyRefused:
    return PolicyRefused(what, why=why, remedy=remedy, reason=reason)
