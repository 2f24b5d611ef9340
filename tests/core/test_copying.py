"""Copies of models: all that deepcopy makes, with what is named beforehand, and without tying copy and original."""

import copy
import weakref
from collections import OrderedDict, deque
from types import MethodType

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import parametrizations

from cases import NETS, state
from taut.core.copying import deep_copy
from taut.errors import ModelError


@pytest.mark.parametrize("case", NETS, ids=str)
def test_a_copy_has_equal_parts_and_shares_none(case):
    model, _ = case.make()
    before = state(model)
    copied = deep_copy(model)
    assert state(model) == before
    assert [(name, type(m)) for name, m in copied.named_modules()] == [(n, type(m)) for n, m in model.named_modules()]
    assert set(copied.modules()).isdisjoint(model.modules())
    for module, mine in zip(model.modules(), copied.modules(), strict=True):
        assert vars(mine).keys() == vars(module).keys()
        assert mine.training == module.training
        for key, value in vars(module).items():
            assert type(vars(mine)[key]) is type(value)
            assert not isinstance(value, dict | list | set) or vars(mine)[key] is not value
    pairs = list(zip(model.state_dict().items(), copied.state_dict().items(), strict=True))
    assert all(a == b and torch.equal(x, y) and x.data_ptr() != y.data_ptr() for (a, x), (b, y) in pairs)
    assert [p.requires_grad for p in copied.parameters()] == [p.requires_grad for p in model.parameters()]


class Tied(nn.Module):
    """A module, a parameter and a list in two places, and one that knows its parent."""

    def __init__(self):
        super().__init__()
        self.a = nn.Linear(3, 3)
        self.b = self.a
        self.c = nn.Linear(3, 3)
        self.c.weight = self.a.weight
        self.sizes = [1, [2, 3]]
        self.same = self.sizes
        self.unnamed = (self.a, {"deep": self.c})
        object.__setattr__(self.c, "parent", self)


def test_what_stands_twice_does_so_in_the_copy():
    model = Tied()
    copied = deep_copy(model)
    assert copied.a is copied.b
    assert copied.c.weight is copied.a.weight
    assert copied.sizes is copied.same
    assert copied.sizes[1] is not model.sizes[1]
    assert copied.unnamed == (copied.a, {"deep": copied.c})
    assert copied.c.parent is copied


def test_what_is_named_beforehand_stays_or_becomes_what_stands_there():
    model = nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.BatchNorm1d(3))
    other = nn.Tanh()
    memo = {id(model[0].weight): model[0].weight, id(model[1]): other}
    copied = deep_copy(model, memo)
    assert copied[0].weight is model[0].weight
    assert copied[0].bias is not model[0].bias
    assert copied[1] is other
    assert memo[id(model[2])] is copied[2]


def test_hooks_stay_and_are_not_shared():
    model, calls = nn.Sequential(nn.Linear(3, 3)), []
    model[0].register_forward_hook(lambda *_: calls.append(1))
    copied = deep_copy(model)
    copied[0].register_forward_hook(lambda *_: calls.append(2))
    copied(torch.zeros(1, 3))
    assert calls == [1, 2]
    model(torch.zeros(1, 3))
    assert calls == [1, 2, 1]
    assert type(copied[0]._forward_hooks) is OrderedDict


class Counted(nn.Linear):
    """A module that says how it is copied."""

    def __getstate__(self):
        return super().__getstate__() | {"copies": getattr(self, "copies", 0) + 1}


class Careful(nn.Linear):
    def __deepcopy__(self, memo):
        made = type(self)(self.in_features, self.out_features)
        made.load_state_dict(self.state_dict())
        memo[id(self)] = made
        made.careful = True
        return made


class Sealed(nn.Linear):
    def __reduce__(self):
        raise TypeError("sealed")


def test_a_module_that_copies_itself_does():
    copied = deep_copy(nn.Sequential(Counted(2, 2), nn.Sequential(Careful(2, 2))))
    assert copied[0].copies == 1
    assert copied[1][0].careful
    normed = nn.Sequential(parametrizations.weight_norm(nn.Linear(2, 2)))
    assert torch.equal(deep_copy(normed)[0].weight, normed[0].weight)


def test_one_that_was_taught_to_copy_itself_does_as_well():
    model = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
    model[0].__deepcopy__ = lambda _: model[0]
    assert deep_copy(model)[0] is model[0]


class Holds(nn.Module):
    def __init__(self, shared):
        super().__init__()
        self.shared, self.layer, self.table = shared, nn.Linear(2, 2), self._modules


@pytest.mark.parametrize("kind", [dict, OrderedDict])
def test_a_dictionary_that_several_hold_is_one_in_the_copy(kind):
    shared = kind()
    model = nn.Sequential(Holds(shared), Holds(shared))
    model.helper = [shared]
    copied = deep_copy(model)
    assert copied[0].shared is copied[1].shared is copied.helper[0]
    assert copied[0].shared is not shared
    assert copied[0].table is copied[0]._modules
    copied[0].layer = nn.Identity()
    assert isinstance(copied[0].table["layer"], nn.Identity)


class Fresh(nn.Module):
    """A module whose state is made anew whenever it is asked for."""

    def __init__(self, number):
        super().__init__()
        self.number = number

    def __getstate__(self):
        return super().__getstate__() | {"made": {"number": [self.number]}}


def test_states_made_for_the_copy_are_not_mixed_up():
    copied = deep_copy(nn.Sequential(*(Fresh(number) for number in range(200))))
    assert [one.made["number"] for one in copied] == [[number] for number in range(200)]


def test_what_cannot_be_copied_is_a_model_error_with_its_own_words():
    with pytest.raises(ModelError, match="The model cannot be copied: TypeError: sealed"):
        deep_copy(nn.Sequential(Sealed(2, 2)))
    with pytest.raises(TypeError, match="sealed"):
        copy.deepcopy(Sealed(2, 2))


def test_a_computed_tensor_is_copied_without_its_history():
    model = nn.Linear(2, 2)
    model.twice = model.weight * 2
    copied = deep_copy(model)
    assert copied.twice.grad_fn is None
    assert torch.equal(copied.twice, model.twice)
    assert copied.twice.data_ptr() != model.twice.data_ptr()


class Slotted(nn.Module):
    __slots__ = ("apart",)


class Delegating(nn.Module):
    """Answers for its layer, as wrappers do."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("layer"), name)


class Note:
    def __init__(self, held):
        self.held = held


def _method(module, *_):
    return module.training


def marked(value, old):
    value.mark = [old]
    return value


VALUES = (
    lambda pool, old: 7,
    lambda pool, old: (1, "two", None),
    lambda pool, old: (1, [2], old),
    lambda pool, old: [old, pool.choice(SHAPES)],
    lambda pool, old: {"a": old, 3: {}},
    lambda pool, old: OrderedDict(a=[old]),
    lambda pool, old: marked(OrderedDict(), old),
    lambda pool, old: {1, "x"},
    lambda pool, old: {Note(old)},
    lambda pool, old: {},
    lambda pool, old: deque([old]),
    lambda pool, old: Note(old),
    lambda pool, old: torch.randn(3),
    lambda pool, old: torch.Size([2, 3]),
    lambda pool, old: torch.float64,
    lambda pool, old: old,
)
SHAPES = (3, (3, 3), [3], {})
LAYERS = (
    lambda pool, old: nn.Linear(3, 3),
    lambda pool, old: nn.Conv2d(3, 3, 3),
    lambda pool, old: nn.BatchNorm1d(3),
    lambda pool, old: nn.LSTM(3, 3),
    lambda pool, old: nn.Sequential(old, nn.ReLU(), old),
    lambda pool, old: Delegating(old),
    lambda pool, old: Counted(2, 2),
    lambda pool, old: Careful(2, 2),
    lambda pool, old: Fresh(3),
    lambda pool, old: Slotted(),
    lambda pool, old: parametrizations.weight_norm(nn.Linear(3, 3)),
)


def _tree(pool):
    """A model with parts, hooks and attributes in several places."""
    root = nn.Sequential()
    modules, values = [root], [{"deep": []}]
    for number in range(pool.randint(1, 12)):
        layer = pool.choice(LAYERS)(pool, pool.choice(modules[1:] or [nn.Identity()]))
        pool.choice([m for m in modules if type(m) is nn.Sequential]).add_module(f"part{number}", layer)
        modules.append(layer)
        values.append(pool.choice(VALUES)(pool, pool.choice([*values, *modules])))
        object.__setattr__(pool.choice(modules), f"note{number}", pool.choice(values))
        held = pool.choice(modules)
        if pool.random() < 0.3:
            held.register_forward_hook(pool.choice([_method, held.train, Note(values[-1]).__init__]))
        for parameter in held.parameters():
            parameter.requires_grad_(pool.random() < 0.5)
            parameter.grad = torch.ones_like(parameter) if pool.random() < 0.5 else None
    return root


def _parts(value):
    """What a thing holds, in order."""
    if isinstance(value, dict):
        parts = [*value, *value.values()]
    elif isinstance(value, list | tuple | deque) or (isinstance(value, set) and len(value) == 1):
        parts = list(value)
    else:
        parts = [value.__self__, value.__func__] if isinstance(value, MethodType) else []
        parts += [value()] if isinstance(value, weakref.ref) else []
    return [*parts, *vars(value).values()] if hasattr(value, "__dict__") and not isinstance(value, type) else parts


def _walk(*roots):
    """Everything that is reached from the first, by every way, with what stands at the same place of the others."""
    seen, waiting = set(), [roots]
    while waiting:
        ones = waiting.pop()
        yield ones
        if id(ones[0]) not in seen:
            seen.add(id(ones[0]))
            held = [_parts(one) for one in ones]
            assert len({len(parts) for parts in held}) == 1
            waiting += zip(*held, strict=True)


@given(st.randoms(use_true_random=False))
def test_a_copy_is_what_deepcopy_makes(pool):
    model = _tree(pool)
    wanted, made = copy.deepcopy(model), deep_copy(model)
    owned = {id(one): one for (one,) in _walk(model)}
    pairs: dict[int, int] = {}
    for theirs, mine in _walk(wanted, made):
        assert type(mine) is type(theirs)
        assert (id(mine) in owned) == (id(theirs) in owned)
        assert pairs.setdefault(id(theirs), id(mine)) == id(mine)
        if isinstance(theirs, torch.Tensor):
            assert torch.equal(mine, theirs)
            assert (mine.requires_grad, mine.grad is None) == (theirs.requires_grad, theirs.grad is None)
        elif not _parts(theirs):
            assert repr(mine) == repr(theirs)
