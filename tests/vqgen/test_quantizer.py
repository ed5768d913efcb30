"""The quantiser against NumPy, against itself in parts, and against what codebooks are known to suffer from."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from vqgen import quantizer as module
from vqgen.errors import InputError
from vqgen.quantizer import EPSILON, VectorQuantizer, kmeans, nearest_codes

DTYPES = (torch.float32, torch.float64)


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def made(size: int = 5, dim: int = 3, *, counts: float | list[float] = 10.0, **options: Any) -> VectorQuantizer:
    """A float64 quantiser that has begun: a random codebook, and the given running counts."""
    quantizer = VectorQuantizer(size, dim, **options).double()
    state = {
        "codebook": draw(size, dim, seed=99),
        "counts": torch.as_tensor(counts, dtype=torch.float64).expand(size).clone(),
        "initialized": torch.tensor(True),
    }
    quantizer.load_state_dict(state)
    return quantizer


def vectors(z: Tensor) -> np.ndarray[Any, Any]:
    """(N, D) array of a (B, D, h, w) feature map."""
    return z.detach().movedim(1, -1).reshape(-1, z.shape[1]).numpy()


def nearest_in_numpy(flat: np.ndarray[Any, Any], codebook: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    return ((flat[:, None].astype(np.float64) - codebook[None].astype(np.float64)) ** 2).sum(-1).argmin(1)


def state_of(quantizer: VectorQuantizer) -> dict[str, Tensor]:
    return {key: value.clone() for key, value in quantizer.state_dict().items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


# Nearest codes


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("count", [0, 1, 3, 4, 5, 8, 23])
def test_nearest_is_numpys_at_every_slice_boundary(monkeypatch, dtype, count):
    monkeypatch.setattr(module, "SLICE_CPU", 40)  # four rows of ten codes
    codebook, flat = draw(10, 6, seed=1, dtype=dtype), draw(count, 6, seed=2, dtype=dtype)
    codes = nearest_codes(flat, codebook)
    assert codes.dtype == torch.int64
    assert codes.tolist() == nearest_in_numpy(flat.numpy(), codebook.numpy()).tolist()


def test_nearest_takes_codebooks_larger_than_a_slice(monkeypatch):
    monkeypatch.setattr(module, "SLICE_CPU", 7)
    codebook, flat = draw(50, 4, seed=1), draw(9, 4, seed=2)
    assert nearest_codes(flat, codebook).tolist() == nearest_in_numpy(flat.numpy(), codebook.numpy()).tolist()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [module.BLOCK - 1, module.BLOCK, 3 * module.BLOCK])
def test_nearest_by_blocks_is_plain_argmin(dtype, size):
    codebook, flat = draw(size, 4, seed=1, dtype=dtype), draw(200, 4, seed=2, dtype=dtype)
    assert nearest_codes(flat, codebook).tolist() == nearest_in_numpy(flat.numpy(), codebook.numpy()).tolist()
    distances = torch.randint(5, (50, size), generator=torch.Generator().manual_seed(0)).to(dtype)  # many equals
    assert module._lowest(distances).tolist() == distances.numpy().argmin(1).tolist()


@pytest.mark.parametrize("copies", [3, 32])
def test_nearest_gives_equals_to_the_lowest_index(copies):
    codebook = torch.arange(12.0).view(4, 3).repeat(copies, 1)  # whole numbers, so that equals are equal to the bit
    assert nearest_codes(codebook, codebook).tolist() == [0, 1, 2, 3] * copies


def test_nearest_in_float64_sees_what_float32_cannot():
    codebook = 1 + torch.arange(8, dtype=torch.float64)[:, None] * 1e-6
    assert nearest_codes(codebook + 4e-7, codebook).tolist() == list(range(8))
    assert nearest_codes((codebook + 4e-7).float(), codebook.float()).tolist() != list(range(8))


class _Largest(TorchDispatchMode):
    """Remembers the most elements that any tensor made under it had."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if isinstance(tensor, Tensor):
                self.elements = max(self.elements, tensor.numel())
        return result


@pytest.mark.parametrize("kind", ["ema", "gradient"])
def test_a_step_never_holds_all_distances(monkeypatch, kind):
    monkeypatch.setattr(module, "SLICE_CPU", 2**14)
    monkeypatch.setattr(module, "KMEANS_POINTS", 2**10)
    quantizer = VectorQuantizer(256, 4, codebook=kind)
    z = draw(4, 4, 32, 32, dtype=torch.float32).requires_grad_()
    with _Largest() as seen:
        for step in range(2):
            out = quantizer(z)
            (out.z.square().mean() + out.loss).backward()
            quantizer.update(step)
    assert 2**14 <= seen.elements <= 2 * z.numel()  # N x K is 64 times z


# Output, gradient and loss


def test_output_is_the_codebooks_vector_and_its_gradient_the_identity():
    quantizer = made()
    z = draw(2, 3, 4, 5).requires_grad_()
    out = quantizer(z)
    assert out.codes.shape == (2, 4, 5)
    assert out.codes.flatten().tolist() == nearest_in_numpy(vectors(z), quantizer.codebook.numpy()).tolist()
    assert torch.equal(out.z, quantizer.lookup(out.codes))
    assert torch.equal(out.z[1, :, 2, 3], quantizer.codebook[out.codes[1, 2, 3]])
    weight = draw(2, 3, 4, 5, seed=7)
    (out.z * weight).sum().backward()
    assert torch.equal(z.grad, weight)


def test_moving_average_codebook_has_the_commitment_loss_only():
    quantizer = made(commitment=0.4)
    z = draw(2, 3, 4, 5).requires_grad_()
    out = quantizer(z)
    difference = (z - quantizer.lookup(out.codes)).detach()
    torch.testing.assert_close(out.loss, 0.4 * difference.square().mean())
    out.loss.backward()
    torch.testing.assert_close(z.grad, 0.4 * 2 / z.numel() * difference)
    assert not list(quantizer.parameters())


def test_gradient_codebook_has_beta_on_the_encoders_term_alone():
    quantizer = made(codebook="gradient", commitment=0.4)
    z = draw(2, 3, 4, 5).requires_grad_()
    out = quantizer(z)
    difference = (z - quantizer.lookup(out.codes)).detach()
    torch.testing.assert_close(out.loss, 1.4 * difference.square().mean())
    (out.loss + out.z.sum()).backward()  # the straight-through path gives the codebook nothing
    torch.testing.assert_close(z.grad, 0.4 * 2 / z.numel() * difference + 1)
    expected = np.zeros((5, 3))
    np.add.at(expected, out.codes.flatten().numpy(), -2 / z.numel() * vectors(difference))
    np.testing.assert_allclose(quantizer.codebook.grad.numpy(), expected, atol=1e-14)


def test_gradient_codebook_is_moved_by_the_optimiser_only():
    quantizer = made(codebook="gradient", revival=0.0)
    before = quantizer.codebook.detach().clone()
    quantizer(draw(2, 3, 4, 5))
    quantizer.update(0)
    assert torch.equal(quantizer.codebook, before)
    assert [name for name, _ in quantizer.named_parameters()] == ["codebook"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_dtype_out_is_dtype_in(dtype):
    quantizer = VectorQuantizer(5, 3)
    out = quantizer(draw(2, 3, 4, 4, dtype=dtype).requires_grad_())
    assert out.z.dtype == dtype
    assert out.loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    out.loss.backward()


@pytest.mark.parametrize("dtype", DTYPES)
def test_autocast_changes_nothing_inside(dtype):
    plain, cast = made().to(dtype), made().to(dtype)
    z = draw(4, 3, 8, 8, dtype=dtype)
    expected = plain(z)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = cast(z)
        half = cast(z.bfloat16())
    assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(out, expected, strict=True))
    assert half.z.dtype == torch.bfloat16
    plain(z.bfloat16())
    plain.update(0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast.update(0)
    assert same(state_of(plain), state_of(cast))


@pytest.mark.parametrize("kind", ["ema", "gradient"])
def test_an_empty_batch_is_nothing(kind):
    quantizer = VectorQuantizer(5, 3, codebook=kind)
    before = state_of(quantizer)
    z = torch.zeros(0, 3, 4, 4, requires_grad=True)
    out = quantizer(z)
    (out.loss + out.z.sum()).backward()
    quantizer.update(0)
    assert out.z.shape == (0, 3, 4, 4)
    assert out.codes.shape == (0, 4, 4)
    assert out.loss == 0
    assert same(state_of(quantizer), before)


@pytest.mark.parametrize("shape", [(2, 4, 5, 5), (2, 3, 5), (3, 5, 5)])
def test_a_feature_map_that_does_not_fit_is_named(shape):
    with pytest.raises(InputError) as caught:
        VectorQuantizer(5, 3)(torch.zeros(shape))
    assert str(list(shape)) in str(caught.value)
    assert "(batch, 3, height, width)" in str(caught.value)


@pytest.mark.parametrize(
    "options",
    [{"codebook_size": 0}, {"code_dim": 0}, {"decay": 1.0}, {"revival": -1.0}, {"commitment": -0.1}, {"codebook": "x"}],
)
def test_arguments_out_of_range_are_refused(options):
    with pytest.raises(InputError):
        VectorQuantizer(**{"codebook_size": 5, "code_dim": 3, **options})


# Moving averages

LATE = 10_000
"""A step at which the decay has reached its full value."""


def test_moving_average_step_by_hand():
    counts = [4.0, 9.0, 25.0, 1.0, 3.0]
    quantizer = made(counts=counts, decay=0.9, revival=0.0)
    codebook, n = quantizer.codebook.numpy().copy(), np.array(counts)
    sums = n[:, None] * codebook
    for step, decay in ((0, 1 / 10), (1, 2 / 11), (LATE, 0.9)):
        z = draw(2, 3, 4, 4, seed=step)
        quantizer(z)
        quantizer.update(step)
        flat = vectors(z)
        one_hot = np.eye(5)[nearest_in_numpy(flat, codebook)]
        n = decay * n + (1 - decay) * one_hot.sum(0)
        sums = decay * sums + (1 - decay) * one_hot.T @ flat
        codebook = (sums + EPSILON * codebook) / (n + EPSILON)[:, None]
        # Nothing but the counts is kept: their product with the code stands for the sums, to the pseudo-count.
        np.testing.assert_allclose(quantizer.counts.numpy(), n, rtol=1e-12)
        np.testing.assert_allclose(quantizer.codebook.numpy(), codebook, rtol=0, atol=EPSILON)
        if step == 0:
            np.testing.assert_allclose(quantizer.codebook.numpy(), codebook, rtol=0, atol=1e-14)


def test_the_decay_rises_to_its_full_value():
    quantizer = made(decay=0.99)
    decays = [quantizer.decay_at(step) for step in range(1000)]
    assert decays == sorted(decays)
    assert decays[0] == 0.1
    assert decays[100] < 0.93
    assert decays[890] == decays[-1] == 0.99


def test_counts_start_at_those_of_a_whole_step_under_accumulation():
    quantizer = VectorQuantizer(16, 3).double()
    for part in range(4):
        quantizer(draw(2, 3, 4, 4, seed=part))
    quantizer.update(0)
    torch.testing.assert_close(quantizer.counts.sum(), torch.tensor(4 * 2 * 16.0, dtype=torch.float64))


def test_kmeans_centres_are_the_means_of_their_points():
    points = draw(300, 3)
    centres, counts = kmeans(points, 8)
    assert counts.sum() == 300
    torch.testing.assert_close((counts[:, None] * centres).sum(0), points.sum(0))

    def error(centres: Tensor) -> float:
        return float((points - centres[nearest_codes(points, centres)]).square().mean())

    assert error(centres) < 0.9 * error(points[:8])


@pytest.mark.parametrize("kind", ["ema", "gradient"])
def test_first_batch_makes_codebook_and_counts_that_agree(kind):
    quantizer = VectorQuantizer(16, 3, codebook=kind).double()
    assert not quantizer.initialized
    z = draw(4, 3, 8, 8) + 5
    quantizer(z)
    assert quantizer.initialized
    torch.testing.assert_close(quantizer.counts.sum(), torch.tensor(256.0, dtype=torch.float64))
    total = (quantizer.counts[:, None] * quantizer.codebook).sum(0).detach()
    torch.testing.assert_close(total, torch.from_numpy(vectors(z)).sum(0))
    before = quantizer.codebook.detach().clone()
    quantizer(draw(4, 3, 8, 8, seed=1) + 5)
    assert torch.equal(quantizer.codebook, before), "only the first batch initialises"


def test_fewer_vectors_than_codes_are_filled_up_from_the_next_batches():
    quantizer = VectorQuantizer(40, 3).double()
    seen = []
    for step in range(5):
        z = draw(1, 3, 4, 4, seed=step)
        seen.append(vectors(z))
        quantizer(z)
        quantizer.update(step)
        low, high = np.concatenate(seen).min(0), np.concatenate(seen).max(0)
        assert (quantizer.codebook.numpy() >= low - 1e-12).all()
        assert (quantizer.codebook.numpy() <= high + 1e-12).all()
    assert len(quantizer.codebook.unique(dim=0)) == 40
    assert (quantizer.counts > 0).all()


@pytest.mark.parametrize("revival", [0.0, 0.1])
@pytest.mark.parametrize("decay", [0.5, 0.99])
def test_no_code_ever_leaves_the_range_of_the_data(revival, decay):
    """The data wander, so that most codes are left behind; they must neither shrink nor fly off."""
    quantizer = VectorQuantizer(64, 4, decay=decay, revival=revival)
    low, high = torch.full((4,), torch.inf), torch.full((4,), -torch.inf)
    shortest, longest = torch.inf, 0.0
    for step in range(1500):
        centre = 10 + 3 * torch.tensor([step / 1500, -step / 1500, np.sin(step / 99), 0.0])
        z = centre[:, None, None] + 0.1 * draw(2, 4, 3, 3, seed=step, dtype=torch.float32)
        flat = torch.from_numpy(vectors(z))
        low, high = torch.minimum(low, flat.amin(0)), torch.maximum(high, flat.amax(0))
        norms = flat.norm(dim=1)
        shortest, longest = min(shortest, float(norms.min())), max(longest, float(norms.max()))
        quantizer(z)
        quantizer.update(step)
        assert (quantizer.codebook >= low - 1e-4).all(), step
        assert (quantizer.codebook <= high + 1e-4).all(), step
        assert (quantizer.codebook.norm(dim=1) <= longest + 1e-4).all(), step
    assert (quantizer.codebook.norm(dim=1) >= shortest - 0.1).all()  # means lie a little inside the shell


# Revival


@pytest.mark.parametrize("kind", ["ema", "gradient"])
def test_a_revived_code_stays_where_it_was_put(kind):
    quantizer = made(counts=[20.0, 0.01, 20.0, 20.0, 20.0], codebook=kind)
    with torch.no_grad():
        quantizer.codebook[1] = 1e3  # far from everything: never used
    z = draw(2, 3, 4, 4)
    quantizer(z)
    assert quantizer.update(LATE)["revived"] == 1
    placed, count = quantizer.codebook[1].detach().clone(), float(quantizer.counts[1])
    assert (np.abs(vectors(z) - placed.numpy()).max(1) < 1e-14).any(), "not an encoder output"
    torch.testing.assert_close(quantizer.counts[1], quantizer.counts[[0, 2, 3, 4]].sum().add(0.01 * 0.99) / 5)

    far = torch.full((1, 3, 4, 4), 50.0, dtype=torch.float64)  # goes to whichever code is nearest, not to all
    far[:] = quantizer.codebook[0].detach()[:, None, None]
    quantizer(far)
    assert quantizer.update(LATE + 1)["revived"] == 0, "revived again at once"
    torch.testing.assert_close(quantizer.codebook[1].detach(), placed, rtol=0, atol=1e-12)
    assert float(quantizer.counts[1]) == pytest.approx(0.99 * count)


def test_a_revived_code_moves_towards_what_it_is_given_at_the_usual_pace():
    quantizer = made(counts=[20.0, 0.0, 20.0, 20.0, 20.0])
    z = draw(2, 3, 4, 4)
    quantizer(z)
    quantizer.update(LATE)
    placed, count = quantizer.codebook[1].clone(), quantizer.counts[1].clone()
    quantizer((placed + 1e-3)[None, :, None, None].expand(1, 3, 4, 4))
    quantizer.update(LATE + 1)
    share = 0.01 * 16 / (0.99 * count + 0.01 * 16 + EPSILON)
    torch.testing.assert_close(quantizer.codebook[1] - placed, (1e-3 * share).expand(3), rtol=1e-6, atol=0)


def test_no_more_codes_are_revived_than_there_are_vectors_and_the_least_used_go_first():
    quantizer = made(6, 3, counts=[0.3, 50.0, 0.1, 0.2, 50.0, 50.0])
    with torch.no_grad():
        quantizer.codebook[[0, 2, 3]] += 1e3
    quantizer(draw(1, 3, 1, 2))
    assert quantizer.update(0)["revived"] == 2
    assert (quantizer.codebook.abs().amax(1) > 100).tolist() == [True, False, False, False, False, False]


def test_revival_finds_what_the_first_batch_did_not_show():
    """Sixteen clusters, of which the first batch shows one."""
    centres = 10 * draw(16, 4, seed=5, dtype=torch.float32)

    def train(revival: float) -> float:
        quantizer = VectorQuantizer(64, 4, decay=0.9, revival=revival)
        for step in range(200):
            which = torch.randint(16 if step else 1, (64,), generator=torch.Generator().manual_seed(step))
            z = centres[which] + 0.1 * draw(64, 4, seed=step, dtype=torch.float32)
            quantizer(z.view(64, 4, 1, 1))
            quantizer.update(step)
        quantizer.eval()
        return float((quantizer(centres.view(16, 4, 1, 1)).z.view(16, 4) - centres).square().mean())

    assert train(0.1) < 0.1
    assert train(0.0) > 1.0


def test_choice_is_a_function_of_seed_and_step():
    def revived(seed: int, step: int) -> Tensor:
        quantizer = made(8, 3, counts=[10.0] * 4 + [0.0] * 4, seed=seed)
        quantizer(draw(2, 3, 8, 8))
        assert quantizer.update(LATE + step)["revived"] > 0
        return quantizer.codebook

    assert torch.equal(revived(1, 2), revived(1, 2))
    assert not torch.equal(revived(1, 2), revived(1, 3))
    assert not torch.equal(revived(1, 2), revived(2, 2))


def test_candidates_are_an_even_sample_of_a_large_batch():
    quantizer = VectorQuantizer(4, 1)
    places = torch.arange(64 * 256, dtype=torch.float32)
    quantizer(places.view(64, 1, 16, 16))
    assert quantizer._pending is not None
    sample = quantizer._pending.sample.vectors.flatten()
    assert len(sample.unique()) == len(sample) == module.MIN_CANDIDATES
    images = torch.bincount((sample // 256).long(), minlength=64)  # 16 expected of each
    cells = torch.bincount((sample % 256).long(), minlength=256)  # 4 of each
    assert images.min() >= 12
    assert images.max() <= 20
    assert cells.min() >= 1
    assert cells.max() <= 8


# State


def test_evaluation_changes_nothing():
    quantizer = made(counts=[10.0, 10.0, 10.0, 0.0, 0.0])
    before = state_of(quantizer)
    quantizer.eval()
    quantizer(draw(2, 3, 4, 4))
    quantizer.train()
    with torch.no_grad():
        quantizer(draw(2, 3, 4, 4))
    assert quantizer.update(0)["revived"] == 0
    assert same(state_of(quantizer), before)

    fresh = VectorQuantizer(5, 3).eval()
    before = state_of(fresh)
    fresh(draw(2, 3, 4, 4))
    assert same(state_of(fresh), before)


def test_global_generators_are_untouched():
    before = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()
    quantizer = VectorQuantizer(8, 3)
    for step in range(3):
        quantizer(draw(1, 3, 2, 2, seed=step))
        quantizer.update(step)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert np.random.get_state()[1].tolist() == before[1]
    assert random.getstate() == before[2]


@pytest.mark.parametrize("kind", ["ema", "gradient"])
def test_resuming_from_the_state_dict_is_bit_for_bit(kind):
    def run(quantizer: VectorQuantizer, steps: range) -> Iterator[dict[str, Tensor]]:
        for step in steps:
            quantizer(draw(2, 3, 4, 4, seed=step, dtype=torch.float32) * (1 + step))
            quantizer.update(step)
            yield state_of(quantizer)

    first = VectorQuantizer(24, 3, codebook=kind)
    whole = list(run(first, range(8)))
    second = VectorQuantizer(24, 3, codebook=kind)
    second(draw(1, 3, 4, 4))  # what it collected before loading must not count
    second.load_state_dict(whole[3])
    assert all(same(a, b) for a, b in zip(run(second, range(4, 8)), whole[4:], strict=True))


# Parts and the whole


def stream(step: int) -> Tensor:
    """One step's joint batch: eight images, whose values wander so that codes are left behind."""
    return draw(8, 3, 3, 3, seed=step) + 4 * (step % 5)


def begin(kind: Any) -> VectorQuantizer:
    return VectorQuantizer(16, 3, codebook=kind, decay=0.5).double()  # forgets fast, so that codes are revived


def small_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    """Candidates fewer than the 72 vectors of a joint batch, so that the sampling is part of what is tested."""
    monkeypatch.setattr(module, "MIN_CANDIDATES", 20)
    monkeypatch.setattr(module, "KMEANS_POINTS", 40)


@pytest.mark.parametrize("kind", ["ema", "gradient"])
@pytest.mark.parametrize("sizes", [[4, 4], [1, 5, 2], [8, 0]])
def test_micro_batches_equal_one_joint_batch(monkeypatch, kind, sizes):
    small_sample(monkeypatch)
    whole, parts, revived = begin(kind), begin(kind), 0.0
    for step in range(12):
        z = stream(step)
        whole(z)
        for part in [z] if step == 0 else z.split(sizes):  # the first micro-batch alone initialises
            parts(part)
        revived += float(whole.update(step)["revived"])
        parts.update(step)
        for name, value in whole.state_dict().items():
            torch.testing.assert_close(parts.state_dict()[name], value, rtol=0, atol=1e-10)
    assert revived > 0


def train_on_shares(folder: str, kind: str) -> None:
    """On each of two processes: the first or the second half of every micro-batch; rank 0 writes the state."""
    from accelerate import PartialState

    process = PartialState(cpu=True)
    assert process.num_processes == 2
    quantizer = begin(kind)
    for step in range(12):
        for micro_batch in stream(step).split(4):
            quantizer(micro_batch.chunk(2)[process.process_index])
        quantizer.update(step)
    state = {key: value.numpy() for key, value in quantizer.state_dict().items()}
    np.savez(Path(folder) / f"{process.process_index}.npz", **state)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of forking, from Python 3.12 on
@pytest.mark.parametrize("kind", ["ema", "gradient"])
def test_two_processes_give_the_codebook_of_one(monkeypatch, tmp_path, kind):
    from accelerate import debug_launcher

    small_sample(monkeypatch)
    debug_launcher(train_on_shares, args=(str(tmp_path), kind), num_processes=2)

    alone, revived = begin(kind), 0.0
    for step in range(12):
        for micro_batch in stream(step).split(4):
            alone(micro_batch)
        revived += float(alone.update(step)["revived"])
    assert revived > 0
    for rank in range(2):
        with np.load(tmp_path / f"{rank}.npz") as state:
            for name, value in alone.state_dict().items():
                np.testing.assert_allclose(state[name], value.numpy(), rtol=0, atol=1e-10)
