"""The school's door: trains, evaluates and learns offline, as a Ray job or in a terminal.

    ray job submit --working-dir . -- python -m esper_ray.simic.job train --algo ppo --env CartPole-v1 --workers 2
    esper simic train --algo ppo --env CartPole-v1

Both are this module. Only a training with workers needs a Ray cluster.
"""

from __future__ import annotations

import contextlib
import json
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich import box
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from esper_ray import config as configuration
from esper_ray.config import Config
from esper_ray.errors import ConfigError, EnvironmentFault, EsperError
from esper_ray.reliability.ids import new_run_id

if TYPE_CHECKING:
    from esper_ray.contracts.ports import Publisher
    from esper_ray.simic.plan import TrainingPlan
    from esper_ray.simic.schooling import Schooled

MORPHOGENESIS = "esper_ray/Morphogenesis-v0"
SENDER = "school"
_LINE_SECONDS = 5.0
# The return is the gain over the host alone, without shaping: what differs between tasks is no reason for a decision.
_OWN_OPTIONS = {"illegal": "error", "against_host": True, "tasks": 96, "rewards": {"potential_weight": 0.0}}

app = typer.Typer(
    name="simic",
    help="Learn to decide: train policies, evaluate them, learn from what runs have recorded.",
    epilog=f"Tamiyo's own school is the environment {MORPHOGENESIS}; any gymnasium environment works.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
console = Console(highlight=False, soft_wrap=True)

File = Annotated[Path | None, typer.Option("--config", "-c", help="A YAML file with settings.", metavar="FILE")]
Settings = Annotated[
    list[str] | None,
    typer.Option("--set", "-s", help="One setting, such as simic.learning_rate=1e-3; may be repeated."),
]


@app.command()
def train(
    algo: Annotated[str, typer.Option(help="ppo or impala.")] = "ppo",
    env: Annotated[str, typer.Option(help="A gymnasium environment's id.")] = MORPHOGENESIS,
    steps: Annotated[int, typer.Option(min=1, help="Environment steps in all.")] = 8000,
    workers: Annotated[
        int | None, typer.Option(min=0, help="Rollout workers on Ray; 0 trains in this process.", show_default="0")
    ] = None,
    seed: Annotated[int, typer.Option(help="Names every random draw.")] = 0,
    name: Annotated[str, typer.Option(help="Of the training; its folder is school/NAME in the home folder.")] = "",
    start_from: Annotated[str, typer.Option("--from", help="A training or a policy to start from.")] = "",
    resume: Annotated[str, typer.Option(help="Go on with the training of this name.", metavar="NAME")] = "",
    device: Annotated[str, typer.Option(help="cpu; the networks are too small to gain from a GPU.")] = "cpu",
    config: File = None,
    settings: Settings = None,
) -> None:
    """Train a policy. Ctrl-C stops with a checkpoint, and --resume NAME goes on.

    Examples:

    esper simic train --algo ppo --env CartPole-v1 --steps 100000

    esper simic train --workers 2 --steps 8000

    ray job submit --working-dir . -- python -m esper_ray.simic.job train --algo ppo --workers 2
    """
    from esper_ray.simic.learner import Learner
    from esper_ray.simic.schooling import School

    _refuse_device(device)
    loaded = configuration.load(config, settings or ())
    plan = _plan_again(loaded, resume) if resume else _plan(loaded, algo, env, steps, workers, seed, name, start_from)
    interface = plan.env.interface()
    if plan.initial is not None and not resume:
        # A policy that does not fit is refused while nothing has been written yet.
        Learner(plan, interface)
    with _crew(loaded, plan) as crew, _nissa(loaded) as publisher, _Stop() as stop, _View(plan) as view:
        school = School(loaded, plan, publisher=publisher, on_progress=view.update, on_note=console.print)
        school.begin(resume=bool(resume))
        console.print(f"training {school.name}: {plan.algo} on {plan.env.id}, {plan.steps} steps, {_where(plan)}")
        schooled = school.run(crew, resume=bool(resume), should_stop=stop.asked)
    _conclude(school.folder, schooled)


def _plan(
    config: Config, algo: str, env: str, steps: int, workers: int | None, seed: int, name: str, start_from: str
) -> TrainingPlan:
    from esper_ray.simic.environments import EnvChoice
    from esper_ray.simic.plan import TrainingPlan, settings_for
    from esper_ray.simic.schooling import folder_of

    chosen = settings_for(config.simic, algo, env)
    if workers is not None:
        chosen = chosen.model_copy(update={"workers": workers})
    title = name or new_run_id(f"{algo}-{env.rpartition('/')[2].removesuffix('-v0').removesuffix('-v1').lower()}")
    options = {"folder": str(config.home / "data"), **_OWN_OPTIONS} if env == MORPHOGENESIS else {}
    return TrainingPlan(
        env=EnvChoice(env, options),
        algo=algo,  # type: ignore[arg-type]
        steps=steps,
        seed=seed,
        config=chosen,
        folder=folder_of(config.home, title),
        initial=_initial(config, start_from) if start_from else None,
    )


def _plan_again(config: Config, name: str) -> TrainingPlan:
    from esper_ray.simic.schooling import plan_of

    return plan_of(config.home, name)


def _initial(config: Config, name: str) -> Path:
    from esper_ray.simic import registry
    from esper_ray.simic.checkpoints import exists
    from esper_ray.simic.schooling import folder_of

    folder = folder_of(config.home, name)
    if exists(folder):
        return folder
    return config.home / "policies" / registry.find(config.home, name).policy_id


def _refuse_device(device: str) -> None:
    """A GPU that is asked for and not there, or would not help, is told before anything begins."""
    if device == "cpu":
        return
    import torch

    if not torch.cuda.is_available():
        raise ConfigError(f"--device {device}: torch sees no GPU here.", remedy="Leave --device out.")
    raise ConfigError(
        f"--device {device}: policies are trained on the CPU.",
        why="Their networks are so small that a step on a GPU takes longer.",
        remedy="Leave --device out; the runs that grow use the GPU by themselves.",
    )


@app.command()
def evaluate(
    who: Annotated[list[str], typer.Argument(help="Policies by id, or heuristic, random, periodic, never.")],
    episodes: Annotated[int, typer.Option(min=2, help="Held-out tasks, the same for everybody.")] = 20,
    out: Annotated[Path | None, typer.Option(help="Write the figures there as JSON.")] = None,
    config: File = None,
    settings: Settings = None,
) -> None:
    """Let several deciders play the same held-out tasks, and compare them with confidence intervals.

    The first is compared with each of the others, paired by task.

    Example: esper simic evaluate policy-3fa9c2 heuristic random never
    """
    from esper_ray.simic import comparison

    loaded = configuration.load(config, settings or ())
    with _bar("episodes", episodes * len(who)) as advance:
        table = comparison.compare(loaded, who, episodes, on_episode=advance)
    console.print(comparison.as_table(table))
    if out is not None:
        out.write_text(json.dumps(table.as_dict(), indent=1))
        console.print(f"figures {out}")


@app.command()
def imitate(
    who: Annotated[
        list[str] | None,
        typer.Argument(help="heuristic, random, periodic or never; NAME:setting=value,... with settings of tamiyo."),
    ] = None,
    episodes: Annotated[int, typer.Option(min=1, help="Training tasks that each of them plays.")] = 96,
    seed: Annotated[int, typer.Option(help="Names every random draw.")] = 0,
    config: File = None,
    settings: Settings = None,
) -> None:
    """Make a policy that decides as controllers do: a start from which `train --from POLICY` can improve.

    Of several, who did better on a task is imitated more on it.

    Examples:

    esper simic imitate heuristic

    esper simic imitate heuristic never heuristic:parameter_budget=600
    """
    import torch

    from esper_ray.simic import imitation

    torch.set_num_threads(1)
    loaded, teachers = configuration.load(config, settings or ()), who or ["heuristic"]
    with _bar("episodes", episodes * len(teachers)) as advance:
        policy_id, loss = imitation.imitate(loaded, teachers, episodes=episodes, seed=seed, on_episode=advance)
    console.print(f"imitates {' '.join(teachers)} with a loss of {loss:.3f} nats per decision")
    console.print(f"policy  {policy_id}; next: esper simic train --from {policy_id}")


@app.command()
def offline(
    start_from: Annotated[str, typer.Option("--from", help="A policy to improve; empty: a new one.")] = "",
    runs: Annotated[list[str] | None, typer.Option("--run", help="Only this run; may be repeated.")] = None,
    passes: Annotated[int, typer.Option(min=1, help="Passes over the trajectories.")] = 30,
    seed: Annotated[int, typer.Option(help="Names every random draw.")] = 0,
    config: File = None,
    settings: Settings = None,
) -> None:
    """Learn from the decisions that runs have sent over the bus; what comes out is a new policy.

    Runs that explored (tamiyo.exploration above 0, or a policy that draws) are learned from by V-trace on the recorded
    probabilities; others only by imitation.

    Example: esper run --set tamiyo.exploration=0.3, a few times, then esper simic offline
    """
    from esper_ray.simic import offline as learning

    loaded = configuration.load(config, settings or ())
    with _bar("passes", passes) as advance:
        found = learning.learn(
            loaded, start_from=start_from, runs=runs or (), passes=passes, seed=seed, on_pass=advance
        )
    console.print(
        f"learned from {found.trajectories} run(s) with {found.steps} decisions "
        f"({found.explored} explored); effective sample size {found.effective_sample_size:.1f}"
    )
    for reason, count in found.left_out.items():
        console.print(f"left out {count}: {reason}")
    console.print(f"policy  {found.policy_id}")


@app.command()
def experience(config: File = None, settings: Settings = None) -> None:
    """List what runs have recorded: what `offline` can learn from."""
    from esper_ray.simic.experience import Experience

    kept = Experience.of(configuration.load(config, settings or ()).home)
    table = Table(box=box.SIMPLE_HEAD, header_style="dim", pad_edge=False)
    for column in ("run", "decisions", "reports", "complete", "exploration", "decided by"):
        table.add_column(column)
    for run in kept.runs():
        row = kept.summary(run)
        explored = f"{row.exploration:g}" if row.exploration else "none: imitation only"
        complete = "yes" if row.complete else "no"
        table.add_row(run, str(row.decisions), str(row.reports), complete, explored, ", ".join(row.policies))
    console.print(table if table.row_count else "Nothing yet: runs record their decisions while the system is up.")


@app.command("list")
def list_trainings(config: File = None, settings: Settings = None) -> None:
    """List the trainings of this home folder, the newest first."""
    from esper_ray.simic.schooling import trainings

    table = Table(box=box.SIMPLE_HEAD, header_style="dim", pad_edge=False)
    for column in ("training", "algorithm", "environment", "steps", "state", "return", "policy"):
        table.add_column(column)
    for row in trainings(configuration.load(config, settings or ()).home):
        result = row["result"]
        tested = result.get("evaluation") or {}
        table.add_row(
            row["name"],
            row["algo"],
            row["env"],
            f"{result.get('steps', '')} of {row['steps']}",
            result.get("state", "open"),
            f"{tested['mean']:.4g}" if tested else "",
            result.get("policy_id", ""),
        )
    console.print(table if table.row_count else "There are no trainings yet: esper simic train")


# Around a training


def _where(plan: TrainingPlan) -> str:
    count = plan.config.workers
    return f"{count} worker{'s' if count > 1 else ''} on Ray" if count else "in this process"


@contextlib.contextmanager
def _crew(config: Config, plan: TrainingPlan) -> Iterator[Any]:
    """Nobody where this process does it all, else actors on the cluster that runs; they end with the training.

    Raises:
        EnvironmentFault: workers are wanted, and no cluster runs.
    """
    if not plan.config.workers:
        import torch

        torch.set_num_threads(1)
        yield None
        return
    import ray

    from esper_ray import cluster

    if not ray.is_initialized():
        address = cluster.locate(config)
        if address is None:
            raise EnvironmentFault(
                f"A training with {plan.config.workers} workers needs a Ray cluster, and none runs.",
                remedy="Start one with `esper up` or `ray start --head --port=6385`, or train with --workers 0.",
            )
        cluster.prepare(address)
        from esper_ray.actors import crew

        crew.join(config, address)
    from esper_ray.actors.simic import RayCrew

    with RayCrew(plan) as found:
        yield found


@contextlib.contextmanager
def _nissa(config: Config) -> Iterator[Publisher | None]:
    """The bus, where a system of this home is up."""
    from esper_ray.oona.bus import publisher_where_up

    with publisher_where_up(config, SENDER) as publisher:
        if publisher is None:
            console.print("no system is up in this home: progress is shown here only", style="dim")
        yield publisher


class _Stop:
    """Ctrl-C or SIGTERM: the training ends with a checkpoint after its present update; the second one breaks off."""

    def __init__(self) -> None:
        self._count = 0
        self._before: dict[int, Any] = {}

    def asked(self) -> bool:
        return self._count > 0

    def __enter__(self) -> _Stop:
        for number in (signal.SIGINT, signal.SIGTERM):
            self._before[number] = signal.signal(number, self._signalled)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _signalled(self, _: int, __: FrameType | None) -> None:
        self._count += 1
        if self._count > 1:
            raise KeyboardInterrupt
        console.print("stopping with a checkpoint; once more breaks off")


class _View:
    """A bar in a terminal; in a log, a line every few seconds."""

    def __init__(self, plan: TrainingPlan) -> None:
        self._plan, self._next = plan, 0.0
        columns = (BarColumn(24), TextColumn("{task.completed}/{task.total}"), TextColumn("{task.description}"))
        self._bar = Progress(*columns, TimeRemainingColumn(), console=console) if console.is_terminal else None
        self._task = self._bar.add_task("", total=plan.steps) if self._bar else None

    def __enter__(self) -> _View:
        if self._bar:
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar:
            self._bar.stop()

    def update(self, progress: Any) -> None:
        text = f"return {progress.mean_return:.4g}  {progress.steps_per_s:.3g} steps/s"
        if progress.evaluation is not None:
            text += f"  evaluated {progress.evaluation.mean:.4g} ± {progress.evaluation.deviation:.2g}"
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=progress.steps, description=text)
        elif time.monotonic() >= self._next or progress.evaluation is not None or progress.steps >= progress.of:
            self._next = time.monotonic() + _LINE_SECONDS
            more = f"  lag {progress.lag_mean:.1f}  dropped {progress.dropped_steps}"
            console.print(f"{progress.steps}/{progress.of}  episodes {progress.episodes}  {text}{more}")


@contextlib.contextmanager
def _bar(what: str, total: int) -> Iterator[Callable[[], None]]:
    with Progress(TextColumn(what), *Progress.get_default_columns(), console=console, transient=True) as bar:
        task = bar.add_task("", total=total)
        yield lambda: bar.advance(task)


def _conclude(folder: Path, schooled: Schooled) -> None:
    from esper_ray.simic.schooling import POLICY

    result = schooled.result
    console.print(f"{result.state} after {result.steps} steps, {result.seconds:.0f} s and {result.restarts} restarts")
    console.print(f"curve   {schooled.picture}")
    if result.state == "stopped":
        console.print(f"go on   esper simic train --resume {folder.name}")
    elif schooled.policy_id:
        console.print(f"policy  {schooled.policy_id}; next: esper policy validate {schooled.policy_id}")
    else:
        console.print(f"policy  {folder / POLICY}")


def main() -> None:
    """The entry point of ``python -m esper_ray.simic.job``: one clear sentence for what a user can mend."""
    try:
        app()
    except EsperError as error:
        console.print(f"error: {error}", style="red")
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main()
