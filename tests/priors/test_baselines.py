"""The baselines are exact: their figures are recomputed by counting."""

from __future__ import annotations

import itertools
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from priors import baselines
from priors.base import PriorSpec
from priors.baselines import Uniform, Unigram
from priors.check import check_prior
from priors.sampling import Noise, SampleOptions
from vqgen.codes import Codes, LevelSpec
from vqgen.errors import InputError, MismatchError

TARGET = LevelSpec("bottom", 2, 3, 4, 2)
CONTEXT = LevelSpec("top", 1, 1, 5, 2)
SPEC = PriorSpec(TARGET, (CONTEXT,), 3)


def batch(size: int, seed: int = 0) -> tuple[Tensor, Codes, Tensor]:
    """Codes whose frequencies differ from position to position and from class to class."""
    generator = np.random.default_rng(seed)
    label = generator.integers(0, 3, size)
    codes = generator.binomial(3, 0.1 + 0.1 * np.arange(6).reshape(2, 3) + 0.1 * label[:, None, None])
    return torch.from_numpy(codes), (torch.zeros(size, 1, 1, dtype=torch.int64),), torch.from_numpy(label)


@pytest.fixture
def unigram() -> Unigram:
    prior = Unigram({}, SPEC)
    prior.prepare([batch(100, 0), batch(50, 1)])
    return prior.eval()


def noise(size: int) -> Noise:
    return Noise(0, tuple(range(size)), 1)


@pytest.mark.parametrize("cls", [Uniform, Unigram])
def test_they_keep_the_rules_of_a_prior(cls: type[Uniform] | type[Unigram]) -> None:
    check_prior(cls, conditional=False)


def test_uniform_is_log2_k_bits_per_code() -> None:
    prior = Uniform({}, SPEC)
    codes, context, label = batch(5)
    assert prior.log_prob(codes, context, label).nats.tolist() == pytest.approx([-6 * math.log(4)] * 5)
    assert prior(codes, context, label)["bits_per_code"].item() == pytest.approx(2)
    assert not prior.state_dict()


def test_unigram_counts_each_code_at_each_position_of_each_class(unigram: Unigram) -> None:
    first, second = batch(100, 0), batch(50, 1)
    codes, labels = torch.cat([first[0], second[0]]), torch.cat([first[2], second[2]])
    tested, context, label = batch(20, 2)
    expected = np.zeros(20)
    for n, (i, j) in itertools.product(range(20), itertools.product(range(2), range(3))):
        same = codes[labels == label[n]][:, i, j]
        count = int((same == tested[n, i, j]).sum())
        expected[n] += math.log((count + 0.5) / (len(same) + 0.5 * 4))
    assert unigram.log_prob(tested, context, label).nats.numpy() == pytest.approx(expected, rel=1e-12)


def test_without_a_label_the_classes_are_added_up(unigram: Unigram) -> None:
    codes = torch.cat([batch(100, 0)[0], batch(50, 1)[0]])
    tested, context, label = batch(20, 2)
    rows = [torch.bincount(codes[:, i, j], minlength=4) for i, j in itertools.product(range(2), range(3))]
    table = ((torch.stack(rows) + 0.5) / (150 + 2)).double().log()
    expected = table.gather(1, tested.flatten(1).T).sum(0)
    assert torch.allclose(unigram.log_prob(tested, context, None).nats, expected)
    assert torch.allclose(unigram.log_prob(tested, context, torch.full_like(label, 3)).nats, expected)


def test_labels_of_one_batch_may_differ(unigram: Unigram) -> None:
    codes, context, _ = batch(4)
    label = torch.tensor([2, 3, 0, 2])
    together = unigram.log_prob_map(codes, context, label)
    for row in range(4):
        alone = unigram.log_prob_map(codes[row : row + 1], (context[0][:1],), label[row : row + 1])
        assert torch.equal(together[row], alone[0])


def test_unseen_codes_have_a_probability(unigram: Unigram) -> None:
    empty = Unigram({}, SPEC)
    codes, context, label = batch(3)
    assert empty.log_prob(codes, context, label).nats.tolist() == pytest.approx([-6 * math.log(4)] * 3)


def test_samples_have_the_counted_frequencies(unigram: Unigram) -> None:
    """3,000 samples: five standard errors for each of 24 frequencies."""
    size = 3000
    samples = unigram.sample(noise(size), (torch.zeros(size, 1, 1, dtype=torch.int64),), torch.full((size,), 1))
    shares = torch.nn.functional.one_hot(samples.flatten(1), 4).double().mean(0)
    chances = unigram.table(1).exp()
    assert ((shares - chances).abs() <= 5 * (chances * (1 - chances) / size).sqrt()).all()


def test_sampling_options_and_known_codes_are_honoured(unigram: Unigram) -> None:
    codes, context, label = batch(30)
    best = unigram.sample(noise(30), context, label, SampleOptions(temperature=0.0))
    for value in range(3):
        likeliest = unigram.table(value).argmax(-1).view(2, 3)
        assert (best[label == value] == likeliest).all()
    two = unigram.sample(noise(30), context, None, SampleOptions(top_k=2))
    least = unigram.table(3).topk(2).values[:, -1:]
    assert (unigram.table(3).gather(1, two.flatten(1).T) >= least).all()
    keep = torch.zeros_like(codes, dtype=torch.bool)
    keep[:, 1] = True
    kept = unigram.sample(noise(30), context, label, known=codes, keep=keep)
    assert torch.equal(kept[:, 1], codes[:, 1])
    assert torch.equal(kept[:, 0], unigram.sample(noise(30), context, label)[:, 0])


def test_guidance_is_refused(unigram: Unigram) -> None:
    _, context, label = batch(2)
    with pytest.raises(InputError, match="cannot be guided"):
        unigram.sample(noise(2), context, label, SampleOptions(guidance=2.0))


def test_preparing_again_counts_anew(unigram: Unigram) -> None:
    before = unigram.counts.clone()
    unigram.prepare([batch(100, 0), batch(50, 1)])
    assert torch.equal(unigram.counts, before)
    assert unigram.counts.sum() == 150 * 6


def test_counts_survive_half_precision_and_saving(unigram: Unigram, tmp_path: Path) -> None:
    codes, context, label = batch(10)
    expected = unigram.log_prob(codes, context, label).nats
    unigram.half().save_pretrained(tmp_path)
    assert torch.equal(Unigram.from_pretrained(tmp_path).log_prob(codes, context, label).nats, expected)


def test_a_table_that_would_be_too_large_is_shared_by_the_classes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(baselines, "MAX_ENTRIES", 3 * 6 * 4 - 1)
    prior = Unigram({}, SPEC)
    assert prior.counts.shape == (1, 6, 4)
    prior.prepare([batch(50)])
    codes, context, label = batch(10, 1)
    assert torch.equal(prior.log_prob(codes, context, label).nats, prior.log_prob(codes, context, None).nats)


def test_codes_that_do_not_fit_are_refused(unigram: Unigram) -> None:
    codes, context, label = batch(4)
    with pytest.raises(InputError, match="3 labels; these codes have none"):
        unigram.prepare([(codes, context, None)])
    with pytest.raises(InputError, match="codes from 0 to 3"):
        unigram.prepare([(codes + 4, context, label)])
    with pytest.raises(MismatchError, match=r"shape \(B, 2, 3\)"):
        unigram.prepare([(codes[:, :1], context, label)])
    with pytest.raises(InputError, match="labels"):
        unigram.prepare([(codes, context, label + 3)])


WORKER = """
import sys, torch
from priors.base import PriorSpec
from priors.baselines import Unigram
from vqgen.codes import LevelSpec
rank, store = int(sys.argv[1]), sys.argv[2]
torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
prior = Unigram({}, PriorSpec(LevelSpec("top", 1, 2, 3, 2)))
codes = torch.tensor([[[0, 1]], [[0, 2]], [[1, 2]]])
prior.prepare([(codes, (), None)] if rank == 0 else [])
print(prior.counts.tolist())
torch.distributed.destroy_process_group()
"""


@pytest.mark.slow
def test_two_processes_count_together(tmp_path: Path) -> None:
    """One of them has no codes at all, and still takes part."""
    command = [sys.executable, "-c", WORKER]
    workers = [
        subprocess.Popen([*command, str(rank), str(tmp_path / "store")], stdout=subprocess.PIPE, text=True)
        for rank in range(2)
    ]
    for worker in workers:
        assert worker.communicate(timeout=120)[0].strip() == "[[[2, 1, 0], [0, 1, 2]]]"
