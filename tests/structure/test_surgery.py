"""Copies and replacements: what is shared, what is independent, and what moves along."""

import copy

import pytest
import torch
from torch import nn

from cases import NETS, case, run, sequential, state, untouched
from taut.errors import CallError, ModelError
from taut.structure.surgery import HOOKS, carry, clone, locate, replace, shallow, swap, swap_all
from taut.structure.tracing import describe_layer


@pytest.mark.parametrize("name", [one.name for one in NETS])
def test_shallow_shares_storage_and_leaves_the_model_alone(name):
    model, example = case(name).make()
    with untouched(model):
        copied = shallow(model)
        for (old_name, old), (new_name, new) in zip(
            model.named_parameters(remove_duplicate=False), copied.named_parameters(remove_duplicate=False), strict=True
        ):
            assert old_name == new_name
            assert old.data_ptr() == new.data_ptr()
            assert old is not new
            assert not new.requires_grad
        assert not {id(m) for m in model.modules()} & {id(m) for m in copied.modules()}
        wanted = run(model, example)
        for a, b in zip(wanted, run(copied, example), strict=True):
            torch.testing.assert_close(a, b)  # a GRU without gradients rounds otherwise
        first = next(name for name, m in copied.named_modules() if name and not list(m.children()))
        replace(copied, first, nn.Identity())
        copied.train()


def test_shallow_keeps_ties_and_shared_modules():
    copied = shallow(case("tied").make()[0])
    assert copied.out.weight is copied.embed.weight
    copied = shallow(case("shared").make()[0])
    assert copied.conv is copied.alias


@pytest.mark.parametrize("name", [one.name for one in NETS])
def test_clone_is_equal_and_independent(name):
    model, example = case(name).make()
    before = run(model, example)
    with untouched(model):
        copied = clone(model)
        assert all(torch.equal(a, b) for a, b in zip(before, run(copied, example), strict=True))
        for parameter in copied.parameters():
            parameter.data.zero_()
        for buffer in copied.buffers():
            buffer.zero_()
    assert [p.requires_grad for p in model.parameters()] == [p.requires_grad for p in copied.parameters()]
    assert all(torch.equal(a, b) for a, b in zip(before, run(model, example), strict=True))


def test_clone_without_shares_only_the_named_layers():
    model = case("mlp").make()[0]
    copied = clone(model, without=frozenset({"fc2"}))
    assert copied.fc2.weight is model.fc2.weight
    assert copied.fc2 is not model.fc2
    assert copied.fc1.weight is not model.fc1.weight
    assert copied.fc1.weight.data_ptr() != model.fc1.weight.data_ptr()


def test_a_model_that_cannot_be_copied_is_a_model_error():
    class Stubborn(nn.Linear):
        def __deepcopy__(self, memo):
            raise RuntimeError("no copies")

    for verb in (shallow, clone):
        with pytest.raises(ModelError, match=r"cannot be copied.*no copies"):
            verb(Stubborn(2, 2))


def test_computed_tensors_of_old_parametrizations_are_copied():
    model, example = case("weight_norm_hook").make()
    model(example)  # leaves a weight with a gradient history on the module
    for verb in (shallow, clone):
        assert torch.equal(verb(model)(example), model(example))


# Replacing.


def test_replace_reaches_every_place_of_a_shared_module():
    model, _ = case("shared").make()
    new = nn.Conv2d(4, 4, 1)
    replace(model, "alias", new)
    assert model.conv is new
    assert model.alias is new


def test_replace_inside_containers():
    inner = nn.Linear(3, 3)
    model = nn.ModuleDict({"list": nn.ModuleList([nn.Sequential(inner), inner]), "other": nn.Linear(3, 3)})
    new = nn.Identity()
    replace(model, "list.0.0", new)
    assert model["list"][0][0] is new
    assert model["list"][1] is new
    assert isinstance(model["other"], nn.Linear)


def test_replace_names_what_is_missing():
    model = nn.Linear(3, 3)
    with pytest.raises(CallError, match="no layer 'nowhere'"):
        replace(model, "nowhere", nn.Identity())
    with pytest.raises(CallError, match=r"wrap it in a torch\.nn\.Sequential"):
        replace(model, "", nn.Identity())


def test_carry_moves_every_hook_and_they_run():
    old, new = nn.Linear(3, 3), nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    seen = []
    old.register_forward_pre_hook(lambda *_: seen.append("pre"))
    old.register_forward_pre_hook(lambda *_: seen.append("pre kw"), with_kwargs=True)
    old.register_forward_hook(lambda *_: seen.append("post"))
    old.register_forward_hook(lambda *_: seen.append("post kw"), with_kwargs=True)
    old.register_full_backward_pre_hook(lambda *_: seen.append("back pre"))
    carry(old, new)
    new(torch.randn(2, 3, requires_grad=True)).sum().backward()
    assert seen == ["pre", "pre kw", "post", "post kw", "back pre"]


def test_carry_moves_backward_hooks_that_run():
    old, new = nn.Linear(3, 3), nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    seen = []
    old.register_full_backward_hook(lambda *_: seen.append("back"))
    carry(old, new)
    new(torch.randn(2, 3, requires_grad=True)).sum().backward()
    assert seen == ["back"]


def test_hooks_lists_all_that_a_module_has():
    """A hook kind that a future torch adds must not be forgotten."""
    kinds = {key for key, value in vars(nn.Linear(1, 1)).items() if "hooks" in key and "state_dict" not in key}
    assert kinds - {"_is_full_backward_hook"} <= set(HOOKS) | {"_non_persistent_buffers_set"}


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("weight", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_carry_keeps_flags(training, weight, bias):
    old, new = nn.Linear(3, 3).train(training), nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 3))
    old.weight.requires_grad_(weight)
    old.bias.requires_grad_(bias)
    carry(old, new)
    assert {m.training for m in new.modules()} == {training}
    assert {p.requires_grad for n, p in new.named_parameters() if n.endswith("weight")} == {weight}
    assert {p.requires_grad for n, p in new.named_parameters() if n.endswith("bias")} == {bias}


def test_swap_without_an_occurrence_changes_nothing():
    model = case("mlp").make()[0]
    before = state(model)
    swap(model, nn.Linear(2, 2), nn.Identity())
    assert state(model) == before


def test_hooks_of_a_replaced_layer_still_see_it():
    model, example = case("hooked").make()
    hook = next(iter(model.fc1._forward_hooks.values()))
    copied = copy.deepcopy(model)
    replace(copied, "fc1", nn.Sequential(nn.Linear(24, 4), nn.Linear(4, 48)))
    before = hook.calls
    copied(example)
    assert hook.calls == before + 1


# Finding a layer again.


def test_locate_finds_a_layer_inside_what_replaced_it():
    model = sequential(conv=nn.Conv2d(4, 6, 3), fc=nn.Linear(6, 2))
    layer = describe_layer("conv", model.conv, (), 1)
    assert locate(model, layer) == "conv"
    inside = nn.Sequential(nn.ZeroPad2d(1), nn.Sequential(nn.Conv2d(4, 6, 3)))
    replace(model, "conv", inside)
    assert locate(model, layer) == "conv.1.0"
    replace(model, "conv", nn.Conv2d(4, 6, 1))
    with pytest.raises(CallError, match=r"'conv' is no Conv2d of shape \(6, 4, 3, 3\)"):
        locate(model, layer)
    with pytest.raises(CallError, match="no layer 'gone'"):
        locate(model, describe_layer("gone", nn.Linear(1, 1), (), 1))


def test_many_layers_are_replaced_wherever_they_stand():
    inner = nn.Linear(2, 2)
    outer, shared = nn.Sequential(inner, nn.ReLU()), nn.Linear(2, 2)
    model = nn.Sequential(outer, shared, nn.Sequential(shared))
    wrapped, other, third = nn.Sequential(outer), nn.Identity(), nn.Identity()
    swap_all(model, [(outer, wrapped), (inner, other), (shared, third)])
    assert model[0] is wrapped
    assert outer[0] is other
    assert model[1] is third
    assert model[2][0] is third
