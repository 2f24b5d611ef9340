"""`observe` against second moments and per-sample gradients written out, and the damage against measured loss."""

import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812 - the name that every torch user knows
from torch.utils.checkpoint import checkpoint

import taut
from cases import NETS, case, sequential, untouched
from taut.errors import CallError, DataError
from taut.structure.fisher import divergence
from taut.structure.observation import GRAPH_BYTES, LOSS_COPIES, _parts, chunk_size
from taut.structure.patches import input_rows, output_rows, positions


def tiny(inplace=False):
    return sequential(
        conv=nn.Conv2d(2, 4, 3, padding=1, stride=2),
        norm=nn.BatchNorm2d(4),
        act=nn.ReLU(inplace=inplace),
        mix=nn.Conv2d(4, 6, 3, groups=2, bias=False),
        act2=nn.ReLU(inplace=inplace),
        flat=nn.Flatten(),
        fc=nn.Linear(24, 3),
    ).eval()


def batches(n=12, size=5):
    x, y = torch.randn(n, 2, 8, 8), torch.randint(0, 3, (n,))
    return x, y, list(zip(x.split(size), y.split(size), strict=True))


def cross_entropy(outputs, targets):
    return F.cross_entropy(outputs, targets, reduction="none")


def captured(model, x, names):
    """Input and output (with its gradient history) of the named layers."""
    found, handles = {}, []
    for name in names:
        module = model.get_submodule(name)

        def hook(module, args, output, name=name):
            found[name] = (args[0].detach().clone(), output)
            return output.clone()

        handles.append(module.register_forward_hook(hook))
    out = model(x)
    for handle in handles:
        handle.remove()
    return out, found


@pytest.mark.parametrize("inplace", [False, True])
def test_moments_are_those_of_samples_taken_one_by_one(inplace, monkeypatch):
    monkeypatch.setattr("taut.structure.collecting.ENOUGH", 0)
    model = tiny(inplace)
    x, y, data = batches()
    net = taut.trace(model, x[:2])
    names = ["conv", "mix", "fc"]
    with untouched(model):
        stats = taut.observe(net, model, data, loss=cross_entropy)
    assert stats.unit == "loss"
    assert stats.samples == 12
    A, B = {}, {}
    for n in range(12):
        out, found = captured(model, x[n : n + 1], names)
        grads = torch.autograd.grad(cross_entropy(out, y[n : n + 1]).sum(), [found[name][1] for name in names])
        for name, grad in zip(names, grads, strict=True):
            module, (seen, made) = model.get_submodule(name), found[name]
            rows = input_rows(module, seen, made, torch.arange(positions(module, made))).double()
            A[name] = A.get(name, 0) + rows.mT @ rows / 12
            g = output_rows(module, grad).double()
            B[name] = B.get(name, 0) + g.mT @ g / 12
    for name in names:
        found = stats.layers[name]
        torch.testing.assert_close(found.weighting.full, A[name].float(), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(found.outputs.full, B[name].float(), rtol=1e-4, atol=1e-6)
    assert stats.layers["conv"].positions == 16


def test_a_mean_loss_is_the_sum_of_per_sample_losses():
    model = tiny()
    x, _, data = batches(size=6)
    net = taut.trace(model, x[:2])
    one = taut.observe(net, model, data, loss=cross_entropy)
    two = taut.observe(net, model, data, loss=F.cross_entropy)
    for name, found in one.layers.items():
        torch.testing.assert_close(found.outputs.full, two.layers[name].outputs.full, rtol=1e-4, atol=1e-7)


def test_sampled_labels_give_the_fisher_information_at_the_logits():
    model = sequential(fc=nn.Linear(4, 3)).eval()
    x = torch.randn(1024, 4)
    stats = taut.observe(taut.trace(model, x[:2]), model, x)
    p = model(x).softmax(1).detach()
    wanted = torch.diag(p.mean(0)) - p.T @ p / len(p)
    assert stats.kinds == ("logits",)
    torch.testing.assert_close(stats.layers["fc"].outputs.full[0], wanted, rtol=0, atol=0.03)


class Head(nn.Module):
    def __init__(self, head, width=3):
        super().__init__()
        self.fc, self.head = nn.Linear(4, width), head

    def forward(self, x):
        return self.head(self.fc(x))


@pytest.mark.parametrize(
    ("head", "kinds"),
    [
        (lambda z: z, ("logits",)),
        (lambda z: z.softmax(1), ("probabilities",)),
        (torch.sigmoid, ("sigmoid",)),
        (lambda z: z[:, :1] * 3 - 5, ("values",)),
        (lambda z: (z, torch.sigmoid(z[:, 0])), ("logits", "sigmoid")),
        (lambda z: {"map": z[:, None, None], "best": z.argmax(1)}, ("values",)),
    ],
)
def test_outputs_of_every_kind_reach_the_layer(head, kinds):
    model = Head(head)
    x = torch.randn(32, 4)
    stats = taut.observe(taut.trace(model, x[:2]), model, [x])
    assert stats.kinds == kinds
    assert stats.unit == "loss"
    B = stats.layers["fc"].outputs.full
    assert B.shape == (1, 3, 3)
    assert float(B.diagonal(dim1=-2, dim2=-1).sum()) > 0
    assert ", ".join(kinds) in str(stats)


def test_output_overrides_what_is_read():
    model = Head(lambda z: z)
    x = torch.randn(16, 4)
    net = taut.trace(model, x[:2])
    assert taut.observe(net, model, [x], output="values").kinds == ("values",)
    with pytest.raises(CallError, match="must be one of auto"):
        taut.observe(net, model, [x], output="nonsense")
    with pytest.raises(CallError, match="A 'loss' needs targets"):
        taut.observe(net, model, [x], loss=cross_entropy)


def test_integer_outputs_alone_give_no_gradient():
    model = Head(lambda z: z.argmax(1))
    x = torch.randn(16, 4)
    stats = taut.observe(taut.trace(model, x[:2]), model, [x])
    assert stats.unit == "relative output error"
    assert stats.layers["fc"].outputs is None
    assert stats.layers["fc"].weighting.known


class Detached(nn.Module):
    """A layer whose gradient is cut off behind it."""

    def __init__(self):
        super().__init__()
        self.cut, self.fc = nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, x):
        return self.fc(torch.relu(self.cut(x).detach()))


def test_a_layer_without_gradient_gets_a_measured_scale():
    """Its predicted damage then is, within a factor of two, what noise of that size costs."""
    model = Detached()
    x = torch.randn(256, 6)
    net = taut.trace(model, x[:2])
    stats = taut.observe(net, model, [x])
    found = stats.layers["cut"]
    assert found.outputs is None
    assert found.scale > 0
    assert stats.layers["fc"].scale is None
    energy = found.weighting.energy(model.cut.weight.detach()[None, :, :, None])
    predicted = measured = 0.0
    with torch.no_grad():
        before, kept = model(x), model.cut.weight.clone()
        for _ in range(20):
            dW = 0.1 * torch.randn(8, 6)
            predicted += float(found.damage(torch.einsum("oi,gij,oj->", dW, found.weighting.full, dW), energy))
            model.cut.weight.copy_(kept + dW)
            measured += divergence(["logits"], before, model(x))
    assert 0.5 < predicted / measured < 2


def test_without_data_the_weights_decide():
    model = tiny()
    stats = taut.observe(taut.trace(model, torch.randn(2, 2, 8, 8)), model)
    assert stats.layers == {}
    assert stats.unit == "relative weight error"
    assert "no calibration data" in str(stats)


@pytest.mark.parametrize("name", [one.name for one in NETS])
def test_observing_leaves_every_net_alone_and_is_repeatable(name):
    model, example = case(name).make()
    net, data = taut.trace(model, example), case(name).data()
    with untouched(model):
        one, two = taut.observe(net, model, data), taut.observe(net, model, data)
    for layer, found in one.layers.items():
        again = two.layers[layer]
        assert torch.equal(found.weighting.full, again.weighting.full)
        assert (found.outputs is None) == (again.outputs is None)
        assert found.outputs is None or torch.equal(found.outputs.full, again.outputs.full)


def test_training_mode_dropout_and_batch_statistics_do_not_enter():
    model, example = case("vgg").make()
    net, data = taut.trace(model, example), case("vgg").data()
    one = taut.observe(net, model, data)
    two = taut.observe(net, model.train(), data)
    assert all(torch.equal(s.weighting.full, two.layers[n].weighting.full) for n, s in one.layers.items())


def test_it_works_under_inference_mode_and_on_inference_tensors():
    model = tiny()
    with torch.inference_mode():
        x = torch.randn(8, 2, 8, 8)
        net = taut.trace(model, x[:2])
        stats = taut.observe(net, model, [x])
    assert stats.unit == "loss"
    assert all(s.outputs is not None for s in stats.layers.values())


def test_what_is_refused():
    model = tiny()
    net = taut.trace(model, torch.randn(2, 2, 8, 8))
    with pytest.raises(CallError, match="traced from another model: this one has no layer 'conv'"):
        taut.observe(net, sequential(other=nn.Linear(2, 2)), [torch.randn(2, 2, 8, 8)])
    with pytest.raises(DataError, match="gave no batch"):
        taut.observe(net, model, [])
    bad = torch.randn(2, 2, 8, 8)
    bad[0, 0, 0, 0] = float("nan")
    with pytest.raises(DataError, match="'conv' is not finite"):
        taut.observe(net, model, [bad])


def test_gradients_that_are_not_finite_never_reach_the_statistics():
    """The root of a square has no gradient at zero; the loss is finite."""
    model = Head(lambda z: z + (0 * z[:, :1]).square().sqrt())
    x = torch.randn(8, 4)
    net = taut.trace(model, x[:2])
    try:
        B = taut.observe(net, model, [x]).layers["fc"].outputs
    except DataError:
        return
    assert B is None or bool(B.full.isfinite().all())


# Samples that are held out, and chunks.


class FixedBatch(nn.Module):
    """Takes four samples at a time, no more and no less."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(3, 2)

    def forward(self, x):
        return self.fc(x.view(4, 3))


@pytest.mark.parametrize(
    ("sizes", "held"), [([64] * 4, 16), ([1] * 64, 8), ([5, 7, 3, 9], 6), ([512], 32), ([2] * 3, 1)], ids=str
)
def test_whole_samples_from_all_over_the_data_are_held_out(sizes, held):
    model = sequential(fc=nn.Linear(3, 2)).eval()
    x = torch.arange(sum(sizes)).float()[:, None].expand(-1, 3)
    net = taut.trace(model, x[:1])
    parts = _parts(net.example, [(part, None) for part in x.split(sizes)], len(x), 10)
    assert all(len(inputs) <= 10 for inputs, _, _ in parts)
    out = [inputs for inputs, _, kept_out in parts if kept_out]
    assert sum(map(len, out)) == held
    assert sorted(torch.cat([inputs for inputs, *_ in parts])[:, 0].tolist()) == x[:, 0].tolist()
    if held > 1:
        places = torch.cat(out)[:, 0]
        assert float(places.min()) < len(x) / 2 or len(sizes) == 1


def test_batches_that_cannot_be_divided_are_held_out_as_they_are():
    model = FixedBatch().eval()
    x = torch.randn(64, 3)
    net = taut.trace(model, x[:4])
    parts = _parts(net.example, [(part, None) for part in x.split(4)], 64, 1)
    assert [len(inputs) for inputs, *_ in parts] == [4] * 16
    assert sum(held for *_, held in parts) == 2
    assert taut.observe(net, model, list(x.split(4))).samples == 64
    alone = _parts(net.example, [(x[:4], None)], 4, 1)
    assert [held for *_, held in alone] == [None]


def test_chunks_count_what_a_head_of_many_words_takes():
    """Its output passes through the loss, its gradient and the sampled labels."""
    head = sequential(table=nn.Embedding(5000, 4), fc=nn.Linear(4, 5000)).eval()
    net = taut.trace(head, torch.zeros(1, 16, dtype=torch.long))
    output = 16 * 5000 * 4
    assert chunk_size(net, output) == GRAPH_BYTES // ((3 + LOSS_COPIES) * output)


def test_lengths_of_the_data_count_and_not_that_of_the_example():
    model = sequential(fc=nn.Linear(3, 2)).eval()
    net = taut.trace(model, torch.randn(1, 50, 3))
    stats = taut.observe(net, model, [torch.randn(6, 4, 3), torch.randn(6, 8, 3)])
    assert stats.layers["fc"].positions == 6


# The unit: damage is the rise of the loss.


def trained():
    """A small convolutional net trained on a task that it cannot solve perfectly."""
    random = torch.Generator().manual_seed(0)
    x = torch.randn(512, 1, 6, 6, generator=random)
    y = (x[:, 0, :3].mean((1, 2)) > x[:, 0, 3:].mean((1, 2))).long() + (x.mean((1, 2, 3)) > 0.05).long()
    y = torch.where(torch.rand(512, generator=random) < 0.1, torch.randint(0, 3, (512,), generator=random), y)
    model = sequential(
        conv=nn.Conv2d(1, 6, 3),
        act=nn.ReLU(),
        conv2=nn.Conv2d(6, 8, 3),
        act2=nn.ReLU(),
        flat=nn.Flatten(),
        fc=nn.Linear(32, 3),
    )
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    with torch.enable_grad():
        for _ in range(60):
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
    return model.eval(), x


def test_fisher_damage_predicts_the_measured_divergence():
    model, x = trained()
    stats = taut.observe(taut.trace(model, x[:2]), model, x)
    with torch.no_grad():
        before = model(x)
        for name in ("conv", "conv2", "fc"):
            found, layer = stats.layers[name], model.get_submodule(name)
            for _ in range(3):
                dW = 0.02 * layer.weight.abs().mean() * torch.randn_like(layer.weight)
                flat = dW.flatten(1)
                moved = flat @ found.weighting.full[0] @ flat.T
                predicted = float(found.damage((found.outputs.full[0] * moved).sum(), 0.0))
                kept = layer.weight.clone()
                layer.weight += dW
                measured = divergence(["logits"], before, model(x))
                layer.weight.copy_(kept)
                assert 0.4 < predicted / measured < 2.5, (name, predicted, measured)


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradients_pass_through_checkpoints(reentrant):
    class Checkpointed(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 3)

        def forward(self, x):
            return self.c(checkpoint(lambda h: self.b(h.relu()).relu(), self.a(x), use_reentrant=reentrant))

    model, x = Checkpointed().eval(), torch.randn(8, 6)
    with warnings.catch_warnings(action="error"):
        net = taut.trace(model, x)
        stats = taut.observe(net, model, [x])
    assert stats.unit == "loss"
    assert all(layer.outputs is not None for layer in stats.layers.values())
    assert torch.utils.checkpoint.CheckpointFunction.__name__ == "CheckpointFunction"
