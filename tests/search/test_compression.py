"""`compress`: budgets hold on the counted model, or the error carries the closest result."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812 - the name that every torch user knows

import taut
from cases import case, macs, run, sequential, untouched
from taut import Budget, BudgetError, CallError, DataError
from taut.measure import file_bytes, stored_tensors
from taut.types import Cost


def classifier():
    """A small net trained on two noisy rings; validation data of its own."""
    random = torch.Generator().manual_seed(0)
    x = torch.randn(1200, 2, generator=random)
    y = (x.norm(dim=1) > 1.1).long()
    x = torch.cat([x, torch.randn(1200, 14, generator=random) * 0.5], 1)
    model = sequential(a=nn.Linear(16, 48), r1=nn.ReLU(), b=nn.Linear(48, 48), r2=nn.ReLU(), c=nn.Linear(48, 2))
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    with torch.enable_grad():
        for _ in range(80):
            optimizer.zero_grad()
            F.cross_entropy(model(x[:800]), y[:800]).backward()
            optimizer.step()
    return model.eval(), x[:800], x[800:], y[800:]


class Evaluate:
    """Accuracy on validation data, counting its calls."""

    def __init__(self, x, y):
        self.x, self.y, self.calls = x, y, 0

    def __call__(self, model):
        self.calls += 1
        with torch.no_grad():
            return float((model(self.x).argmax(1) == self.y).float().mean())


def bytes_of(model):
    return file_bytes(stored_tensors(model)[0])


@pytest.mark.parametrize("name", ["mlp", "vgg", "resnet", "tied", "keywords"])
@pytest.mark.parametrize("key", ["params", "macs", "bytes"])
def test_a_budget_of_one_is_a_bit_equal_copy(name, key):
    model, example = case(name).make()
    data = case(name).data()
    with untouched(model):
        result = taut.compress(model, example, budget=Budget(**{key: 1.0}), data=data)
    assert result.model is not model
    assert result.plan.steps == ()
    new = result.model.state_dict()
    assert list(new) == list(model.state_dict())
    assert all(torch.equal(value, new[key]) for key, value in model.state_dict().items())
    assert all(torch.equal(a, b) for a, b in zip(run(model, example), run(result.model, example), strict=True))


@pytest.mark.parametrize("name", ["mlp", "vgg", "resnet"])
@pytest.mark.parametrize(
    "budget",
    [{"params": 0.5}, {"macs": 0.5}, {"bytes": 0.75}, {"params": 0.6, "macs": 0.4, "bytes": 0.9}],
    ids="+".join,
)
def test_budgets_hold_on_the_counted_model(name, budget):
    model, example = case(name).make()
    result = taut.compress(model, example, budget=Budget(**budget), data=case(name).data())
    small = result.model
    found = Cost(
        sum(p.numel() for p in small.parameters()),
        sum(int(p.count_nonzero()) for p in small.parameters()),
        macs(small, example) // 2,
        bytes_of(small),
    )
    before = Cost(sum(p.numel() for p in model.parameters()), 0, macs(model, example) // 2, bytes_of(model))
    for key, share in budget.items():
        assert getattr(found, key) <= share * getattr(before, key)
    assert result.plan.after == found
    assert (result.plan.before.params, result.plan.before.macs) == (before.params, before.macs)
    assert result.comparison.after == found


def test_an_absolute_budget_holds():
    model, example = case("mlp").make()
    result = taut.compress(model, example, budget=Budget(params=1500), data=case("mlp").data())
    assert 1000 < sum(p.numel() for p in result.model.parameters()) <= 1500


def test_what_cannot_be_met_comes_with_the_closest_result(tmp_path):
    model, example = case("vgg").make()
    with untouched(model), pytest.raises(BudgetError, match="No plan meets the budget params <= 10") as caught:
        taut.compress(model, example, budget=Budget(params=10), data=case("vgg").data())
    best = caught.value.best
    assert isinstance(best, taut.Result)
    assert run(best.model, example)[0].shape == (2, 10)
    assert best.plan.after.params == sum(p.numel() for p in best.model.parameters())
    assert best.plan.after.params < 0.3 * best.plan.before.params
    assert str(best.plan.after.params) in str(caught.value).replace("k", "")
    best.save(tmp_path / "small")
    assert (tmp_path / "small" / "model.safetensors").exists()


def test_a_model_with_nothing_to_compress():
    model, x = sequential(norm=nn.BatchNorm1d(4), act=nn.ReLU()), torch.randn(2, 4)
    with pytest.raises(BudgetError) as caught:
        taut.compress(model.eval(), x, budget=Budget(params=0.5), data=[torch.randn(16, 4)])
    assert torch.equal(caught.value.best.model(x), model(x))


# Drop.


@pytest.mark.parametrize("drop", [0.0, 0.02, 0.2])
def test_a_drop_holds_on_the_evaluate_it_was_given(drop):
    model, data, x, y = classifier()
    evaluate = Evaluate(x, y)
    before = evaluate(model)
    with untouched(model):
        result = taut.compress(model, data[:2], budget=Budget(drop=drop), data=data, evaluate=evaluate)
    assert Evaluate(x, y)(result.model) >= before - drop
    assert evaluate.calls <= 1 + 1 + 6 + 3  # ours, the original, six on the way, the comparison
    if drop >= 0.02:
        assert sum(p.numel() for p in result.model.parameters()) < 0.5 * sum(p.numel() for p in model.parameters())
    assert result.comparison.score_after.value == pytest.approx(evaluate(result.model))


def test_a_larger_drop_is_never_a_larger_model():
    model, data, x, y = classifier()
    sizes = [
        taut.compress(model, data[:2], budget=Budget(drop=drop), data=data, evaluate=Evaluate(x, y)).plan.after.params
        for drop in (0.0, 0.02, 0.1)
    ]
    assert sizes == sorted(sizes, reverse=True)


def test_drop_together_with_a_ceiling():
    model, data, x, y = classifier()
    budget = Budget(drop=0.05, params=0.6)
    result = taut.compress(model, data[:2], budget=budget, data=data, evaluate=Evaluate(x, y))
    assert Evaluate(x, y)(result.model) >= Evaluate(x, y)(model) - 0.05
    assert result.plan.after.params <= 0.6 * result.plan.before.params


@pytest.mark.parametrize("methods", [None, ("channels", "svd")], ids=["low rank", "both"])
def test_of_several_keys_the_least_damage_within_all_and_not_the_whole_drop(methods):
    model, data, x, y = classifier()
    both, alone = (
        taut.compress(model, data[:2], budget=budget, data=data, methods=methods, evaluate=Evaluate(x, y)).plan
        for budget in (Budget(drop=0.9, params=0.6), Budget(params=0.6))
    )
    assert both == alone
    assert both.after.params > 0.5 * both.before.params


def test_a_drop_that_the_ceiling_forbids_is_a_budget_error():
    model, data, x, y = classifier()
    with pytest.raises(BudgetError, match="drop") as caught:
        taut.compress(model, data[:2], budget=Budget(drop=0.0, params=0.1), data=data, evaluate=Evaluate(x, y))
    assert caught.value.best.plan.after.params < 0.2 * caught.value.best.plan.before.params


def test_another_plan_is_found_where_the_one_of_least_damage_falls_too_far():
    """A metric need not fall with the size: what holds a tighter budget holds the looser one."""
    model, x = sequential(a=nn.Linear(32, 64), b=nn.ReLU(), c=nn.Linear(64, 32)).eval(), torch.randn(64, 32)
    whole = sum(p.numel() for p in model.parameters())

    def evaluate(small):
        size = sum(p.numel() for p in small.parameters())
        return 1.0 if size == whole or size < 0.5 * whole else 0.9

    for share in (0.9, 0.45):
        budget = Budget(params=share, drop=0.05)
        result = taut.compress(model, x[:2], budget=budget, data=[x], evaluate=evaluate)
        assert result.plan.after.params <= share * whole
        assert evaluate(result.model) == 1.0


def test_training_may_win_back_a_drop_and_only_that():
    torch.manual_seed(0)
    model, x = sequential(a=nn.Linear(16, 32), b=nn.ReLU(), c=nn.Linear(32, 4)).eval(), torch.randn(128, 16)
    y = torch.randn(128, 4)

    def evaluate(candidate):
        return -float(nn.functional.mse_loss(candidate.eval()(x), y).detach())

    def compress(**budget):
        tune = taut.Finetune(
            [(x, y)], evaluate, nn.functional.mse_loss, schedule=(taut.Stage((), epochs=40, rate=1e-2),)
        )
        arguments = {"budget": Budget(**budget), "data": [x], "evaluate": evaluate, "finetune": tune}
        return taut.compress(model, x[:2], **arguments)

    result = compress(params=0.5, drop=-0.0)
    assert evaluate(result.model) > evaluate(model)
    with pytest.raises(BudgetError, match="params"):
        compress(params=1e-3, drop=0.0)


def test_nothing_on_the_path_is_good_enough():
    """Any change at all is punished: the original comes back."""
    model, data, _, _ = classifier()
    reference = model(data[:5])

    def exact(candidate):
        return 1.0 if torch.equal(candidate(data[:5]), reference) else 0.0

    result = taut.compress(model, data[:2], budget=Budget(drop=0.1), data=data, evaluate=exact)
    assert torch.equal(result.model(data), model(data))
    assert result.plan.steps == ()


def test_a_drop_needs_evaluate_and_evaluate_must_work():
    model, data, _, _ = classifier()
    with pytest.raises(CallError, match="'drop' needs evaluate="):
        taut.compress(model, data[:2], budget=Budget(drop=0.1), data=data)
    with pytest.raises(DataError, match="evaluate"):
        taut.compress(model, data[:2], budget=Budget(drop=0.1), data=data, evaluate=lambda _: float("nan"))
    with pytest.raises(CallError, match=r"must be a taut\.Budget, .* Got 0\.5"):
        taut.compress(model, data[:2], budget=0.5, data=data)


# Methods, exact steps, seeds.


def test_named_methods_are_the_only_ones_used():
    model, example = case("vgg").make()
    for method in ("svd", "spatial", "tucker"):
        result = taut.compress(model, example, budget=Budget(macs=0.8), data=case("vgg").data(), methods=[method])
        assert {s.method for s in result.plan.steps} == {method}


def crepe():
    return sequential(
        conv=nn.Conv1d(4, 16, 64, padding=32), act=nn.ReLU(), conv2=nn.Conv1d(16, 16, 5, padding=2)
    ).eval()


def test_exact_steps_come_first_and_are_free():
    model, x = crepe(), torch.randn(64, 4, 4)
    result = taut.compress(model, x[:2], budget=Budget(params=0.5), data=x, methods=["dead_taps"])
    assert [s.method for s in result.plan.steps] == ["dead_taps"]
    torch.testing.assert_close(result.model(x), model(x), rtol=1e-4, atol=1e-5)
    assert result.plan.after.params == sum(p.numel() for p in result.model.parameters())


def test_exact_steps_and_factorizations_share_a_plan_by_original_names():
    model, x = crepe(), torch.randn(64, 4, 4)
    result = taut.compress(model, x[:2], budget=Budget(params=0.12), data=x, methods=["dead_taps", "svd", "tucker"])
    assert {name for s in result.plan.steps for name in s.layers} <= {"conv", "conv2"}
    assert result.plan.steps[0].method == "dead_taps"
    assert len(result.plan.steps) >= 2
    assert result.plan.before.params == sum(p.numel() for p in model.parameters())
    assert sum(p.numel() for p in result.model.parameters()) <= 0.12 * result.plan.before.params
    # the plan alone rebuilds the same network from the original model
    net = taut.trace(model, x[:2])
    again = taut.apply(model, taut.Plan.from_json(result.plan.to_json()), taut.observe(net, model, x))
    assert [tuple(p.shape) for p in again.parameters()] == [tuple(p.shape) for p in result.model.parameters()]


def test_without_data_the_weights_decide():
    model, example = case("mlp").make()
    result = taut.compress(model, example, budget=Budget(params=0.5))
    assert result.plan.unit == "relative weight error"
    assert result.plan.after.params <= 0.5 * result.plan.before.params


def test_the_same_seed_gives_the_same_bits_whatever_the_callers_state():
    model, example = case("vgg").make()
    states = []
    for turn in range(2):
        torch.manual_seed(turn)
        result = taut.compress(model, example, budget=Budget(macs=0.5), data=case("vgg").data(), seed=4)
        states.append(list(result.model.state_dict().values()))
    assert all(torch.equal(a, b) for a, b in zip(*states, strict=True))


def test_a_generator_is_read_once():
    model, example = case("mlp").make()
    data = (batch for batch in case("mlp").data())
    result = taut.compress(model, example, budget=Budget(params=0.5), data=data)
    assert result.plan.unit == "loss"
    with pytest.raises(DataError, match="gave no batch"):
        taut.compress(model, example, budget=Budget(params=0.5), data=data)


def test_it_works_under_inference_mode():
    model, example = case("mlp").make()
    with torch.inference_mode():
        result = taut.compress(model, example, budget=Budget(params=0.5), data=case("mlp").data())
    assert not any(p.is_inference() for p in result.model.parameters())
    result.model(torch.randn(3, 24)).sum().backward()
    assert result.model.fc3.bias.grad is not None


def test_the_result_prints():
    model, example = case("mlp").make()
    result = taut.compress(model, example, budget=Budget(params=0.5), data=case("mlp").data())
    assert "parameters" in str(result.comparison)
    assert "whole model" in str(result.plan)
