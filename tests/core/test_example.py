"""How a model is called: every mode of the example, batches read once, random state and modes put back."""

import threading

import pytest
import torch
from torch import nn

from cases import NETS, Keywords, OneDict, TwoInputs, case
from taut import DataError, ModelError
from taut.core.data import collect
from taut.core.example import Example, TautControl
from taut.core.modes import device_of, evaluating, generator, quiet, quietly
from taut.core.tensors import describe, detached, map_tensors, on_device, tensors


@pytest.mark.parametrize("name", [one.name for one in NETS])
def test_every_net_runs_on_its_example(name):
    model, value = case(name).make()
    example = Example(model, value)
    assert example.batch == 2
    assert tensors(example.run(model))
    for batch in case(name).data():
        assert example.inputs_of(batch) == (batch, None)
        assert example.samples.size(batch) == 8
        example.run(model, batch)


def test_how_the_structure_decides_the_call():
    model = Keywords()
    value = {"image": torch.randn(3, 12), "tokens": torch.zeros(3, 4, dtype=torch.int64)}
    assert Example(model, value).keywords
    assert Example(model, value).batch == 3
    one = OneDict()
    given = {"left": torch.randn(3, 12), "right": torch.randn(3, 8)}
    assert not Example(one, given).keywords
    assert torch.equal(Example(one, given).run(one)[0], one(given)[0])
    two = TwoInputs()
    pair = (torch.randn(3, 10), torch.randn(3, 6))
    assert torch.equal(Example(two, pair).run(two), two(*pair))
    single = nn.Linear(10, 2)
    assert torch.equal(Example(single, pair[0]).run(single), single(pair[0]))


def test_a_list_is_one_argument_and_a_tuple_several():
    class Sum(nn.Module):
        def forward(self, xs):
            return xs[0] + xs[1]

    model = Sum()
    pair = [torch.ones(2, 3), torch.ones(2, 3)]
    assert torch.equal(Example(model, pair).run(model), torch.full((2, 3), 2.0))
    with pytest.raises(ModelError, match="TypeError"):
        Example(model, tuple(pair)).run(model)


def test_the_example_keeps_no_history_and_no_inference_tensor():
    x = torch.randn(2, 4, requires_grad=True) * 2
    assert Example(nn.Linear(4, 2), x).value.grad_fn is None
    with torch.inference_mode():
        y = torch.randn(2, 4)
    kept = Example(nn.Linear(4, 2), y).value
    assert not kept.is_inference()
    assert torch.equal(kept, y)


@pytest.mark.parametrize(
    "value", [None, 3, "x", [], {}, torch.tensor(1.0), torch.randn(0, 3), {"a": 3}, (torch.empty(2, 0),)], ids=repr
)
def test_inputs_without_a_batch_are_refused(value):
    with pytest.raises(DataError, match="at least one tensor with a batch dimension"):
        Example(nn.Linear(3, 2), value)


def test_errors_of_the_model_are_named_with_their_cause():
    model = nn.Linear(3, 2)
    with pytest.raises(ModelError, match=r"structure float32\[2, 4\]: RuntimeError: ") as caught:
        Example(model, torch.randn(2, 4)).run(model)
    assert isinstance(caught.value.__cause__, RuntimeError)


def test_our_own_control_flow_passes_through():
    class Stop(TautControl):
        pass

    model = nn.Linear(3, 2)

    def leave(*_):
        raise Stop

    model.register_forward_hook(leave)
    with pytest.raises(Stop):
        Example(model, torch.randn(2, 3)).run(model)


# Batches.

X, Y = torch.arange(24.0).reshape(8, 3), torch.arange(8)
EXAMPLE = Example(nn.Linear(3, 2), X[:2])


@pytest.mark.parametrize(
    ("batch", "targets"), [(X, None), ([X], None), ((X,), None), ((X, Y), Y), ([X, Y], Y), ((X, {"y": Y}), {"y": Y})]
)
def test_batches_with_and_without_targets(batch, targets):
    inputs, found = EXAMPLE.inputs_of(batch)
    assert inputs is X
    assert found is targets if not isinstance(targets, dict) else found == targets


@pytest.mark.parametrize("batch", [Y, (Y, X), {"x": Y}, X[0], None, "text", [], X.bool(), (X[0], Y)], ids=describe)
def test_batches_of_another_structure_show_both(batch):
    with pytest.raises(DataError) as caught:
        EXAMPLE.inputs_of(batch)
    assert "float32[2, 3]" in str(caught.value)
    assert describe(batch) in str(caught.value)


def test_dict_and_tuple_examples_take_batches_of_their_own_form():
    example = Example(TwoInputs(), (torch.randn(2, 10), torch.randn(2, 6)))
    pair = (torch.randn(4, 10), torch.randn(4, 6))
    assert example.inputs_of(pair) == (pair, None)
    assert example.inputs_of((pair, Y)) == (pair, Y)
    example = Example(OneDict(), {"left": torch.randn(2, 12), "right": torch.randn(2, 8)})
    batch = {"right": torch.randn(5, 8), "left": torch.randn(5, 12)}
    assert example.inputs_of(batch) == (batch, None)
    assert example.inputs_of([batch, Y])[1] is Y


def joined(batches):
    return torch.cat([inputs for inputs, _ in batches])


@pytest.mark.parametrize(
    "data",
    [
        X,
        [X],
        (X,),
        [X[:3], X[3:]],
        [(X[:3], Y[:3]), (X[3:], Y[3:])],
        ((X[:4], Y[:4]), (X[4:], Y[4:])),
        torch.utils.data.DataLoader(torch.utils.data.TensorDataset(X, Y), batch_size=3),
        torch.utils.data.DataLoader(X, batch_size=8),
    ],
    ids=lambda v: type(v).__name__,
)
def test_collect_reads_every_form_of_data(data):
    assert torch.equal(joined(collect(EXAMPLE, data, 100)), X)


def test_collect_reads_one_batch_with_targets_as_such():
    ((inputs, targets),) = collect(EXAMPLE, (X, Y), 100)
    assert inputs is not None
    assert torch.equal(inputs, X)
    assert torch.equal(targets, Y)


def test_collect_reads_generators_once_and_no_further_than_it_must():
    read = []

    def endless():
        while True:
            read.append(1)
            yield X, Y

    batches = collect(EXAMPLE, endless(), 20)
    assert len(read) == 3
    assert [len(inputs) for inputs, _ in batches] == [8, 8, 4]
    assert [len(targets) for _, targets in batches] == [8, 8, 4]


@pytest.mark.parametrize("limit", [1, 3, 8, 9, 16, 100])
def test_collect_cuts_the_last_batch_to_the_limit(limit):
    data = [(X, Y), (X, Y)]
    batches = collect(EXAMPLE, data, limit)
    assert sum(len(inputs) for inputs, _ in batches) == min(limit, 16)
    assert all(len(inputs) == len(targets) for inputs, targets in batches)


def test_collect_stops_at_the_memory_limit():
    batches = collect(EXAMPLE, iter([X] * 10), 1000, max_bytes=2 * X.numel() * 4)
    assert len(batches) == 2


def test_tensors_that_are_no_batch_are_not_cut():
    example = Example(OneDict(), {"left": torch.randn(2, 12), "right": torch.randn(3, 8)})
    ((inputs, _),) = collect(example, [{"left": torch.randn(5, 12), "right": torch.randn(3, 8)}], 2)
    assert inputs["left"].shape == (2, 12)
    assert inputs["right"].shape == (3, 8)


def test_collect_keeps_neither_history_nor_inference_tensors():
    with torch.inference_mode():
        x = torch.randn(4, 3)
    ((inputs, _),) = collect(EXAMPLE, [x], 10)
    assert not inputs.is_inference()
    ((inputs, _),) = collect(EXAMPLE, [X * torch.ones(1, requires_grad=True)], 10)
    assert not inputs.requires_grad


def test_unusable_data_are_refused_by_name():
    spent = iter([X])
    list(spent)
    with pytest.raises(DataError, match=r"\(list_iterator\) gave no batch\. A generator can be read only once"):
        collect(EXAMPLE, spent, 10)
    with pytest.raises(DataError, match=r"\(list\) gave no batch"):
        collect(EXAMPLE, [], 10)
    with pytest.raises(DataError, match=r"must be an iterable of batches\. Got int"):
        collect(EXAMPLE, 3, 10)
    with pytest.raises(DataError, match=r"must look like the example, float32\[2, 3\].*Got int64\[8\]"):
        collect(EXAMPLE, [Y], 10)
    with pytest.raises(DataError, match="must look like the example"):
        collect(EXAMPLE, Y, 10)
    with pytest.raises(DataError, match="batch dimension"):
        collect(EXAMPLE, [X[:0]], 10)


# Small helpers.


def test_nests():
    nest = {"a": X, "b": [Y, 3, (X,)], "c": None}
    assert [t is X for t in tensors(nest)] == [True, False, True]
    doubled = map_tensors(lambda t: t * 2, nest)
    assert torch.equal(doubled["b"][2][0], X * 2)
    assert doubled["b"][1] == 3
    assert describe(nest) == "{a: float32[8, 3], b: [int64[8], int, (float32[8, 3])], c: NoneType}"
    assert on_device(nest, torch.device("meta"))["a"].device.type == "meta"
    assert detached(nest)["c"] is None


def test_device_of_models_with_and_without_tensors():
    assert device_of(nn.ReLU()) == torch.device("cpu")
    assert device_of(nn.Linear(2, 2, device="meta")).type == "meta"
    assert device_of(nn.BatchNorm1d(2, affine=False, device="meta")).type == "meta"


def test_evaluating_puts_back_every_flag_also_after_an_error():
    model = nn.Sequential(nn.Linear(2, 2), nn.Dropout())
    model[0].eval()

    def look():
        with evaluating(model) as inside:
            assert not any(m.training for m in inside.modules())
            raise KeyError

    with pytest.raises(KeyError):
        look()
    assert [m.training for m in model.modules()] == [True, False, True]


# The random state.


def test_quiet_is_seeded_and_undone():
    before = torch.get_rng_state()
    with quiet(5):
        one = torch.rand(3)
    with quiet(5):
        two = torch.rand(3)
    with quiet(6):
        three = torch.rand(3)
    assert torch.equal(one, two)
    assert not torch.equal(one, three)
    assert torch.equal(before, torch.get_rng_state())


def test_quiet_is_undone_after_an_error():
    before = torch.get_rng_state()

    def fail():
        with quiet():
            torch.rand(3)
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert torch.equal(before, torch.get_rng_state())
    with quiet(5):  # the outermost again
        assert torch.initial_seed() == 5


def test_nested_quiet_keeps_the_outermost_seed_and_stream():
    with quiet(5):
        whole = torch.rand(4)
    with quiet(5):
        first = torch.rand(2)
        with quiet(9):
            second = torch.rand(2)
        assert torch.initial_seed() == 5
    assert torch.equal(torch.cat([first, second]), whole)


def test_quiet_modes():
    with torch.inference_mode(), quiet():
        assert not torch.is_inference_mode_enabled()
        assert not torch.is_grad_enabled()
        assert not torch.ones(2).is_inference()
        with torch.enable_grad():
            x = torch.ones(2, requires_grad=True)
            (grad,) = torch.autograd.grad(x.sum(), x)
        with quiet():
            assert not torch.ones(2).is_inference()
    assert grad.tolist() == [1, 1]
    assert torch.is_grad_enabled()


def test_quiet_in_another_thread_is_its_own():
    seeds = []

    def work():
        with quiet(7):
            seeds.append(torch.initial_seed())

    with quiet(5):
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
    assert seeds == [7]


def test_quietly_keeps_name_and_result():
    @quietly
    def verb(a, *, b=1):
        """Words."""
        assert not torch.is_grad_enabled()
        return a + b

    assert verb(1, b=2) == 3
    assert (verb.__name__, verb.__doc__) == ("verb", "Words.")


def test_generators_follow_the_seed_in_force_and_do_not_touch_it():
    def draw(offset):
        return torch.rand(2, generator=generator(offset)).tolist()

    with quiet(3):
        before = torch.get_rng_state()
        one, two, again = draw(0), draw(1), draw(0)
        assert torch.equal(before, torch.get_rng_state())
    with quiet(4):
        other = draw(0)
    assert one == again
    assert one != two
    assert other == two  # seed plus offset
    torch.manual_seed(-1)
    assert draw(5)


def test_a_mapping_that_is_no_dict_goes_as_keywords():
    """A tokenizer's output is a UserDict."""
    from collections import UserDict  # noqa: PLC0415

    class Named(torch.nn.Module):
        def forward(self, ids, mask):
            return ids * mask

    value = UserDict(ids=torch.ones(3, 2), mask=torch.zeros(3, 2))
    example = Example(Named(), value)
    assert example.batch == 3
    assert torch.equal(example.run(Named()), torch.zeros(3, 2))
    assert set(example.inputs_of(value)[0]) == {"ids", "mask"}
