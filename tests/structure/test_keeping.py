"""What keep= names: layers by name, glob, kind or as the module; of several the strictest; and what means nothing."""

from fractions import Fraction

import numpy as np
import pytest
import torch
from torch import nn

import taut
from taut import CallError
from taut.planning.plain_form import in_plain_form
from taut.structure.keeping import leaving, shares_of
from taut.types.keep import parse_keep, written_keep


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
        self.head = nn.Sequential(nn.Linear(4, 2))
        self.again = self.head[0]


LINEAR = {"body.0", "body.2", "head.0"}


@pytest.mark.parametrize(
    ("keep", "kept"),
    [
        (None, set()),
        ("body.0", {"body.0"}),
        (["body.0", "head"], {"body.0", "head", "head.0"}),
        ("body*", {"body", "body.0", "body.1", "body.2"}),
        ("*.0", {"body.0", "head.0"}),
        (nn.Linear, LINEAR),
        ({"Linear"}, LINEAR),
        ("again", {"head.0"}),
        ("body.1", {"body.1"}),
        (lambda net: net.body[2], {"body.2"}),
        (lambda net: (net.head, "body.0"), {"head", "head.0", "body.0"}),
    ],
)
def test_what_is_meant(keep, kept):
    net = Net()
    shares = shares_of(net, keep(net) if callable(keep) and not isinstance(keep, type) else keep)
    assert set(shares) == kept
    assert set(shares.values()) <= {1.0}


def test_of_several_the_strictest_holds():
    shares = shares_of(Net(), {nn.Linear: 0.25, "body": 0.5, "*.2": 1})
    assert {name: shares[name] for name in LINEAR} == {"body.0": 0.5, "body.2": 1.0, "head.0": 0.25}


@pytest.mark.parametrize("share", ["50%", " 50 % ", np.float32(0.5), Fraction(1, 2)])
def test_shares_as_they_are_written(share):
    assert shares_of(Net(), {"again": share}) == {"head.0": 0.5}


def test_a_module_inside_of_a_wrapper_is_found():
    net = Net()
    inner = net.body[0]
    net.body = nn.DataParallel(net.body)
    assert set(shares_of(nn.DataParallel(net), inner)) == {"body.0"}


@pytest.mark.parametrize(
    ("keep", "message"),
    [
        ("bodi.0", r"no such layer\. Did you mean 'body\.0'"),
        ("tail.*", "no such layer"),
        (["head", "Conv2d"], "'Conv2d', but the model has no such layer"),
        (nn.Conv2d, "no layer of that kind. Its kinds are .*Linear"),
        (nn.Linear(4, 4), "no module of this model"),
        ({"head": 0}, r"in \(0, 1\].*Got 0 instead"),
        ({"head": 1.5}, "Got 1.5"),
        ({"head": True}, "Got True"),
        ({"head": "half"}, "Got 'half'"),
        ({"head": float("nan")}, "Got nan"),
        (3, "keep= must be a layer"),
        ("", "its name is empty"),
        ({"head": "150%"}, r"in \(0, 1\]"),
        ([3], "a layer is given by its name"),
    ],
)
def test_what_means_nothing_is_told(keep, message):
    with pytest.raises(CallError, match=message):
        shares_of(Net(), keep)


def test_as_it_is_written_in_files_and_on_command_lines():
    assert parse_keep(["head.*", "a.b=0.5", "Linear = 25%"]) == {"head.*": 1.0, "a.b": 0.5, "Linear": 0.25}
    assert written_keep("head") == written_keep(["head"]) == {"head": 1.0}
    assert written_keep({"head": 1, "a": 0.5}) == {"head": 1.0, "a": 0.5}
    for wrong in (["a", "a=0.5"], ["a=x"], ["a=2"], ["=0.5"], [""]):
        with pytest.raises(CallError):
            parse_keep(wrong)
    for wrong in (4, [4, "a"], {4: 0.5}):
        with pytest.raises(CallError, match='A name that is a number stands in quotes: "4"'):
            written_keep(wrong)
    for wrong in (3, [{"a": 1}], {1: 0.5}, {"a": 2}):
        with pytest.raises(CallError):
            written_keep(wrong)


@pytest.mark.parametrize(
    ("wrap", "keep", "kept"),
    [
        (nn.DataParallel, "module.head.0", {"head.0"}),
        (nn.DataParallel, "module.body*", {"body", "body.0", "body.1", "body.2"}),
        (nn.DataParallel, {"head.0": 1.0, "module.body.0": 1.0}, {"head.0", "body.0"}),
        (torch.compile, "_orig_mod.head.0", {"head.0"}),
        (lambda net: nn.DataParallel(torch.compile(net)), "module._orig_mod.body.2", {"body.2"}),
    ],
)
def test_a_wrapper_s_own_names_mean_the_layers_inside(wrap, keep, kept):
    assert set(shares_of(wrap(Net()), keep)) == kept
    assert len(shares_of(wrap(Net()), next(iter(wrap(Net())._modules)))) == len(list(Net().named_modules()))


def test_an_inner_wrapper_s_names_and_a_layer_of_that_name():
    net = Net()
    net.body = nn.DataParallel(net.body)
    assert set(shares_of(net, "body.module.2")) == set(shares_of(net, "body.2")) == {"body.2"}
    inner = nn.Sequential()
    inner.module, inner.other = nn.Linear(4, 4), nn.Linear(4, 4)
    assert set(shares_of(nn.DataParallel(inner), "module")) == {"module"}


class Packed(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.MultiheadAttention(8, 2, batch_first=True)
        self.l = nn.LSTM(8, 4, bidirectional=True, batch_first=True)
        self.w, self.fc = nn.Parameter(torch.randn(8, 8)), nn.Linear(8, 8)

    def forward(self, x):
        return self.fc(self.l(self.a(x, x, x)[0])[0] @ self.w)


ATTENTION = {f"a.{part}_proj" for part in ("q", "k", "v", "out")}
RECURRENT = {"l.inputs.0", "l.states.0", "l.states.1"}


@pytest.mark.parametrize(
    ("keep", "kept"),
    [
        ("a", {"a", *ATTENTION}),
        ("a.*", {"a", *ATTENTION}),
        ("*_proj", {"a", *ATTENTION}),
        (nn.MultiheadAttention, {"a", *ATTENTION}),
        ("a.q_proj", {"a.q_proj"}),
        (["a.q_proj", "a.k_proj"], {"a.q_proj", "a.k_proj"}),
        ("l.*", {"l", *RECURRENT}),
        ("LSTM", {"l", *RECURRENT}),
        ("l.states", {"l.states.0", "l.states.1"}),
        ("l.inputs.0", {"l.inputs.0"}),
        ("w", {"w"}),
        ("w.*", {"w"}),
        ("w.0", {"w.0"}),
        ("fc.weight.0", {"fc.weight.0"}),
        ("fc.weight.*", {"fc"}),
    ],
)
def test_layers_that_only_plain_forms_have(keep, kept):
    """Those names that plans show, and of all layers of a module: itself."""
    assert set(shares_of(Packed(), keep)) == kept
    if isinstance(keep, str) and keep != "LSTM":
        assert set(shares_of(nn.DataParallel(Packed()), f"module.{keep}" if keep[0] in "al" else keep)) == kept


def test_of_several_parts_the_least_is_the_share_of_the_whole():
    shares = shares_of(Packed(), {"a.*": 0.5, "a.v_proj": 0.9, "l": 0.25, "l.states.1": 1})
    assert (shares["a"], shares["a.q_proj"], shares["a.v_proj"]) == (0.5, 0.5, 0.9)
    assert (shares["l"], shares["l.inputs.0"], shares["l.states.1"]) == (0.25, 0.25, 1.0)


@pytest.mark.parametrize(
    ("keep", "message"),
    [("a.p_proj", "Did you mean .*'a.q_proj'"), ("l.inputs.1", "'l.inputs.0'"), ("a.0", "no such layer")],
)
def test_layers_that_no_plain_form_has(keep, message):
    with pytest.raises(CallError, match=message):
        shares_of(Packed(), keep)


@pytest.mark.parametrize("verb", [leaving, lambda net, model, keep: net.keeping(keep)])
def test_what_is_kept_of_plain_forms_stays_once_they_are_there(verb):
    model = Packed().eval()
    net = taut.trace(model, torch.randn(2, 3, 8))
    inner = in_plain_form(model, verb(net, model, ["a.v_proj", "l.states.*", "w.0"]))[1]
    assert inner.kept - {"w", "w.0"} == {"a.v_proj", "l.states.0", "l.states.1"}
    assert inner.kept & {"w", "w.0"}
    whole = in_plain_form(model, verb(net, model, ["a.*", "l", "w.*"]))[1]
    assert {"a", "l", "w"} <= whole.kept
    shares = {"a.v_proj": 0.5, "a": 0.25, "w.*": 0.75}
    floors = in_plain_form(model, verb(net, model, shares))[1].floors
    wanted = {**dict.fromkeys(ATTENTION, 0.25), "a.v_proj": 0.5, "w.0": 0.75}
    assert {name: floor.share for name, floor in floors.items()} == wanted
    for name, why in (("w.1", "Its layers are 'w.0'"), ("fc.weight.0", "It becomes no layers")):
        with pytest.raises(CallError, match=why):
            leaving(net, model, name)
