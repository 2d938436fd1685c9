"""The commands. Imports no torch at module level, so that ``--help`` and configuration mistakes answer at once."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from sft_dist import __version__
from sft_dist.config.load import dump_config, load_config
from sft_dist.config.schema import Config
from sft_dist.config.validate import validate
from sft_dist.errors import ConfigError, PlanError, SftError
from sft_dist.runtime.failure import INTERRUPTED_EXIT_CODE, report, report_interrupt, report_unexpected

UNEXPECTED_EXIT_CODE = 1

EPILOG = (
    "Exit codes: 0 done, 1 unexpected, 2 usage or configuration, 3 does not fit, 4 data, "
    "5 checkpoint or model on disk, 6 training diverged, 75 stopped by a signal and saved, 130 interrupted."
)


class _Commands(TyperGroup):
    """Turns a failure of any command into its message and exit code, in one place."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except SftError as error:
            report(error, debug=ctx.obj)
            raise typer.Exit(error.exit_code) from None
        except KeyboardInterrupt:
            report_interrupt()
            raise typer.Exit(INTERRUPTED_EXIT_CODE) from None


app = typer.Typer(
    cls=_Commands,
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    # Rich's renderer of Markdown would be half of the time that help takes.
    rich_markup_mode=None,
    epilog=EPILOG,
    help="Supervised fine-tuning of causal language models on any number of GPUs.",
)
config_app = typer.Typer(
    no_args_is_help=True, rich_markup_mode=None, help="Look at a configuration without running it."
)
app.add_typer(config_app, name="config")
model_app = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="Models of the Hugging Face hub.")
app.add_typer(model_app, name="model")

data_app = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="Training data, on a machine without GPUs.")
app.add_typer(data_app, name="data")

ConfigPath = Annotated[Path, typer.Argument(metavar="CONFIG", help="YAML file that describes the run.")]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="KEY.PATH=VALUE",
        help="Change single keys, e.g. train.max_steps=20 'data.eval=[{path: x.jsonl}]'. The value is YAML.",
        show_default=False,
    ),
]


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"sft-dist {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    debug: Annotated[
        bool, typer.Option("--debug", help="Show the stack trace of an error; may stand anywhere.")
    ] = False,
    version: Annotated[bool, typer.Option("--version", is_eager=True, callback=_show_version, help="Show it.")] = False,
) -> None:
    # Here for the help text only: main() takes --debug out before the command line is parsed.
    pass


def _load(path: Path, overrides: Sequence[str] | None) -> Config:
    config = load_config(path, overrides or [])
    validate(config, source=str(path))
    return config


AllowChange = Annotated[
    list[str] | None,
    typer.Option(
        "--allow-change",
        metavar="NAME",
        help="Go on from a checkpoint although this value differs from that of the checkpoint, such as train.seed or "
        "data.train; may be given several times.",
    ),
]


@app.command()
def train(
    config: ConfigPath,
    overrides: Overrides = None,
    resume: Annotated[
        str,
        typer.Option(
            metavar="auto|never|PATH",
            help="auto: go on from the newest checkpoint in output_dir, or begin; PATH: go on from that checkpoint.",
        ),
    ] = "never",
    allow_change: AllowChange = None,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run",
            help="Train nothing: say whether it fits, how long it takes and what it costs, as the command plan does; "
            "hardware.gpu=NAME, hardware.gpus_per_node=N and the like say on what. Ends with 3 where it does not fit.",
        ),
    ] = False,
    rehearse: Annotated[
        bool,
        typer.Option(
            "--rehearse",
            help="First do each thing that the run will do once, at full size: the longest batch, an evaluation, a "
            "save, a reload, a resumption, the export and its proof. Then train, as without.",
        ),
    ] = False,
    rehearse_only: Annotated[
        bool, typer.Option("--rehearse-only", help="Do that and end: output_dir is then as it was.")
    ] = False,
) -> None:
    """Train. Under a launcher (torchrun, accelerate, deepspeed) each process runs this; without one, this process does.

    Paths in the configuration count from the current directory. See `plan` and --dry-run for what a run will take;
    receipt.json in output_dir says in the end what it took.
    """
    if dry_run and (rehearse or rehearse_only):
        raise ConfigError("--dry-run trains nothing, and a rehearsal trains some steps", fix="give one of the two")
    checked = _load(config, overrides)
    if dry_run:
        _plan(checked)
        return
    from sft_dist.runtime.world import restarts
    from sft_dist.train.preflight import preflight
    from sft_dist.train.resume import AUTO, resume_after_restart

    if restarts():
        resume = resume_after_restart(resume, checked.output_dir)
        if os.environ["RANK"] == "0":
            place = f"--resume {resume}" if resume != AUTO else "the newest checkpoint, as with --resume auto"
            typer.echo(f"restart {restarts()}: going on from {place}")
    preflight(checked, resume=resume)
    _put_own_tools_on_path()
    from sft_dist.runtime.quiet import quiet_libraries

    quiet_libraries()
    from sft_dist.train.run import run_training

    run_training(
        checked,
        resume=resume,
        allowed=allow_change or (),
        rehearsing="only" if rehearse_only else "first" if rehearse else "no",
    )


@app.command()
def resume(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a run: its output_dir.")],
    overrides: Overrides = None,
    verify: Annotated[
        int | None,
        typer.Option(
            metavar="K",
            min=1,
            help="Train nothing new: train up to K recorded steps again from a checkpoint, and compare.",
        ),
    ] = None,
    allow_change: AllowChange = None,
) -> None:
    """Go on with a run from its newest checkpoint, on whatever processes this is started on.

    The same as `train RUN/config.yaml --resume auto`: with the settings as they were resolved, but for those given
    here.
    """
    from sft_dist.train.preflight import preflight
    from sft_dist.train.resume import AUTO, config_of

    checked = _load(config_of(run), [f"output_dir={json.dumps(str(run))}", *(overrides or ())])
    preflight(checked, resume=AUTO)
    _put_own_tools_on_path()
    from sft_dist.runtime.quiet import quiet_libraries

    quiet_libraries()
    if verify is not None:
        from sft_dist.train.replay import replay

        replay(checked, steps=verify, allowed=allow_change or ())
        return
    from sft_dist.train.run import run_training

    run_training(checked, resume=AUTO, allowed=allow_change or ())


GpuName = Annotated[
    str | None,
    typer.Option(
        "--gpu", metavar="NAME", help="Plan for this GPU, e.g. a100-80gb; else hardware.gpu, else this machine's."
    ),
]


@app.command(short_help="The dry run: does it fit, how long, how much money.")
def plan(
    config: ConfigPath,
    overrides: Overrides = None,
    gpu: GpuName = None,
    gpus: Annotated[int | None, typer.Option("--gpus", min=1, metavar="N", help="GPUs of a node.")] = None,
    nodes: Annotated[int | None, typer.Option("--nodes", min=1, metavar="N", help="Nodes.")] = None,
    examples: Annotated[
        str | None, typer.Option("--examples", metavar="N", help="Plan for so many rows of data, e.g. 10k.")
    ] = None,
    tokens_per_example: Annotated[
        str | None, typer.Option("--tokens-per-example", metavar="T", help="Their mean length, with the template.")
    ] = None,
    fx: Annotated[float | None, typer.Option("--fx", metavar="JPY", help="JPY per USD.")] = None,
    search: Annotated[
        bool, typer.Option("--search", help="Look for other machines, strategies and micro-batches too.")
    ] = False,
    methods: Annotated[
        str | None,
        typer.Option("--methods", metavar="M,...", help="Search these too: full, lora, qlora, or all of them."),
    ] = None,
    budget: Annotated[
        str | None, typer.Option("--budget", metavar="MONEY", help="Search the fastest for at most e.g. $50 or ¥8000.")
    ] = None,
    deadline: Annotated[
        str | None, typer.Option("--deadline", metavar="TIME", help="Search the cheapest within e.g. 6h or 90m.")
    ] = None,
    max_gpus: Annotated[
        int | None, typer.Option("--max-gpus", min=1, metavar="N", help="GPUs that a search may take; 16 by default.")
    ] = None,
    html: Annotated[Path | None, typer.Option(metavar="FILE", help="Write the plan as one HTML page too.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the plan as JSON: docs/plan_schema.json.")] = False,
    verbose: Annotated[
        bool, typer.Option("--verbose", help="With the parts of all phases and all assumptions.")
    ] = False,
    probe: Annotated[
        int | None,
        typer.Option(
            "--probe",
            min=3,
            metavar="N",
            help="Then train N steps on what is here, under a launcher or in this process, and compare; on a GPU the "
            "next plan starts from what 5 steps or more measured. Needs the weights; keeps nothing of the model.",
        ),
    ] = None,
) -> None:
    """The dry run: does it fit, how long does it take, what does it cost. Needs no GPU, no weights and no network.

    Prints the plan and writes plan.json into output_dir. Ends with 3 where the run does not fit.

    With --search, or an option of it, also plans other ways to do the same training: on hardware.gpu, or on all GPUs
    that have a price where that is null. Ends with 3 where nothing fits, or nothing under the budget or the deadline.
    """
    machines = {"gpu": gpu, "gpus_per_node": gpus, "nodes": nodes, "fx": fx}
    stated = [f"hardware.{key}={value}" for key, value in machines.items() if value is not None]
    asked = {"methods": methods, "budget": budget, "deadline": deadline, "max_gpus": max_gpus}
    searches = search or any(wish is not None for wish in asked.values())
    if searches and probe is not None:
        raise ConfigError("--probe trains one configuration, and --search looks at many", fix="give one of the two")
    # What is pasted behind the command, a proposal for one, comes last.
    checked = _load(config, [*stated, *(overrides or [])])
    if probe is None:
        _plan(
            checked,
            asked={**asked, "gpus": gpus, "nodes": nodes} if searches else None,
            examples=examples,
            tokens_per_example=tokens_per_example,
            html=html,
            as_json=as_json,
            verbose=verbose,
        )
        return
    _put_own_tools_on_path()
    from sft_dist.runtime.quiet import quiet_libraries

    quiet_libraries()
    from sft_dist.plan.command import Views, stated_data
    from sft_dist.train.probe import probe as run_probe

    views = Views(html=html, as_json=as_json, verbose=verbose)
    run_probe(checked, steps=probe, stated=stated_data(examples, tokens_per_example), views=views)


def _plan(
    config: Config,
    *,
    asked: dict[str, Any] | None = None,
    examples: str | None = None,
    tokens_per_example: str | None = None,
    html: Path | None = None,
    as_json: bool = False,
    verbose: bool = False,
) -> None:
    """Makes and shows a plan; ends with 3 where the run does not fit.

    Args:
        asked: of a search, as the command line has it; None: nothing is searched.
    """
    from sft_dist.runtime.quiet import quiet_libraries

    quiet_libraries()
    from sft_dist.plan.command import Views, make_plan, stated_data, wishes

    views = Views(html=html, as_json=as_json, verbose=verbose)
    wished = None if asked is None else wishes(**asked)
    made = make_plan(config, stated=stated_data(examples, tokens_per_example), views=views, wished=wished)
    if made.memory.verdict == "does not fit" and wished is None:
        raise typer.Exit(PlanError.exit_code)


@app.command(short_help="Measure this machine's GPU for plans.")
def calibrate(
    gpu: Annotated[
        str | None,
        typer.Option("--gpu", metavar="NAME", help="What this GPU is in the table; else as its driver calls it."),
    ] = None,
) -> None:
    """Measure this machine's GPU, so that plans count with it: matrix products, memory and, under a launcher, links.

    Takes under a minute and shows what was measured beside the table's figures.
    """
    from sft_dist.runtime.quiet import quiet_libraries

    quiet_libraries()
    from sft_dist.plan.calibrate import calibrate as measure_gpu

    measure_gpu(gpu)


class _Device(StrEnum):
    auto = "auto"
    cpu = "cpu"
    cuda = "cuda"


class _Dtype(StrEnum):
    auto = "auto"
    bf16 = "bf16"
    fp16 = "fp16"
    fp32 = "fp32"


Answering = Annotated[
    str,
    typer.Argument(
        metavar="PATH",
        help="A run's output_dir (its final/, or its newest checkpoint where there is none yet), a folder of its "
        "checkpoints/, a model or adapter in Hugging Face layout, or a hub id in the local cache.",
        show_default=False,
    ),
]
CheckpointOf = Annotated[
    str | None,
    typer.Option("--checkpoint", metavar="STEP|latest", help="Of a run: this checkpoint in place of final/."),
]
DeviceOption = Annotated[_Device, typer.Option("--device", help="auto: the GPU, if there is one.")]
DtypeOption = Annotated[
    _Dtype, typer.Option("--dtype", help="auto: what the run computed in; where that is not known, the files'.")
]
MaxNewTokens = Annotated[int, typer.Option("--max-new-tokens", min=1, metavar="N", help="Most tokens of an answer.")]


@app.command(short_help="Talk to a run, or let it answer a file.")
def chat(
    path: Answering,
    compare_base: Annotated[
        bool, typer.Option("--compare-base", help="The base model answers too, beside what training made of it.")
    ] = False,
    file: Annotated[
        str | None,
        typer.Option(
            "--file", metavar="INPUT", help="Answer the rows of this file, in any format of training data; needs --out."
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out", metavar="OUTPUT.jsonl", help="Where the answers go, a line a row; goes on where it was stopped."
        ),
    ] = None,
    system: Annotated[str | None, typer.Option("--system", metavar="TEXT", help="System message.")] = None,
    prompt: Annotated[str | None, typer.Option("--prompt", metavar="TEXT", help="Answer this, and leave.")] = None,
    max_new_tokens: MaxNewTokens = 512,
    temperature: Annotated[
        float | None,
        typer.Option(
            "--temperature",
            min=0,
            max=10,
            metavar="T",
            help="0: always the most probable token. By default 0.7 in a "
            "conversation; 0 with --compare-base and --file.",
        ),
    ] = None,
    top_p: Annotated[
        float, typer.Option("--top-p", min=1e-6, max=1, metavar="P", help="Draw from the tokens that make up P.")
    ] = 1.0,
    seed: Annotated[
        int | None, typer.Option("--seed", min=0, metavar="S", help="Of the draws: the same answers again.")
    ] = None,
    checkpoint: CheckpointOf = None,
    device: DeviceOption = _Device.auto,
    dtype: DtypeOption = _Dtype.auto,
) -> None:
    """Talk to a run in the terminal, compare it with its base, or let it answer the rows of a file.

    What answers is loaded with plain transformers and peft and prompted as it was trained; a 4-bit base is quantised as
    in training. Paths in an adapter count from the current directory, as they did in training.
    """
    from sft_dist.runtime.quiet import quiet_libraries

    quiet_libraries()
    from sft_dist.generate.command import Options
    from sft_dist.generate.command import chat as run_chat

    options = Options(
        system=system, prompt=prompt, file=file, output=out, compare_base=compare_base, max_new_tokens=max_new_tokens,
        temperature=temperature, top_p=top_p, seed=seed,
    )  # fmt: skip
    try:
        run_chat(path, options, checkpoint=checkpoint, device=device.value, dtype=dtype.value)
    except KeyboardInterrupt:
        typer.echo("\ninterrupted" + ("" if file is None else ": the same command goes on"), err=True)
        raise typer.Exit(INTERRUPTED_EXIT_CODE) from None


@app.command(short_help="Answer over HTTP, as the OpenAI API does.")
def serve(
    path: Answering,
    host: Annotated[
        str, typer.Option("--host", metavar="ADDRESS", help="Another than this machine's own needs --api-key.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", min=0, max=65535, metavar="PORT", help="0: any that is free.")] = 8000,
    api_key: Annotated[
        str | None,
        typer.Option(
            "--api-key",
            metavar="KEY",
            envvar="SFT_DIST_API_KEY",
            show_envvar=True,
            help="What clients have to show; the environment does not show it to other users of the machine.",
        ),
    ] = None,
    max_new_tokens: MaxNewTokens = 1024,
    checkpoint: CheckpointOf = None,
    device: DeviceOption = _Device.auto,
    dtype: DtypeOption = _Dtype.auto,
) -> None:
    """Serve /v1/chat/completions and /v1/completions to clients of the OpenAI API: to try a run in a real client.

    One answer at a time, whoever asks; for production `sft-dist export` makes a folder for vLLM. --max-new-tokens is
    for requests that say nothing of it.
    """
    from sft_dist.generate.serve import Address, require_packages

    require_packages()
    from sft_dist.runtime.quiet import quiet_libraries

    quiet_libraries()
    from sft_dist.generate.serve import serve as run_server

    run_server(
        path, Address(host, port, api_key), max_new_tokens=max_new_tokens, checkpoint=checkpoint, device=device.value,
        dtype=dtype.value,
    )  # fmt: skip


class _WrittenDtype(StrEnum):
    bf16 = "bf16"
    fp16 = "fp16"
    fp32 = "fp32"


class _Base(StrEnum):
    dequantized = "dequantized"
    original = "original"


@app.command(short_help="Write an adapter, a merged or a whole model for others to load.")
def export(
    path: Annotated[
        Path, typer.Argument(metavar="PATH", help="Run directory, checkpoint, or folder of an adapter or a model.")
    ],
    merge: Annotated[bool, typer.Option("--merge", help="Put the adapter into the weights of its base.")] = False,
    checkpoint: Annotated[
        str | None,
        typer.Option(metavar="STEP|latest", help="Of a run directory, this checkpoint in place of final/."),
    ] = None,
    dtype: Annotated[
        _WrittenDtype | None,
        typer.Option(help="Of the weights; else what the run computed in, or an adapter as it is."),
    ] = None,
    base: Annotated[
        _Base | None,
        typer.Option(
            help="With --merge after training on a quantised base: into its dequantised weights, which is exactly what "
            "was trained and the default, or into the original ones in its files.",
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", help="Where to; else merged, adapter or model in the run directory."),
    ] = None,
    max_shard_size: Annotated[
        str, typer.Option(metavar="SIZE", help="Most weights of one file, e.g. 5GB or 500MB.")
    ] = "5GB",
    check: Annotated[
        bool,
        typer.Option(
            "--check/--no-check",
            help="Load the folder in a fresh process with plain transformers and peft, and compare logits; takes "
            "memory for the model in fp32.",
        ),
    ] = True,
) -> None:
    """Write what a run or a checkpoint made as a folder that transformers, vLLM and TGI load by itself.

    An adapter stays one unless --merge puts it into its base, which needs memory for two tensors and no GPU. A whole
    model is written in another dtype or in other files. Tokenizer, chat template, settings for generation and a model
    card are with it.
    """
    from sft_dist.export.wish import Wish, parse_size

    wish = Wish(
        merge=merge,
        dtype=None if dtype is None else dtype.value,
        base=None if base is None else base.value,
        out=out,
        max_file_bytes=parse_size(max_shard_size),
        check=check,
    )
    from sft_dist.runtime.quiet import quiet_libraries

    quiet_libraries()
    from sft_dist.export.command import run_export

    run_export(path, wish, checkpoint=checkpoint)


def _put_own_tools_on_path() -> None:
    """Lets DeepSpeed find the environment's ninja when the environment is used without being activated.

    Before the system's own: operators compiled with one version are compiled again by another.
    """
    tools = Path(sys.executable).parent
    if (tools / "ninja").exists():
        os.environ["PATH"] = f"{tools}{os.pathsep}{os.environ.get('PATH', '')}"


@config_app.command("check")
def check(
    config: ConfigPath,
    overrides: Overrides = None,
    processes: Annotated[int, typer.Option(min=1, metavar="N", help="Processes of the run, one for each GPU.")] = 1,
) -> None:
    """Say whether a configuration can be trained, without GPU, weights, data or network.

    Looks at the settings, at the model's config.json or what is known of it without, and at what goes together.
    """
    checked = _load(config, overrides)
    _put_own_tools_on_path()
    from sft_dist.runtime.quiet import quiet_libraries

    quiet_libraries()
    from sft_dist.plan.check import check, report
    from sft_dist.runtime.world import WorldShape

    shape = WorldShape(1, processes)
    lines = report(check(checked, shape), shape)
    typer.echo(f"{config}: valid")
    for line in lines:
        typer.echo(f"  {line}")


@config_app.command("show")
def show(config: ConfigPath, overrides: Overrides = None) -> None:
    """Print the configuration with every default, as YAML that can be loaded again."""
    typer.echo(dump_config(_load(config, overrides)), nl=False)


@config_app.command("schema")
def schema() -> None:
    """Print the JSON schema of a configuration, for editors; every key is described in it."""
    typer.echo(json.dumps(Config.model_json_schema(), indent=2))


def _shard(text: str) -> tuple[int, int]:
    number, _, of = text.partition("/")
    if not (number.isdecimal() and of.isdecimal() and 1 <= int(number) <= int(of)):
        raise ConfigError(f"--shard {text} is no part", fix="say --shard i/n with i from 1 to n, e.g. 1/4")
    return int(number) - 1, int(of)


@data_app.command("prepare")
def prepare(
    config: ConfigPath,
    overrides: Overrides = None,
    shard: Annotated[
        str,
        typer.Option(
            metavar="i/n",
            help="Do the i-th of n parts, on a machine that shares the folder of the cache with those that do the "
            "others; who ends last puts them together.",
        ),
    ] = "1/1",
) -> None:
    """Tokenise, mask and pack the data of a run into its cache, with all CPUs; training then opens it at once.

    Goes on where it was stopped or killed. What is prepared already, by this or another run, is used.
    """
    number, of = _shard(shard)
    checked = _load(config, overrides)
    from sft_dist.data.tokenising import Shard
    from sft_dist.runtime.quiet import quiet_libraries

    quiet_libraries()
    from sft_dist.train.data import prepare_data

    prepare_data(checked, shard=Shard(number, of))


@data_app.command("audit")
def audit(
    config: ConfigPath,
    overrides: Overrides = None,
    html: Annotated[Path | None, typer.Option(metavar="FILE", help="Write the report as one HTML page too.")] = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Write the report as JSON too.")
    ] = None,
) -> None:
    """Say what is wrong with the data of a run: labels, duplicates, leaks, answers, encodings.

    Ends with 4 where more is wrong than data.audit allows. Training does the part that takes seconds by itself.
    """
    checked = _load(config, overrides)
    from sft_dist.runtime.quiet import quiet_libraries

    quiet_libraries()
    from sft_dist.train.audit import audit_data

    audit_data(checked, html=html, json=json_file)


class _Set(StrEnum):
    train = "train"
    eval = "eval"


@data_app.command("show")
def show_data(
    config: ConfigPath,
    overrides: Overrides = None,
    side: Annotated[_Set, typer.Option("--set", help="Which set.")] = _Set.train,
    row: Annotated[
        list[str] | None,
        typer.Option("--row", metavar="N|N-M", help="This row, or these, from 0; may be given several times."),
    ] = None,
    random: Annotated[int | None, typer.Option(min=1, metavar="N", help="N rows drawn at random.")] = None,
    seed: Annotated[int | None, typer.Option(min=0, metavar="S", help="For --random; 0 by default.")] = None,
    longest: Annotated[int | None, typer.Option(min=1, metavar="N", help="The N longest rows.")] = None,
    least_supervised: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="The N rows with the fewest trained tokens.")
    ] = None,
    packs: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="The first N packs, with the borders of their rows.")
    ] = None,
    source: Annotated[str | None, typer.Option(metavar="NAME", help="Only rows of this source.")] = None,
    tokens: Annotated[bool, typer.Option("--tokens", help="With the borders of the tokens and their ids.")] = False,
    html: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write them to one HTML page that needs nothing else.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print ids, labels and origins as JSON.")] = False,
) -> None:
    """Look at rows of the data as a run trains them: what is trained, what is context, where each token ends.

    Shows the first 3 rows of the training set unless told otherwise. Prepares the data first, as `data prepare` does.
    """
    from sft_dist.data.show_choice import Choice, Form

    form = Form(tokens=tokens, html=html, as_json=as_json)
    choice = Choice(
        side="eval" if side is _Set.eval else "train",
        rows=tuple(row or ()),
        random=random,
        seed=seed,
        longest=longest,
        least_supervised=least_supervised,
        packs=packs,
        source=source,
    )
    checked = _load(config, overrides)
    from sft_dist.runtime.quiet import quiet_libraries

    quiet_libraries()
    from sft_dist.train.show_data import show_data

    show_data(checked, choice, form)


@model_app.command("fetch")
def fetch(
    config: ConfigPath,
    overrides: Overrides = None,
    weights: Annotated[
        bool,
        typer.Option(
            "--weights/--no-weights", help="Without weights it is enough to check a run and prepare its data."
        ),
    ] = True,
) -> None:
    """Bring the hub model of a configuration into the local hub cache; training itself never asks the hub.

    Goes on where an interrupted fetch stopped. For a model that is not public, set HF_TOKEN or run: hf auth login.
    """
    model = _load(config, overrides).model
    from sft_dist.model.hub import fetch as fetch_model
    from sft_dist.model.hub import is_folder_path, model_folder

    if is_folder_path(model.path) or Path(model.path).is_dir():
        folder = model_folder(model.path, model.revision)
        typer.echo(f"{folder} is a folder on this machine: there is nothing to fetch")
        return
    fetched = fetch_model(model.path, model.revision, weights=weights, say=typer.echo)
    news = f"{fetched.new_bytes / 1e9:,.3f} GB of weights fetched" if fetched.new_bytes else "nothing was missing"
    typer.echo(f"{model.path} is in {fetched.folder}: {news if weights else 'configuration and tokenizer'}")


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs one command and exits with its code.

    Args:
        arguments: of the command line, without the program's name; those of this process by default.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    rest = [argument for argument in given if argument != "--debug"]
    try:
        app(args=rest, prog_name="sft-dist", obj=len(rest) < len(given))
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED_EXIT_CODE)
    except Exception as error:
        report_unexpected(error)
        sys.exit(UNEXPECTED_EXIT_CODE)
