"""`vqgen info`: what a run holds, and what of it was only begun."""

from __future__ import annotations

import json
from pathlib import Path

from pipelines.info import info
from vqgen.files import write_json
from vqgen.run_folder import RunFolder


def test_what_was_only_begun_is_named(run_copy: Path) -> None:
    run = RunFolder(run_copy)
    assert not [line for line in info(run)["table"] if "not done" in line[-1]]
    (level,) = (path for path in run_copy.glob("priors/pixelcnn/top"))
    (level / "checkpoints" / "step-00000028").mkdir(parents=True, exist_ok=True)
    (level / "checkpoints" / "latest").write_text("step-00000028", encoding="utf-8")
    record = json.loads(run.record.read_text(encoding="utf-8"))
    del record["stages"]["priors/pixelcnn/top"], record["stages"]["codes"]
    write_json(run.record, record)
    begun = {line[0]: line for line in info(run)["table"] if "not done" in line[-1]}
    assert list(begun) == ["priors/pixelcnn/top", "codes"]
    assert begun["priors/pixelcnn/top"][1] == "at 28"
    assert "train-codes --resume" in begun["codes"][-1]
