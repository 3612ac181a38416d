"""PostHocEMA: averages with the profile asked for, states that resume, and synthesis."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from posthoc_cli import KarrasEMA, PostHocEMA
from posthoc_cli.api import open_snapshots
from posthoc_cli.errors import SnapshotError, UsageError
from posthoc_cli.snapshots.folder import read_folder
from posthoc_cli.snapshots.sampling import fit_snapshots
from posthoc_cli.solver.blup import expected_error as expect
from posthoc_cli.solver.methods import solve
from posthoc_cli.solver.profiles import Profile, sigma_rel_to_gamma
from tests.training.networks import Counter, Tied, folder_bytes, needs_gpu, small, train


@pytest.mark.parametrize("update_every", [1, 10, 100])
def test_mean_age_is_the_profiles(update_every: int, tmp_path: Path) -> None:
    steps, model = 1000 * update_every, Counter()  # a sum of 1000 terms is off by 1 in 2000
    ema = PostHocEMA(model, folder=tmp_path, checkpoint_every=None, update_every=update_every)
    karras = KarrasEMA(model, sigma_rel=0.2, update_every=update_every)
    for step in range(1, steps + 1):
        if step % update_every == 0:  # the other calls must not look at the network
            model.set(step)
        ema.update()
        karras.update()
    means = [averages["weight"].item() for averages in ema.state_dict()["averages"]]
    means.append(karras.ema_model.weight.item())
    for gamma, mean in zip((*ema.gammas, karras.gamma), means, strict=True):
        assert mean / steps == pytest.approx((gamma + 1) / (gamma + 2), abs=1e-3)
    assert karras.beta == (1 - update_every / steps) ** (1 + karras.gamma)


def test_uneven_skipped_and_changed_intervals_keep_the_profile(tmp_path: Path) -> None:
    model, generator = Counter(), np.random.default_rng(0)
    ema = PostHocEMA(
        model, gammas=(3.0, 8.0), folder=tmp_path, checkpoint_every=None, dtype=torch.float32
    )
    step = 0
    while step < 1_000_000:
        step += int(generator.integers(1, 500))
        if step > 300_000:
            ema.update_every = 2000
        model.set(step)
        ema.update(step)
    ema.checkpoint()  # up to the present step, whatever update_every left behind
    for gamma, averages in zip((3.0, 8.0), ema.state_dict()["averages"], strict=True):
        assert averages["weight"].item() / step == pytest.approx(
            (gamma + 1) / (gamma + 2), abs=2e-3
        )


def test_an_update_weighs_what_the_paper_says(tmp_path: Path) -> None:
    model = Counter()
    ema = PostHocEMA(model, gammas=(2.0, 5.0), folder=tmp_path, checkpoint_every=None)
    model.set(1.0)
    ema.update(100)
    model.set(0.0)
    ema.update(130)
    for gamma, averages in zip((2.0, 5.0), ema.state_dict()["averages"], strict=True):
        assert averages["weight"].item() == pytest.approx((1 - 30 / 130) ** (1 + gamma), rel=1e-12)


def test_the_step_can_not_go_back_and_repeating_it_does_nothing(tmp_path: Path) -> None:
    model = Counter()
    ema = PostHocEMA(model, folder=tmp_path, checkpoint_every=5)
    model.set(1)
    ema.update(5)
    model.set(100)
    ema.update(5)
    assert ema.state_dict()["averages"][0]["weight"].item() == 1
    with pytest.raises(ValueError, match="can't go back"):
        ema.update(4)


def test_bfloat16_network_is_averaged_in_float32(tmp_path: Path) -> None:
    """In bfloat16 a weight of 1e-4 is lost: the average would stay where it began."""
    model = Counter(torch.bfloat16)
    ema = PostHocEMA(model, folder=tmp_path, checkpoint_every=None, dtype=torch.float32)
    karras = KarrasEMA(model, sigma_rel=0.1)
    model.set(1.0)
    for each in (ema, karras):
        each.update(1_000_000)
    model.set(2.0)
    naive = torch.ones((), dtype=torch.bfloat16)
    for step in range(1_000_000, 1_100_000, 100):
        ema.update(step + 100)
        karras.update(step + 100)
        naive.lerp_(model.weight.detach(), 1e-4 * (1 + ema.gammas[1]))
    expected = 2 - (1_000_000 / 1_100_000) ** (1 + ema.gammas[1])
    assert naive.item() == 1.0
    assert ema.state_dict()["averages"][1]["weight"].item() == pytest.approx(expected, abs=1e-4)
    assert karras.ema_model.weight.dtype == torch.bfloat16
    assert karras.ema_model.weight.item() == pytest.approx(expected, abs=2**-8)


def test_synthesis_agrees_with_an_ema_tracked_at_the_target(tmp_path: Path) -> None:
    torch.manual_seed(1)
    model = nn.Linear(40, 50).double()
    walk = KarrasEMA(model, sigma_rel=0.07)
    ema = PostHocEMA(
        model, folder=tmp_path, checkpoint_every=100, dtype=None, average_dtype=torch.float64
    )
    values = []
    for _ in range(2000):
        with torch.no_grad():
            model.weight += 0.01 * torch.randn_like(model.weight)
        values.append(model.weight.detach().clone())
        ema.update()
        walk.update()
    target = Profile(2000, float(sigma_rel_to_gamma(0.07)))
    snapshots = read_folder(tmp_path).usable()
    error = solve([each.profile for each in snapshots], [target]).profile_error[0]
    made = ema.synthesize(sigma_rel=0.07)["weight"]
    # The error of the profile is relative to its L2 norm, over time; Cauchy and Schwarz bound by
    # it what a weight can be off: sqrt(sum of squared deviations) * error * norm.
    norm = (target.gamma + 1) / np.sqrt((2 * target.gamma + 1) * target.step)
    deviations = torch.stack(values) - walk.ema_model.weight
    bound = (deviations**2).sum(0).sqrt() * error * norm
    assert torch.all((made - walk.ema_model.weight).abs() <= bound)
    assert (made - model.weight).abs().mean() > 10 * (made - walk.ema_model.weight).abs().mean()

    # And blup is off by as much as it expects to be.
    by_blup = ema.synthesize(sigma_rel=0.07, method="blup")["weight"]
    profiles = [each.profile for each in snapshots]
    trajectory = fit_snapshots(snapshots).trajectory
    weights = solve(profiles, [target], "blup", trajectory=trajectory).weights
    expected = expect(trajectory, profiles, [target], weights).total[0]
    off = (by_blup - walk.ema_model.weight).square().mean().sqrt()
    assert expected / 2 < off < 2 * expected


@pytest.mark.parametrize("how", ["data", "parameter", "layer"])
def test_replaced_parameters_are_followed(how: str, tmp_path: Path) -> None:
    model = small()
    ema = PostHocEMA(model, folder=tmp_path, checkpoint_every=None)
    ema.update()
    before = [{k: v.clone() for k, v in each.items()} for each in ema.state_dict()["averages"]]
    if how == "data":  # as module.to() does
        model[0].bias.data = torch.full((5,), 7.0)
    elif how == "parameter":
        model[0].bias = nn.Parameter(torch.full((5,), 7.0))
    else:
        model[0] = nn.Linear(3, 5)
        nn.init.constant_(model[0].bias, 7.0)
    ema.update()
    for gamma, old, new in zip(ema.gammas, before, ema.state_dict()["averages"], strict=True):
        weight = 1 - 0.5 ** (1 + gamma)
        expected = old["0.bias"] + weight * (7.0 - old["0.bias"])
        torch.testing.assert_close(new["0.bias"], expected)


def test_a_checkpoint_catches_up_with_the_step(tmp_path: Path) -> None:
    model = Counter()
    ema = PostHocEMA(
        model, gammas=(2.0, 5.0), folder=tmp_path, checkpoint_every=None, update_every=10
    )
    for step in range(1, 16):
        model.set(step)
        ema.update()
    ema.checkpoint()
    for gamma, averages in zip((2.0, 5.0), ema.state_dict()["averages"], strict=True):
        beta = (1 - 5 / 15) ** (1 + gamma)
        assert averages["weight"].item() == pytest.approx(10 * beta + 15 * (1 - beta))


@pytest.mark.parametrize(
    "device", [pytest.param("cuda", marks=needs_gpu), pytest.param("cpu", marks=needs_gpu)]
)
def test_gpu_network_with_averages_on_either_device(device: str, tmp_path: Path) -> None:
    model = small().cuda()
    ema = PostHocEMA(model, folder=tmp_path, checkpoint_every=4, device=device, background=True)
    host_model = small()
    host = PostHocEMA(host_model, folder=tmp_path / "host", checkpoint_every=None)
    train(model, ema, 8)
    train(host_model, host, 8)
    ema.wait()
    for one, other in zip(ema.state_dict()["averages"], host.state_dict()["averages"], strict=True):
        for name in one:
            assert one[name].device.type == device
            torch.testing.assert_close(one[name].cpu(), other[name])
    assert len(read_folder(tmp_path).usable()) == 4


def test_what_is_copied_and_what_is_ignored(tmp_path: Path) -> None:
    model = small()
    options = {
        "param_or_buffer_names_no_ema": {"0.bias"},
        "ignore_names": {"0.weight"},
        "ignore_startswith_names": {"1.w"},
    }
    ema = PostHocEMA(model, folder=tmp_path, checkpoint_every=None, **options)
    karras = KarrasEMA(model, gamma=ema.gammas[0], **options)
    first: dict[str, torch.Tensor] = {}
    for step in range(3):
        train(model, ema, 1)
        karras.update()
        first = first or {name: value.clone() for name, value in model.state_dict().items()}
        assert ema.step == karras.step == step + 1
    ema.checkpoint()
    for state in (ema.state_dict()["averages"][0], karras.ema_model.state_dict()):
        assert torch.equal(state["0.bias"], model[0].bias)
        assert torch.equal(state["0.weight"], first["0.weight"])
        assert torch.equal(state["1.weight"], first["1.weight"])
        assert not torch.equal(state["1.bias"], first["1.bias"])
        assert not torch.equal(state["1.bias"], model[1].bias)
    train(model, ema, 3)
    ema.checkpoint()
    made = ema.synthesize(0.08)
    assert torch.equal(made["0.bias"], model[0].bias.half().float())
    assert torch.equal(made["0.weight"], first["0.weight"].half().float())
    assert not torch.equal(made["1.bias"], model[1].bias.half().float())


def test_a_loaded_state_is_a_copy_and_its_folder_is_looked_at_anew(tmp_path: Path) -> None:
    one = PostHocEMA(small(), folder=tmp_path / "a", checkpoint_every=1)
    train(one.model, one, 2)
    other = PostHocEMA(small(), folder=tmp_path / "b", checkpoint_every=1)
    train(other.model, other, 1)
    before = copy.deepcopy(one.state_dict()["averages"])
    other.load_state_dict(one.state_dict())
    with pytest.raises(UsageError, match="another run's"):
        other.update()
    other.folder = tmp_path / "c"
    other.folder.mkdir()
    train(other.model, other, 2)
    for was, now in zip(before, one.state_dict()["averages"], strict=True):
        assert all(torch.equal(was[name], now[name]) for name in was)


@pytest.mark.parametrize("background", [False, True])
def test_a_resumed_run_writes_the_same_bytes(background: bool, tmp_path: Path) -> None:
    model = small()
    ema = PostHocEMA(
        model, folder=tmp_path / "a", checkpoint_every=4, update_every=3, background=background
    )
    train(model, ema, 10)
    torch.save({"model": model.state_dict(), "ema": ema.state_dict()}, tmp_path / "state.pt")
    train(model, ema, 10)
    ema.wait()

    state = torch.load(tmp_path / "state.pt", weights_only=True)
    again = small()
    again.load_state_dict(state["model"])
    resumed = PostHocEMA(again, folder=tmp_path / "b", checkpoint_every=4, update_every=3)
    resumed.load_state_dict(state["ema"])
    train(again, resumed, 10)
    never_stopped, resumed_bytes = folder_bytes(tmp_path / "a"), folder_bytes(tmp_path / "b")
    assert sorted(resumed_bytes) == sorted(never_stopped)[4:]
    assert len(resumed_bytes) == 6
    for name, data in resumed_bytes.items():
        assert data == never_stopped[name], name


def test_a_changed_network_is_refused_by_name(tmp_path: Path) -> None:
    model = small()
    ema = PostHocEMA(model, folder=tmp_path, checkpoint_every=None)
    karras = KarrasEMA(model, sigma_rel=0.1)
    ema.update()
    karras.update()
    model[1] = nn.Linear(5, 3)
    for each in (ema, karras, ema, karras):  # every time: it does not go on with what it had
        with pytest.raises(ValueError, match=r"'1.bias' is \[3\] in the model and \[2\]"):
            each.update()
    resumed = PostHocEMA(nn.Linear(2, 2), folder=tmp_path, checkpoint_every=None)
    resumed.load_state_dict(ema.state_dict())
    with pytest.raises(ValueError, match="missing in the model"):
        resumed.update()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"sigma_rels": (0.1,)}, "two or more"),
        ({"sigma_rels": ()}, "two or more"),
        ({"sigma_rels": (0.1, 0.1)}, "same profile"),
        ({"gammas": (6.94, 6.9401)}, "same profile"),
        ({"sigma_rels": (0.1, 0.3)}, "between 0 and"),
        ({"gammas": (-0.5, 3)}, "not above 0"),
        ({"sigma_rels": (0.05, 0.1), "gammas": (5, 10)}, "not both"),
        ({"checkpoint_every": 0}, "checkpoint_every 0"),
        ({"update_every": 1.5}, "update_every 1.5"),
        ({"keep": 0}, "keep 0"),
        ({"dtype": torch.int8}, "floating-point"),
        ({"average_dtype": torch.bfloat16}, "decay near one is lost"),
        ({"prefix": "../x"}, "without a folder"),
    ],
)
def test_arguments_that_make_no_sense(
    arguments: dict[str, object], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        PostHocEMA(small(), folder=tmp_path, **arguments)  # type: ignore[arg-type]


@pytest.mark.filterwarnings("ignore:ComplexHalf")
def test_what_cannot_be_tracked_is_refused_before_training(tmp_path: Path) -> None:
    class FullyShardedDataParallel(nn.Linear):
        """Looks like the one of torch.distributed."""

    sharded = nn.Sequential(FullyShardedDataParallel(2, 2))
    for make in (PostHocEMA, KarrasEMA):
        with pytest.raises(TypeError, match="fully_shard"):
            make(sharded, (0.1, 0.2) if make is PostHocEMA else 0.1)
    model = small()
    model.register_buffer("small", torch.zeros(2, dtype=torch.float32).to(torch.complex32))
    with pytest.raises(ValueError, match=r"'small' is torch.complex32.*include="):
        PostHocEMA(model, folder=tmp_path).update()
    PostHocEMA(model, folder=tmp_path, include=("0.*",)).update()
    with pytest.raises(ValueError, match="nothing to average with a name"):
        PostHocEMA(model, folder=tmp_path, include=("2.*",)).update()


def test_a_state_of_other_profiles_is_refused(tmp_path: Path) -> None:
    ema = PostHocEMA(small(), folder=tmp_path)
    with pytest.raises(ValueError, match="profiles that the run began with"):
        PostHocEMA(small(), (0.1, 0.2), folder=tmp_path).load_state_dict(ema.state_dict())


def test_synthesize_gives_the_networks_dtypes_and_only_this_run(tmp_path: Path) -> None:
    other = PostHocEMA(nn.Linear(2, 2), folder=tmp_path, checkpoint_every=1, prefix="other")
    other.update()
    other.close()
    model = Tied().bfloat16()
    ema = PostHocEMA(
        model, folder=tmp_path, checkpoint_every=5, dtype=torch.float32, overwrite=True
    )
    with pytest.warns(RuntimeWarning, match="another run's"):
        train(model, ema, 15)
    files = set(tmp_path.iterdir())
    state = ema.synthesize(sigma_rel=0.1, step=10)
    snapshot = load_file(tmp_path / "ema-step00000010-0.100.safetensors")
    assert set(tmp_path.iterdir()) == files
    for name, value in model.state_dict().items():
        assert state[name].dtype == value.dtype
        assert torch.equal(state[name], snapshot[name].to(value.dtype)), name
    with pytest.raises(UsageError, match="after the last"):
        ema.synthesize(sigma_rel=0.1, step=99)
    with pytest.raises(ValueError, match="one of the two"):
        ema.synthesize()


@pytest.mark.parametrize(
    "target",
    [{"window": 7}, {"lr_decay": "1-sqrt:40%"}, {"decay": 0.8}, {"half_life": "20%"}],
)
def test_targets_are_those_of_the_library(tmp_path: Path, target: dict[str, Any]) -> None:
    ema = PostHocEMA(small(), folder=tmp_path, checkpoint_every=5, dtype=None)
    train(ema.model, ema, 20)
    more = {"target_for": {"*bias": 0.1}, "step": 15, "method": "blup"}
    solution = open_snapshots(tmp_path).solve(**target, **more)
    made = ema.synthesize(**target, **more)
    for name, value in solution.state_dict().items():
        assert torch.equal(made[name], value)
    with ema.lend(**target, **more) as lent:
        assert all(torch.equal(made[name], each) for name, each in lent.state_dict().items())
    for wrong in ({"sigma_rel": 0.1}, {"gamma": 3}):
        with pytest.raises(ValueError, match="one target"):
            ema.synthesize(**wrong, **target)
    with pytest.raises(UsageError, match=r"out of bounds|no length|less than|longer than"):
        ema.synthesize(**{key: -1 if key != "lr_decay" else "1-sqrt:99" for key in target})


def test_synthesize_before_the_first_update_uses_the_whole_folder(tmp_path: Path) -> None:
    ema = PostHocEMA(small(), folder=tmp_path, checkpoint_every=5)
    with pytest.raises(SnapshotError, match=r"holds no \.safetensors files"):
        ema.synthesize(0.07)
    train(ema.model, ema, 15)
    late = PostHocEMA(small(), folder=tmp_path)
    for name, value in ema.synthesize(0.07).items():
        assert torch.equal(late.synthesize(0.07)[name], value)


def test_lend_gives_the_weights_back_to_the_bit(tmp_path: Path) -> None:
    model = Tied()
    ema = PostHocEMA(model, folder=tmp_path, checkpoint_every=5)
    train(model, ema, 15)
    own = {name: value.clone() for name, value in model.state_dict().items()}
    state = ema.synthesize(sigma_rel=0.07)

    def borrow() -> None:
        with ema.lend(sigma_rel=0.07) as borrower:
            assert borrower is model
            assert model.head.weight is model.embedding.weight
            for name, value in model.state_dict().items():
                assert torch.equal(value, state[name]), name
            with pytest.raises(RuntimeError, match="on loan"):
                ema.update()
            raise KeyError("in the middle")

    with pytest.raises(KeyError):
        borrow()
    for name, value in model.state_dict().items():
        assert torch.equal(value, own[name]), name
    ema.update()
    with pytest.raises(ValueError, match="in the model"), ema.lend(0.07, model=nn.Linear(1, 1)):
        pass


def test_trackers_can_be_copied_and_pickled(tmp_path: Path) -> None:
    for ema in (PostHocEMA(Counter(), folder=tmp_path), KarrasEMA(Counter(), gamma=2.0)):
        ema.update()
        assert pickle.dumps(ema)
        other = copy.deepcopy(ema)
        for each in (ema, other):
            each.model.set(1.0)
            each.update()
        one, two = (
            each.state_dict()["averages"][0]["weight"]
            if isinstance(each, PostHocEMA)
            else each.ema_model.weight
            for each in (ema, other)
        )
        assert one is not two
        assert one.item() == two.item() > 0


@pytest.mark.parametrize("background", [False, True])
def test_the_network_itself_beside_its_averages(tmp_path: Path, background: bool) -> None:
    model = small()
    ema = PostHocEMA(
        *(model,),
        folder=tmp_path,
        checkpoint_every=2,
        keep=2,
        raw=True,
        dtype=None,
        background=background,
    )
    for _ in range(6):
        with torch.no_grad():
            for each in model.parameters():
                each.add_(torch.randn_like(each))
        ema.update()
    ema.close()
    found = read_folder(tmp_path).usable()
    assert [(each.step, each.sigma_rel) for each in found] == [
        (step, width) for step in (4, 6) for width in (0.0, 0.05, 0.10)
    ]
    for method in ("edm2", "blup"):  # the first has no use for the network itself
        assert ema.synthesize(0.07, method=method).keys() == model.state_dict().keys()
    saved = load_file(tmp_path / "ema-step00000006-raw.safetensors")
    assert all(torch.equal(saved[name], value) for name, value in model.state_dict().items())
