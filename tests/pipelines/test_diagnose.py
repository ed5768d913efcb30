"""Diagnosis: runs broken on purpose get the verdict that names what was broken, healthy ones get none of them.

Priors are judged on codes made up for the purpose: the label chooses half of the top codebook, all four top codes of
an image are one code, and every bottom code is the top code above it, moved by the same step throughout an image. So
there is much to learn, coarser codes and labels matter, and what a perfect prior pays is known.
"""

from __future__ import annotations

import copy
import json
import math
import re
import shlex
import shutil
from collections.abc import Callable
from dataclasses import replace
from html import unescape
from itertools import pairwise
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from pipelines import cli
from pipelines.diagnose import left_out
from pipelines.diagnosis.codec_figures import CodecFigures
from pipelines.diagnosis.codec_verdicts import codec_verdicts
from pipelines.diagnosis.commands import Commands
from pipelines.diagnosis.curves import CurveFigures, read_curve
from pipelines.diagnosis.findings import Cure, Finding
from pipelines.diagnosis.neighbours import Distances, compare_memory, searchable
from pipelines.diagnosis.prior_figures import (
    Bits,
    PriorFigures,
    image_bits,
    measure_prior,
    sampled_bits,
    teacher_forced,
)
from pipelines.diagnosis.prior_verdicts import Evidence, prior_verdicts, region
from pipelines.diagnosis.sample_verdicts import sample_verdicts
from pipelines.encode import encode_splits
from pipelines.run_codes import prior_spec
from pipelines.run_priors import fit_baseline
from pipelines.settings import merged_settings, prior_settings_of_run, run_settings
from priors.autoregressive import AutoregressivePrior
from priors.base import Density, Prior
from priors.pixelcnn import PixelCNN
from priors.sampling import PLAIN, Noise, SampleOptions
from vqgen.code_store import CodeStore, CodeStoreInfo, CodeWriter
from vqgen.codec import HierarchicalVQVAE
from vqgen.codes import Codes, ImageSpec, LevelSpec
from vqgen.console import Console
from vqgen.data import load_data
from vqgen.hub import fingerprint
from vqgen.run_folder import RunFolder

K = 8
LEVELS = (LevelSpec("top", 2, 2, K, 4), LevelSpec("bottom", 4, 4, K, 4))
SMALL = {"width": 16, "blocks": 2, "first_kernel": 3, "dropout": 0.0}
TEST, TRAIN = 256, 2048
HOSTILE = "<script>alert('x')</script>\"><img src=http://evil.example/x onerror=alert(1)> 漢字"


def made_up(count: int, seed: int, random: bool = False) -> tuple[Codes, Tensor]:
    """Codes with the structure described above, or without any; and labels."""
    generator = torch.Generator().manual_seed(seed)

    def draw(end: int, *shape: int) -> Tensor:
        return torch.randint(0, end, shape, generator=generator)

    label = draw(2, count)
    if random:
        return (draw(K, count, 2, 2), draw(K, count, 4, 4)), label
    top = (4 * label + draw(4, count))[:, None, None].expand(count, 2, 2).contiguous()
    above = top.repeat_interleave(2, 1).repeat_interleave(2, 2)
    return (top, (above + draw(2, count)[:, None, None]) % K), label


def make_store(folder: Path, train: int = TRAIN, random: bool = False) -> CodeStore:
    info = CodeStoreInfo(LEVELS, ("even", "odd"), ImageSpec(3, 16, 16), "codec", "data")
    with CodeWriter(folder, info) as writer:
        for seed, (split, count) in enumerate({"train": train, "validation": 64, "test": TEST}.items()):
            writer.add(split, *made_up(count, seed, random))
    return CodeStore.load(folder)


def trained(kind: type[PixelCNN], store: CodeStore, level: int, steps: int) -> PixelCNN:
    """A prior of ``kind`` after ``steps`` steps on batches of 64 training maps."""
    torch.manual_seed(0)
    prior = kind({**SMALL}, prior_spec(store, level))
    optimizer = torch.optim.Adam(prior.parameters(), 5e-3)
    split = store.split("train")
    for _ in range(steps):
        batch = split.__getitems__(torch.randint(len(split), (min(64, len(split)),)).tolist())
        loss = prior(batch["codes"][level], batch["codes"][:level], batch["label"])["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return prior.eval()


class Deaf(PixelCNN):
    """Is given the coarser codes and never listens."""

    name = "deaf"

    def logits(self, codes: Tensor, context: Codes = (), label: Tensor | None = None) -> Tensor:
        return super().logits(codes, tuple(torch.zeros_like(coarser) for coarser in context), label)


class Parrot(Prior):
    """Draws training maps, and has no likelihood."""

    name = "parrot"
    likelihood = "none"
    Config = PixelCNN.Config
    maps: ClassVar[Tensor]

    def sample(
        self,
        noise: Noise,
        context: Codes = (),
        label: Tensor | None = None,
        options: SampleOptions = PLAIN,
        known: Tensor | None = None,
        keep: Tensor | None = None,
    ) -> Tensor:
        return self.maps[list(noise.indices)]


def verdicts(prior: Prior, store: CodeStore, level: int, **evidence: Any) -> dict[str, Finding]:
    """Findings of a prior by check."""
    unigram: Any = fit_baseline("unigram", store, level)
    splits = store.split("train"), store.split("test")
    test, train = range(TEST), range(min(TEST, len(splits[0])))
    figures = measure_prior(prior, unigram, level, splits, test, train, 0)
    given = {"curve": CurveFigures("bits_per_code", (), ()), "config": {}, "training": {"steps": 100}, **evidence}
    return {found.check: found for found in prior_verdicts(Evidence(figures, **given))}


def states(found: dict[str, Finding]) -> dict[str, str]:
    return {check: finding.state for check, finding in found.items()}


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> CodeStore:
    return make_store(tmp_path_factory.mktemp("codes") / "codes")


@pytest.fixture(scope="module")
def healthy(store: CodeStore) -> list[PixelCNN]:
    return [trained(PixelCNN, store, level, 120) for level in (0, 1)]


def test_a_healthy_prior_raises_no_alarm(store: CodeStore, healthy: list[PixelCNN]) -> None:
    for level, prior in enumerate(healthy):
        found = verdicts(prior, store, level)
        assert set(states(found).values()) <= {"good", "unknown"}, found
        assert found["against counting codes"].state == found["training against held-out"].state == "good"
        assert found["label"].state == "good"
    assert found["coarser codes"].state == "good"


def test_what_a_healthy_prior_pays_is_near_what_the_codes_hold(store: CodeStore, healthy: list[PixelCNN]) -> None:
    unigram: Any = fit_baseline("unigram", store, 0)
    splits = store.split("train"), store.split("test")
    figures = measure_prior(healthy[0], unigram, 0, splits, range(TEST), range(TEST), 0)
    assert figures.uniform == 3
    assert figures.unigram == pytest.approx(2.0, abs=0.02)
    assert figures.test is not None
    assert figures.test.mean == pytest.approx(0.5, abs=0.06)
    assert figures.expected == pytest.approx(figures.test.mean, abs=0.06)
    assert figures.label is not None
    assert figures.label.mean > 1
    assert figures.position_bits is not None
    assert figures.position_bits[0][0] == pytest.approx(2.0, abs=0.15)
    mean = sum(map(sum, figures.position_bits)) / 4
    assert mean == pytest.approx(figures.test.mean, abs=1e-6)


@pytest.mark.parametrize("level", [0, 1])
def test_an_untrained_prior_is_no_better_than_counting(store: CodeStore, level: int) -> None:
    found = verdicts(trained(PixelCNN, store, level, 0), store, level)
    assert found["against counting codes"].state == "bad"
    assert found["training against held-out"].state == "good"
    assert found["label"].state == "unknown"
    assert found["against counting codes"].cures


def test_a_prior_with_shuffled_weights_is_worse_than_guessing(store: CodeStore, healthy: list[PixelCNN]) -> None:
    prior = copy.deepcopy(healthy[1])
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in prior.parameters():
            weight.copy_(3 * weight.flatten()[torch.randperm(weight.numel(), generator=generator)].view(weight.shape))
    found = verdicts(prior, store, 1)["against counting codes"]
    assert found.state == "bad"
    assert "guessing" in found.text
    logged = verdicts(prior, store, 1, curve=curve(2.0, 1.0, 0.3, 0.2))
    assert "not the weights that were trained" in logged["against counting codes"].text
    assert logged["against counting codes"].cures[0].changes == {"training.steps": 100}
    assert "end of the training" not in logged


def test_an_overfitted_prior_is_named_with_cures_for_it(tmp_path: Path) -> None:
    few = make_store(tmp_path / "codes", train=16, random=True)
    curve = CurveFigures("bits_per_code", (), ((10, 3.2), (20, 3.0), (100, 5.0)))
    found = verdicts(
        trained(PixelCNN, few, 1, 150),
        few,
        1,
        curve=curve,
        config={"dropout": 0.0, "width": 64},
        training={"steps": 100},
    )
    overfit = found["training against held-out"]
    assert overfit.state == "bad"
    assert "step 20 of 100" in overfit.text
    assert overfit.cures[0].changes == {"priors.pixelcnn.dropout": 0.2, "training.patience": 5}
    assert "end of the training" not in found  # training longer is the last thing to do
    assert found["against counting codes"].state == "bad"
    assert "knows only its training images" in found["against counting codes"].fault


def test_a_prior_that_ignores_its_context_is_named(store: CodeStore) -> None:
    deaf = trained(Deaf, store, 1, 120)
    found = verdicts(deaf, store, 1, config={"condition_blocks": 2})
    assert found["against counting codes"].state == "good"
    assert found["coarser codes"].state == "bad"
    assert found["coarser codes"].fault == "the deaf of level bottom ignores the coarser codes"
    forgiven = verdicts(deaf, store, 1, carried=0.01)
    assert forgiven["coarser codes"].state == "watch"  # the codec put nothing there


def curve(*values: float, every: int = 100) -> CurveFigures:
    return CurveFigures("bits_per_code", (), tuple((every * (i + 1), value) for i, value in enumerate(values)))


@pytest.mark.parametrize(
    ("values", "state"),
    [
        ((3.0, 2.0, 1.5, 1.2), "bad"),
        ((3.0, 1.03, 1.02, 0.99), "watch"),
        ((3.0, 1.0, 1.0, 1.0), "good"),
        ((3.0,), "unknown"),
    ],
)
def test_the_end_of_the_curve_tells_whether_training_was_done(
    store: CodeStore, healthy: list[PixelCNN], values: tuple[float, ...], state: str
) -> None:
    found = verdicts(healthy[1], store, 1, curve=curve(*values))["end of the training"]
    assert found.state == state
    if state in ("bad", "watch"):
        assert found.cures[0].changes == {"training.steps": 200}
        assert found.gain > 0


def test_the_curve_is_read_between_its_points() -> None:
    falling = curve(5.0, 4.0, 3.0, 2.0)
    assert falling.late_drop == pytest.approx(1.0)
    assert (falling.best_step, falling.rise, falling.steps) == (400, 0.0, 400)
    risen = curve(5.0, 2.0, 3.0)
    assert (risen.best_step, risen.rise) == (200, 1.0)
    assert curve(5.0).late_drop is None
    assert CurveFigures("loss", (), ((900, 2.0), (1000, 1.9))).late_drop is None
    assert curve(3.0, 1.0, 2.0, 2.5).late_drop == 0  # it rose over the last quarter, after an early low
    assert curve(3.0, 1.0, 2.0, 1.5).late_drop == 0.5


def test_bits_that_an_adversary_cost_are_no_overfitting(store: CodeStore, healthy: list[PixelCNN]) -> None:
    seen = curve(4.0, 1.0, 1.4, 1.4, 1.4)  # the adversary came in after the second, and weights are kept from then on
    found = verdicts(healthy[1], store, 1, curve=replace(seen, kept=400))
    assert {found[check].state for check in ("training against held-out", "end of the training")} == {"good"}
    past = verdicts(healthy[1], store, 1, curve=seen)["training against held-out"]
    assert past.state == "watch"
    assert "step 200" in past.fault


def test_drifting_and_plain_samples_are_told_by_their_bits(store: CodeStore, healthy: list[PixelCNN]) -> None:
    prior = healthy[1]
    (top, bottom), label = made_up(64, 9)
    fair = sampled_bits(prior, bottom, (top,), label)
    noise = sampled_bits(prior, torch.randint(0, K, (64, 4, 4)), (top,), label)
    assert noise.mean > 3 * fair.mean
    unigram: Any = fit_baseline("unigram", store, 1)
    figures = measure_prior(prior, unigram, 1, (store.split("train"), store.split("test")), range(64), range(64), 0)
    for sampled, state in ((fair, "good"), (noise, "bad")):
        evidence = Evidence(replace(figures, sampled=sampled), curve(), {}, {"steps": 100})
        assert {f.check: f for f in prior_verdicts(evidence)}["own samples"].state == state


def test_one_step_from_the_truth_agrees_with_the_likelihood(store: CodeStore, healthy: list[PixelCNN]) -> None:
    (top, bottom), label = made_up(32, 5)
    prior: AutoregressivePrior = healthy[1]
    forced = teacher_forced(prior, bottom, (top,), label, Noise(0, tuple(range(32)), 1))
    torch.testing.assert_close(-forced.nats, prior.log_prob_map(bottom, (top,), label), atol=1e-5, rtol=1e-5)
    with torch.no_grad():
        probabilities = prior.logits(bottom, (top,), label).double().softmax(-1)
    torch.testing.assert_close(
        forced.entropy, torch.distributions.Categorical(probabilities).entropy(), atol=1e-6, rtol=0
    )
    assert (forced.drawn == bottom)[:, 1:].double().mean() > 0.9  # what is certain is drawn as it is
    again = teacher_forced(prior, bottom, (top,), label, Noise(0, tuple(range(32)), 1))
    assert torch.equal(forced.drawn, again.drawn)


class Loose(Parrot):
    """Knows no more than a bound, and a bad one."""

    name = "loose"
    likelihood = "bound"

    def log_prob(
        self,
        codes: Tensor,
        context: Codes = (),
        label: Tensor | None = None,
        *,
        noise: Noise | None = None,
        samples: int = 64,
    ) -> Density:
        nats = torch.full((len(codes),), -codes[0].numel() * math.log(K), dtype=torch.float64)
        return Density(nats, torch.full_like(nats, 0.1), torch.full_like(nats, 3.0))


def test_a_bound_is_called_one_and_is_no_proof_of_failure(store: CodeStore) -> None:
    prior = Loose({}, prior_spec(store, 1))
    found = verdicts(prior, store, 1)["against counting codes"]
    assert found.state == "watch"
    assert "at most 3.000 bits/code" in found.text
    notes = left_out(("top", "bottom"), {"bottom": prior})
    assert "No prior is trained for level top" in notes[0]
    assert "makes a map at once" in notes[1]


class Noisy(Loose):
    """An estimate that is nothing but its noise."""

    name = "noisy"

    def log_prob(
        self,
        codes: Tensor,
        context: Codes = (),
        label: Tensor | None = None,
        *,
        noise: Noise | None = None,
        samples: int = 64,
    ) -> Density:
        assert noise is not None
        return Density.exact(noise.normal("proposal"))


def test_an_estimate_of_an_image_does_not_depend_on_the_batch(
    store: CodeStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    prior = Noisy({}, prior_spec(store, 1))
    whole = image_bits(prior, store.split("test"), 1, range(20))
    monkeypatch.setattr("pipelines.diagnosis.prior_figures.NUMBERS_AT_ONCE", 7 * 16 * K)
    assert torch.equal(image_bits(prior, store.split("test"), 1, range(20)), whole)


@pytest.mark.parametrize(("first", "state"), [(0.001, "good"), (1.0, "watch")])
def test_places_where_there_is_nothing_to_learn_are_not_held_against_a_prior(first: float, state: str) -> None:
    bits = Bits(0.5, 0.01)
    figures = PriorFigures("pixelcnn", "top", "exact", 4, 0, 64, 3.0, 1.0, test=bits, train=bits, gain=bits)
    own, unigram = ((1.1 * first, 1.1 * first), (0.5, 0.5)), ((first, first), (1.0, 1.0))
    figures = replace(figures, position_bits=own, unigram_position_bits=unigram)
    found = {f.check: f for f in prior_verdicts(Evidence(figures, curve(), {}, {"steps": 100}))}
    assert found["places in the map"].state == state


def test_a_prior_without_likelihood_or_with_nothing_to_learn_is_not_judged(tmp_path: Path, store: CodeStore) -> None:
    parrot = Parrot({}, prior_spec(store, 0))
    assert states(verdicts(parrot, store, 0)) == {"against counting codes": "unknown"}
    info = CodeStoreInfo(LEVELS, ("even", "odd"), ImageSpec(3, 16, 16), "codec", "data")
    with CodeWriter(tmp_path / "flat", info) as writer:
        for split in ("train", "validation", "test"):
            (top, bottom), label = made_up(TEST, 0)
            writer.add(split, (torch.zeros_like(top), torch.zeros_like(bottom)), label)
    flat = CodeStore.load(tmp_path / "flat")
    found = verdicts(trained(PixelCNN, flat, 1, 0), flat, 1)
    assert states(found) == {"against counting codes": "unknown"}


def varied(count: int, seed: int) -> Codes:
    """Maps with enough choice that no two are alike."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, K, (count, 2, 2), generator=generator), torch.randint(
        0, K, (count, 4, 4), generator=generator
    )


@pytest.fixture
def varied_store(tmp_path: Path) -> CodeStore:
    info = CodeStoreInfo(LEVELS, (), ImageSpec(3, 16, 16), "codec", "data")
    with CodeWriter(tmp_path / "varied", info) as writer:
        for seed, (split, count) in enumerate({"train": 600, "validation": 10, "test": 100}.items()):
            writer.add(split, varied(count, seed))
    return CodeStore.load(tmp_path / "varied")


def books() -> list[Tensor]:
    generator = torch.Generator().manual_seed(7)
    return [torch.randn(K, 4, generator=generator) for _ in LEVELS]


def test_samples_that_repeat_training_maps_are_named(varied_store: CodeStore) -> None:
    train = varied_store.split("train")
    held_out = varied_store.split("test").__getitems__(range(100))["codes"]
    distances = Distances(books(), train, range(600))
    copies = train.__getitems__(range(100, 164))["codes"]
    Parrot.maps = copies[1]
    parrot = Parrot({}, prior_spec(varied_store, 1))
    repeated = (copies[0], parrot.sample(Noise(0, tuple(range(64)), 1), (copies[0],)))
    figures, nearest = compare_memory(distances, repeated, held_out, ("top", "bottom"))
    memory = sample_verdicts(figures, ["parrot"])[0]
    assert memory.state == "bad"
    assert "samples are copies of training images" in memory.fault
    assert figures[0].copies == 1
    assert nearest.place.tolist() == list(range(100, 164))
    fresh, _ = compare_memory(distances, varied(64, 11), held_out, ("top", "bottom"))
    assert {found.state for found in sample_verdicts(fresh, ["fresh"])} == {"good"}
    assert fresh[0].ratio == pytest.approx(1, abs=0.15)
    half = (varied(64, 12)[0], copies[1])  # a bottom that remembers below a top that does not
    partly, _ = compare_memory(distances, half, held_out, ("top", "bottom"))
    assert "the bottom maps of the samples" in sample_verdicts(partly, ["parrot"])[0].fault


def test_samples_that_are_all_alike_are_named(varied_store: CodeStore) -> None:
    held_out = varied_store.split("test").__getitems__(range(100))["codes"]
    one = tuple(level[:1].expand(64, -1, -1).clone() for level in varied(1, 3))
    figures, _ = compare_memory(
        Distances(books(), varied_store.split("train"), range(600)), one, held_out, ("top", "bottom")
    )
    assert {found.check: found.state for found in sample_verdicts(figures, ["stuck"])}["variety"] == "bad"


def test_distances_are_those_of_the_plain_way(varied_store: CodeStore) -> None:
    queries, indices = varied(5, 21), list(range(0, 600, 7))
    train = varied_store.split("train")
    found = Distances(books(), train, indices).nearest(queries)
    maps = train.__getitems__(indices)["codes"]
    per_level = []
    for book, own, others in zip(books(), queries, maps, strict=True):
        plain = torch.stack([(book[own[q]] - book[others]).square().sum(-1).mean((1, 2)) for q in range(5)])
        per_level.append(plain / (2 * book[others.flatten()].var(0, correction=0).sum()))
    for scope, expected in ((0, per_level[0]), (1, per_level[1]), (None, torch.stack(per_level).mean(0))):
        least, place = expected.min(1)
        torch.testing.assert_close(found[scope].distance, least.sqrt(), atol=2e-3, rtol=1e-4)
        assert found[scope].place.tolist() == [indices[i] for i in place]


def test_a_search_is_limited_by_the_size_of_the_maps() -> None:
    assert searchable(80, 64, 47_500) == 47_500
    assert searchable(80, 64, 1_200_000) == 50_000
    assert 1_000 <= searchable(5120, 64, 1_200_000) < 5_000


def test_the_dearest_part_of_a_map_has_a_name() -> None:
    bits = [[1.0] * 6 for _ in range(6)]
    bits[5][0] = 9.0
    assert region(tuple(map(tuple, bits))) == "lower left"
    assert region(((1.0, 2.0),)) == "map"


# The whole command on small runs


def diagnosed(run: Path, *options: str) -> dict[str, Any]:
    assert cli.call(["diagnose", "--run", str(run), "-n", "16", *options]) == 0
    record: dict[str, Any] = json.loads((run / "diagnose" / "diagnose.json").read_text())
    return record


@pytest.fixture(scope="module")
def diagnosis(finished_run: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    run = Path(shutil.copytree(finished_run, tmp_path_factory.mktemp("diagnosis") / "a run"))
    return run, diagnosed(run)


def test_the_command_writes_page_figures_and_panels(diagnosis: tuple[Path, dict[str, Any]]) -> None:
    run, record = diagnosis
    folder = RunFolder(run).diagnose
    assert {level["level"] for level in record["levels"]} == {"top", "bottom"}
    assert record["summary"].startswith("What fails: ")
    learned = [found for found in record["findings"] if found["check"] == "against counting codes"]
    assert {found["level"] for found in learned if found["state"] == "bad"}  # four steps teach nothing
    names = [panel["file"] for panel in record["panels"]]
    assert names == [
        *("images.png", "reconstructions.png", "only-top.png", "one-step-top.png", "one-step-bottom.png"),
        *("real-top.png", "mode.png", "sampled.png", "nearest.png"),
    ]
    assert all((folder / name).read_bytes().startswith(b"\x89PNG") for name in names)
    assert record["memory"][0]["searched"] == record["memory"][0]["training_images"]
    assert not [path for path in run.iterdir() if path.name.endswith(".tmp")]


def numbers(record: Any) -> list[float]:
    values = record.values() if isinstance(record, dict) else record if isinstance(record, list) else ()
    own = [record] if isinstance(record, float) else []
    return own + [number for value in values for number in numbers(value)]


def test_the_page_says_what_the_file_says(diagnosis: tuple[Path, dict[str, Any]]) -> None:
    run, record = diagnosis
    page = (run / "diagnose" / "report.html").read_text(encoding="utf-8")
    words = re.sub(r"\s+", " ", unescape(re.sub(r"<[^>]*>", "", page)))
    assert record["summary"] in words
    for found in record["findings"]:
        assert found["text"] in words
    for cure in record["cures"]:
        assert cure["command"] in words
        assert cure["text"] in words
    for level in record["levels"]:
        for key in ("uniform", "unigram", "test", "train", "expected", "sampled"):
            assert f"{level[key]:.3f}" in words
        assert f"{level['label']:+.3f}" in words
    for key in ("mse", "train_mse", "mean_image_mse", "flat_mse"):
        assert f"{record['codec'][key]:.5f}" in words
    cells = re.findall(r'<td class="number">(?:≤ )?([+-]?[\d.]+)', page)
    known = numbers(record["levels"]) + numbers(record["codec"]) + numbers(record["memory"])
    assert len(cells) > 20
    for cell in cells:
        digits = len(cell.partition(".")[2])
        assert any(math.isclose(float(cell), round(value, digits), abs_tol=1e-9) for value in known), cell
    assert "<script" not in page
    assert not re.search(r"""(?:src|href)=["'](?!data:)""", page)


def test_every_command_that_is_suggested_can_be_typed(diagnosis: tuple[Path, dict[str, Any]]) -> None:
    run, record = diagnosis
    commands = [cure["command"] for found in record["findings"] for cure in found["cures"] if cure["command"]]
    assert len(commands) > 3
    for command in set(commands):
        program, name, *words = shlex.split(command)
        assert program == "vqgen"
        parsed = cli.cli.commands[name].make_context(name, list(words))
        assert parsed.params["run_path"] == str(run)
        if name == "train-prior" and parsed.params["sets"]:
            level = parsed.params["levels"]
            settings = prior_settings_of_run(RunFolder(run), parsed.params["prior"], level, parsed.params["sets"])
            assert settings.priors[parsed.params["prior"]]["levels"][level[0]]


def test_what_is_suggested_was_not_tried_before(store: CodeStore) -> None:
    untrained = PixelCNN({**SMALL}, prior_spec(store, 1)).eval()

    def others(*tried: str) -> list[str]:
        cures = verdicts(untrained, store, 1, tried=tried)["against counting codes"].cures
        return [cure.words[2] for cure in cures if cure.words]

    assert others() == ["transformer"]
    assert others("pixelcnn", "transformer") == ["pixelsnail"]
    assert others("pixelcnn", "transformer", "pixelsnail") == []


def test_a_suggested_codec_is_trained_on_the_images_where_they_are_now(finished_run: Path) -> None:
    run = RunFolder(finished_run)
    found = Finding("codec", "all", "", "bad", "", cures=(Cure("", {"codec.width": 32}), Cure("", words=("sample",))))
    cures = Commands(run, run_settings(run), source="moved/").complete(found).cures
    assert "--data moved/" in cures[0].command
    assert "--data" not in cures[1].command


def test_a_suggested_command_keeps_how_the_prior_was_trained(run_copy: Path) -> None:
    train = ["train-prior", "--prior", "pixelcnn", "--level", "top", "--run", str(run_copy)]
    given = ["--set", "training.batch_size=8", "--set", "priors.pixelcnn.width=20", "--seed", "5"]
    assert cli.call([*train, *given, "--set", "training.steps=3", "--overwrite"]) == 0
    record = diagnosed(run_copy, "--prior", "top=pixelcnn")
    assert record["priors"]["top"] == "pixelcnn"
    assert record["priors"]["bottom"] in ("pixelcnn", "transformer")  # the best trained, since none was named
    top = [found for found in record["findings"] if (found["part"], found["level"]) == ("prior", "top")]
    command = next(cure["command"] for found in top for cure in found["cures"] if "training.steps" in cure["command"])
    for part in ("training.batch_size=8", "priors.pixelcnn.width=20", "--seed 5"):
        assert part in command
    assert cli.call(shlex.split(command)[1:]) == 0
    after = RunFolder(run_copy).stage("priors/pixelcnn/top")
    assert after is not None
    assert after["steps"] == 30
    assert after["settings"]["training"]["batch_size"] == 8
    assert after["settings"]["config"]["width"] == 20
    assert after["settings"]["seed"] == 5


def test_overwriting_what_it_was_made_from_removes_the_diagnosis(run_copy: Path) -> None:
    run = RunFolder(run_copy)
    diagnosed(run_copy)
    train = ["train-prior", "--prior", "pixelcnn", "--level", "top", "--run", str(run_copy)]
    assert cli.call([*train, "--set", "training.steps=1", "--overwrite"]) == 0
    assert not run.diagnose.exists()
    diagnosed(run_copy)
    assert cli.call(["train-codes", "--set", "training.steps=2", "--overwrite", "--run", str(run_copy)]) == 0
    assert not run.diagnose.exists()
    record = diagnosed(run_copy)  # a codec alone can be looked at, too
    assert record["priors"] == {}
    assert record["levels"] == record["memory"] == []
    assert len(record["notes"]) == 2


def test_a_level_without_a_prior_is_left_out(run_copy: Path) -> None:
    run = RunFolder(run_copy)
    run.remove_stages([stage for stage in run.stages() if stage.endswith("/top")])
    record = diagnosed(run_copy)
    assert list(record["priors"]) == ["bottom"]
    assert [level["sampled"] for level in record["levels"]] == [None]  # there is no top to sample it under
    names = [panel["file"] for panel in record["panels"]]
    assert "real-top.png" in names
    assert "sampled.png" not in names
    assert "level top" in record["notes"][0]


def test_a_single_image_is_enough(run_copy: Path) -> None:
    assert cli.call(["diagnose", "--run", str(run_copy), "-n", "1"]) == 0
    record = json.loads((run_copy / "diagnose" / "diagnose.json").read_text())
    assert record["codec"]["images"] == record["levels"][0]["images"] == 1
    assert record["codec"]["carried"] is record["levels"][0]["test_error"] is None


@pytest.mark.parametrize("idle", ["top", "bottom"])
def test_an_idle_level_is_named_and_can_be_left_out(
    finished_run: Path, diagnosis: tuple[Path, dict[str, Any]], idle: str
) -> None:
    config = run_settings(RunFolder(finished_run))
    mixed = config.run.model_copy(update={"priors": ({"top": "pixelcnn", "bottom": "transformer"},)})
    own = {"pixelcnn": {"levels": {"bottom": {"width": 20}}}}
    sizes = config.codec.model_copy(update={"codebook_size": (16, 32)})
    config = config.model_copy(update={"run": mixed, "priors": own, "codec": sizes})
    kept = {key: value for key, value in diagnosis[1]["codec"].items() if key in CodecFigures.__dataclass_fields__}
    carried = {"top": 0.9, "bottom": 0.9, idle: 0.01}
    figures = CodecFigures(**{**kept, "carried": carried, "mse": 0.001, "flat_mse": 0.05, "mean_image_mse": 0.05})
    found = {f.check: f for f in codec_verdicts(figures, curve(), config)}["what each level carries"]
    assert found.state == ("bad" if idle == "top" else "watch")
    assert f"level {idle}" in found.fault
    values = config.model_dump(mode="json", exclude_none=True)
    command = shlex.split(Commands(RunFolder(finished_run), config).complete(found).cures[-1].command)
    sets = [word for flag, word in pairwise(command) if flag == "--set"]
    alone = merged_settings(values, sets, source=None, seed=None, minutes=None, short_for="codec", file="")
    assert alone.codec.strides == ((4,) if idle == "top" else (8,))
    assert alone.codec.per_level("codebook_size") == ((32,) if idle == "top" else (16,))


def collapsed(run: RunFolder) -> None:
    """Make every code but one of each level unreachable, and encode the images again."""
    codec = HierarchicalVQVAE.from_pretrained(run.codec)
    for quantizer in codec.quantizers:
        with torch.no_grad():
            quantizer.codebook[1:] += 1e4
    codec.save_pretrained(run.codec)
    config = run_settings(run)
    shutil.rmtree(run.codes)
    codec.eval()
    encode_splits(
        run.codes, codec, fingerprint(run.codec), load_data(config.data, config.seed), Console(quiet=True), 64
    )
    run.remove_stages([stage for stage in run.stages() if stage.startswith("priors/")])


def test_a_collapsed_codebook_is_the_failing_part(run_copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    collapsed(RunFolder(run_copy))
    capsys.readouterr()
    record = diagnosed(run_copy, "--json")
    assert json.loads(capsys.readouterr().out)["summary"] == record["summary"]
    assert "the codebook of level top has collapsed" in record["summary"]
    found = [found for found in record["findings"] if found["part"] == "codebook"]
    assert [finding["state"] for finding in found] == ["bad", "bad"]
    assert record["codebooks"][0]["dead"] == 15
    assert record["cures"][0]["command"].startswith("vqgen train-codes --set codec.")
    assert "worse than one flat colour" in " ".join(finding["fault"] for finding in record["findings"])


def test_hostile_names_are_shown_and_do_nothing(run_copy: Path) -> None:
    stored = json.loads((run_copy / "run.json").read_text())
    stored["data"]["description"] = HOSTILE
    (run_copy / "run.json").write_text(json.dumps(stored))
    info = json.loads((run_copy / "codes" / "codes.json").read_text())
    info["class_names"][0] = HOSTILE
    (run_copy / "codes" / "codes.json").write_text(json.dumps(info))
    hostile = run_copy.rename(run_copy.parent / "a<b>&'c\"")
    diagnosed(hostile)
    page = (hostile / "diagnose" / "report.html").read_text(encoding="utf-8")
    assert "<script" not in page
    assert "<img src=http" not in page
    assert "&lt;script&gt;" in page
    assert "a&lt;b&gt;&amp;&#39;c&#34;" in page


def test_a_third_partys_prior_is_diagnosed_and_its_file_named(run_copy: Path, tmp_path: Path) -> None:
    text = (Path(__file__).resolve().parents[2] / "README.md").read_text(encoding="utf-8")
    plugin = tmp_path / "my_prior.py"
    plugin.write_text(text.split("```python\n# my_prior.py")[1].split("```")[0], encoding="utf-8")
    run = ["--run", str(run_copy), "--plugin", str(plugin)]
    assert cli.call(["train-prior", "--prior", "bigram", "--level", "top", "--set", "training.steps=3", *run]) == 0
    record = diagnosed(run_copy, "--prior", "top=bigram", "--plugin", str(plugin))
    assert record["levels"][0]["prior"] == "bigram"
    commands = [cure["command"] for cure in record["cures"] if "train-prior" in cure["command"]]
    assert commands
    assert all(f"--plugin {plugin}" in command for command in commands)


def test_what_cannot_be_diagnosed_is_refused(run_copy: Path, fails: Callable[..., str]) -> None:
    run = ["--run", str(run_copy)]
    assert "transformr" in fails("diagnose", "--prior", "transformr", *run)
    assert "no level 'botom'" in fails("diagnose", "--prior", "botom=pixelcnn", *run)
    assert "no trained unigram" in fails("diagnose", "--prior", "top=unigram", *run)
    assert not (run_copy / "diagnose").exists()
    RunFolder(run_copy).remove_stages(["codes"])
    assert "no codes yet" in fails("diagnose", *run)


def test_a_curve_knows_which_weights_were_kept(tmp_path: Path) -> None:
    points = ((1, 1.0), (2, 3.0))
    lines = [{"step": s, "split": "validation", "seconds": 0.0, "bits_per_code": bits} for s, bits in points]
    (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
    assert read_curve(tmp_path, "bits_per_code").best_step == 1
    (tmp_path / "metrics.json").write_text('{"step": 2}')
    assert read_curve(tmp_path, "bits_per_code").best_step == 2


def test_a_curve_is_read_from_a_runs_own_log(finished_run: Path) -> None:
    read = read_curve(RunFolder(finished_run).prior("pixelcnn", "top"), "bits_per_code")
    assert [step for step, _ in read.validation] == [2, 4]
    assert read.kept == read.best_step
    assert read_curve(finished_run / "nothing", "loss").steps == 0


def test_global_generators_are_left_alone(store: CodeStore, healthy: list[PixelCNN]) -> None:
    before = torch.random.get_rng_state()
    verdicts(healthy[1], store, 1)
    (top, bottom), label = made_up(8, 5)
    teacher_forced(healthy[1], bottom, (top,), label, Noise(0, tuple(range(8)), 1))
    assert torch.equal(before, torch.random.get_rng_state())
