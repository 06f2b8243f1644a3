"""The command line: wellread list | show | run | eval | index | search | measured | demo.

Built with click alone, since the commands under `run` are made from the methods' signatures when they are asked for. Nothing that imports
torch is imported before a command needs it, and output is plain text, so that `list` is there at once and pipes well.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import textwrap
import traceback
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

import wellread
from wellread import catalog
from wellread.errors import BadInput, Diverged

if TYPE_CHECKING:
    from click.shell_completion import CompletionItem

    from wellread.method import Parameter

# --- the whole


class Stopped(Exception):
    """Ctrl-C, with the line that says how to go on. click would turn KeyboardInterrupt into an exception that says nothing."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code: 0, 2 for bad input, 1 for anything else, 130 after Ctrl-C. Never a traceback."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in words or os.environ.get("WELLREAD_DEBUG", "") not in ("", "0")
    words = [word for word in words if word != "--debug"]  # taken anywhere: people add it to the end of the line that failed
    try:
        return int(app.main(words, prog_name="wellread", complete_var="_WELLREAD_COMPLETE", standalone_mode=False) or 0)
    except (BadInput, click.ClickException) as error:
        if debug:
            traceback.print_exc()
        return _fail(error.format_message() if isinstance(error, click.ClickException) else str(error), 2)
    except Stopped as stopped:
        return _fail(str(stopped), 130)
    except (KeyboardInterrupt, click.Abort):
        return _fail("stopped", 130)
    except Diverged as error:
        if debug:
            traceback.print_exc()
        return _fail(str(error), 1)
    except Exception as error:
        if debug:
            traceback.print_exc()
        return _fail(f"{type(error).__name__}: {error} (--debug shows the traceback)", 1)


def _fail(message: str, code: int) -> int:
    click.echo("wellread: " + " ".join(message.split()), err=True)
    return code


def _json(value: Any) -> None:
    click.echo(json.dumps(value, indent=1, ensure_ascii=False, default=str))


def _print_version(context: click.Context, _parameter: click.Parameter, wanted: bool) -> None:
    if wanted and not context.resilient_parsing:
        click.echo(f"wellread {wellread.__version__}")
        context.exit()


def _print_completion(context: click.Context, _parameter: click.Parameter, shell: str | None) -> None:
    if shell and not context.resilient_parsing:
        from click.shell_completion import get_completion_class

        completion = get_completion_class(shell)
        assert completion is not None
        click.echo(completion(app, {}, "wellread", "_WELLREAD_COMPLETE").source())
        context.exit()


@click.group(
    invoke_without_command=True,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 140},
    epilog="--debug anywhere on the line (or WELLREAD_DEBUG=1) shows the traceback of an error.",
)
@click.option("--version", is_flag=True, is_eager=True, expose_value=False, callback=_print_version, help="Show the version.")
@click.option(
    "--completion",
    type=click.Choice(["bash", "zsh", "fish"]),
    is_eager=True,
    expose_value=False,
    callback=_print_completion,
    help='Print the shell\'s completion script; for bash put in ~/.bashrc: eval "$(wellread --completion bash)".',
)
@click.pass_context
def app(context: click.Context) -> None:
    """Published research on pre-trained networks, run on your own network and data."""
    if context.invoked_subcommand is None:
        click.echo(context.get_help())


_as_json = click.option("--json", "as_json", is_flag=True, help="Print JSON.")

# --- list, show, measured: read from the cards and the measurements, without torch


@app.command("list")
@click.argument("words", nargs=-1, shell_complete=lambda *_: [])
@click.option("--chapter", shell_complete=lambda _c, _p, start: [name for name in catalog.chapters() if name.startswith(start)], help="Only these.")
@_as_json
@click.option("--markdown", is_flag=True, help="Print the table of the README.")
def list_methods(words: tuple[str, ...], chapter: str | None, as_json: bool, markdown: bool) -> None:
    """The methods; with WORDS those whose card holds all of them."""
    cards = catalog.methods()
    known = sorted({card.chapter for card in cards})
    if chapter is not None and chapter not in known:
        raise BadInput(f"there is no chapter {chapter!r}: choose {', '.join(known)}")
    cards = catalog.find([card for card in cards if chapter in (None, card.chapter)], words)
    if as_json:
        keys = ("name", "chapter", "wish", "brings", "gets", "title", "paper")
        _json([{key: getattr(card, key) for key in keys} for card in cards])
    elif markdown:
        click.echo(markdown_table(cards))
    elif not cards:
        click.echo("no method's card holds these words: wellread list shows all" if words else "there are no finished methods yet")
    else:
        name, room = max(len(card.name) for card in cards), max(len(card.chapter) for card in cards)
        for card in cards:
            _row(f"{card.name:{name}}  {card.chapter:{room}}  ", card.wish)


def _row(start: str, text: str) -> None:
    """`start` and then `text`, wrapped under itself in a terminal and on one line in a pipe."""
    if not sys.stdout.isatty():
        click.echo(start + text)
        return
    indent = len(click.unstyle(start))
    lines = textwrap.wrap(text, max(shutil.get_terminal_size().columns - indent, 30)) or [""]
    click.echo(start + ("\n" + " " * indent).join(lines))


def markdown_table(cards: Sequence[catalog.Card]) -> str:
    """The README's table: what the paper claims beside what was measured here."""
    lines = ["| method | I want | I bring | the paper | here |", "| --- | --- | --- | --- | --- |"]
    for card in cards:
        link = f"[{card.name}](wellread/{card.chapter}/{card.path.name})"
        claim = _claim(card.claims[0]) if card.claims else ""
        lines.append(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in (link, card.wish, card.brings, claim, _here(card)))} |")
    return "\n".join(lines)


def _claim(claim: dict[str, Any]) -> str:
    against = f" against {claim['baseline']}" if claim.get("baseline") not in (None, "") else ""
    return f"{claim.get('method')}{against}, {claim.get('metric')}, {claim.get('on')} ({claim.get('source')})"


def _here(card: catalog.Card) -> str:
    measured = catalog.measurements(card.name)
    if not measured:
        return "not measured"
    expects = measured["expects"]
    first = f"{expects[0]['sentence']}: {catalog.shown(expects[0]['value'])}; " if expects else ""
    held = sum(expect["passed"] for expect in expects)
    return f"{first}{held} of {len(expects)} expectations held" + (" (older version)" if catalog.stale(card.name) else "")


@app.command()
@click.argument("method", shell_complete=lambda _c, _p, start: [card.name for card in catalog.methods() if card.name.startswith(start)])
@_as_json
def show(method: str, as_json: bool) -> None:
    """The card of METHOD, its signature, and what was measured."""
    card = catalog.card(method)
    if as_json:
        keys = ("name", "chapter", "title", "paper", "wish", "brings", "gets", "claims", "body", "draft")
        record = {key: getattr(card, key) for key in keys}
        _json({**record, "signature": catalog.signature(method), "measured": catalog.measurements(method), "stale": catalog.stale(method)})
        return
    paper = card.paper
    link = f"arXiv {paper['arxiv']}" if paper.get("arxiv") else f"doi {paper['doi']}" if paper.get("doi") else str(paper.get("url", ""))
    code = f"; code {paper['code']}" if paper.get("code") else ""
    click.echo(f"{click.style(card.name, bold=True)} ({card.chapter})\n{card.title}\n{paper.get('authors')} {paper.get('year')}, {link}{code}\n")
    for what, text in (("wish", card.wish), ("brings", card.brings), ("gets", card.gets)):
        _row(f"{what:8}", text)
    click.echo(f"\n{card.body}\n")
    _show_measured(card)
    click.echo(f"\n{catalog.signature(method)}\n\nrun it:  wellread run {card.name} --help")


@app.command()
@_as_json
def measured(as_json: bool) -> None:
    """What each paper claims beside what was measured here."""
    cards = catalog.methods()
    if as_json:
        _json([_measured_record(card) for card in cards])
        return
    for card in cards:
        click.echo(f"{click.style(card.name, bold=True)} ({card.chapter})")
        _show_measured(card)
        click.echo()
    results = [catalog.measurements(card.name) or {"expects": []} for card in cards]
    expects = [expect["passed"] for result in results for expect in result["expects"]]
    click.echo(f"{len(cards)} methods, {len(expects)} expectations stated before measuring, {sum(expects)} held")


def _measured_record(card: catalog.Card) -> dict[str, Any]:
    found = catalog.measurements(card.name)
    return {"method": card.name, "chapter": card.chapter, "claims": card.claims, "stale": catalog.stale(card.name), "measured": found}


def _show_measured(card: catalog.Card) -> None:
    for claim in card.claims:
        _row("  paper   ", _claim(claim))
    found = catalog.measurements(card.name)
    if not found:
        _row("  here    ", f"not measured: make bench NAME={card.path.stem}")
        return
    for expect in found["expects"]:
        word, colour = ("held    ", "green") if expect["passed"] else ("failed  ", "red")
        wanted = f"{'at least' if expect.get('at_least', True) else 'at most'} {catalog.shown(expect['threshold'])}"
        _row(f"  {click.style(word, fg=colour)}", f"{expect['sentence']}: {catalog.shown(expect['value'])} ({wanted})")
    for kind, word in (("figures", "figure  "), ("baselines", "against ")):
        for name, figure in found.get(kind, {}).items():
            spread = f" ± {figure['sd']:.2g}" if figure.get("sd") is not None else ""
            _row(f"  {word}", f"{name} {catalog.shown(figure['mean'])}{spread}")
    for note in found.get("notes", []):
        _row("  note    ", note)
    machine = found.get("machine", {})
    kind = machine.get("gpu") or f"{machine.get('cores')} x {machine.get('cpu')}" if isinstance(machine, dict) else machine
    _row("  how     ", f"{len(found['seeds'])} seeds, {found['seconds']:.0f} s on {kind}, {found['date']}")
    if catalog.stale(card.name):
        _row("  stale   ", f"the method's file has changed since: make bench NAME={card.path.stem}")


# --- run: one command per method, made from its signature

RESERVED = ("out", "device", "precision", "force", "json", "quiet", "debug", "help")  # no method may have a parameter of these names


class Value(click.ParamType):
    """Text to a value of a setting: a number, a word, a choice, true or false, and "none" where None is allowed."""

    def __init__(self, parameter: Parameter) -> None:
        self.of = parameter
        kinds = {int: "integer", float: "number", bool: "true|false", str: "text", Path: "path"}
        name = "|".join(map(str, parameter.choices)) if parameter.choices else kinds[parameter.type]
        self.name = name + "|none" * (parameter.optional and "none" not in name)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if self.of.optional and value.lower() == "none":
            return None
        try:
            if self.of.choices or self.of.type is bool:
                return {str(choice): choice for choice in self.of.choices or (True, False)}[value if self.of.choices else value.capitalize()]
            return self.of.type(value)
        except (ValueError, KeyError):
            near = get_close_matches(value, self.name.split("|"), n=1)
            self.fail(f"{value!r} is not {self.name}" + (f": did you mean {near[0]}?" if near else ""), param, ctx)

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        from click.shell_completion import CompletionItem

        return [CompletionItem(word) for word in self.name.split("|") if "|" in self.name and word.startswith(incomplete)]


class MethodOption(click.Option):
    """An option made from a parameter of the method. When it is not given, the method's own default stands."""

    def __init__(self, parameter: Parameter) -> None:
        self.of = parameter
        flag = "--" + parameter.name.replace("_", "-")
        notes = [] if parameter.required else [f"default: {_shown(parameter.default)}"]
        notes += ["repeat the option for each"] if parameter.many else []
        meaning = f"{parameter.help} [{'; '.join(notes)}]" if notes else parameter.help
        common: dict[str, Any] = {"required": parameter.required, "help": meaning.strip(), "multiple": parameter.many}
        if parameter.type is bool and not parameter.optional and not parameter.many:
            super().__init__([f"{flag}/--no-{flag[2:]}"], **common)
        elif _brought(parameter):
            super().__init__([flag], metavar="DATA" if parameter.needs else "NETWORK", type=click.Path(), **common)  # a name passes; a path completes
        else:
            value = Value(parameter)
            super().__init__([flag], metavar=value.name, type=value, **common)

    def argument(self, value: Any) -> Any:
        """The parsed value as the method takes it."""
        values = list(value) if self.of.many else [value]
        return values if self.of.many and values != [None] else values[0]


def _brought(parameter: Parameter) -> bool:
    return parameter.needs is not None or getattr(parameter.type, "__name__", "") == "Network"


def _typeable(parameter: Parameter) -> bool:
    """Whether it can be given in a shell. What cannot (a function, a tensor) keeps its default and is for Python only."""
    return _brought(parameter) or parameter.choices is not None or parameter.type in (int, float, bool, str, Path)


def _shown(default: Any) -> str:
    if isinstance(default, bool):
        return "yes" if default else "no"
    return "none" if default is None else str(getattr(default, "__name__", default))


COMMON = [
    click.Option(["--out"], required=True, metavar="FOLDER", type=click.Path(), help="Where the result is written; refused when it exists."),
    click.Option(["--force"], is_flag=True, help="Replace an existing --out, and discard an unfinished run of other settings."),
    click.Option(["--device"], default="auto", metavar="NAME", help="cpu, cuda, cuda:1, mps [default: the fastest there is]"),
    click.Option(["--precision"], type=click.Choice(["float32", "bfloat16", "float16"]), default="float32", help="Arithmetic. [default: float32]"),
    click.Option(["--json", "as_json"], is_flag=True, help="Print the result as JSON."),
    click.Option(["--quiet"], is_flag=True, help="No progress bars."),
]


class MethodCommand(click.Command):
    """`wellread run METHOD`. The method is imported only when its options are asked for, so that METHOD itself completes at once."""

    def __init__(self, card: catalog.Card) -> None:
        super().__init__(card.name, help=card.wish, short_help=card.wish, callback=None)
        self.card = card
        self.options: list[MethodOption] | None = None

    def get_params(self, ctx: click.Context) -> list[click.Parameter]:
        return [*self.method_options(), *COMMON, *super().get_params(ctx)]

    def method_options(self) -> list[MethodOption]:
        if self.options is None:
            from wellread.method import parameters

            self.options = [MethodOption(parameter) for parameter in parameters(catalog.function(self.card.name)) if _typeable(parameter)]
        return self.options

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        from wellread.method import returns

        options = self.method_options()
        groups: list[tuple[str, Sequence[click.Parameter]]] = [
            (f"Brings ({self.card.brings})", [option for option in options if option.of.kind == "brings"]),
            ("Settings", [option for option in options if option.of.kind != "brings"]),
            ("Running", [*COMMON, *super().get_params(ctx)]),
        ]
        for title, members in groups:
            rows = [record for member in members if (record := member.get_help_record(ctx))]
            if rows:
                with formatter.section(title):
                    formatter.write_dl(rows)
        with formatter.section(f"Gets ({returns(catalog.function(self.card.name))})"):
            formatter.write_text(self.card.gets)

    def invoke(self, ctx: click.Context) -> Any:
        values = dict(ctx.params)
        common = {name: values.pop(name) for name in ("out", "force", "device", "precision", "as_json", "quiet")}
        given = {
            option.of.name: option.argument(values[option.of.name])
            for option in self.method_options()
            if ctx.get_parameter_source(option.of.name) == click.core.ParameterSource.COMMANDLINE
        }
        return run_method(self.card, given, **common)


class Methods(click.Group):
    """The methods as commands, found in the catalogue."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return [card.name for card in catalog.methods()]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        try:
            return MethodCommand(catalog.card(cmd_name))
        except BadInput:
            if ctx.resilient_parsing:  # the shell completes a line that need not be right
                return None
            raise


@app.group(cls=Methods, invoke_without_command=True, subcommand_metavar="METHOD --ARG VALUE ... --out FOLDER")
@click.pass_context
def run(context: click.Context) -> None:
    """Run METHOD on your networks and data. `wellread run METHOD --help` shows what it takes."""
    if context.invoked_subcommand is None:
        raise BadInput("name the method to run: wellread list shows them")


def run_method(card: catalog.Card, given: dict[str, Any], *, out: str, force: bool, device: str, precision: str, as_json: bool, quiet: bool) -> None:
    """Run a method, save what it returns in `out`, and print it. Checkpoints lie in `out`.partial until then, so that a killed run goes on."""
    from wellread.folders import writable
    from wellread.runtime import using

    first = os.environ.get("RANK", "0") == "0"  # under `accelerate launch` every process runs this; one of them writes
    target = writable(out, force) if first else Path(out).expanduser().resolve()
    partial = target.with_name(target.name + ".partial")
    function = catalog.function(card.name)
    try:
        with _plain_warnings(), using(device=device, precision=precision, progress=first and not quiet, folder=partial):
            if first:
                _continue(partial, {"method": card.name, "code": catalog.code_sha256(card.name), "given": given, "precision": precision}, force)
            result = function(**given)
        if not first:
            return
        result.save(target, force)
        shutil.rmtree(partial, ignore_errors=True)
    except KeyboardInterrupt:
        kept = _checkpoints(partial)
        raise Stopped(f"stopped: the same command goes on from the checkpoints in {partial}" if kept else "stopped: nothing was written") from None
    finally:
        if first and partial.is_dir() and not _checkpoints(partial):
            shutil.rmtree(partial, ignore_errors=True)
    _print_result(result, out, as_json)


@contextmanager
def _plain_warnings() -> Iterator[None]:
    """Warnings as one line each, without those that libraries address to programmers."""
    with warnings.catch_warnings():
        for category in (DeprecationWarning, PendingDeprecationWarning, FutureWarning):
            warnings.simplefilter("ignore", category)
        warnings.showwarning = lambda message, *_, **__: click.echo(f"note: {' '.join(str(message).split())}", err=True)
        yield


def _checkpoints(partial: Path) -> bool:
    return partial.is_dir() and any(path.name != "command.json" for path in partial.iterdir())


def _continue(partial: Path, command: dict[str, Any], force: bool) -> None:
    """Note the command beside its checkpoints, and refuse to go on from those of another."""
    note = partial / "command.json"
    text = json.dumps(command, sort_keys=True, default=str)
    if partial.exists() and not (note.exists() and note.read_text("utf-8") == text):
        if not force:
            raise BadInput(f"{partial} holds an unfinished run of another command: choose another --out, or discard it with --force")
        if not note.exists():
            raise BadInput(f"{partial} is in the way and wellread did not write it: choose another --out, or remove it yourself")
        shutil.rmtree(partial)
    partial.mkdir(parents=True, exist_ok=True)
    note.write_text(text, "utf-8")


def _print_result(result: Any, out: str, as_json: bool) -> None:
    from wellread.network import Network

    if isinstance(result, Network):
        if as_json:
            keys = ("fingerprint", "output", "labels", "architecture", "edits", "lineage", "measured")
            reports = {name: report.to_dict() for name, report in result.reports.items()}
            _json({"out": out, "kind": "Network", **{key: getattr(result, key) for key in keys}, "reports": reports})
            return
        for report in result.reports.values():
            report.show()
        texts = result.input is not None and result.input.column == "text"
        following = {
            "score": f'wellread search INDEX "what you want to know" --rerank {out}',
            "embedding": f"wellread index --encoder {out} --corpus folder:NOTES --out INDEX" if texts else f"wellread run transfer --networks {out} ...",
        }.get(result.output, f"wellread eval {out} DATA     with data that it has not seen")
        click.echo(f"{result!r}\nsaved in {out}\nnext:  {following}")
    elif as_json:
        _json({"out": out, "kind": type(result).__name__, **result.to_dict()})
    else:
        result.show()
        click.echo(f"saved in {out}\nnext:  open {Path(out) / 'report.html'} in a browser, or in Python: wellread.load_result({out!r})")


# --- eval, demo


@app.command("eval")
@click.argument("network", type=click.Path())
@click.argument("data")
@click.option("--device", default="auto", metavar="NAME", help="cpu, cuda, cuda:1, mps [default: the fastest there is]")
@click.option("--quiet", is_flag=True, help="No progress bars.")
@_as_json
def evaluate(network: str, data: str, device: str, quiet: bool, as_json: bool) -> None:
    """Evaluate NETWORK (a name or a folder) on DATA (elpv:test, folder:PATH, csv:PATH, ...)."""
    from wellread.data import as_data
    from wellread.evaluate import evaluate as measure
    from wellread.network import load
    from wellread.runtime import using

    table = as_data(data, split="test")
    with _plain_warnings(), using(device=device, progress=not quiet):
        report = measure(load(network), table)
    if as_json:
        _json(report.to_dict())
    else:
        report.show()


# --- one network of many


@app.command()
@click.argument("network", type=click.Path())
@click.argument("size", required=False)
@click.option("--data", metavar="DATA", help="Examples to estimate batch norm on, where the network kept no statistics for the size.")
@click.option("--out", metavar="FOLDER", type=click.Path(), help="Where the cut network is saved.")
@click.option("--force", is_flag=True, help="Replace an existing --out.")
@_as_json
def cut(network: str, size: str | None, data: str | None, out: str | None, force: bool, as_json: bool) -> None:
    """Cut SIZE out of NETWORK, which sortednet, starbucks or stitchable made; without SIZE, list its sizes."""
    from wellread.data import as_data
    from wellread.elastic.hardware_aware_search import chosen, sizes_of
    from wellread.folders import writable
    from wellread.network import load
    from wellread.results import Report

    if size is not None and out is None:
        raise BadInput(f"where shall the network of size {size} be saved? add --out FOLDER")
    with _plain_warnings():
        whole = load(network)
        rows = {str(row["size"]): row for row in sizes_of(whole)[1].values()}
        if size is None:
            if as_json:
                _json(list(rows.values()))
            else:
                Report(f"{len(rows)} sizes", tables={"sizes": list(rows.values())}).show()
            return
        if size not in rows:
            near = get_close_matches(size, rows, 5, 0.0)
            raise BadInput(f"{network} has no size {size!r}; of its {len(rows)} sizes the nearest names are {', '.join(near)}: wellread cut {network}")
        target = writable(str(out), force)
        found = chosen(whole, rows[size], None if data is None else as_data(data))
        found.save(target, force)
    _print_result(found, str(out), as_json)


# --- index, search


@app.command()
@click.option("--encoder", required=True, metavar="NETWORK", type=click.Path(), help="A network that gives embeddings of text: a name or a folder.")
@click.option("--corpus", required=True, metavar="DATA", help="folder:PATH (text, Markdown, HTML, PDF), jsonl:FILE, csv:FILE, parquet:FILE, hf:NAME.")
@click.option("--out", required=True, metavar="FOLDER", type=click.Path(), help="Where the index lies. An unfinished one goes on.")
@click.option("--update", is_flag=True, help="Bring an existing index up to date: encode what is new or changed, delete what vanished.")
@click.option("--kind", type=click.Choice(["flat", "hnsw"]), default="flat", show_default=True, help="hnsw is for more than some 100,000 passages.")
@click.option("--score", type=click.Choice(["cosine", "dot"]), default="cosine", show_default=True, help="How vectors are compared.")
@click.option("--lexical/--no-lexical", default=True, show_default=True, help="Also index the words.")
@click.option("--language", default="en", show_default=True, help="Of stemming and stop words; none takes words as they are.")
@click.option("--words", type=click.IntRange(8), default=160, show_default=True, help="Of a passage, at most, when files are cut.")
@click.option("--batch-size", type=click.IntRange(1), default=64, show_default=True)
@click.option("--device", default="auto", metavar="NAME", help="cpu, cuda, cuda:1, mps [default: the fastest there is]")
@click.option("--quiet", is_flag=True, help="No progress bars.")
@_as_json
def index(encoder: str, corpus: str, out: str, words: int, language: str, device: str, quiet: bool, as_json: bool, **settings: Any) -> None:
    """Make documents searchable, by meaning and by words. A killed run goes on with the same command."""
    from wellread import documents
    from wellread.index import Index
    from wellread.runtime import using

    with _plain_warnings(), using(device=device, progress=not quiet):
        try:
            made = Index.build(
                encoder, documents.corpus(corpus, words=words), out, language=None if language.lower() == "none" else language, **settings
            )
        except KeyboardInterrupt:
            raise Stopped("stopped: the same command goes on from where it was") from None
    if as_json:
        _json({"out": out, "passages": len(made), **made.settings})
    else:
        click.echo(f'{len(made)} passages in {out}\nnext:  wellread search {out} "what you want to know"')


@app.command()
@click.argument("folder", metavar="INDEX", type=click.Path())
@click.argument("query", nargs=-1, required=True)
@click.option("-k", default=10, type=click.IntRange(1), show_default=True, help="How many passages.")
@click.option(
    "--mode", type=click.Choice(["hybrid", "dense", "lexical"]), default="hybrid", show_default=True, help="By meaning (dense), words or both."
)
@click.option("--rerank", metavar="NETWORK", type=click.Path(), help="A reranker (neural-ranking, prop) that orders the first 100 anew.")
@click.option("--encoder", metavar="NETWORK", type=click.Path(), help="Where the encoder lies now, if it was moved.")
@click.option("--device", default="auto", metavar="NAME", help="cpu, cuda, cuda:1, mps [default: the fastest there is]")
@_as_json
def search(folder: str, query: tuple[str, ...], k: int, mode: str, rerank: str | None, encoder: str | None, device: str, as_json: bool) -> None:
    """Find the passages of INDEX that answer QUERY."""
    from wellread.index import Index
    from wellread.network import load
    from wellread.rerankers import reordered
    from wellread.runtime import using
    from wellread.words import excerpt

    text = " ".join(query)
    with _plain_warnings(), using(device=device, progress=False):
        reranker = None if rerank is None else load(rerank)
        opened = Index.open(folder, encoder)
        hits = opened.search(text, k if reranker is None else max(k, 100), mode)  # type: ignore[arg-type]
        if reranker is not None:
            hits = reordered(reranker, text, hits)[:k]
    if as_json:
        _json([hit.to_dict() for hit in hits])
        return
    if not hits:
        click.echo("nothing found: none of these words is in the index")
    for place, hit in enumerate(hits, 1):
        how = ", ".join(f"{name} {rank}" for name, rank in hit.ranks.items())
        click.echo(f"{place:>2}  {click.style(hit.id, bold=True)}  {hit.score:.4g}  ({how})")
        if hit.title:
            _row("    ", hit.title)
        _row("    ", excerpt(hit.text, text, opened.settings["language"], lambda word: click.style(word, fg="yellow", bold=True)))
        click.echo()


@app.command()
@click.option("--out", default="wellread-demo", metavar="FOLDER", type=click.Path(), help="Where everything is written. [default: wellread-demo]")
@click.option("--force", is_flag=True, help="Replace an existing --out.")
def demo(out: str, force: bool) -> None:
    """An ImageNet network becomes a solar-cell inspector, in about eight minutes."""
    from wellread import demo as script

    script.main(Path(out), force=force)
