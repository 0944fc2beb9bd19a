"""The command line: run a notebook, train or plan a recipe, list runs and show one, look into checkpoints.

Everything heavy is imported by the command that needs it, so that `ibqlab --help` answers at once.
"""

import errno
import os
import shlex
import shutil
import signal
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ibqlab.base.checks import is_finite_number
from ibqlab.base.devices import require_device, require_processes
from ibqlab.base.escaping import for_terminal, lines_for_terminal
from ibqlab.base.files import why_not
from ibqlab.base.measures import is_measure, measure, whole_or_short

if TYPE_CHECKING:
    from ibqlab.runs import Run


def _say(text: object, err: bool = False) -> None:
    """Lines on the terminal, whatever was named by others made harmless."""
    click.echo(lines_for_terminal(text), err=err)


def _is_first_process() -> bool:
    """Whether this is the process, of several under torchrun, that speaks for all."""
    return os.environ.get("RANK", "0") == "0"


def _say_loading(command: str) -> None:
    """Say that a command has begun: what it imports takes seconds."""
    if _is_first_process():
        _say(f"ibqlab {command}: loading …", err=True)


WHERE = "A plain name goes below the folder of all runs; a path starts with / ./ ../ or ~."


class _Commands(click.Group):
    """Prints what the user can mend as one message instead of a traceback; exit code 2."""

    def main(self, *words: Any, **options: Any) -> Any:
        _open_closed_streams()
        try:
            return super().main(*words, **options)
        except OSError as error:  # the text of --help, which is written before any command is run
            if error.errno != errno.ENOSPC:
                raise
            _say(f"Error: {_about_file(error)}", err=True)
            return sys.exit(2)

    def invoke(self, ctx: click.Context) -> Any:
        try:
            _require_current_folder()
            with _warnings_in_one_line():
                return super().invoke(ctx)
        except (KeyboardInterrupt, click.Abort) as error:
            _say(str(error) or "Interrupted; the same command goes on where it stopped", err=True)
            return ctx.exit(130)
        except FileNotFoundError as error:
            message = str(error) if error.errno is None else _about_file(error)
        except ValueError as error:
            message = str(error)
        except OSError as error:
            if error.errno == errno.EPIPE:
                raise
            message = _about_file(error)
        except RuntimeError as error:
            # The package's own errors, told by their home so that torch need not be imported to name their classes.
            if type(error).__module__.partition(".")[0] != "ibqlab":
                raise
            message = str(error)
        _say(f"Error: {message}", err=True)
        return ctx.exit(2)


@contextmanager
def _warnings_in_one_line() -> Iterator[None]:
    """Inside the block the package's own warnings are a line each, without the place in the code that warns."""
    package = os.path.dirname(os.path.abspath(__file__)) + os.sep
    with warnings.catch_warnings():
        shown_otherwise = warnings.showwarning

        def show(message: Warning | str, category: type[Warning], filename: str, *place: Any, **more: Any) -> None:
            if issubclass(category, UserWarning) and os.path.abspath(filename).startswith(package):
                if _is_first_process():
                    _say(f"Warning: {for_terminal(message, None)}", err=True)
            else:
                shown_otherwise(message, category, filename, *place, **more)

        warnings.showwarning = show
        yield


@contextmanager
def _sigterm_as_ctrl_c() -> Iterator[None]:
    """Inside the block SIGTERM stops the work as Ctrl-C does, so that what was made is still written down."""
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _about_file(error: OSError) -> str:
    """What the system said about a file, in words that name a remedy."""
    if error.filename:
        return f"{for_terminal(error.filename)}: {why_not(error)}"
    if error.errno == errno.ENOSPC:
        return "the disk that this output is written to is full; make room, or send it elsewhere"
    return why_not(error)


def _open_closed_streams() -> None:
    """Whatever a shell has closed of input, output and errors leads nowhere: a run's file must not get its number."""
    for number, name, mode in ((0, "stdin", "r"), (1, "stdout", "w"), (2, "stderr", "w")):
        if getattr(sys, name) is None:
            with suppress(OSError):
                os.fstat(number)
                continue
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free number, which is this one
            setattr(sys, name, os.fdopen(number, mode, closefd=False))


def _require_current_folder() -> None:
    """Refuse to work where relative paths lead nowhere."""
    try:
        os.getcwd()
    except FileNotFoundError:
        raise ValueError("the current folder has been deleted; go to another one: cd FOLDER") from None


@click.group(cls=_Commands)
@click.version_option(package_name="ibqlab")
def main() -> None:
    """Why do codebooks collapse, and what keeps every code alive?"""


# --- run -------------------------------------------------------------------------------------------------------------


def _help_of_run(ctx: click.Context, _: click.Parameter, asked: bool) -> None:
    """Without a notebook the command's help and all notebooks, with one its parameters."""
    if not asked or ctx.resilient_parsing:
        return
    from ibqlab.notebooks.parameters import describe_notebooks, describe_parameters, find_notebook  # noqa: PLC0415

    name = ctx.params.get("notebook")
    if name:
        source = find_notebook(name)
        _say(f"ibqlab run {name} [KEY=VALUE]...\n\nparameters of {source.name}\n{describe_parameters(source)}")
    else:
        _say(f"{ctx.get_help()}\n\nNotebooks:\n{describe_notebooks()}\n\nParameters: ibqlab run NOTEBOOK --help")
    ctx.exit()


@main.command(add_help_option=False)
@click.argument("notebook", required=False, is_eager=True, metavar="NOTEBOOK")
@click.argument("settings", nargs=-1, metavar="[KEY=VALUE]...")
@click.option(
    "--output", type=click.Path(path_type=Path), help="Executed copy; by default dated, under runs/notebooks."
)
@click.option(
    "--help",
    is_flag=True,
    expose_value=False,
    callback=_help_of_run,
    help="Show this and all notebooks; with NOTEBOOK its parameters and presets.",
)
def run(notebook: str | None, settings: Sequence[str], output: Path | None) -> None:
    """Execute NOTEBOOK, a path or a name under notebooks/, with some of its parameters replaced.

    codebook_sizes=[256,1024] is a list, text stays as it is typed. All parameters, presets and settings of recipes are
    checked before anything starts.
    """
    if not notebook:
        raise click.UsageError("NOTEBOOK is missing; list them with: ibqlab run --help")
    _say_loading(f"run {notebook}")
    from ibqlab.notebooks.parameters import execute, find_notebook, place_for, read_settings  # noqa: PLC0415
    from ibqlab.notebooks.results import results_of  # noqa: PLC0415

    source = find_notebook(notebook)
    values = read_settings(source, settings)
    target = place_for(source, output)
    with _sigterm_as_ctrl_c():
        execution = execute(source, target, values)
    if execution.folder and (execution.folder / "config.yaml").is_file():
        _report_on(execution.folder, redraw=False, result=execution.result)
    elif execution.folder:
        _say("\n".join(results_of(execution.folder, execution.result)))
    _say(f"executed copy: {target}")
    if execution.failure:
        _say(f"Error: {execution.failure}", err=True)
        sys.exit(1)


# --- train -----------------------------------------------------------------------------------------------------------


@main.command()
@click.argument("recipe")
@click.argument("settings", nargs=-1, metavar="[KEY=VALUE]...")
@click.option("--output", default="", help=f"Run folder; by default <recipe>-<settings' hash>. {WHERE}")
@click.option("--accept-changed-data", is_flag=True, help="Continue a run whose images have changed since it began.")
@click.option("--report/--no-report", "reporting", default=True, help="Draw the run's figures and report at the end.")
def train(recipe: str, settings: Sequence[str], output: str, accept_changed_data: bool, reporting: bool) -> None:
    """Train RECIPE, a path or a name under experiments/, with some of its keys replaced: a tokenizer or a generator.

    Keys are dotted: tokenizer.quantizer.codebook_size=4096. An interrupted run is continued; a finished one is left
    as it is. Several processes: torchrun --nproc-per-node N -m ibqlab train RECIPE processes=N
    """
    _say_loading(f"train {recipe}")
    first = _is_first_process()
    from ibqlab.config import content_hash  # noqa: PLC0415
    from ibqlab.recipes.recipe_files import find_recipe, recipe_config  # noqa: PLC0415
    from ibqlab.runs.finding import output_folder  # noqa: PLC0415
    from ibqlab.training import TrainConfig, train_generator  # noqa: PLC0415
    from ibqlab.training import train as train_tokenizer  # noqa: PLC0415

    config = recipe_config(recipe, assignments=settings)
    kind = train_tokenizer if isinstance(config, TrainConfig) else train_generator
    folder = output_folder(output, default=f"{find_recipe(recipe).stem}-{content_hash(config)}")
    try:
        with _sigterm_as_ctrl_c():
            done = kind(config, folder, accept_changed_data=accept_changed_data)
    except KeyboardInterrupt:
        if first and reporting:
            _report_on(folder)
        raise
    if not first:
        return
    _say(f"{done.status}: {done.path}; look at it with: ibqlab show {done.path}")
    if reporting:
        _report_on(done.path)


def _report_on(folder: Path, redraw: bool = True, result: str = "") -> None:
    """Write a run's report and say where it lies; what is wrong with it is no error of the training."""
    if not folder.is_dir():  # stopped before anything was written
        return
    _say(f"drawing the figures of {folder.name} …", err=True)
    from ibqlab.notebooks.results import results_of  # noqa: PLC0415
    from ibqlab.runs import Run  # noqa: PLC0415
    from ibqlab.studies.run_report import write_run_report  # noqa: PLC0415

    try:
        write_run_report(Run(folder), redraw=redraw)
    except (RuntimeError, ValueError, OSError) as error:
        _say(f"no report was written: {error}", err=True)
        return
    for line in results_of(folder, result):
        _say(line)


# --- tokens and samples ----------------------------------------------------------------------------------------------


@main.command()
@click.argument("tokenizer")
@click.argument("settings", nargs=-1, metavar="[KEY=VALUE]...")
@click.option("--output", default="", help=f"Folder to write; by default <tokenizer>-tokens. {WHERE}")
@click.option("--crops", type=int, default=1, show_default=True, help="Random crops stored of each training image.")
@click.option("--weights", type=click.Choice(["ema", "raw"]), default="ema", show_default=True, help="Of TOKENIZER.")
@click.option("--batch-size", type=int, default=64, show_default=True, help="Images computed at once.")
@click.option("--device", default="cpu", show_default=True, help="cpu, cuda, cuda:1, …")
@click.option("--seed", type=int, default=0, show_default=True, help="Of the crops.")
@click.option("--verify", is_flag=True, help="Compare the files of a store that is there with their checksums.")
def tokenize(tokenizer: str, settings: Sequence[str], output: str, verify: bool, **given: Any) -> None:
    """Write the tokens of a data set once, for generators to be trained on: tokens=FOLDER in their recipe.

    TOKENIZER is a run, an export or a published file. The images are those that the run was trained on, or those that
    KEY=VALUE says: source=FOLDER image_size=256 flip=false. An interrupted command is gone on with. Several processes:
    torchrun --nproc-per-node N -m ibqlab tokenize …
    """
    _say_loading(f"tokenize {tokenizer}")
    from ibqlab.config import apply_overrides, parse  # noqa: PLC0415
    from ibqlab.data import DataConfig  # noqa: PLC0415
    from ibqlab.pretrained import load_tokenizer  # noqa: PLC0415
    from ibqlab.runs.finding import output_folder  # noqa: PLC0415
    from ibqlab.runs.root import locate  # noqa: PLC0415
    from ibqlab.tokens.store import TokenStore  # noqa: PLC0415
    from ibqlab.tokens.writing import TokenSettings, write_tokens  # noqa: PLC0415

    require_device(given["device"], "--device")
    require_processes()
    place = locate(tokenizer)
    folder = output_folder(output, default=f"{place.stem}-tokens")
    if verify:
        TokenStore(folder).verify()
        _say(f"every file of {folder} has its checksum")
        return
    loaded = load_tokenizer(place, given.pop("weights")).float()
    data = parse(DataConfig, apply_overrides(_data_of(place), settings, DataConfig), source="data")
    store = write_tokens(loaded, data, folder, TokenSettings(**given))
    _say(f"{store.describe()}\ntrain a generator on them: ibqlab train RECIPE tokens={folder}")


@main.command()
@click.argument("checkpoint")
@click.argument("settings", nargs=-1, metavar="[KEY=VALUE]...")
@click.option("--output", default="", help=f"Folder; by default <checkpoint>-samples. {WHERE}")
@click.option("--card", help="A published sampling card, such as ibq_b, which KEY=VALUE changes.")
@click.option("--tokenizer", default="", help="That decodes; by default the one that CHECKPOINT holds.")
@click.option("--images-per-class", type=int, default=50, show_default=True)
@click.option("--classes", default="", help="Names, or labels such as 0,7,12 or 0-3; by default all.")
@click.option("--seed", type=int, default=0, show_default=True, help="Of the first image; the next ones follow.")
@click.option("--batch-size", type=int, default=50, show_default=True, help="Images drawn at once.")
@click.option("--shard-size", type=int, default=1000, show_default=True, help="Images per tar file.")
@click.option("--compiled", is_flag=True, help="Compile the step of one position (CUDA graphs on a GPU).")
@click.option("--device", default="cpu", show_default=True, help="cpu, cuda, cuda:1, …")
def sample(checkpoint: str, settings: Sequence[str], output: str, card: str | None, **given: Any) -> None:
    """Draw images of every class from a generator: tar shards, and the .npz that published evaluators read.

    CHECKPOINT is a generator's run, export or published file. KEY=VALUE says how tokens are drawn: cfg_scale=2.25
    temperature=1.1 top_p=0.95. An interrupted command is gone on with. Several processes: torchrun --nproc-per-node N
    -m ibqlab sample …
    """
    _say_loading(f"sample {checkpoint}")
    from dataclasses import replace  # noqa: PLC0415

    from ibqlab.base.checks import require_choice  # noqa: PLC0415
    from ibqlab.config import ConfigError, apply_overrides, parse, to_dict  # noqa: PLC0415
    from ibqlab.generating.pipeline import class_names, open_pair  # noqa: PLC0415
    from ibqlab.generating.sample_picture import save_sample_picture  # noqa: PLC0415
    from ibqlab.generating.sampling_runs import SampleRequest, read_classes, sample_images  # noqa: PLC0415
    from ibqlab.generator.cards import SAMPLING_CARDS  # noqa: PLC0415
    from ibqlab.generator.sampling import SamplingConfig  # noqa: PLC0415
    from ibqlab.pretrained.generators import is_generator  # noqa: PLC0415
    from ibqlab.runs import RunError  # noqa: PLC0415
    from ibqlab.runs.finding import output_folder  # noqa: PLC0415
    from ibqlab.runs.root import locate  # noqa: PLC0415

    require_device(given["device"], "--device")
    require_processes()
    if card:
        require_choice("card", card, SAMPLING_CARDS)
    base = to_dict(SAMPLING_CARDS[card]) if card else {}
    sampling = parse(SamplingConfig, apply_overrides(base, settings, SamplingConfig), source="sampling")
    tokenizer, classes = given.pop("tokenizer"), given.pop("classes")
    request = parse(SampleRequest, given, source="samples")
    place = locate(checkpoint)
    folder = output_folder(output, default=f"{place.stem}-samples")
    if os.path.exists(place) and not is_generator(place):
        raise ConfigError(
            f"{checkpoint} is no generator; images are drawn from one that was trained over a tokenizer's tokens: "
            "ibqlab train builtin/digits_generator tokens=… (ibqlab tokenize writes them)"
        )
    pair = open_pair(checkpoint, tokenizer)
    names = class_names(checkpoint)
    labels = read_classes(classes, names, pair.generator.config.num_classes)
    archive = sample_images(*pair, folder, sampling, replace(request, classes=labels))
    if not _is_first_process():
        return
    try:
        _say(f"picture: {save_sample_picture(folder, names)}")
    except RunError as error:  # of samples that are finished, but whose shards were deleted
        _say(f"no picture: {error}", err=True)
    _say(f"{archive}; compare it with real images: ibqlab.metrics.evaluate_generation({str(archive)!r}, REFERENCE)")
    given_tokenizer = f" {shlex.quote(f'tokenizer={tokenizer}')}" if tokenizer else ""
    _say(
        "other guidance, temperatures and top-p beside each other: ibqlab run generation_gallery "
        f"{shlex.quote(f'generator={checkpoint}')}{given_tokenizer}"
    )


def _data_of(place: Path) -> dict[str, Any]:
    """The data settings of a run; none for a tokenizer that is no run."""
    from ibqlab.runs import Run  # noqa: PLC0415

    return dict(Run(place).located_config.get("data", {})) if place.is_dir() else {}


# --- report ----------------------------------------------------------------------------------------------------------


@main.command()
@click.argument("name")
@click.option(
    "--projection",
    type=click.Choice(["pca", "umap"]),
    default="pca",
    show_default=True,
    help="Of a run's map of codes.",
)
def report(name: str, projection: str) -> None:
    """One HTML page and one Markdown file on NAME, a run or a study: tables, figures, provenance, commands.

    NAME is a folder, or a name in the folder of all runs, such as ablations-laptop. A run may still be training; runs
    of a study that are not finished are left out and named.
    """
    _say_loading(f"report {name}")
    from ibqlab.runs.finding import find_run  # noqa: PLC0415

    folder = find_run(name, "run or study")
    if (folder / "config.yaml").is_file():
        from ibqlab.runs import Run  # noqa: PLC0415
        from ibqlab.studies.run_report import write_run_report  # noqa: PLC0415

        page = write_run_report(Run(folder), projection)
    else:
        from ibqlab.studies.reports import write_study_report  # noqa: PLC0415

        page = write_study_report(folder)
    _say("\n".join(str(file) for file in dict.fromkeys((page, page.with_suffix(".md")))))


# --- plan ------------------------------------------------------------------------------------------------------------


@main.command()
@click.argument("recipe")
@click.argument("settings", nargs=-1, metavar="[KEY=VALUE]...")
@click.option("--images-per-second", type=float, help="Measured training speed of one GPU.")
@click.option("--gpus", type=int, help="GPUs that work together; by default the recipe's processes.")
@click.option("--gpu-hour-price", type=float, help="Price of one GPU for an hour, in any currency.")
def plan(
    recipe: str,
    settings: Sequence[str],
    images_per_second: float | None,
    gpus: int | None,
    gpu_hour_price: float | None,
) -> None:
    """What RECIPE would cost: parameters, operations, memory, steps, disk; GPU-hours and price.

    RECIPE is a path or a name under experiments/, or a folder of recipes, such as imagenet: one row each. Nothing is
    trained; neither data nor weight files nor a GPU are needed. Without --images-per-second, --gpus takes the speeds
    measured under experiments/results/training_step; where there are none, it gives the hours that no GPU can beat.
    """
    from ibqlab.costs.generator_cost import plan_recipe  # noqa: PLC0415
    from ibqlab.costs.tokenizer_cost import Speed, cost_of_run  # noqa: PLC0415
    from ibqlab.recipes.recipe_files import find_recipes  # noqa: PLC0415

    plans = [plan_recipe(str(file), settings) for file in find_recipes(recipe)]
    if images_per_second is not None:
        speeds = {p.name: Speed(images_per_second=images_per_second, origin="as given") for p in plans}
    elif gpus is not None or gpu_hour_price is not None:
        speeds = _known_speeds(plans)
    else:
        speeds = {}
    costs = {p.name: cost_of_run(p, speeds[p.name].images_per_second, gpus, gpu_hour_price) for p in plans if speeds}
    if len(plans) == 1:
        _say(plans[0].describe())
        _say(costs[plans[0].name].describe() if costs else _how_to_measure(plans[0]))
    else:
        # A folder may hold recipes of both kinds.
        kinds = dict.fromkeys(map(type, plans))
        _say("\n\n".join(_plan_rows([p for p in plans if type(p) is kind], costs, speeds) for kind in kinds))
        if not costs:
            _say(_how_to_measure(plans[0]))
    if any(speed.is_bound for speed in speeds.values()):
        _say(
            "at least: no speed was measured on a GPU; hours are those of the operations alone at the data sheet's "
            "989 × 10¹² per second (H100, H200), which no step reaches. Measure with "
            "experiments/benchmarks/training_speed.py, or give --images-per-second"
        )


def _known_speeds(plans: "Sequence[AnyPlan]") -> "dict[str, Speed]":
    """Recipe → measured speed, or the bound where nothing was measured.

    Raises:
        ConfigError: a recipe for CPUs, whose speed nothing bounds.
    """
    from ibqlab.config import ConfigError  # noqa: PLC0415
    from ibqlab.costs.tokenizer_cost import measured_speeds, speed_of  # noqa: PLC0415

    measured = measured_speeds()
    for one in plans:
        if one.accelerator == "cpu" and one.name not in measured:
            raise ConfigError(
                f"{one.name} trains on CPUs, for which no speed is known: add --images-per-second, measured there"
            )
    return {one.name: speed_of(one, measured, plans) for one in plans}


def _plan_rows(plans: "Sequence[AnyPlan]", costs: "dict[str, RunCost]", speeds: "dict[str, Speed]") -> str:
    """Plans of one kind as a table."""
    from ibqlab.costs.generator_cost import GeneratorPlan, generator_plan_table  # noqa: PLC0415
    from ibqlab.costs.tokenizer_cost import plan_table  # noqa: PLC0415

    table = (generator_plan_table if isinstance(plans[0], GeneratorPlan) else plan_table)(plans)
    for column in ("gpu_hours", "days", "price") if costs else ():
        table[column] = [getattr(costs[plan.name], column) for plan in plans]
    if speeds:
        table["hours are"] = [speeds[plan.name].origin for plan in plans]
    shown = table.dropna(axis="columns", how="all").astype(object).where(table.notna(), "–")
    shown = shown.rename(
        columns={name: f"paper's {name}" for name in ("rfid", "lpips", "usage", "gfid", "inception_score")}
    )
    return shown.to_string(index=False, float_format=lambda value: f"{value:,.4g}")


def _how_to_measure(plan: "AnyPlan") -> str:
    """No speed is assumed: the line that stands in its place."""
    return (
        "time: measure a speed on the GPU that will be used and give it as --images-per-second; "
        f"`ibqlab train {plan.name} steps=200 processes=1 batch_size={plan.images_at_once}` prints images/s"
    )


# --- checkpoints -----------------------------------------------------------------------------------------------------

HEADS = click.option("--num-heads", type=int, help="Of a published generator, which does not tell it; else width / 64.")
GRID = click.option("--grid-size", type=int, help="Of a published generator: tokens along a side; by default 16.")


@main.command()
@click.argument("checkpoint")
@click.option("--weights", type=click.Choice(["ema", "raw"]), default="ema", help="Which set to account for as used.")
@click.option("--quantizer", help="Of a published file that does not tell IBQ from VQ: ibq or vq.")
@HEADS
@GRID
def inspect(checkpoint: str, weights: str, quantizer: str | None, num_heads: int | None, grid_size: int | None) -> None:
    """What CHECKPOINT holds, key by key, and the architecture that its names and shapes tell.

    CHECKPOINT is a published file, a file from `ibqlab export`, or a run folder, of a tokenizer or a generator. Nothing
    in it is executed.
    """
    from ibqlab.config import dump_yaml  # noqa: PLC0415
    from ibqlab.pretrained import load_generator, load_tokenizer  # noqa: PLC0415
    from ibqlab.pretrained.generators import is_generator  # noqa: PLC0415

    if is_generator(checkpoint):
        model = load_generator(checkpoint, num_heads=num_heads, grid_size=grid_size)
    else:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*averaged weights still hold")  # the report says the same
            model = load_tokenizer(checkpoint, weights, quantizer=quantizer)
    _say(model.load_report)
    _section("settings", dump_yaml(model.config))


@main.command()
@click.argument("name", required=False)
@click.option("--folder", type=click.Path(path_type=Path), help="Where to; by default the hub's own cache.")
def download(name: str | None, folder: Path | None) -> None:
    """Fetch the published checkpoint NAME, check its checksum and print where it lies; without a name, list them all.

    Tokenizers are listed with K, their number of codes, generators with the tokenizer whose tokens they draw.
    """
    from ibqlab.pretrained import PUBLISHED, PUBLISHED_GENERATORS, download_published  # noqa: PLC0415

    if name is None:
        rows = [
            f"{key:<28} K {tokenizer.codebook_size:>7,}  rFID {tokenizer.rfid}" for key, tokenizer in PUBLISHED.items()
        ]
        rows += [
            f"{key:<28} over {entry.tokenizer:<16}  gFID {entry.gfid}  IS {entry.inception_score:.2f}"
            for key, entry in PUBLISHED_GENERATORS.items()
        ]
        _say("\n".join(rows))
        return
    _say(download_published(name, folder))


@main.command()
@click.argument("checkpoint")
@click.argument("target", type=click.Path(path_type=Path))
@click.option("--weights", type=click.Choice(["ema", "raw"]), help="For .safetensors: which set; by default ema.")
@HEADS
@GRID
def export(checkpoint: str, target: Path, weights: str | None, num_heads: int | None, grid_size: int | None) -> None:
    """Write CHECKPOINT to TARGET: .safetensors with one set of weights and its settings, .ckpt with published names."""
    from ibqlab.config import ConfigError  # noqa: PLC0415
    from ibqlab.pretrained import export_published, export_tokenizer  # noqa: PLC0415
    from ibqlab.pretrained.checkpoint import held_weights  # noqa: PLC0415
    from ibqlab.pretrained.generators import is_generator  # noqa: PLC0415

    generator = is_generator(checkpoint)
    if generator and weights:
        raise ConfigError("--weights is for tokenizers; a generator has one set of weights. Leave it out")
    if generator and target.suffix in (".safetensors", ".ckpt"):
        _say(_export_generator(checkpoint, target, num_heads=num_heads, grid_size=grid_size))
        return
    if target.suffix == ".safetensors":
        _say(f"{export_tokenizer(checkpoint, target, weights)}\nholds {held_weights(target)}")
        return
    if target.suffix != ".ckpt":
        raise ConfigError(
            f"TARGET must end in .safetensors (one set of weights) or .ckpt (published names); got {target}"
        )
    if weights:
        raise ConfigError("--weights is for .safetensors; a .ckpt holds the weights as trained and the averaged ones")
    _say(f"{export_published(checkpoint, target)}\nholds {held_weights(target)}")


def _export_generator(checkpoint: str, target: Path, **sizes: int | None) -> Path:
    """A generator's export of the kind that the target's ending names."""
    from ibqlab.pretrained import (  # noqa: PLC0415
        export_generator,
        export_published_generator,
        load_first_stage,
        load_generator,
    )
    from ibqlab.pretrained.export import check_free  # noqa: PLC0415

    check_free(target)
    if target.suffix == ".safetensors":
        return export_generator(load_generator(checkpoint, **sizes), target)
    first = load_first_stage(checkpoint)
    return export_published_generator(load_generator(checkpoint, **sizes), target, first)


# --- runs, show ------------------------------------------------------------------------------------------------------


@main.command()
@click.argument("folder", required=False, type=click.Path(path_type=Path))
@click.option("--wide", is_flag=True, help="All columns, however narrow the terminal.")
def runs(folder: Path | None, wide: bool) -> None:
    """List the runs below FOLDER, by default all, in as many columns as the terminal has room for."""
    from ibqlab.runs import list_runs, runs_root  # noqa: PLC0415

    if folder and not folder.is_dir():
        raise FileNotFoundError(f"{folder}: there is no such folder; without a folder, `ibqlab runs` lists all runs")
    folder = folder or runs_root()
    table = list_runs(folder).drop(columns=["path", "config_hash"])
    if table.empty:
        _say(f"no runs in {folder}; make one with: ibqlab train builtin/photos")
        return
    table = table.dropna(axis="columns", how="all").convert_dtypes().astype(object)
    whole = table.where(table.notna(), "–").map(lambda value: for_terminal(value) if isinstance(value, str) else value)
    left_out = [] if wide else _fit_columns(whole, shutil.get_terminal_size((120, 24)).columns)
    _say(_as_text(whole.drop(columns=left_out)))
    if left_out:
        _say(f"left out: {', '.join(left_out)}; all columns: ibqlab runs --wide")


LEAST_TELLING = (
    *("validation_tokens", "usage_tokens", "losses", "duration_s", "code_dim", "seed", "kind", "usage"),
    *("validation_psnr", "validation_loss", "loss", "problem", "codebook_size", "quantizer"),
    *("validation_usage", "step"),
)
"""Columns of `ibqlab runs` in the order in which they give way to a narrow terminal."""


def _as_text(table: Any) -> str:
    return table.to_string(index=False, float_format=lambda value: f"{value:.4g}")


def _fit_columns(table: Any, width: int) -> list[str]:
    """The columns that a terminal of so many letters has no room for."""
    left_out: list[str] = []
    for column in (name for name in LEAST_TELLING if name in table):
        if len(_as_text(table.drop(columns=left_out)).partition("\n")[0]) <= width:
            break
        left_out.append(column)
    return left_out


MAIN_SETTINGS = (
    *("data.source", "data.image_size", "tokens", "tokenizer", "tokenizer.quantizer.name"),
    *("tokenizer.quantizer.codebook_size", "tokenizer.quantizer.code_dim", "generator.name", "generator.width"),
    *("generator.depth", "start_from", "optimizer.learning_rate", "batch_size", "steps", "precision", "seed"),
)
MAIN_METRICS = (
    *("step", "loss", "validation_loss", "validation_bits_per_token", "validation_psnr", "validation_usage"),
    *("validation_perplexity", "usage", "perplexity", "dead_codes", "images_per_second", "seconds"),
)


@main.command()
@click.argument("run")
@click.option("--all", "everything", is_flag=True, help="All settings, all metrics and the provenance.")
def show(run: str, everything: bool) -> None:
    """Show RUN, a path or a name that `ibqlab runs` lists: status, main settings and last metrics, what is there."""
    from ibqlab.config import dump_yaml  # noqa: PLC0415
    from ibqlab.runs.commands import leaves  # noqa: PLC0415

    found = _find_run(run)
    last = _last_values(found)
    lines = dict(zip(last, describe_metrics(last), strict=True))
    _say(f"{found.name}: {found.describe_status()}\n{found.path}")
    if everything:
        settings, shown = dump_yaml(found.config), list(lines.values())
    else:
        given = dict(leaves(found.config))
        settings = "\n".join(f"{key}: {for_terminal(given[key])}" for key in MAIN_SETTINGS if given.get(key, "") != "")
        shown = [lines[name] for name in MAIN_METRICS if name in lines] or list(lines.values())[:12]
    _section(f"settings (content hash {found.config_hash})", settings)
    _section("last metrics", "\n".join(shown) or "none yet")
    _section("in the folder", "\n".join(_contents(found, everything)))
    if everything:
        _section("provenance", dump_yaml(found.provenance))
    else:
        _say(f"\nall settings, all metrics, provenance: ibqlab show {shlex.quote(run)} --all")


def _contents(run: "Run", everything: bool) -> Iterator[str]:
    """Snapshots, checkpoint, figures and report of a run, each in a line, figures by name where all is asked for."""
    steps, checkpoint = run.snapshot_steps, run.last_checkpoint
    few = everything or len(steps) < 9
    at = ", ".join(map(str, steps)) if few else f"{len(steps)} steps from {steps[0]} to {steps[-1]}"
    yield f"snapshots: {at or 'none'}"
    yield f"last checkpoint: {checkpoint.name if checkpoint else 'none'}"
    figures = sorted(path.name for path in (run.path / "figures").glob("*"))
    drawn = ", ".join(figures) if everything or len(figures) < 5 else f"{len(figures)} files in figures"
    yield f"figures: {drawn or 'none'}"
    yield f"report: {'report.html' if (run.path / 'report.html').exists() else 'none; make it with ibqlab report'}"


def _find_run(name: str) -> "Run":
    from ibqlab.runs import Run  # noqa: PLC0415
    from ibqlab.runs.finding import find_run  # noqa: PLC0415

    return Run(find_run(name))


def _section(title: str, text: str) -> None:
    _say(f"\n{title}\n" + "\n".join(f"  {line}" for line in text.splitlines()))


def _last_values(run: "Run") -> dict[str, Any]:
    """The last value of every metric that has one."""
    columns = {name: column.dropna() for name, column in run.metrics.items()}
    return {name: column.iloc[-1] for name, column in columns.items() if len(column)}


def describe_metrics(last: dict[str, Any]) -> list[str]:
    """Metrics as lines with units; usage and perplexity name the number of tokens they were counted in.

    Args:
        last: values by the names of metrics.jsonl.
    """
    return [f"{name}: {_with_unit(name, value, last)}" for name, value in last.items()]


def _with_unit(name: str, value: Any, last: dict[str, Any]) -> str:
    if not is_finite_number(value):
        return for_terminal(value)
    return measure(name).text(value, last) if is_measure(name) else whole_or_short(value)
