"""The `gsl` command: every stage, and a look at what they left behind.

A command imports what it opens, so `gsl versions` starts without torch or Ray. A caller's mistake is one line on
standard error and exit code 2.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer
from rich.table import Column, Table

from gsl_dist import jobs
from gsl_dist.config import Strict, load_config
from gsl_dist.errors import BadInput, GslError
from gsl_dist.hits import NO_ID, Effort, Hits
from gsl_dist.screen import Screen, console, show_error, show_figures

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

C = TypeVar("C", bound=Strict)

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)
for command in (jobs.submit, jobs.status, jobs.logs, jobs.stop, jobs.pipeline):
    app.command(rich_help_panel="Jobs on a cluster")(command)

Config = Annotated[Path, typer.Argument(metavar="CONFIG", help="a YAML file; see configs/")]
Overrides = Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="settings laid over the file")]
Index = Annotated[str, typer.Argument(metavar="INDEX", help="the index folder")]


@app.command()
def train(config: Config, overrides: Overrides = None) -> None:
    """Train an encoder and the codebook it lands on; a relaunch goes on where it stopped.

    Example: gsl train configs/fashion/train.yaml fit.epochs=10
    """
    from gsl_dist.cluster.train import TrainConfig, run_train

    run_stage(TrainConfig, run_train, config, overrides)


@app.command()
def codebook(config: Config, overrides: Overrides = None) -> None:
    """Give the codebook of an index: the network's own, or one fitted to a corpus.

    Example: gsl codebook configs/fashion/codebook.yaml
    """
    from gsl_dist.cluster.codebook import CodebookConfig, run_codebook

    run_stage(CodebookConfig, run_codebook, config, overrides)


@app.command()
def encode(config: Config, overrides: Overrides = None) -> None:
    """Encode a corpus into shards of codes; a relaunch does only the shards that are missing.

    Example: gsl encode configs/fashion/encode.yaml resources.workers=8
    """
    from gsl_dist.cluster.encode import EncodeConfig, run_encode

    run_stage(EncodeConfig, run_encode, config, overrides)


@app.command()
def build(config: Config, overrides: Overrides = None) -> None:
    """Build a version of an index from codes, and promote it.

    Example: gsl build configs/fashion/build.yaml version=v2 promote=false
    """
    from gsl_dist.cluster.build import BuildConfig, run_build

    run_stage(BuildConfig, run_build, config, overrides)


@app.command()
def compact(config: Config, overrides: Overrides = None) -> None:
    """Make the next version: what was written over this one becomes part of it, and codes are added.

    Example: gsl compact configs/fashion/compact.yaml codes=build/new/codes duplicates=replace
    """
    from gsl_dist.cluster.compact import CompactConfig, run_compact

    run_stage(CompactConfig, run_compact, config, overrides)


@app.command()
def serve(config: Config, overrides: Overrides = None) -> None:
    """Serve a version: replicas that hold its shards, and a router in front of them.

    With RAY_ADDRESS set the service stays up on that cluster; without, it runs until Ctrl-C.

    Example: gsl serve configs/fashion/serve.yaml port=9000
    """
    from gsl_dist.cluster.serve import ServeConfig, run_serve, stop_service

    run_stage(ServeConfig, run_serve, config, overrides)
    if os.environ.get("RAY_ADDRESS"):
        return
    console.print("serving; Ctrl-C stops it")
    try:
        while True:
            time.sleep(3600)
    except KeyboardInterrupt:
        stop_service()


@app.command()
def evaluate(config: Config, overrides: Overrides = None) -> None:
    """Measure a version with held-out queries: mAP, recall against exact search, quantization error.

    Example: gsl evaluate configs/fashion/evaluate.yaml version=v2
    """
    from gsl_dist.cluster.evaluate import EvaluateConfig, run_evaluate

    run_stage(EvaluateConfig, run_evaluate, config, overrides)


@app.command()
def tune(config: Config, overrides: Overrides = None) -> None:
    """Measure what recall takes, on queries held out, and keep it: a query may then ask for recall=0.95.

    Example: gsl tune configs/fashion/tune.yaml target=0.9
    """
    from gsl_dist.cluster.tune import TuneConfig, run_tune

    made = run_stage(TuneConfig, run_tune, config, overrides)
    table = Table("k", "recall", "probes", "refine", "ms a query", title="the curve, fastest first")
    for point in made["points"]:
        shown = (point["k"], f"{point['recall']:.4f}", point["probes"], point["refine"], f"{point['latency_ms']:.3f}")
        table.add_row(*map(str, shown))
    console.print(table)


@app.command()
def match(config: Config, overrides: Overrides = None) -> None:
    """Find the nearest items for every row of a corpus, or for a version's own: joins, near duplicates, their groups.

    Example: gsl match configs/fashion/match.yaml queries=null within=1.5 groups=true
    """
    from gsl_dist.cluster.match import MatchConfig, run_match

    run_stage(MatchConfig, run_match, config, overrides)


@app.command()
def plan(
    settings: Annotated[list[str], typer.Argument(metavar="KEY=VALUE...", help="rows, dim, code_bytes, machines ...")],
    costs: Annotated[
        str | None, typer.Option(help="a file of benchmarks/costs.py; by default that of the package")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="print JSON")] = False,
) -> None:
    """Tell what an index will take before there is one: cells, shards, memory, disk, time to build and to ask.

    Settings: rows, dim, code_bytes, recall, k, machines, cores, memory_gb, vectors (bytes kept of a dimension), cells.

    Example: gsl plan rows=1e9 dim=128 code_bytes=16 recall=0.9 machines=10 cores=16 memory_gb=64
    """
    from gsl_dist.plan import load_costs, make_plan, read_task

    known = load_costs(costs)
    task = read_task(settings)
    made = make_plan(task, known)
    if as_json:
        sys.stdout.write(json.dumps({"task": task.model_dump(), "plan": made.model_dump()}) + "\n")
        return
    show_figures("plan", made.model_dump())
    console.print(f"by costs measured on {known.made_on}; recall is that of the lists looked into")


@app.command()
def demo(
    output: Annotated[Path, typer.Option(help="where the report and all artefacts go")] = Path("build/demo"),
    seed: Annotated[int, typer.Option(min=0, help="seed of both trainings")] = 0,
) -> None:
    """Run the main job on 12,000 shipped images and leave a report.

    Example: gsl demo --output build/demo
    """
    from gsl_dist.demo import run_demo

    with Screen() as screen:
        report = run_demo(output.resolve(), seed, screen)
    show_figures("demo", {key: value for key, value in report.items() if isinstance(value, (str, int, float))})
    console.print(f"report: {output / 'report.html'}")


@app.command()
def search(  # noqa: PLR0913 - the options of a command
    target: Annotated[str, typer.Argument(metavar="TARGET", help="an index folder, or the URL of a service")],
    query: Annotated[
        Path,
        typer.Argument(metavar="QUERY", help=".npy, .fvecs, an image, or a=FILE,b=FILE"),
    ],
    k: Annotated[int, typer.Option("-k", help="neighbours for each query")] = 10,
    probes: Annotated[
        int | None, typer.Option(help="cells, or regions of lines, to look into; by default 16 cells")
    ] = None,
    refine: Annotated[
        int | None, typer.Option(help="candidates for each hit, ranked by the vectors kept; by default 4 if they are")
    ] = None,
    recall: Annotated[
        float | None, typer.Option(help="share of the true neighbours, instead of probes and refine: see gsl tune")
    ] = None,
    where: Annotated[
        str | None, typer.Option(help='which items may be hits, as JSON: {"label": 3, "year": {"$gte": 1990}}')
    ] = None,
    version: Annotated[str | None, typer.Option(help="a version of the folder; by default the promoted one")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="print JSON")] = False,
) -> None:
    """Search a version for neighbours of vectors, of an image, or of modalities.

    An image passes through the encoder of the version; a service has one if it was started with `encoder=true`.

    Example: gsl search build/demo/index coat.png -k 5
    """
    effort = Effort(k, probes, refine, recall, _read_json(where))
    hits = _search_service(target, query, effort) if "://" in target else _search_folder(target, query, effort, version)
    if as_json:
        shown = {"ids": hits.ids.tolist(), "distances": hits.distances.tolist(), "version": hits.version}
        sys.stdout.write(json.dumps(shown) + "\n")
        return
    table = Table("query", "rank", "id", "distance", title=f"version {hits.version}")
    for row, (ids, distances) in enumerate(zip(hits.ids, hits.distances, strict=True)):
        for rank, (found, distance) in enumerate(zip(ids, distances, strict=True), 1):
            if found != NO_ID:
                table.add_row(str(row), str(rank), str(found), f"{distance:.4f}")
    console.print(table)


@app.command()
def versions(index: Index) -> None:
    """List the versions of an index; a star marks the one that is served.

    Example: gsl versions build/demo/index
    """
    from gsl_dist.index.manifest import current_version, list_versions, open_version
    from gsl_dist.storage import Folder

    folder = Folder(index)
    served, names = current_version(folder), list_versions(folder)
    if not names:
        raise BadInput("index", index, "there is no version in this folder; gsl build makes one")
    whole = Column("version", no_wrap=True)
    table = Table("", whole, "rows", "shards", "bytes an item", "codebook", Column("created", overflow="fold"))
    for name in names:
        manifest = open_version(folder, name)
        figures = (manifest.rows, len(manifest.shards), manifest.bytes_per_item)
        mark = "*" if name == served else ""
        table.add_row(mark, name, *map(str, figures), manifest.fingerprint[:12], manifest.created)
    console.print(table)


@app.command()
def promote(index: Index, version: Annotated[str, typer.Argument(metavar="VERSION")]) -> None:
    """Let a version be the one that is served next; promoting the version before rolls back.

    Example: gsl promote build/demo/index v-3f2a90b1c5d7
    """
    from gsl_dist.index.manifest import promote_version
    from gsl_dist.storage import Folder

    manifest = promote_version(Folder(index), version)
    console.print(f"{manifest.version} is promoted: {manifest.rows} rows in {len(manifest.shards)} shards")


@app.command()
def token(
    tokens: Annotated[str, typer.Argument(metavar="FILE", help="the file of tokens; made if it is not there")],
    name: Annotated[str, typer.Argument(help="whose token it is")],
    admin: Annotated[bool, typer.Option("--admin", help="may write, promote and compact, and not only read")] = False,
) -> None:
    """Make a token for a service, show it once, and keep its digest in the file that `serve` is told of.

    Example: gsl token tokens.json dashboard
    """
    from gsl_dist.service.access import add_token, make_token

    text, known = make_token(name, "admin" if admin else "read")
    add_token(tokens, known)
    sys.stdout.write(text + "\n")


@app.command()
def delete(
    target: Annotated[str, typer.Argument(metavar="TARGET", help="the URL of a service, or a folder that none serves")],
    ids: Annotated[list[int], typer.Argument(help="the items")],
    token: Annotated[str | None, typer.Option(envvar="GSL_TOKEN", help="of scope admin, if the service asks")] = None,
) -> None:
    """End items: no query finds them from then on.

    Example: gsl delete http://127.0.0.1:8080 17 42
    """
    if "://" in target:
        from gsl_dist.client import Client

        with Client(target, token=token) as client:
            seq = client.delete(ids)
    else:
        seq = _delete_in_folder(target, ids)
    console.print(f"commit {seq}: {len(ids)} items ended")


@app.command()
def verify(index: Index, version: Annotated[str | None, typer.Argument(metavar="[VERSION]")] = None) -> None:
    """Check every checksum and fingerprint of a version, by default the promoted one.

    Example: gsl verify build/demo/index
    """
    from gsl_dist.index.manifest import open_version, verify_version
    from gsl_dist.index.search import open_searcher
    from gsl_dist.storage import Folder

    folder = Folder(index)
    faults = verify_version(folder, version)
    for fault in faults:
        show_error("damaged", fault)
    if faults:
        raise typer.Exit(2)
    # Opening compares the codebook inside every shard file with the version's.
    rows = open_searcher(index, version).rows
    manifest = open_version(folder, version)
    if rows != manifest.rows:
        raise BadInput("rows", rows, f"the manifest of {manifest.version} counts {manifest.rows}")
    console.print(f"{manifest.version} is whole: {len(manifest.files) + 1} files, {rows} rows")


def run_stage(kind: type[C], run: Callable[[C, Screen], Any], config: Path, overrides: list[str] | None) -> Any:
    """Run a stage with progress on the screen, show what it made, and give it."""
    from gsl_dist.cluster.job import summarize

    settings = load_config(kind, config, overrides or [])
    with Screen() as screen:
        made = run(settings, screen)
    show_figures(run.__name__.removeprefix("run_"), summarize(made))
    return made


def _delete_in_folder(index: str, ids: list[int]) -> int:
    from gsl_dist.index.log import Write, WriteLog
    from gsl_dist.index.manifest import open_version
    from gsl_dist.index.overlay import read_overlay
    from gsl_dist.storage import Folder

    folder = Folder(index)
    manifest, log = open_version(folder), WriteLog(folder)
    overlay = read_overlay(folder, manifest, log)
    return log.append(overlay.check([Write("delete", item) for item in ids]), manifest.space, overlay.seq)


def _search_service(url: str, query: Path, effort: Effort) -> Hits:
    from gsl_dist.client import Client

    with Client(url, timeout_s=60) as client:
        if _is_vectors(query):
            return client.search(_read_vectors(query), **effort._asdict())
        return client.search(items=[_read_item(query)], **effort._asdict())


def _search_folder(index: str, query: Path, effort: Effort, version: str | None) -> Hits:
    from gsl_dist.index.overlay import open_written

    searcher = open_written(index, version)
    if _is_vectors(query):
        return searcher.search(_read_vectors(query), **effort._asdict())
    from gsl_dist.cluster.evaluate import embed_queries

    manifest = searcher.manifest
    if "=" in str(query) and manifest.model:
        from gsl_dist.cluster.query import QueryEncoder

        return searcher.search(QueryEncoder(index, manifest).encode([_read_item(query)]), **effort._asdict())
    shape = manifest.configs.get("train", {}).get("corpus", {}).get("image")
    if shape is None or not manifest.model:
        raise BadInput("query", str(query), f"version {manifest.version} has no image encoder; give .npy or .fvecs")
    embedded = embed_queries(index, manifest, _read_image(query, shape)[None])
    return searcher.search(embedded, **effort._asdict())


def _read_json(where: str | None) -> Any:
    try:
        return where and json.loads(where)
    except ValueError as error:
        raise BadInput("where", where, f"it must be JSON ({error})") from None


def _is_vectors(query: Path) -> bool:
    return query.suffix in (".npy", ".fvecs")


def _read_vectors(query: Path) -> NDArray[np.float32]:
    from gsl_dist.data import CorpusConfig, open_corpus

    vectors: NDArray[np.float32] = open_corpus(CorpusConfig(path=str(query))).read_all().items
    return vectors


def _read_item(query: Path) -> bytes | dict[str, bytes]:
    """Read a file, or a file of each modality: `image=coat.png,edges=coat-edges.png`."""
    named = [part.partition("=") for part in str(query).split(",")]
    try:
        if "=" not in str(query):
            return query.read_bytes()
        return {name.strip(): Path(file).read_bytes() for name, _, file in named}
    except OSError as error:
        raise BadInput("query", str(query), f"it must be a readable file ({error})") from error


def _read_image(query: Path, shape: dict[str, Any]) -> NDArray[np.uint8]:
    from gsl_dist.data import ImageConfig, decode_image

    try:
        return decode_image(query.read_bytes(), ImageConfig(**shape))
    except (OSError, ValueError) as error:
        raise BadInput("query", str(query), f"it must be a readable image, .npy or .fvecs ({error})") from error


def main() -> None:
    """Run the command line."""
    try:
        app()
    except GslError as error:
        show_error("error", error)
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main()
