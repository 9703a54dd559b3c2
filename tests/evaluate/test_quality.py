"""The quality metrics against closed forms, and against clips that are worse by construction."""

import math
from pathlib import Path

import pytest
import torch

from optpass.errors import UserError
from optpass.evaluate.quality import (
    Evaluator,
    Quality,
    centroids,
    feature_statistics,
    frechet_distance,
    psnr,
    temporal_consistency,
)

CHECKPOINT = Path(__file__).parents[1] / "checkpoints" / "moving-digits"


def blobs(corners: torch.Tensor, width: float | torch.Tensor = 3.0) -> torch.Tensor:
    """Gaussian blobs of the given width around `corners` [N, F, 2]: clips [N, F, 1, 32, 32]."""
    line = torch.arange(32.0)
    x = (line - corners[..., 0:1]).square()
    y = (line - corners[..., 1:2]).square()
    return torch.exp(-(x[..., None, :] + y[..., :, None]) / (2 * torch.as_tensor(width) ** 2)).unsqueeze(2)


def straight(count: int = 4) -> torch.Tensor:
    start = torch.full((count, 1, 2), 9.0)
    velocity = torch.tensor([1.6, 1.1])
    return start + velocity * torch.arange(8)[None, :, None]


# ------------------------------------------------------------------------------------------------------------- psnr


def test_psnr_of_a_constant_error_is_its_decibels() -> None:
    black = torch.zeros(2, 3, 1, 4, 4)
    assert psnr(black, black + 0.1) == pytest.approx(20.0, abs=1e-5)
    assert psnr(black, black + 0.01) == pytest.approx(40.0, abs=1e-5)


def test_psnr_by_hand() -> None:
    a, b = torch.tensor([[[[[0.0, 1.0]]]]]), torch.tensor([[[[[0.5, 1.0]]]]])
    assert psnr(a, b) == pytest.approx(10 * math.log10(8), abs=1e-9)


def test_psnr_of_equal_clips_is_infinite() -> None:
    assert psnr(torch.ones(1, 2, 1, 2, 2), torch.ones(1, 2, 1, 2, 2)) == math.inf


def test_psnr_refuses_shapes_that_differ() -> None:
    with pytest.raises(UserError, match=r"\[1, 2, 1, 2, 2\] and \[1, 3, 1, 2, 2\]"):
        psnr(torch.zeros(1, 2, 1, 2, 2), torch.zeros(1, 3, 1, 2, 2))


# ---------------------------------------------------------------------------------------------------------- Fréchet


def test_frechet_distance_of_commuting_gaussians_is_the_closed_form() -> None:
    mean_a, mean_b = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([0.0, 4.0, 3.0])
    variances_a, variances_b = torch.tensor([1.0, 4.0, 9.0]), torch.tensor([4.0, 1.0, 0.0])
    expected = 1 + 4 + (1 - 2) ** 2 + (2 - 1) ** 2 + (3 - 0) ** 2
    found = frechet_distance(mean_a, torch.diag(variances_a), mean_b, torch.diag(variances_b))
    assert found == pytest.approx(expected, rel=1e-9)


def test_frechet_distance_agrees_with_scipy_where_covariances_do_not_commute() -> None:
    linalg = pytest.importorskip("scipy.linalg")
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(200, 6, generator=generator, dtype=torch.float64) for _ in range(2))
    b = b @ torch.randn(6, 6, generator=generator, dtype=torch.float64) + 1
    (mean_a, cov_a), (mean_b, cov_b) = feature_statistics(a), feature_statistics(b)
    root = linalg.sqrtm((cov_a @ cov_b).numpy()).real
    expected = float((mean_a - mean_b).square().sum() + cov_a.trace() + cov_b.trace()) - 2 * root.trace()
    assert frechet_distance(mean_a, cov_a, mean_b, cov_b) == pytest.approx(expected, rel=1e-8)


def test_frechet_distance_to_itself_is_zero_also_when_rank_deficient() -> None:
    few = torch.randn(3, 16, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    mean, covariance = feature_statistics(few)
    assert frechet_distance(mean, covariance, mean, covariance) == pytest.approx(0, abs=1e-6)


# ---------------------------------------------------------------------------------------------- temporal consistency


def test_one_shape_at_constant_speed_is_perfectly_consistent() -> None:
    assert temporal_consistency(blobs(straight())).min().item() == pytest.approx(1.0, abs=0.02)


def test_centroids_are_where_the_blobs_are() -> None:
    corners = straight(1)
    found = centroids((blobs(corners).mean(2) - 0.1).clamp(min=0))
    assert torch.allclose(found, corners, atol=0.02)


def test_a_reflection_between_two_frames_costs_nothing() -> None:
    path = torch.tensor([10.0, 12.0, 14.0, 16.0, 14.0, 12.0, 10.0, 8.0])
    corners = torch.stack([path, torch.full((8,), 16.0)], dim=-1)[None]
    assert temporal_consistency(blobs(corners)).item() == pytest.approx(1.0, abs=0.02)


@pytest.mark.parametrize("jitter", [0.5, 1.0, 2.0])
def test_a_jittered_track_is_less_consistent(jitter: float) -> None:
    corners = straight()
    noise = torch.randn(corners.shape, generator=torch.Generator().manual_seed(2)) * jitter
    assert (temporal_consistency(blobs(corners + noise)) < temporal_consistency(blobs(corners)) - 0.2).all()


def test_a_clip_with_its_frames_shuffled_is_less_consistent() -> None:
    clips = blobs(straight())
    order = torch.tensor([3, 0, 6, 1, 7, 4, 2, 5])
    assert (temporal_consistency(clips[:, order]) < 0.5 * temporal_consistency(clips)).all()


def test_a_shape_that_changes_half_way_is_less_consistent_though_its_track_is_smooth() -> None:
    width = torch.tensor([2.0, 2.0, 2.0, 2.0, 4.0, 4.0, 4.0, 4.0]).reshape(1, 8, 1, 1)
    constant, changing = blobs(straight(1)), blobs(straight(1), width)
    assert temporal_consistency(changing).item() < temporal_consistency(constant).item() - 0.05


def test_empty_clips_have_no_consistency() -> None:
    assert temporal_consistency(torch.zeros(2, 8, 1, 32, 32)).tolist() == [0.0, 0.0]


def test_frames_with_nan_are_refused() -> None:
    frames = torch.zeros(1, 8, 1, 32, 32)
    frames[0, 3, 0, 1, 1] = math.nan
    with pytest.raises(UserError, match="NaN or Inf"):
        temporal_consistency(frames)


def test_frames_of_the_wrong_rank_are_refused() -> None:
    with pytest.raises(UserError, match=r"\[N, F, C, H, W\]"):
        temporal_consistency(torch.zeros(8, 1, 32, 32))


# --------------------------------------------------------------------------------------------------------- evaluator


def test_a_folder_without_an_evaluator_is_refused_with_what_is_missing(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no evaluator in .*reference\.safetensors.* missing"):
        Evaluator.load(tmp_path)


def test_a_damaged_evaluator_is_refused(tmp_path: Path) -> None:
    for file in (CHECKPOINT / "evaluator").iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    weights = tmp_path / "reference.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(UserError, match=r"damaged|cannot be read"):
        Evaluator.load(tmp_path)


def test_labels_that_do_not_fit_are_refused() -> None:
    evaluator = Evaluator.load(CHECKPOINT)
    with pytest.raises(UserError, match=r"2 clips need labels of shape \[2\], not \[3\]"):
        evaluator.measure(torch.zeros(2, 8, 1, 32, 32), torch.tensor([1, 2, 3]))


def test_noise_measures_worse_than_nothing_moving_at_all() -> None:
    evaluator = Evaluator.load(CHECKPOINT)
    noise = torch.rand(10, 8, 1, 32, 32, generator=torch.Generator().manual_seed(3))
    quality = evaluator.measure(noise, torch.arange(10))
    assert isinstance(quality, Quality)
    assert quality.frame_accuracy < 0.5
    assert quality.frechet_distance > 1
    assert set(quality.as_dict()) == {
        "frame_accuracy",
        "temporal_consistency",
        "temporal_consistency_real",
        "frechet_distance",
    }
