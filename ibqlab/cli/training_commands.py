"""`ibqlab train` and `ibqlab plan`: what a recipe makes, and what it would cost."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import click

from ibqlab.cli.run_commands import report_on
from ibqlab.cli.terminal import PLUGIN, WHERE, is_first_process, say, say_loading, sigterm_as_ctrl_c

if TYPE_CHECKING:
    from ibqlab.costs.run_cost import RunCost
    from ibqlab.costs.time_and_price import TrainingSpeed, TrainingTime


@click.command()
@click.argument("recipe")
@click.argument("settings", nargs=-1, metavar="[KEY=VALUE]...")
@click.option("--output", default="", help=f"Run folder; by default <recipe>-<settings' hash>. {WHERE}")
@click.option("--accept-changed-data", is_flag=True, help="Continue a run whose images have changed since it began.")
@click.option("--report/--no-report", "reporting", default=True, help="Draw the run's figures and report at the end.")
@PLUGIN
def train(
    recipe: str,
    settings: Sequence[str],
    *,
    output: str,
    accept_changed_data: bool,
    reporting: bool,
    plugins: Sequence[str],
) -> None:
    """Train RECIPE, a path or a name under experiments/, with some of its keys replaced: a tokenizer or a generator.

    Keys are dotted: tokenizer.quantizer.codebook_size=4096. An interrupted run is continued; a finished one is left
    as it is. Several processes: torchrun --nproc-per-node N -m ibqlab train RECIPE processes=N
    """
    say_loading(f"train {recipe}")
    first = is_first_process()
    from ibqlab.config import content_hash
    from ibqlab.pretrained.start_settings import recipe_config
    from ibqlab.recipes.recipe_files import find_recipe
    from ibqlab.runs.finding import output_folder
    from ibqlab.training import TrainConfig, train_generator
    from ibqlab.training import train as train_tokenizer
    from ibqlab.training.plugin_check import warn_of_broken_rules

    config = recipe_config(recipe, assignments=settings, plugins=plugins)
    kind = train_tokenizer if isinstance(config, TrainConfig) else train_generator
    folder = output_folder(output, default=f"{find_recipe(recipe).stem}-{content_hash(config)}")
    if first:
        warn_of_broken_rules([config])
    try:
        with sigterm_as_ctrl_c():
            run = kind(config, folder, accept_changed_data=accept_changed_data)
    except KeyboardInterrupt:
        if first and reporting:
            report_on(folder)
        raise
    if not first:
        return
    say(f"{run.status}: {run.path}; look at it with: ibqlab show {run.path}")
    if reporting:
        report_on(run.path)


@click.command()
@click.argument("recipe")
@click.argument("settings", nargs=-1, metavar="[KEY=VALUE]...")
@click.option("--images-per-second", type=float, help="Measured training speed of one GPU.")
@click.option("--gpus", type=int, help="GPUs that work together; by default the recipe's processes.")
@click.option("--gpu-hour-price", type=float, help="Price of one GPU for an hour, in any currency.")
@PLUGIN
def plan(
    recipe: str,
    settings: Sequence[str],
    *,
    images_per_second: float | None,
    gpus: int | None,
    gpu_hour_price: float | None,
    plugins: Sequence[str],
) -> None:
    """What RECIPE would cost: parameters, operations, memory, steps, disk; GPU-hours and price.

    RECIPE is a path or a name under experiments/, or a folder of recipes, such as imagenet: one row each. Nothing is
    trained; neither data nor weight files nor a GPU are needed. Without --images-per-second, hours follow from the
    speeds measured under experiments/results/training_step, of the recipe or of the nearest one by operations; where
    there are none, --gpus gives the hours that no GPU can beat.
    """
    from ibqlab.costs.run_cost import count_recipe
    from ibqlab.costs.time_and_price import TrainingSpeed, training_time
    from ibqlab.recipes.recipe_files import find_recipes

    plans = [count_recipe(str(file), settings, plugins) for file in find_recipes(recipe)]
    if images_per_second is not None:
        speeds = {p.name: TrainingSpeed(images_per_second=images_per_second, origin="as given") for p in plans}
    else:
        speeds = _known_speeds(plans, bool(settings), bounded=gpus is not None or gpu_hour_price is not None)
    costs = {p.name: training_time(p, speeds[p.name].images_per_second, gpus, gpu_hour_price) for p in plans if speeds}
    if len(plans) == 1:
        name = plans[0].name
        say(plans[0].describe())
        say(f"{costs[name].describe()} ({_origin_text(speeds[name])})" if costs else _how_to_measure(plans[0]))
    else:
        # A folder may hold recipes of both kinds.
        networks = dict.fromkeys(plan.network for plan in plans)
        say("\n\n".join(_plan_rows([p for p in plans if p.network == network], costs, speeds) for network in networks))
        if not costs:
            say(_how_to_measure(plans[0]))
    if any(speed.is_bound for speed in speeds.values()):
        say(
            "at least: no speed was measured on a GPU; hours are those of the operations alone at the data sheet's "
            "989 × 10¹² per second (H100, H200), which no step reaches. Measure with "
            "experiments/benchmarks/training_speed.py, or give --images-per-second"
        )


def _known_speeds(plans: "Sequence[RunCost]", changed: bool, bounded: bool) -> "dict[str, TrainingSpeed]":
    """Recipe → measured speed, its own or scaled from the nearest recipe's, or the bound where nothing was measured.

    Args:
        plans: costs of the recipes.
        changed: whether settings were changed, so that a recipe's own measured speed is another network's.
        bounded: whether bounds will do. False: empty where a recipe has no measured speed.
    Raises:
        ConfigError: a recipe for CPUs, whose speed nothing bounds, where bounds were asked for.
    """
    from ibqlab.config import ConfigError
    from ibqlab.costs.run_cost import count_recipe
    from ibqlab.costs.time_and_price import measured_speeds, speed_of
    from ibqlab.recipes.recipe_files import EXPERIMENTS

    speeds = measured_speeds()
    for plan in plans:
        if plan.accelerator == "cpu" and (changed or plan.name not in speeds):
            if not bounded:
                return {}
            raise ConfigError(
                f"{plan.name} trains on CPUs, for which no speed is known: add --images-per-second, measured there"
            )
    own = {} if changed else {plan.name: speeds[plan.name] for plan in plans if plan.name in speeds}
    if len(own) == len(plans):
        return own
    # A recipe that was measured may be the nearest one to a recipe that was not.
    files = [EXPERIMENTS / f"{name}.yaml" for name in speeds]
    measured = [count_recipe(str(file)) for file in files if file.is_file()]
    known = {plan.name: own.get(plan.name) or speed_of(plan, speeds, measured) for plan in plans}
    return known if bounded or not any(speed.is_bound for speed in known.values()) else {}


def _origin_text(speed: "TrainingSpeed") -> str:
    """Where a speed is from, for the line behind a single recipe's hours."""
    return "no speed was measured" if speed.is_bound else speed.origin


def _plan_rows(plans: "Sequence[RunCost]", costs: "dict[str, TrainingTime]", speeds: "dict[str, TrainingSpeed]") -> str:
    """Plans of one kind as a table."""
    from ibqlab.costs.run_cost import cost_table

    table = cost_table(plans)
    for column in ("gpu_hours", "days", "price") if costs else ():
        table[column] = [getattr(costs[plan.name], column) for plan in plans]
    if speeds:
        table["hours are"] = [speeds[plan.name].origin for plan in plans]
    rows = table.dropna(axis="columns", how="all").astype(object).where(table.notna(), "–")
    rows = rows.rename(
        columns={name: f"paper's {name}" for name in ("rfid", "lpips", "usage", "gfid", "inception_score")}
    )
    return rows.to_string(index=False, float_format=lambda value: f"{value:,.4g}")


def _how_to_measure(plan: "RunCost") -> str:
    """No speed is assumed: the line that stands in its place."""
    return (
        "time: measure a speed on the GPU that will be used and give it as --images-per-second; "
        f"`ibqlab train {plan.name} steps=200 processes=1 batch_size={plan.images_at_once}` prints images/s"
    )
