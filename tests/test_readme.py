"""The README holds: its commands run or parse, its settings exist, its Python does what the comments claim.

Commands in ``console`` blocks (lines that start with ``$ vqgen``) are run in order in one empty folder, with the
options of QUICK added so that they end in seconds. All other ``vqgen`` lines and snippets are parsed only, and so are
the commands of docs/ and those of the help.
"""

from __future__ import annotations

import contextlib
import io
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import click
import pytest

from pipelines import cli
from pipelines.settings import new_run_settings, parse_per_level, parse_priors
from pipelines.sweep_grid import make_plan
from priors import registry
from vqgen.codes import level_names

ROOT = Path(__file__).resolve().parent.parent
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")

QUICK = {
    "run": [
        *("--set", "data.count=40", "--set", "codec.training.steps=2"),
        *("--set", "priors.pixelcnn.training.steps=2", "--set", "priors.transformer.training.steps=2"),
    ],
    "train-codes": ["--set", "data.count=40", "--set", "training.steps=2"],
    "train-prior": ["--set", "training.steps=2"],
    "sample": ["-n", "4"],
    "compare": ["-n", "4", "--samples", "4"],
    "diagnose": ["-n", "4"],
}
LATER = ("sample --keep-best 2 -n 2 --out best", "diagnose -n 4", "evaluate -n 4", "score -n 4")
"""What makes the parts of a run that the commands of the console blocks do not."""
LEVELS = level_names(2)
NAMED_PER_LEVEL = ("temperature", "top_k", "top_p", "guidance")
FILE = re.compile(r"[\w-]+\.(?:json|jsonl|yaml|safetensors|png|html|md)")
CLAIM = re.compile(r"^(\w+) = .*#.*?\((\d+(?:, \d+)*)\)(?: in \[(-?\d+), (-?\d+)\])?", re.MULTILINE)


def blocks(*languages: str, of: str = TEXT) -> list[str]:
    """The texts between fences, with lines that end in a backslash joined to the next."""
    found = re.findall(r"^```(\w*)\n(.*?)^```$", of, re.MULTILINE | re.DOTALL)
    return [text.replace("\\\n", " ") for language, text in found if language in languages]


def commands(text: str, start: str) -> list[str]:
    return [line.removeprefix(start) for line in text.splitlines() if line.startswith(f"{start}vqgen ")]


PROSE = re.sub(r"^```.*?^```$", "", TEXT, flags=re.MULTILINE | re.DOTALL)
SNIPPETS = [re.sub(r"\s+", " ", snippet) for snippet in re.findall(r"`([^`]+)`", PROSE)]
RUN = [line for block in blocks("console") for line in commands(block, "$ ")]
SHOWN = [line for block in blocks("", "sh", "bash", "shell") for line in commands(block, "")]
NAMED = [snippet[snippet.index("vqgen ") :] for snippet in SNIPPETS if re.search(r"(^| )vqgen [a-z]", snippet)]
PYTHON = [block for block in blocks("python", "py") if not re.match(r"# \S+\.py\n", block)]
PAGES = {page.relative_to(ROOT).as_posix(): page.read_text(encoding="utf-8") for page in ROOT.glob("docs/**/*.md")}
LAUNCHED = re.compile(r"^.*?(?:\$\(which vqgen\)\"?|accelerate launch.* vqgen) ", re.MULTILINE)
"""What stands before a command under a launcher."""
IN_PAGES = [
    (name, line)
    for name, text in PAGES.items()
    for block in blocks("", "bash", of=text)
    for line in commands(LAUNCHED.sub("vqgen ", block), "")
]
IN_HELP = [
    (name, re.split(r"\s{3,}", line.strip())[0])  # what it does stands apart
    for name, command in cli.cli.commands.items()
    for line in (command.epilog or "").removeprefix("\b").replace("Example:", "").splitlines()
    if line.strip()
]
ALL_PAGES = {**PAGES, **{name: (ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "SECURITY.md")}}
FILES = {block.split()[1]: block for block in blocks("python", "py") if re.match(r"# \S+\.py\n", block)}


def words(line: str) -> list[str]:
    return [word for word in shlex.split(line, comments=True)[1:] if word != "..."]


class Outcome(NamedTuple):
    line: str
    code: int
    errors: str


class Made(NamedTuple):
    folder: Path
    outcomes: list[Outcome]


@contextlib.contextmanager
def folder_with_files(folder: Path) -> Iterator[None]:
    """Work in ``folder``, which gets the files that the README shows; what they register is forgotten afterwards."""
    for name, text in FILES.items():
        (folder / name).write_text(text, encoding="utf-8")
    built_in = {name: kind for name, kind in registry._registered.items() if kind.__module__.startswith("priors.")}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(registry, "_registered", built_in)
        patch.chdir(folder)
        yield


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """The folder in which every command of the console blocks was run, and how each ended."""
    folder = tmp_path_factory.mktemp("readme")
    outcomes = []
    with folder_with_files(folder):
        for line in RUN:
            errors = io.StringIO()
            name, *arguments = words(line)
            budget = ["--minutes", "0.02"] if "--minutes" in arguments else []
            with contextlib.redirect_stderr(errors), contextlib.redirect_stdout(io.StringIO()):
                code = cli.call([name, *arguments, *QUICK.get(name, []), *budget])
            outcomes.append(Outcome(line, code, errors.getvalue()))
        for line in LATER:
            with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
                assert cli.call(line.split()) == 0, line
    return Made(folder, outcomes)


@pytest.fixture
def plugins(tmp_path: Path) -> Iterator[None]:
    """A folder of its own with the files that the README shows."""
    with folder_with_files(tmp_path):
        yield


def parsed(line: str, *, whole: bool = True) -> dict[str, Any]:
    """The options of a command line as click reads them; ``whole`` says that none may be missing."""
    name, *arguments = words(line)
    assert name in cli.cli.commands, f"there is no command 'vqgen {name}'"
    try:
        return cli.cli.commands[name].make_context(name, arguments).params
    except click.MissingParameter:
        assert not whole, line
        return {}


def check_values(line: str, options: dict[str, Any]) -> None:
    """That presets, settings, priors and levels named in ``options`` exist; options that are absent are fine."""
    for plugin in options.get("plugins", ()):
        registry.load_plugin(plugin)
    chosen = options.get("prior") or options.get("priors") or ()
    for text in [chosen] if isinstance(chosen, str) else chosen:
        parse_priors(text, LEVELS)
    for option in NAMED_PER_LEVEL:
        if options.get(option) is not None:
            parse_per_level(options[option], LEVELS, float, option)
    for level in options.get("levels") or () if words(line)[0] == "train-prior" else ():
        assert level in LEVELS
    groups = {"train-codes": "codec", "train-prior": f"priors.{options.get('prior')}"}
    new_run_settings(
        options.get("config") or "cifar10",
        options.get("data"),
        options.get("sets", ()),
        short_for=groups.get(words(line)[0]),
    )


def test_there_is_something_to_check() -> None:
    """The lines a reader starts with are there; a change of layout must not empty the tests below."""
    assert {words(line)[0] for line in RUN} >= {"train-codes", "train-prior", "sample", "compare"}
    assert len(SHOWN) >= 4
    assert len(NAMED) >= 3
    assert PYTHON
    assert FILES


def test_the_commands_run_one_after_another(made: Made) -> None:
    for line, code, errors in made.outcomes:
        assert code == 0, f"{line}\n{errors}"


@pytest.mark.parametrize("line", [*RUN, *SHOWN])
def test_a_command_parses_and_names_what_there_is(line: str, plugins: None) -> None:
    check_values(line, parsed(line))


@pytest.mark.parametrize(("place", "line"), [*IN_PAGES, *IN_HELP])
def test_a_command_of_the_docs_or_the_help_parses_and_names_what_there_is(place: str, line: str) -> None:
    assert place.endswith(".md") or words(line)[0] == place
    if words(line)[0] == "sweep":
        options = parsed(line)
        make_plan(options["grid"], options["config"], options["data"], options["sets"], minutes=options["minutes"])
    elif "--plugin" not in line:
        check_values(line, parsed(line))


def test_every_page_with_commands_is_among_them() -> None:
    assert {"docs/scaling.md", "docs/streaming.md", "docs/precision.md"} <= {name for name, _ in IN_PAGES}
    assert sum("imagenet" in line for name, line in IN_PAGES if name == "docs/scaling.md") == 2  # under launchers
    assert {name for name, _ in IN_HELP} == set(cli.cli.commands)


@pytest.mark.parametrize("name", sorted(ALL_PAGES))
def test_what_a_page_names_is_there(name: str) -> None:
    """Links, scripts of ``benchmarks/`` and their options, tests, and presets."""
    text, folder = ALL_PAGES[name], (ROOT / name).parent
    links = [link for link in re.findall(r"\]\(([^)#\s]+)", text) if "://" not in link]
    assert [link for link in links if not (folder / link).exists()] == []
    assert [path for path in re.findall(r"`(tests/[\w/*.]+)`", text) if not list(ROOT.glob(path))] == []
    snippets = re.findall(r"`([^`]+)`", re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL))
    for snippet in [*snippets, *"".join(blocks("", "bash", of=text)).splitlines()]:
        script = re.match(r"(?:python )?(?:benchmarks/)?(\w+\.py)", snippet)
        path = ROOT / "benchmarks" / (script[1] if script else "")
        if script and ("benchmarks/" in snippet or path.is_file()):
            source = path.read_text(encoding="utf-8")
            assert [option for option in re.findall(r" (--[a-z-]+)", snippet) if f'"{option}"' not in source] == []


@pytest.mark.parametrize("line", NAMED)
def test_a_command_in_the_text_exists(line: str, plugins: None) -> None:
    check_values(line, parsed(line, whole=False))


@pytest.mark.parametrize(
    "line",
    [
        "vqgen train-code",
        "vqgen compare --bits",
        "vqgen sample --levels two",
        "vqgen train-prior --level top",
        "vqgen train-codes --set codec.widht=3",
        "vqgen train-prior --prior pixelcnn --set priors.pixelcnn.widht=3",
        "vqgen train-prior --prior pixelcn",
        "vqgen train-prior --prior pixelcnn --level lowest",
        "vqgen sample --temperature low=1",
        "vqgen run --config cifar",
    ],
)
def test_a_wrong_command_is_noticed(line: str, plugins: None) -> None:
    with pytest.raises((AssertionError, click.ClickException, cli.VqgenError)):
        check_values(line, parsed(line))


@pytest.mark.parametrize("text", PYTHON)
def test_the_python_runs_and_does_what_its_comments_say(text: str, made: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(made.folder)
    names: dict[str, Any] = {}
    exec(compile(text, "README.md", "exec"), names)
    for name, shape, low, high in CLAIM.findall(text):
        value = names[name]
        assert tuple(value.shape) == tuple(int(size) for size in shape.split(", ")), name
        if low:
            assert float(value.min()) >= float(low)
            assert float(value.max()) <= float(high)


def test_the_python_claims_a_shape() -> None:
    assert any(CLAIM.search(text) for text in PYTHON)


def test_the_files_of_a_run_are_those_listed(made: Made) -> None:
    """The tree of a run: the first word of each line is there, and so is each file named beside a folder."""
    trees = [block for block in blocks("") if block.startswith("runs/shapes/")]
    assert trees
    for line in "".join(trees).splitlines()[1:]:
        if not line.strip():
            continue
        place, *others = line.split()
        found = list((made.folder / "runs/shapes").glob(re.sub(r"<\w+>", "*", place)))
        assert found, line
        folder = found[0] if found[0].is_dir() else found[0].parent
        for name in filter(FILE.fullmatch, others):
            assert (folder / name).is_file(), f"{folder.name}: no {name}"


def test_the_make_targets_exist() -> None:
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    lines = [line.removeprefix("$ ") for block in blocks("", "console", "sh", "bash") for line in block.splitlines()]
    named = {match[1] for line in [*lines, *SNIPPETS] if (match := re.match(r"make ([a-z][\w-]*)", line))}
    assert named >= {"demo", "test"}
    assert named <= targets
