"""GAE, V-trace, PPO's and IMPALA's losses against loops in float64 that are written out step by step."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from esper_ray.simic.flat import Adam, FlatParameters
from esper_ray.simic.gae import gae
from esper_ray.simic.impala import impala_loss
from esper_ray.simic.ppo import normalised, ppo_loss
from esper_ray.simic.vtrace import vtrace

CASES = 2000


def draw(rng: np.random.Generator) -> dict[str, np.ndarray]:
    """A random batch [T, B] with ends of both kinds, also at the same step and in the last one."""
    shape = (int(rng.integers(1, 9)), int(rng.integers(1, 4)))
    end = float(rng.choice([0.0, 0.2, 0.6]))
    return {
        "rewards": rng.normal(size=shape) * rng.choice([0.1, 1.0, 10.0]),
        "values": rng.normal(size=shape),
        "next_values": rng.normal(size=shape),
        "terminated": rng.random(shape) < end,
        "truncated": rng.random(shape) < end,
        "log_rhos": rng.normal(size=shape),
        "gamma": float(rng.choice([0.0, 0.9, 0.99, 1.0])),
        "lambda_": float(rng.choice([0.0, 0.5, 0.95, 1.0])),
        "rho_bar": float(rng.choice([0.5, 1.0, 2.0])),
        "c_bar": float(rng.choice([0.5, 1.0])),
    }


def tensors(case: dict[str, np.ndarray], *names: str) -> list[Tensor]:
    return [torch.from_numpy(case[name]) for name in names]


def test_gae_is_the_discounted_sum_of_td_errors_within_each_episode() -> None:
    rng = np.random.default_rng(0)
    for _ in range(CASES):
        case = draw(rng)
        found = gae(
            *tensors(case, "rewards", "values", "next_values", "terminated", "truncated"),
            gamma=case["gamma"],
            lambda_=case["lambda_"],
        )
        steps, envs = case["rewards"].shape
        for env in range(envs):
            for start in range(steps):
                expected, factor = 0.0, 1.0
                for t in range(start, steps):
                    after = 0.0 if case["terminated"][t, env] else case["next_values"][t, env]
                    delta = case["rewards"][t, env] + case["gamma"] * after - case["values"][t, env]
                    expected += factor * delta
                    factor *= case["gamma"] * case["lambda_"]
                    if case["terminated"][t, env] or case["truncated"][t, env]:
                        break
                assert found.advantages[start, env].item() == pytest.approx(expected, abs=1e-6)
                assert found.returns[start, env].item() == pytest.approx(
                    expected + case["values"][start, env], abs=1e-6
                )


def reference_vtrace(case: dict[str, np.ndarray], env: int) -> tuple[list[float], list[float]]:
    """Equation 1 as it stands in the paper: a sum over s of gamma^(s-t) (product of c) delta_s V."""
    steps = len(case["rewards"])
    rho = [min(case["rho_bar"], math.exp(case["log_rhos"][t, env])) for t in range(steps)]
    c = [case["lambda_"] * min(case["c_bar"], math.exp(case["log_rhos"][t, env])) for t in range(steps)]
    after = [0.0 if case["terminated"][t, env] else case["next_values"][t, env] for t in range(steps)]
    ends = [bool(case["terminated"][t, env] or case["truncated"][t, env]) for t in range(steps)]
    vs, advantages = [], []
    for start in range(steps):
        target, product = case["values"][start, env], 1.0
        for s in range(start, steps):
            delta = rho[s] * (case["rewards"][s, env] + case["gamma"] * after[s] - case["values"][s, env])
            target += product * delta
            product *= case["gamma"] * c[s]
            if ends[s]:
                break
        vs.append(target)
    for t in range(steps):
        follows = after[t] if ends[t] or t == steps - 1 else vs[t + 1]
        advantages.append(rho[t] * (case["rewards"][t, env] + case["gamma"] * follows - case["values"][t, env]))
    return vs, advantages


def test_vtrace_is_equation_1_of_the_paper() -> None:
    rng = np.random.default_rng(1)
    for _ in range(CASES):
        case = draw(rng)
        found = vtrace(
            *tensors(case, "log_rhos", "rewards", "values", "next_values", "terminated", "truncated"),
            gamma=case["gamma"],
            rho_bar=case["rho_bar"],
            c_bar=case["c_bar"],
            lambda_=case["lambda_"],
        )
        for env in range(case["rewards"].shape[1]):
            vs, advantages = reference_vtrace(case, env)
            assert found.vs[:, env].tolist() == pytest.approx(vs, abs=1e-6)
            assert found.advantages[:, env].tolist() == pytest.approx(advantages, abs=1e-6)


def test_vtrace_on_policy_is_the_n_step_return() -> None:
    rng = np.random.default_rng(2)
    case = draw(rng) | {"rewards": rng.normal(size=(6, 2)), "values": rng.normal(size=(6, 2))}
    case |= {"next_values": np.vstack([case["values"][1:], rng.normal(size=(1, 2))])}
    nothing = torch.zeros(6, 2, dtype=torch.bool)
    found = vtrace(torch.zeros(6, 2), *tensors(case, "rewards", "values", "next_values"), nothing, nothing, gamma=0.9)
    expected = sum(0.9**t * case["rewards"][t] for t in range(6)) + 0.9**6 * case["next_values"][-1]
    assert found.vs[0].numpy() == pytest.approx(expected, abs=1e-6)


def test_what_comes_after_an_end_changes_nothing_before_it() -> None:
    rng = np.random.default_rng(3)
    names = ("rewards", "values", "next_values", "terminated", "truncated")
    for kind in ("terminated", "truncated"):
        case = {name: rng.normal(size=(6, 1)) for name in names[:3]}
        case |= {name: np.zeros((6, 1), np.bool_) for name in names[3:]}
        case[kind][2] = True
        other = {name: array.copy() for name, array in case.items()}
        other["rewards"][3:], other["values"][3:] = 100.0, -100.0
        for one, two in zip(
            gae(*tensors(case, *names), gamma=0.99, lambda_=0.95),
            gae(*tensors(other, *names), gamma=0.99, lambda_=0.95),
            strict=True,
        ):
            assert torch.equal(one[:3], two[:3])
        rhos = torch.zeros(6, 1, dtype=torch.float64)
        for one, two in zip(
            vtrace(rhos, *tensors(case, *names), gamma=0.99),
            vtrace(rhos, *tensors(other, *names), gamma=0.99),
            strict=True,
        ):
            assert torch.equal(one[:3], two[:3])


def test_ppo_loss_is_the_papers_clipped_objective() -> None:
    rng = np.random.default_rng(4)
    for _ in range(CASES):
        n, clip = int(rng.integers(1, 12)), float(rng.choice([0.1, 0.2, 0.3]))
        logp, old = rng.normal(size=n), rng.normal(size=n)
        advantages, values, returns, entropy = (rng.normal(size=n) for _ in range(4))
        found = ppo_loss(
            torch.from_numpy(logp),
            torch.from_numpy(values),
            torch.from_numpy(entropy),
            behaviour_log_probs=torch.from_numpy(old),
            advantages=torch.from_numpy(advantages),
            returns=torch.from_numpy(returns),
            clip=clip,
            value_weight=0.5,
            entropy_weight=0.01,
        )
        policy = value = kl = 0.0
        for i in range(n):
            ratio = math.exp(logp[i] - old[i])
            policy -= min(ratio * advantages[i], max(1 - clip, min(1 + clip, ratio)) * advantages[i]) / n
            value += 0.5 * (values[i] - returns[i]) ** 2 / n
            kl += (ratio - 1 - (logp[i] - old[i])) / n
        assert found.policy.item() == pytest.approx(policy, abs=1e-6)
        assert found.value.item() == pytest.approx(value, abs=1e-6)
        assert found.approx_kl.item() == pytest.approx(kl, abs=1e-6)
        assert found.total.item() == pytest.approx(policy + 0.5 * value - 0.01 * entropy.mean(), abs=1e-6)


def test_a_ratio_beyond_the_clip_in_the_advantages_direction_has_no_gradient() -> None:
    for advantage, log_ratio, flows in ((1.0, 0.5, False), (1.0, -0.5, True), (-1.0, -0.5, False), (-1.0, 0.5, True)):
        logp = torch.tensor([log_ratio], requires_grad=True)
        zero = torch.zeros(1)
        ppo_loss(
            logp,
            zero,
            zero,
            behaviour_log_probs=zero,
            advantages=torch.tensor([advantage]),
            returns=zero,
            clip=0.2,
            value_weight=0.5,
            entropy_weight=0.0,
        ).total.backward()
        assert (logp.grad is not None and logp.grad.item() != 0.0) is flows


def test_normalised_advantages_have_mean_0_and_deviation_1_and_equal_ones_are_0() -> None:
    found = normalised(torch.randn(64, generator=torch.Generator().manual_seed(0)) * 7 + 3)
    assert found.mean().item() == pytest.approx(0.0, abs=1e-5)
    assert found.std(correction=0).item() == pytest.approx(1.0, abs=1e-5)
    assert torch.equal(normalised(torch.full((1,), 5.0)), torch.zeros(1))


def test_impala_loss_is_the_mean_over_valid_steps_of_its_three_terms() -> None:
    rng = np.random.default_rng(5)
    for _ in range(CASES // 4):
        case = draw(rng)
        steps, envs = case["rewards"].shape
        logp, entropy = rng.normal(size=(steps, envs)), rng.normal(size=(steps, envs))
        valid = rng.random((steps, envs)) < 0.8
        weights, normalise = rng.random(envs) + 0.1, bool(rng.random() < 0.5)
        found = impala_loss(
            torch.from_numpy(logp),
            *tensors(case, "values", "next_values"),
            torch.from_numpy(entropy),
            behaviour_log_probs=torch.from_numpy(logp - case["log_rhos"]),
            **{name: torch.from_numpy(case[name]) for name in ("rewards", "terminated", "truncated")},
            valid=torch.from_numpy(valid),
            gamma=case["gamma"],
            rho_bar=case["rho_bar"],
            c_bar=case["c_bar"],
            lambda_=case["lambda_"],
            value_weight=0.5,
            entropy_weight=0.01,
            normalise=normalise,
            weights=torch.from_numpy(weights),
        )
        expected, count = 0.0, max(1, int(valid.sum()))
        targets = [reference_vtrace(case, env) for env in range(envs)]
        there = [targets[env][1][t] for env in range(envs) for t in range(steps) if valid[t, env]]
        mean, deviation = (np.mean(there), np.std(there) + 1e-8) if normalise and there else (0.0, 1.0)
        for env in range(envs):
            vs, advantages = targets[env]
            for t in range(steps):
                if valid[t, env]:
                    term = (
                        -logp[t, env] * (advantages[t] - mean) / deviation
                        + 0.25 * (vs[t] - case["values"][t, env]) ** 2
                    )
                    expected += weights[env] * (term - 0.01 * entropy[t, env]) / count
        assert found.total.item() == pytest.approx(expected, abs=1e-6)


def test_impala_takes_no_gradient_through_its_targets() -> None:
    shape = (4, 2)
    values = torch.randn(shape, requires_grad=True)
    logp = torch.randn(shape, requires_grad=True)
    no = torch.zeros(shape, dtype=torch.bool)
    loss = impala_loss(
        logp,
        values,
        torch.randn(shape),
        torch.zeros(shape),
        behaviour_log_probs=torch.randn(shape),
        rewards=torch.randn(shape),
        terminated=no,
        truncated=no,
        valid=~no,
        gamma=0.99,
        rho_bar=1.0,
        c_bar=1.0,
        lambda_=1.0,
        value_weight=0.0,
        entropy_weight=0.0,
    )
    loss.total.backward()
    assert values.grad is None or not values.grad.any()
    assert logp.grad is not None
    assert logp.grad.any()


def test_adam_takes_pytorchs_steps_and_clips_as_pytorch_does() -> None:
    def network() -> torch.nn.Module:
        torch.manual_seed(0)
        return torch.nn.Sequential(torch.nn.Linear(3, 5), torch.nn.Tanh(), torch.nn.Linear(5, 1)).double()

    ours, theirs = network(), network()
    flat = FlatParameters(list(ours.parameters()))
    adam = Adam(flat, rate=1e-2)
    peer = torch.optim.Adam(theirs.parameters(), lr=1e-2, eps=1e-5)
    for step in range(50):
        x = torch.randn(8, 3, generator=torch.Generator().manual_seed(step), dtype=torch.float64)
        flat.zero_grad()
        ours(x).square().sum().backward()
        norm = flat.clip(0.5)
        adam.step()
        peer.zero_grad()
        theirs(x).square().sum().backward()
        expected = torch.nn.utils.clip_grad_norm_(theirs.parameters(), 0.5)
        peer.step()
        assert norm.item() == pytest.approx(expected.item(), rel=1e-9)
    for one, two in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.allclose(one, two, atol=1e-9)
