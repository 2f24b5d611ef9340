"""The model's function and what we are given: kinds, branches, forms of outputs, inputs written to, wrappers."""

import copy
import warnings
from collections import namedtuple

import pytest
import torch
from torch import nn

import taut
from cases import sequential, untouched
from taut import Budget, BudgetError, ModelError
from taut.types import Plan, Step


def layers():
    return nn.Conv2d(3, 24, 3, padding=1), nn.Conv2d(24, 24, 3, padding=1), nn.Conv2d(24, 8, 3, padding=1)


class Walk(nn.Module):
    """Rectifies and collects what convolutions give, asked in one of several ways."""

    def __init__(self, is_convolution):
        super().__init__()
        self.f, self.ask = nn.Sequential(*layers()), is_convolution

    def forward(self, x):
        maps = []
        for m in self.f:
            x = m(x)
            if self.ask(m):
                x = x.relu()
                maps.append(x)
        return maps


class Penalized(nn.Module):
    """Gives the sum of all convolutions' weights beside its output."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = layers()

    def forward(self, x):
        size = sum(m.weight.abs().sum() for m in self.modules() if isinstance(m, nn.Conv2d))
        return self.c(self.b(self.a(x).relu()).relu()).mean((2, 3)), size


class Counted(nn.Module):
    """Divides by how many layers it has."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(16, 32), nn.Linear(32, 8)

    def forward(self, x):
        return self.b(torch.relu(self.a(x))) / len([m for m in self.modules() if not list(m.children())])


KINDS = {
    "isinstance": lambda m: isinstance(m, nn.Conv2d),
    "type": lambda m: type(m) is nn.Conv2d,
    "name": lambda m: m.__class__.__name__ == "Conv2d",
    "text": lambda m: "Conv2d(" in repr(m).partition("\n")[0],
    "attribute": lambda m: hasattr(m, "kernel_size"),
    "not a container": lambda m: not list(m.children()),
    "parameters": lambda m: "weight" in dict(m.named_parameters()),
}


def agrees(model, small, batches, tolerance):
    with torch.no_grad():
        for x in batches:
            for a, b in zip(flat(model(x)), flat(small(x)), strict=True):
                assert a.shape == b.shape
                assert a.dtype == b.dtype
                assert (a - b).norm() <= tolerance * a.norm()


def flat(output):
    return [output] if isinstance(output, torch.Tensor) else list(output)


@pytest.mark.parametrize("ask", KINDS)
@pytest.mark.parametrize("methods", [None, ("channels", "svd")])
def test_code_that_asks_for_the_kind_of_a_layer_goes_the_same_way(ask, methods):
    model, data = Walk(KINDS[ask]).eval(), [torch.randn(32, 3, 12, 12)]
    net = taut.trace(model, data[0])
    if ask == "attribute":  # what takes the layers' place answers
        assert [net[name].answers["kernel_size"] for name in ("f.0", "f.1", "f.2")] == [(3, 3)] * 3
    else:
        assert all("kind" in net[name].skip or "attribute" in net[name].skip for name in ("f.0", "f.1", "f.2"))
    with warnings.catch_warnings(action="ignore"):
        try:
            share = 0.7 if ask == "attribute" else 0.5  # where layers are replaced, a random net loses much
            small = taut.compress(model, data[0], budget=Budget(macs=share), data=data, methods=methods).model
        except BudgetError as error:
            small = error.best.model
    agrees(model, small, data, 0.5)


@pytest.mark.parametrize("net", [Penalized, Counted])
def test_code_that_looks_at_the_model_as_a_whole_gives_the_same(net):
    model = net().eval()
    x = torch.randn(32, 16) if net is Counted else torch.randn(8, 3, 12, 12)
    with pytest.raises(BudgetError) as caught:
        taut.compress(model, x, budget=Budget(macs=0.5), data=[x])
    agrees(model, caught.value.best.model, [x], 1e-5)


def test_a_kind_that_nobody_asks_in_forward_does_not_matter():
    class Typed(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(16, 32), nn.Linear(32, 8)
            for m in self.modules():
                if isinstance(m, nn.Linear):
                    nn.init.normal_(m.weight)

        def forward(self, x):
            assert isinstance(self.a, nn.Module)
            return self.b(torch.relu(self.a(x)))

    assert all(layer.skip is None for layer in taut.trace(Typed(), torch.randn(2, 16)).layers)


class Branching(nn.Module):
    """Another layer, and another layer's weight, for inputs that are mostly positive."""

    def __init__(self, positive):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(16, 32), nn.Linear(32, 32), nn.Linear(32, 8)
        self.positive = positive

    def forward(self, x):
        h = torch.relu(self.a(x))
        h = self.positive(self, h) if bool(x.mean() > 1) else self.b(h)
        return self.c(torch.relu(h))


BRANCHES = {
    "weight": lambda m, h: nn.functional.linear(h, m.b.weight),
    "attribute": lambda m, h: m.b(h) * m.b.out_features,
    "kind": lambda m, h: m.b(h) * (2 if isinstance(m.b, nn.Linear) else 1),
    "width": lambda m, h: m.b(h + torch.ones(32)),
    "twice": lambda m, h: m.b(torch.relu(m.b(h))),
}


@pytest.mark.parametrize("verbs", [False, True], ids=["compress", "verbs"])
@pytest.mark.parametrize("methods", [("svd",), ("channels", "svd")], ids="-".join)
@pytest.mark.parametrize("branch", BRANCHES)
def test_branches_that_only_some_data_take_are_kept(branch, methods, verbs):
    model = Branching(BRANCHES[branch]).eval()
    usual, rare = torch.randn(64, 16), torch.randn(64, 16) + 2
    data = [usual, usual + 0.1, rare, torch.randn(64, 16)]
    if verbs:
        net = taut.trace(model, usual[:2])
        stats = taut.observe(net, model, data)
        small = taut.apply(model, taut.plan(net, stats, Budget(params=0.8), ["svd"]), stats, data=data)
    else:
        small = taut.compress(model, usual, budget=Budget(params=0.8), data=data, methods=methods).model
    agrees(model, small, [usual, rare], 0.5)


def test_branches_on_the_shape_are_kept():
    class Long(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(16, 32), nn.Linear(32, 16)

        def forward(self, x):
            h = torch.relu(self.a(x))
            return nn.functional.linear(h, self.b.weight) if x.shape[1] > 5 else self.b(h)

    model = Long().eval()
    short, long = torch.randn(8, 4, 16), torch.randn(8, 9, 16)
    assert taut.trace(model, short)["b"].skip is None
    assert "weight" in taut.trace(model, short, [short, long])["b"].skip
    small = taut.compress(model, short, budget=Budget(params=0.9), data=[short, long]).model
    agrees(model, small, [short, long], 0.5)


@pytest.mark.parametrize("example", [16, 128])
def test_branches_on_the_batch_size_are_kept(example):
    class Big(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = nn.Linear(16, 32), nn.Linear(32, 32), nn.Linear(32, 8)

        def forward(self, x):
            h = torch.relu(self.a(x))
            return self.c(nn.functional.linear(h, self.b.weight, self.b.bias) if len(x) > 100 else self.b(h))

    model, data = Big().eval(), [torch.randn(128, 16) for _ in range(3)]
    small = taut.compress(model, torch.randn(example, 16), budget=Budget(params=0.8), data=data).model
    agrees(model, small, [*data, torch.randn(16, 16)], 0.5)


@torch.jit.script
def any_large(x: torch.Tensor) -> torch.Tensor:
    if bool((x[:, 0] > 3).any()):
        return x * 0 + 1
    return x * 0


VALUES = {
    "script": lambda x: bool(any_large(x).max() > 0),
    "where": lambda x: len(torch.where(x[:, 0] > 3)[0]) > 0,
    "repeat": lambda x: x.repeat_interleave((x[:, 0] > 3).long(), 0).shape[0] > 0,
    "numpy": lambda x: x.numpy()[:, 0].max() > 3,
    "list": lambda x: max(x[:, 0].tolist()) > 3,
}


class Looking(nn.Module):
    """Uses a layer's weight where a value is large, however it looks at it."""

    def __init__(self, large):
        super().__init__()
        self.a, self.b, self.c, self.large = nn.Linear(16, 32), nn.Linear(32, 32), nn.Linear(32, 8), large

    def forward(self, x):
        h = torch.relu(self.a(x))
        h = nn.functional.linear(h, self.b.weight) if self.large(x) else self.b(h)
        return self.c(torch.relu(h))


@pytest.mark.parametrize("value", VALUES)
@pytest.mark.parametrize("late", [False, True], ids=["observe", "apply"])
def test_however_code_looks_at_values_the_branch_is_seen(value, late):
    model = Looking(VALUES[value]).eval()
    usual, rare = torch.randn(64, 16).clamp(-2.9, 2.9), torch.randn(64, 16).clamp(-2.9, 2.9)
    rare[7, 0] = 4
    data = [usual, rare]
    net = taut.trace(model, usual[:4])
    stats = taut.observe(net, model, None if late else data)
    plan = Plan.of(net, [Step((name,), "svd", {"rank": 8}) for name in ("ab" if late else "a")])
    with warnings.catch_warnings(action="ignore"):
        small = taut.apply(model, plan, stats, data=data)
    assert late or "weight" in stats.network["b"].skip
    agrees(model, small, [usual, rare], 0.6)


Pair = namedtuple("Pair", "scores features")


class Named(nn.Module):
    def __init__(self, end):
        super().__init__()
        self.a, self.b, self.end = nn.Linear(16, 32), nn.Linear(32, 8), end

    def forward(self, x):
        h = torch.relu(self.a(x))
        return self.end(self.b(h), h)


@pytest.mark.parametrize(
    "end",
    [
        Pair,
        lambda y, h: {"y": y, "h": [h, None]},
        lambda y, h: (y.double(), h.half()),
        lambda y, h: (y, len(h), "text"),
    ],
    ids=["named", "nested", "dtypes", "plain"],
)
def test_the_form_of_the_output_is_kept(end):
    model, x = Named(end).eval(), torch.randn(64, 16)
    result = taut.compress(model, x, budget=Budget(params=0.7), data=[x])
    one, two = model(x), result.model(x)
    assert type(one) is type(two)
    assert taut.structure.outputs.form_of(one) == taut.structure.outputs.form_of(two)


def test_a_step_that_changes_the_form_is_rolled_back_with_its_reason():
    class Rank(nn.Module):
        """Gives as many columns as its layer's replacement has channels inside: seen by no stand-in."""

        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(16, 16), nn.Linear(16, 8)

        def forward(self, x):
            inner = len(next(self.a.parameters()))
            return self.b(torch.relu(self.a(x)))[:, : inner // 2]

    model, x = Rank().eval(), torch.randn(64, 16)
    net = taut.trace(model, x[:4])
    plan = Plan.of(net, [Step(("a",), "svd", {"rank": 4})])
    with pytest.warns(UserWarning, match=r"float32\[2, 2\] instead of float32\[2, 8\]"):
        small = taut.apply(model, plan, taut.observe(net, model, x), data=x)
    agrees(model, small, [x], 0.0)


def test_outputs_whose_size_depends_on_values_may_change_it():
    class Kept(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(16, 32), nn.Linear(32, 8)

        def forward(self, x):
            y = self.b(torch.relu(self.a(x)))
            return y[y[:, 0] > 0]

    model, x = Kept().eval(), torch.randn(128, 16)
    result = taut.compress(model, x, budget=Budget(params=0.6), data=[x])
    assert len(result.plan.steps) == 2


@pytest.mark.parametrize("data", [False, True])
def test_weights_beyond_the_range_of_floats_never_come_out_as_nan(data):
    model, x = sequential(a=nn.Linear(16, 16, bias=False), b=nn.Linear(16, 16, bias=False)).eval(), torch.randn(64, 16)
    with torch.no_grad():
        model.a.weight.mul_(1e30)
        model.b.weight.mul_(1e-30)
    if data:
        with pytest.raises(ModelError, match="second moment is not finite"):
            taut.compress(model, x, budget=Budget(params=0.8), data=[x])
    else:
        small = taut.compress(model, x, budget=Budget(params=0.8)).model
        assert bool(torch.isfinite(small(x)).all())
    with torch.no_grad():
        model.b.weight.mul_(float("1e33"))
        model.b.weight.mul_(float("1e30"))
    with pytest.raises((ModelError, taut.DataError), match=r"not finite|NaN or Inf"):
        taut.compress(model, x, budget=Budget(params=0.8), data=[x] if data else None)


class InPlace(nn.Module):
    """Writes to its input."""

    def __init__(self, write):
        super().__init__()
        self.a, self.b, self.fc = nn.Conv2d(3, 24, 3, padding=1), nn.Conv2d(24, 24, 3, padding=1), nn.Linear(24, 5)
        self.write = write

    def forward(self, x):
        x = self.write(x)
        return self.fc(self.b(self.a(x).relu()).relu().mean((2, 3)))


WRITES = {
    "scaled": lambda x: x.mul_(0.5).sub_(0.3),
    "masked": lambda x: x.masked_fill_(x < 0, 0.0),
    "indexed": lambda x: x.__setitem__((slice(None), 0), 0.0) or x,
    "added": lambda x: x.__iadd__(1),
    "out": lambda x: torch.mul(x, 0.5, out=x),
    "data": lambda x: x.data.mul_(0.5) * 1,
}


@pytest.mark.parametrize("write", WRITES)
def test_a_forward_that_writes_to_its_input_harms_nobody(write):
    model, x = InPlace(WRITES[write]).eval(), torch.randn(64, 3, 12, 12)
    before = x.clone()
    functional = copy.deepcopy(model)
    functional.write = lambda t: WRITES[write](t.clone())
    methods = ("channels", "svd") if write == "added" else ("svd",)
    settings = {"budget": Budget(macs=0.5), "methods": methods, "sensitivity": True}
    result = taut.compress(model, x[:4], data=[x], evaluate=lambda m: float(m(x.clone()).mean()), **settings)
    assert torch.equal(x, before)
    wanted = taut.compress(functional, x[:4], data=[x], **settings)
    assert torch.equal(x, before)
    a, b = result.model.state_dict(), wanted.model.state_dict()
    assert all(torch.equal(a[key], b[key]) for key in b)


def test_a_dict_that_forward_empties_is_full_again():
    class Popping(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(16, 32), nn.Linear(32, 8)

        def forward(self, batch):
            x, rest = batch.pop("x"), batch.pop("rest")
            return self.b(torch.relu(self.a(x + rest.pop())))

    model = Popping().eval()
    data = [{"x": torch.randn(64, 16), "rest": [torch.randn(64, 16)]} for _ in range(2)]
    taut.compress(model, data[0], budget=Budget(params=0.7), data=data)
    assert [(sorted(batch), len(batch["rest"])) for batch in data] == [(["rest", "x"], 1)] * 2


def test_a_loss_that_writes_to_its_targets_does_not_change_them():
    model = sequential(a=nn.Linear(16, 32), act=nn.ReLU(), b=nn.Linear(32, 8)).eval()
    x, targets = torch.randn(64, 16), torch.randn(64, 8)
    before = targets.clone()

    def loss(outputs, wanted):
        return (outputs - wanted.mul_(0.5)).square().mean()

    net = taut.trace(model, x[:2])
    taut.observe(net, model, [(x, targets)], loss=loss)
    taut.finetune(
        model, None, None, [(x, targets)], [(x, targets)], loss=loss, example=x, schedule=(taut.Stage(epochs=2),)
    )
    assert torch.equal(targets, before)


def spoil(model):
    model.train()
    model.a = nn.Identity()
    for p in model.parameters():
        p.data.mul_(0.5)
        p.requires_grad_(False)
    model.half()
    return 1.0


@pytest.mark.parametrize("call", ["compress", "drop", "explore", "compare", "finetune"])
def test_evaluate_may_do_what_it_likes(call, tmp_path):
    model, x = sequential(a=nn.Linear(16, 32), act=nn.ReLU(), b=nn.Linear(32, 8)).eval(), torch.randn(64, 16)
    seen = []

    def evaluate(m):
        seen.append(float(sum(p.double().abs().sum() for p in m.parameters())))
        return spoil(m)

    with untouched(model):
        if call == "compress":
            small = taut.compress(model, x, budget=Budget(params=0.7), data=[x], evaluate=evaluate).model
        elif call == "drop":
            small = taut.compress(model, x, budget=Budget(drop=0.1), data=[x], evaluate=evaluate).model
        elif call == "explore":
            small = taut.apply(
                model,
                taut.explore(model, x, data=[x], evaluate=evaluate).points[1].plan,
                taut.observe(taut.trace(model, x), model, [x]),
            )
        elif call == "compare":
            small = copy.deepcopy(model)
            taut.compare(model, small, evaluate, x)
        else:
            small = taut.finetune(model, None, None, [x], evaluate, example=x, teacher=model)
    assert {p.dtype for p in small.parameters()} == {torch.float32}
    assert not isinstance(small.a, nn.Identity)
    assert len(seen) >= 2


def wrap_compiled(model):
    return torch.compile(model, backend="eager")  # which code is made matters to nobody here


def wrap_inside(model):
    model.body = torch.compile(model.body, backend="eager")
    return model


def wrap_in_place(model):
    model.compile(backend="eager")
    return model


def wrap_parallel(model):
    return nn.DataParallel(model)


@pytest.mark.parametrize(
    "wrap", [wrap_compiled, wrap_inside, wrap_in_place, wrap_parallel, lambda m: wrap_compiled(wrap_parallel(m))]
)
def test_wrappers_are_taken_off(wrap, tmp_path):
    def build():
        return sequential(body=nn.Sequential(nn.Linear(16, 32), nn.ReLU()), head=nn.Linear(32, 8))

    plain, x = build().eval(), torch.randn(64, 16)
    wrapped = wrap(copy.deepcopy(plain)).eval()
    with warnings.catch_warnings(action="error"):
        result = taut.compress(wrapped, x, budget=Budget(params=0.7), data=[x])
    wanted = taut.compress(plain, x, budget=Budget(params=0.7), data=[x])
    a, b = result.model.state_dict(), wanted.model.state_dict()
    assert list(a) == list(b)
    assert all(torch.equal(a[key], b[key]) for key in b)
    result.save(tmp_path / "small")
    again = taut.load(tmp_path / "small", base=build)
    assert torch.equal(again(x), result.model(x))
    assert taut.compare(wrapped, result.model, example=x).before.params == sum(p.numel() for p in plain.parameters())
