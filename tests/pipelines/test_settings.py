"""From what was typed to settings: which preset, which run, which levels a change holds for."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest

from pipelines import cli
from pipelines.cli_options import with_flags
from pipelines.settings import (
    every_training,
    new_run_settings,
    prior_settings_of_run,
    run_settings,
    training_minutes,
)
from priors.registry import prior_settings
from vqgen.errors import ConfigError, InputError
from vqgen.run_folder import RunFolder, run_for


def test_data_alone_takes_the_preset_for_own_images_and_names_the_run() -> None:
    assert new_run_settings(None, "my images/").data.model_dump(include={"source", "image_size"}) == {
        "source": "my images/",
        "image_size": 64,
    }
    assert run_for(None, None, "holidays/my images") == Path("runs/my-images")
    assert run_for(None, "cifar10", "elsewhere") == Path("runs/cifar10")
    assert new_run_settings(None, None).data.source == "shapes"


def test_a_bare_training_means_the_one_stage_trained(finished_run: Path) -> None:
    settings = new_run_settings("shapes", None, ["training.steps=7"], short_for="codec")
    assert settings.codec.training.steps == 7
    with pytest.raises(InputError, match=r"codec\.training\.steps"):
        new_run_settings("shapes", None, ["training.steps=7"])
    run = RunFolder(finished_run)
    config = prior_settings_of_run(run, "pixelcnn", ["top"], ["training.steps=9", "priors.pixelcnn.width=24"])
    section = config.priors["pixelcnn"]
    top, bottom = (prior_settings("pixelcnn", section, level) for level in ("top", "bottom"))
    assert (top.training.steps, top.config.model_dump()["width"]) == (9, 24)
    assert (bottom.training.steps, bottom.config.model_dump()["width"]) == (4, 16)


def test_minutes_replace_a_budget_in_steps_at_every_level(finished_run: Path) -> None:
    config = prior_settings_of_run(RunFolder(finished_run), "pixelcnn", (), [], minutes=2)
    for level in ("top", "bottom"):
        training = prior_settings("pixelcnn", config.priors["pixelcnn"], level).training
        assert (training.minutes, training.steps) == (2, None)
    everything = training_minutes(new_run_settings("mnist", None), 3)
    assert everything.codec.training.minutes == 3
    assert prior_settings("transformer", everything.priors["transformer"], "bottom").training.minutes == 3


def test_a_flag_holds_for_every_training_that_no_assignment_names() -> None:
    sets = ["priors.pixelcnn.training.compile=false", "codec.training.minutes=2", "seed=1"]
    given = new_run_settings("shapes", None, sets, seed=5)
    made = every_training(given, with_flags((), compiled=True, auto_batch=True), sets)
    assert made.seed == 5
    assert made.codec.training.compile
    assert made.codec.training.minutes == 2
    for level in ("top", "bottom"):
        trainings = {name: prior_settings(name, made.priors[name], level).training for name in made.run.priors}
        assert [training.auto_batch for training in trainings.values()] == [True, True]
        assert trainings["transformer"].compile
    assert not prior_settings("pixelcnn", made.priors["pixelcnn"], "top").training.compile
    assert with_flags(["data.streaming=false"], streaming=True) == ("data.streaming=true", "data.streaming=false")


def test_a_resume_starts_from_what_the_level_was_begun_with(run_copy: Path) -> None:
    run = RunFolder(run_copy)
    redo = ["train-prior", "--prior", "pixelcnn", "--level", "top", "--overwrite", "--run", str(run_copy)]
    assert cli.call([*redo, "--seed", "5", "--set", "training.steps=3"]) == 0
    config = prior_settings_of_run(run, "pixelcnn", ["top"], [], resume=True)
    assert (config.seed, prior_settings("pixelcnn", config.priors["pixelcnn"], "top").training.steps) == (5, 3)
    assert run_settings(run).seed == 0


def test_a_finished_prior_with_other_settings_is_refused_and_nothing_is_written(
    run_copy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {path: path.read_bytes() for path in run_copy.rglob("*") if path.is_file()}
    again = ["train-prior", "--prior", "pixelcnn", "--resume", "--run", str(run_copy)]
    assert cli.call([*again, "--set", "priors.pixelcnn.width=24"]) == 2
    assert "config.width: was 16, now 24" in capsys.readouterr().err
    after = {path: path.read_bytes() for path in run_copy.rglob("*") if path.is_file() and path.name != ".lock"}
    assert {path: content for path, content in before.items() if path.name != ".lock"} == after


def test_other_images_under_the_same_name_are_refused(
    tmp_path: Path, tiny_config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import numpy as np

    generator = np.random.default_rng(0)
    for images in generator.integers(0, 256, (2, 40, 16, 16, 3), dtype=np.uint8):
        np.save(tmp_path / "mine.npy", images)
        if not (tmp_path / "run").exists():
            arguments = ["--config", str(tiny_config), "--data", str(tmp_path / "mine.npy")]
            assert cli.call(["train-codes", *arguments, "--run", str(tmp_path / "run")]) == 0
    record = json.loads((tmp_path / "run/run.json").read_text())
    del record["stages"]["codes"]
    (tmp_path / "run/run.json").write_text(json.dumps(record))
    assert cli.call(["train-codes", "--resume", "--run", str(tmp_path / "run")]) == 2
    assert "not those" in capsys.readouterr().err


def test_overwrite_reads_the_data_before_it_removes_anything(
    run_copy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.call(["train-codes", "--overwrite", "--data", "./nowhere", "--run", str(run_copy)]) == 2
    assert "nowhere" in capsys.readouterr().err
    assert (run_copy / "codec/model.safetensors").is_file()
    assert (run_copy / "priors/pixelcnn/top/model.safetensors").is_file()


def test_unknown_settings_are_named_by_what_was_typed(finished_run: Path) -> None:
    with pytest.raises(ConfigError, match=r"priors\.pixelcnn\.blokcs: unknown key\. Did you mean 'blocks'"):
        prior_settings_of_run(RunFolder(finished_run), "pixelcnn", (), ["priors.pixelcnn.blokcs=3"])


def test_mirrored_training_images_are_encoded_as_they_are(tmp_path: Path, tiny_config: Path) -> None:
    """Encoded after some epochs of mirrored images, and again from scratch: the same codes."""
    from vqgen.code_store import CodeStore

    run = tmp_path / "run"
    assert cli.call(["train-codes", "--config", str(tiny_config), "--run", str(run), "--set", "data.flip=true"]) == 0
    first = CodeStore.load(run / "codes").fingerprint
    record = json.loads((run / "run.json").read_text())
    del record["stages"]["codes"]
    (run / "run.json").write_text(json.dumps(record))
    assert cli.call(["train-codes", "--resume", "--run", str(run)]) == 0
    assert CodeStore.load(run / "codes").fingerprint == first


@pytest.mark.parametrize("command", [["train-codes"], ["train-prior", "--prior", "pixelcnn"]])
def test_a_refused_overwrite_removes_nothing(
    command: list[str], run_copy: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *rest: None if name == "wandb" else found(name, *rest))
    before = {path: path.read_bytes() for path in run_copy.rglob("*.safetensors")}
    arguments = [*command, "--overwrite", "--run", str(run_copy), "--set", "training.tracker=wandb"]
    assert cli.call(arguments) == 2
    assert "vqgen[tracking]" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in run_copy.rglob("*.safetensors")} == before


def test_other_images_are_not_taken_for_those_of_a_finished_run(
    run_copy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import numpy as np

    images = np.random.default_rng(0).integers(0, 256, (40, 16, 16, 3), dtype=np.uint8)
    np.save(tmp_path / "others.npy", images)
    assert cli.call(["run", "--run", str(run_copy), "--data", str(tmp_path / "others.npy")]) == 2
    assert "are not those" in capsys.readouterr().err
