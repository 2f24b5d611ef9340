"""Models as they come: wrapped ones are unwrapped, offloaded ones loaded; what cannot be used is said in one line."""

import copy
import warnings

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

import taut
from taut.errors import CallError, ModelError
from taut.structure.wrappers import unwrapped


def build():
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)).eval()


X = torch.randn(4, 6)


@pytest.mark.parametrize("wrap", [AveragedModel, nn.DataParallel, lambda m: nn.DataParallel(AveragedModel(m))])
def test_wrappers_are_taken_off(wrap):
    model = wrap(build())
    assert type(unwrapped(model)) is nn.Sequential
    assert [layer.name for layer in taut.trace(model, X).layers] == ["0", "2"]


class Asking(nn.Module):
    """Knows that its features are wrapped."""

    def __init__(self, wrap, ask):
        super().__init__()
        self.f, self.head, self.ask = wrap(build()), nn.Linear(3, 2), ask

    def forward(self, x):
        return self.head(self.ask(self.f, x).relu())


ASKED = {
    "module": (nn.DataParallel, lambda f, x: f.module(x)),
    "its layers": (nn.DataParallel, lambda f, x: f.module[2](f.module[1](f.module[0](x)))),
    "device_ids": (nn.DataParallel, lambda f, x: f(x) if not f.device_ids else f.module(x)),
    "n_averaged": (AveragedModel, lambda f, x: f.module(x) * (f.n_averaged + 1)),
    "_orig_mod": (torch.compile, lambda f, x: f._orig_mod(x)),
    "twice": (lambda m: nn.DataParallel(AveragedModel(m)), lambda f, x: f.module.module(x)),
}


@pytest.mark.parametrize("asked", ASKED)
def test_code_that_knows_an_inner_wrapper_can_still_ask_it(asked, tmp_path):
    torch.manual_seed(0)
    model = Asking(*ASKED[asked]).eval()
    before, wanted = list(model.state_dict()), model(X)
    result = taut.compress(model, X, budget={"params": 0.9}, data=[X], compare=False, methods=("svd",))
    assert result.plan.steps
    assert list(model.state_dict()) == before
    assert torch.equal(unwrapped(model)(X), wanted)
    assert type(unwrapped(unwrapped(model)).f) is nn.Sequential
    result.save(tmp_path / "small")
    assert torch.equal(taut.load(tmp_path / "small", lambda: Asking(*ASKED[asked]))(X), result.model(X))


@pytest.mark.parametrize("where", ["cpu", "disk", "hooks"])
def test_what_accelerate_has_offloaded_is_loaded(where, tmp_path):
    accelerate = pytest.importorskip("accelerate")
    plain = build()
    model = copy.deepcopy(plain)
    if where == "cpu":
        model = accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    elif where == "disk":
        model = accelerate.disk_offload(model, tmp_path, execution_device=torch.device("cpu"))
    else:
        accelerate.hooks.add_hook_to_module(model[0], accelerate.hooks.ModelHook())
    places = [p.device for p in model.parameters()]
    net = taut.trace(model, X)
    assert [layer.skip for layer in net.layers] == [None, None]
    assert torch.equal(unwrapped(model)(X), plain(X))
    small = taut.apply(
        model, taut.types.Plan.of(net, [taut.types.Step(("0",), "svd", {"rank": 2})]), taut.observe(net, model)
    )
    assert not any(hasattr(module, "_hf_hook") for module in small.modules())
    assert [p.device for p in model.parameters()] == places


def meta():
    model = build()
    model[2].to("meta")
    return model


class Wrapped(torch.Tensor):
    """Stands for what quantization libraries keep their weights in."""

    @staticmethod
    def __new__(cls, held):
        return torch.Tensor._make_wrapper_subclass(cls, held.shape, dtype=held.dtype)

    def __init__(self, held):
        self.held = held

    def __tensor_flatten__(self):
        return ["held"], None

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        plain = torch.utils._pytree.tree_map(lambda t: t.held if isinstance(t, cls) else t, (args, kwargs or {}))
        out = func(*plain[0], **plain[1])
        return cls(out) if func is torch.ops.aten.detach.default else out


def subclassed():
    model = build()
    model[0].weight = nn.Parameter(Wrapped(model[0].weight.detach()), requires_grad=False)
    return model


def quantized():
    with warnings.catch_warnings(action="ignore"):
        return torch.ao.quantization.quantize_dynamic(build(), {nn.Linear})


def sharded():
    class FullyShardedDataParallel(nn.Module):
        def __init__(self, module):
            super().__init__()
            self.module = module

    return FullyShardedDataParallel(build())


def scripted():
    with warnings.catch_warnings(action="ignore"):
        return torch.jit.trace(build(), X)


UNUSABLE = {
    "meta": (meta, "'2.weight' is on the meta device.*load the weights first"),
    "subclass": (subclassed, "'0.weight' is a Wrapped.*compress the model in floating point"),
    "quantized": (quantized, "'0' is a quantized Linear.*compress the model in floating point"),
    "part of it quantized": (lambda: nn.Sequential(nn.Linear(6, 6), quantized()), "'1.0' is a quantized Linear"),
    "sharded": (sharded, r"'\(model\)' is sharded over processes.*full state dict"),
    "scripted": (scripted, r"'\(model\)' is compiled TorchScript.*as it was before"),
    "exported": (lambda: torch.export.export(build(), (X,)).module(), "exported program.*given to torch.export"),
}


@pytest.mark.parametrize("kind", UNUSABLE)
def test_what_cannot_be_used_is_said_with_the_remedy(kind):
    make, words = UNUSABLE[kind]
    model = make()
    for verb in (taut.trace, lambda m, x: taut.compress(m, x, budget=taut.Budget(macs=0.5))):
        with pytest.raises(ModelError, match=words) as caught:
            verb(model, X)
        assert "\n" not in str(caught.value)


NO_MODULES = {
    "None": (None, "Got NoneType instead"),
    "text": ("x", "Got str instead"),
    "function": (lambda x: x, "function instead: wrap it in a module"),
    "class": (nn.Flatten, r"the class Flatten instead: pass an object of it, Flatten\(\.\.\.\)"),
    "state dict": (build().state_dict(), "OrderedDict instead: .*load_state_dict"),
}


@pytest.mark.parametrize("kind", NO_MODULES)
def test_no_verb_takes_what_is_no_module(kind):
    given, words = NO_MODULES[kind]
    for verb in (taut.trace, taut.inspect, lambda m, x: taut.compress(m, x, budget=taut.Budget(macs=0.5))):
        with pytest.raises(CallError, match=words):
            verb(given, X)


@pytest.mark.parametrize("layer", [nn.LazyLinear(3), nn.LazyBatchNorm1d(affine=False)])
def test_every_verb_says_of_lazy_layers_what_to_do(layer):
    model = nn.Sequential(nn.Linear(6, 8), layer)
    for verb in (taut.trace, taut.inspect, lambda m, x: taut.compress(m, x, budget=taut.Budget(macs=0.5))):
        with pytest.raises(ModelError, match=r"'1[.].*is not initialized yet: run the lazy model on an input first"):
            verb(model, X)


def test_what_is_no_module_is_said_with_the_remedy():
    with pytest.raises(CallError, match="function instead: wrap it in a module"):
        taut.trace(lambda x: x, X)
    with pytest.raises(CallError, match=r"exported program.*given to torch\.export"):
        taut.compress(torch.export.export(build(), (X,)), X, budget=taut.Budget(macs=0.5))
