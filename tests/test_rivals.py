"""The criteria that ours are compared with, against their formulas; the models they look at stay as they were."""

import copy
import time

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from benchmarks.latency import latency_ratio
from benchmarks.rivals import TORCH_PRUNING, chip, torch_pruning_importance, tvsprune

pytestmark = pytest.mark.slow
LAYERS = ["conv1", "conv2", "fc1"]
READERS = {"conv1": "conv2", "conv2": "fc1", "fc1": "fc2"}
DEAD = 3


class Net(nn.Module):
    """Convolutions with or without norms, then linear layers; everything between them is functional."""

    def __init__(self, norm=True):
        super().__init__()
        self.conv1 = nn.Conv2d(2, 6, 3, padding=1, bias=not norm)
        self.bn1 = nn.BatchNorm2d(6) if norm else nn.Identity()
        self.conv2 = nn.Conv2d(6, 5, 3, bias=not norm)
        self.bn2 = nn.BatchNorm2d(5) if norm else nn.Identity()
        self.fc1 = nn.Linear(5, 7)
        self.fc2 = nn.Linear(7, 3)

    def forward(self, x):
        x = F.relu(self.bn1(self.conv1(x)))
        x = F.relu(self.bn2(self.conv2(x)))
        return self.fc2(F.relu(self.fc1(x.mean((2, 3)))))


def net(norm=True):
    torch.manual_seed(0)
    model = Net(norm)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.weight)
            nn.init.normal_(module.bias)
            nn.init.normal_(module.running_mean)
            nn.init.uniform_(module.running_var, 0.5, 2)
    return model.eval()


def batches(sizes=(4, 3), side=5):
    generator = torch.Generator().manual_seed(1)
    return [
        (torch.randn(n, 2, side, side, generator=generator), torch.randint(3, (n,), generator=generator)) for n in sizes
    ]


def importance(name, model, layers=LAYERS, data=None):
    data = batches() if data is None else data
    return torch_pruning_importance(name, model, layers, data, data[0][0][:1] if data else torch.randn(1, 2, 5, 5))


def without(maps, gone):
    maps = maps.double().clone()
    maps[gone] = 0
    return torch.linalg.matrix_norm(maps, ord="nuc")


def independence_by_svd(maps):
    """(images, channels, positions) -> (channels,)."""
    found = [[without(image, []) - without(image, i) for i in range(len(image))] for image in maps]
    return torch.tensor(found, dtype=torch.float64).mean(0)


def maps_behind_conv1(model, data):
    with torch.no_grad():
        return torch.cat([F.relu(model.bn1(model.conv1(x))).flatten(2) for x, _ in data])


@pytest.mark.parametrize("side", [2, 3, 5, 9])  # fewer positions than channels, and more
@pytest.mark.parametrize("kind", ["different", "two equal", "dead"])
def test_chip_is_the_loss_of_nuclear_norm(side, kind):
    model = net()
    # So that the smallest maps are not smaller than the kernel.
    model.conv2.padding = (1, 1)
    with torch.no_grad():
        if kind == "two equal":
            for tensor in (model.conv1.weight, *model.bn1.parameters(), *model.bn1.buffers()):
                if tensor.ndim:
                    tensor[4] = tensor[1]
        if kind == "dead":
            model.bn1.weight[DEAD] = 0
            model.bn1.bias[DEAD] = -1
    data = batches(side=side)
    maps = maps_behind_conv1(model, data)
    expected = independence_by_svd(maps)
    found = chip(model, ["conv1"], data, readers=READERS)["conv1"]
    assert found.dtype == torch.float64
    # The smallest singular value that counts is about 1e-7 of the largest.
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6 * float(torch.linalg.matrix_norm(maps, ord=2).max()))
    assert float(found.max() - found.min()) > 0.01
    if kind == "dead":
        assert int(found.argmin()) == DEAD
        assert abs(float(found[DEAD])) < 1e-9
    if kind == "two equal":
        torch.testing.assert_close(found[1], found[4], rtol=0, atol=1e-9)


def test_chip_of_channels_that_share_nothing_is_their_norm():
    """A row orthogonal to all others takes its own length with it; one that repeats another takes less."""
    model = nn.Sequential(nn.Conv2d(3, 3, 1, bias=False), nn.Conv2d(3, 2, 1))
    with torch.no_grad():
        model[0].weight.copy_(torch.eye(3)[:, :, None, None])
    x = torch.zeros(1, 3, 2, 2)
    x[0].flatten(1)[:, :3] = torch.diag(torch.tensor([3.0, 1.0, 2.0]))
    apart = chip(model, ["0"], [x], readers={"0": "1"})["0"]
    torch.testing.assert_close(apart, torch.tensor([3.0, 1.0, 2.0], dtype=torch.float64))
    x[0, 2] = x[0, 0]
    repeated = chip(model, ["0"], [x], readers={"0": "1"})["0"]
    expected = torch.tensor([3 * 2**0.5 - 3, 1, 3 * 2**0.5 - 3], dtype=torch.float64)
    torch.testing.assert_close(repeated, expected)


def test_chip_reads_pooled_features_and_tokens():
    model, data = net(), batches()
    found = chip(model, ["conv2", "fc1"], data, readers=READERS)
    with torch.no_grad():
        x = torch.cat([x for x, _ in data])
        pooled = F.relu(model.bn2(model.conv2(F.relu(model.bn1(model.conv1(x)))))).mean((2, 3))
        hidden = F.relu(model.fc1(pooled))
    for layer, features in (("conv2", pooled), ("fc1", hidden)):
        torch.testing.assert_close(found[layer], independence_by_svd(features[:, :, None]), rtol=1e-6, atol=1e-6)
    tokens = nn.Sequential(nn.Linear(4, 5), nn.GELU(), nn.Linear(5, 4))
    x = torch.randn(3, 7, 4)
    with torch.no_grad():
        maps = tokens[1](tokens[0](x)).transpose(1, 2)
    found = chip(tokens, ["0"], [x], readers={"0": "2"})
    torch.testing.assert_close(found["0"], independence_by_svd(maps), rtol=1e-6, atol=1e-6)


def test_chip_is_the_mean_over_the_first_images():
    model, data = net(), batches((4, 3, 5))
    found = chip(model, ["conv1"], data, readers=READERS, images=6)["conv1"]
    expected = independence_by_svd(maps_behind_conv1(model, data)[:6])
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    more = chip(model, ["conv1"], data, readers=READERS)["conv1"]
    assert float((more - expected).abs().max()) > 1e-3


def test_chip_errors():
    model, data = net(), batches()
    with pytest.raises(ValueError, match="images must be a positive integer, got 0"):
        chip(model, ["conv1"], data, readers=READERS, images=0)
    with pytest.raises(ValueError, match="layers must name convolutions or linear layers, 'bn1' is a BatchNorm2d"):
        chip(model, ["bn1"], data, readers=READERS)
    with pytest.raises(ValueError, match="layers must name convolutions or linear layers, 'conv9' is no module"):
        chip(model, ["conv9"], data, readers=READERS)
    with pytest.raises(ValueError, match="readers must name a module for each layer, got None for 'conv1'"):
        chip(model, ["conv1"], data, readers={})
    with pytest.raises(ValueError, match=r"readers must read the 6 channels .* 'fc1' for 'conv1' reads \(4, 5\)"):
        chip(model, ["conv1"], data, readers={"conv1": "fc1"})
    with pytest.raises(ValueError, match="batches must give at least one image"):
        chip(model, ["conv1"], [], readers=READERS)


def group_of_conv1(model, member):
    """member(parameter, the axis of conv1's channels) -> (6,), for what the group of conv1 holds."""
    return [member(model.conv1.weight, 0), member(model.conv2.weight, 1)]


def over_others(tensor, axis):
    return tensor.detach().double().movedim(axis, 0).reshape(tensor.shape[axis], -1).sum(1)


def normalised(members):
    mean = sum(members) / len(members)
    return mean / mean.mean()


def test_magnitude_is_the_squared_norm_over_the_group():
    model = net()
    members = group_of_conv1(model, lambda weight, axis: over_others(weight**2, axis))
    members.append(model.bn1.weight.detach().double() ** 2)
    torch.testing.assert_close(importance("magnitude", model)["conv1"], normalised(members), rtol=1e-5, atol=0)


def test_bn_scale_is_the_norms_weight():
    model = net()
    found = importance("bn_scale", model, ["conv1", "conv2"])
    for layer, norm in (("conv1", model.bn1), ("conv2", model.bn2)):
        expected = norm.weight.detach().double().abs()
        torch.testing.assert_close(found[layer], expected / expected.mean(), rtol=1e-5, atol=0)
    with pytest.raises(ValueError, match="must have a batch norm behind them for name='bn_scale', 'fc1' has none"):
        importance("bn_scale", model)


def test_lamp_orders_a_layer_as_magnitude_does():
    magnitude, lamp = importance("magnitude", net()), importance("lamp", net())
    for layer in LAYERS:
        assert torch.equal(lamp[layer].argsort(), magnitude[layer].argsort())
        assert float(lamp[layer].max()) == pytest.approx(1)  # over the sum of what is no smaller: itself
        assert not torch.allclose(lamp[layer], magnitude[layer])


def test_taylor_is_weight_times_gradient_of_the_whole_data():
    model, data = net(norm=False), batches()
    by_hand = copy.deepcopy(model)
    x, labels = (torch.cat(parts) for parts in zip(*data, strict=True))
    F.cross_entropy(by_hand(x), labels).backward()
    members = group_of_conv1(by_hand, lambda weight, axis: over_others((weight * weight.grad).abs(), axis))
    torch.testing.assert_close(importance("taylor", model)["conv1"], normalised(members), rtol=1e-4, atol=1e-6)


def test_hessian_is_weight_squared_times_squared_gradients_of_every_sample():
    model, data = net(), batches()
    x, labels = (torch.cat(parts) for parts in zip(*data, strict=True))

    def member(name, axis):
        total = 0
        for i in range(len(x)):
            by_hand = copy.deepcopy(model)
            F.cross_entropy(by_hand(x[i : i + 1]), labels[i : i + 1]).backward()
            weight = by_hand.get_parameter(name)
            total = total + over_others(weight**2 * weight.grad**2, axis)
        return total

    expected = normalised([member("conv1.weight", 0), member("conv2.weight", 1), member("bn1.weight", 0)])
    torch.testing.assert_close(importance("hessian", model)["conv1"], expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ["taylor", "hessian"])
def test_a_channel_that_nobody_hears_is_the_least_important(name):
    model = net()
    with torch.no_grad():
        model.bn1.weight[DEAD] = 0
        model.bn1.bias[DEAD] = -1
    found = importance(name, model)["conv1"]
    assert int(found.argmin()) == DEAD
    assert float(found[DEAD]) == 0
    assert float(found.sort().values[1]) > 0


def test_magnitude_needs_no_data_and_gradients_do():
    assert torch.equal(importance("magnitude", net(), data=[])["conv1"], importance("magnitude", net())["conv1"])
    for name in ("taylor", "hessian"):
        with pytest.raises(ValueError, match="batches must give at least one sample, they gave none"):
            importance(name, net(), data=[])
    with pytest.raises(ValueError, match="name must be one of 'magnitude'.*, got 'l0'"):
        importance("l0", net())


def test_what_is_not_finite_is_refused():
    model = net()
    with torch.no_grad():
        model.conv1.weight[0] = torch.nan
    with pytest.raises(AssertionError, match="'conv1' has 6 components"):
        importance("magnitude", model)


@pytest.mark.parametrize("name", ["chip", *TORCH_PRUNING])
def test_the_model_is_left_alone_and_runs_in_eval_mode(name):
    data = batches()

    def run(model):
        if name == "chip":
            return chip(model, ["conv1", "conv2"], data, readers=READERS)
        return importance(name, model, ["conv1", "conv2"])

    expected = run(net())
    model = net().train().requires_grad_(False)
    model.conv2.weight.requires_grad_(True).grad = torch.full_like(model.conv2.weight, 7.0)
    before = copy.deepcopy(model.state_dict())
    with torch.no_grad():
        found = run(model)
    for layer, values in expected.items():
        assert torch.equal(found[layer], values)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert all(module.training and not module._forward_pre_hooks for module in model.modules())
    assert [key for key, value in model.named_parameters() if value.requires_grad] == ["conv2.weight"]
    assert all(value.grad is None for key, value in model.named_parameters() if key != "conv2.weight")
    assert torch.equal(model.conv2.weight.grad, torch.full_like(model.conv2.weight, 7.0))


def test_tvsprune_ranks_what_tells_no_classes_last():
    model = net()
    with torch.no_grad():
        model.bn1.weight[DEAD] = 0
    labels = torch.arange(60) % 3
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(60, 2, 5, 5, generator=generator) + labels[:, None, None, None]
    found = tvsprune(model, ["conv1"], [(x, labels)], num_classes=3)
    assert list(found) == ["conv1"]
    assert found["conv1"].shape == (6,)
    assert float(found["conv1"][DEAD]) == 0
    assert float(found["conv1"].sort().values[1]) > 0.01


class Sleeper(nn.Module):
    def __init__(self, seconds):
        super().__init__()
        self.seconds = seconds

    def forward(self, x):
        assert not self.training
        assert not torch.is_grad_enabled()
        time.sleep(self.seconds)
        return x


def test_latency_is_measured_after_over_before():
    before, after = Sleeper(0.02).train(), Sleeper(0.002).train()
    ratio, spread, seconds_before, seconds_after = latency_ratio(before, after, torch.zeros(1), repeats=5)
    assert ratio < 0.7
    assert spread >= 0
    assert seconds_before >= 0.02
    assert 0.002 <= seconds_after < seconds_before
    assert before.training
    assert after.training


def test_latency_errors():
    one = Sleeper(0)
    with pytest.raises(ValueError, match="repeats must be an integer of at least 2, got 1"):
        latency_ratio(one, one, torch.zeros(1), repeats=1)
    with pytest.raises(ValueError, match="x must be on the CPU, got one on meta"):
        latency_ratio(one, one, torch.zeros(1, device="meta"))
