"""Policies as artifacts: ``policies/<id>/policy.safetensors`` with ``policy.json`` beside it. No pickle.

The id is the beginning of a digest over weights and network: the same policy has the same id wherever it is made, and
an altered one is noticed when it is loaded.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

from esper_ray.errors import PolicyRefused
from esper_ray.reliability import atomic
from esper_ray.reliability.ids import digest
from esper_ray.tamiyo.graph import FEATURES_DIGEST
from esper_ray.tamiyo.policy import GraphPolicy, GraphPolicyConfig
from esper_ray.tamiyo.seat import POLICIES

FORMAT = 1
_CARD, _WEIGHTS = "policy.json", "policy.safetensors"
_PREFIX = "policy-"


@dataclass(frozen=True, slots=True)
class Metadata:
    """What stands beside the weights.

    Attributes:
        digest: of weights and network.
        parent_id: of the policy it was learned from; empty if it began with random weights.
        training: how it was learned, for people.
    """

    policy_id: str
    digest: str
    parent_id: str
    created_at: str
    network: Mapping[str, Any]
    features: str
    training: Mapping[str, Any] = field(default_factory=dict)


def save(home: Path, policy: GraphPolicy, *, parent_id: str = "", training: Mapping[str, Any] | None = None) -> str:
    """Keep a policy; returns its id. The same weights again change nothing but its card.

    Raises:
        PolicyRefused: a weight is not finite.
    """
    _demand_finite("The policy", policy.state_dict())
    weights = safetensors.torch.save({name: tensor.contiguous() for name, tensor in policy.state_dict().items()})
    network = asdict(policy.config)
    whole = _digest(weights, network)
    policy_id = _PREFIX + whole[:12]
    folder = atomic.make_folder(home / POLICIES / policy_id)
    atomic.write_bytes(folder / _WEIGHTS, weights)
    card = {
        "format": FORMAT,
        "policy_id": policy_id,
        "digest": whole,
        "parent_id": parent_id,
        "created_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "network": network,
        "features": FEATURES_DIGEST,
        "training": dict(training or {}),
        "versions": {"torch": torch.__version__},
    }
    atomic.write_text(folder / _CARD, json.dumps(card, indent=1))
    return policy_id


def load(home: Path, policy_id: str) -> tuple[GraphPolicy, Metadata]:
    """The policy of that id, checked: in evaluation mode, and what stands beside it.

    Raises:
        PolicyRefused: it is missing, damaged, foreign (another format, other features, another network), or not finite;
            ``reason`` says which.
    """
    if not re.fullmatch(r"[\w-]+", policy_id):
        raise _refusal(repr(policy_id), "missing", "That is no policy's id.", "See `esper policy list`.")
    folder = home / POLICIES / policy_id
    card, weights = _read(folder, policy_id)
    if card["format"] != FORMAT or card["features"] != FEATURES_DIGEST:
        raise _refusal(
            policy_id,
            "foreign",
            "It was learned on other features than Tamiyo sees, or by another version.",
            "Train it again with this version.",
        )
    if _digest(weights, card["network"]) != card["digest"] or not policy_id.endswith(card["digest"][:12]):
        raise _refusal(
            policy_id, "damaged", "Its digest differs from that of its card.", "Restore it, or train it again."
        )
    try:
        tensors = safetensors.torch.load(weights)
        policy = GraphPolicy(GraphPolicyConfig(**card["network"]))
        policy.load_state_dict(tensors)
    except Exception as error:
        # safetensors, the network's own checks and torch each have errors of their own for what does not fit.
        why = " ".join(str(error).split())[:200]
        raise _refusal(policy_id, "foreign", f"Its weights are not those of this network: {why}.", "") from None
    _demand_finite(policy_id, tensors)
    policy.eval()
    told = {name: card.get(name, "") for name in ("parent_id", "created_at")}
    return policy, Metadata(
        policy_id=policy_id,
        digest=card["digest"],
        network=card["network"],
        features=card["features"],
        training=card.get("training", {}),
        **told,
    )


def _read(folder: Path, policy_id: str) -> tuple[dict[str, Any], bytes]:
    if not (folder / _CARD).exists():
        raise _refusal(policy_id, "missing", f"There is no {folder / _CARD}.", "See `esper policy list`.")
    try:
        card = json.loads((folder / _CARD).read_text())
        needed = {"format", "digest", "network", "features"}
        if not isinstance(card, dict) or needed - card.keys():
            raise ValueError(f"its card lacks {', '.join(sorted(needed))}")
        return card, (folder / _WEIGHTS).read_bytes()
    except (OSError, ValueError) as error:
        raise _refusal(policy_id, "damaged", f"It cannot be read: {error}.", "Restore it, or train it again.") from None


def _digest(weights: bytes, network: Mapping[str, Any]) -> str:
    return digest(weights + json.dumps(network, sort_keys=True).encode() + FEATURES_DIGEST.encode())


def _demand_finite(what: str, tensors: Mapping[str, torch.Tensor]) -> None:
    for name, tensor in tensors.items():
        if not math.isfinite(float(tensor.double().abs().sum())):
            raise _refusal(what, "not_finite", f"The weights {name} are not all finite numbers.", "Train it again.")


def _refusal(policy_id: str, reason: str, why: str, remedy: str) -> PolicyRefused:
    return PolicyRefused(f"{policy_id} was refused.", why=why, remedy=remedy, reason=reason)
