"""KarrasEMA: the network it holds, its state, and its devices."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from posthoc_cli import KarrasEMA
from tests.training.networks import Counter, small


def test_karras_copies_calls_and_evaluates() -> None:
    model = nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5))
    ema = KarrasEMA(model, gamma=3.0)
    assert ema.sigma_rel == pytest.approx((4 / 150) ** 0.5)
    assert ema.beta == 0
    assert ema.eval() is ema.ema_model
    assert not ema.ema_model.training
    model[0].weight.data.fill_(2.0)
    ema.copy_params_from_model_to_ema()
    model.eval()
    x = torch.randn(4, 3)
    assert torch.equal(ema(x), model(x))
    model[0].weight.data.fill_(5.0)
    ema.copy_params_from_ema_to_model()
    assert torch.all(model[0].weight == 2.0)
    assert not any(parameter.requires_grad for parameter in ema.parameters())
    assert model[0].weight.requires_grad
    assert len(list(ema.iter_all_ema_params_and_buffers())) == 6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_karras_state_dict_round_trip(dtype: torch.dtype) -> None:
    def run(ema: KarrasEMA, start: int) -> None:
        for step in range(start, start + 20):
            torch.manual_seed(step)
            for parameter in ema.model.parameters():
                parameter.data.normal_()
            ema.update()

    one = KarrasEMA(small().to(dtype), sigma_rel=0.1, update_every=3)
    run(one, 0)
    other = KarrasEMA(small().to(dtype), sigma_rel=0.1, update_every=3)
    other.load_state_dict({k: v.clone() for k, v in one.state_dict().items()}, strict=True)
    for ema in (one, other):
        run(ema, 20)
    state, again = one.state_dict(), other.state_dict()
    assert state.keys() == again.keys()
    assert all(torch.equal(state[name], again[name]) for name in state)
    assert other.step == 40
    with pytest.raises(RuntimeError, match="Missing key"):
        other.load_state_dict({k: v for k, v in state.items() if k != "step"})


def test_karras_frozen_counts_but_stays_and_thaws() -> None:
    model = Counter()
    ema = KarrasEMA(model, gamma=2.0, frozen=True)
    for step in (1, 2, 3):
        model.set(step)
        ema.update()
    assert (ema.step, ema.ema_model.weight.item()) == (3, 1.0)
    ema.frozen = False
    model.set(4)
    ema.update()
    assert ema.beta == (1 - 3 / 4) ** 3  # all that it missed counts as the present weights
    assert ema.ema_model.weight.item() == pytest.approx(ema.beta + 4 * (1 - ema.beta))


class Uncopyable(Counter):
    def __deepcopy__(self, memo: object) -> None:
        raise RuntimeError("no copies of me")


def test_karras_with_a_network_of_the_users() -> None:
    with pytest.raises(TypeError, match=r"no copies of me.*ema_model="):
        KarrasEMA(Uncopyable(), sigma_rel=0.1)
    model = Uncopyable()
    model.set(3.0)
    ema = KarrasEMA(model, sigma_rel=0.1, ema_model=Counter)
    ema.update()
    assert ema.ema_model.weight.item() == 3.0


def test_karras_devices() -> None:
    model = small()
    elsewhere = small().to("meta")
    with pytest.raises(ValueError, match="allow_different_devices=True"):
        KarrasEMA(model, sigma_rel=0.1, ema_model=elsewhere).update()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_karras_moves_to_the_network_or_stays() -> None:
    model = small().cuda()
    stays = KarrasEMA(model, sigma_rel=0.1, ema_model=small(), allow_different_devices=True)
    moves = KarrasEMA(model, sigma_rel=0.1, ema_model=small(), move_ema_to_online_device=True)
    for ema, device in ((stays, "cpu"), (moves, "cuda")):
        ema.update()
        assert {each.device.type for each in ema.ema_model.parameters()} == {device}
        assert torch.equal(ema.ema_model[0].weight.cpu(), model[0].weight.cpu())
