"""Weights that code multiplies by become layers, and what is made of these is saved, loaded, exported and trained."""

import copy
import dataclasses

import pytest
import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812 - the name that every torch user knows

import taut
from taut.nn import GroupedLinear, Product
from taut.structure.products import WRONG
from taut.types import Plan, Step


class Attention(nn.Module):
    """As timm's BEiT and EVA: the weight of a layer that is not called, with a bias put together elsewhere."""

    def __init__(self, width=24, heads=3):
        super().__init__()
        self.heads, self.qkv, self.proj = heads, nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width)
        self.q_bias, self.v_bias = nn.Parameter(torch.randn(width)), nn.Parameter(torch.randn(width))
        self.register_buffer("k_bias", torch.zeros(width), persistent=False)

    def forward(self, x):
        bias = torch.cat((self.q_bias, self.k_bias, self.v_bias))
        q, k, v = F.linear(x, weight=self.qkv.weight, bias=bias).unflatten(-1, (3, self.heads, -1)).unbind(-3)
        y = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
        return self.proj(y.transpose(1, 2).flatten(2))


class Packed(nn.Module):
    """Slices of one packed parameter, as in attention of one's own."""

    def __init__(self, width=24):
        super().__init__()
        self.in_proj, self.out = nn.Parameter(torch.randn(3 * width, width) / 5), nn.Linear(width, width)

    def forward(self, x):
        q, k, v = (
            F.linear(y, part)[:, None] for y, part in zip((x, x.roll(1, 1), x), self.in_proj.chunk(3), strict=True)
        )
        return self.out(F.scaled_dot_product_attention(q, k, v)[:, 0])


class Written(nn.Module):
    """A transformer by hand: einsum over heads, matrices in the way of JAX."""

    def __init__(self, width=24, heads=3):
        super().__init__()
        each = width // heads
        self.wq, self.wk, self.wv = (nn.Parameter(torch.randn(heads, width, each) / 5) for _ in range(3))
        self.wo = nn.Parameter(torch.randn(heads, each, width) / 5)
        self.up, self.down = (
            nn.Parameter(torch.randn(width, 2 * width) / 5),
            nn.Parameter(torch.randn(2 * width, width)),
        )

    def forward(self, x):
        q, k, v = (torch.einsum("bnd,hdk->bhnk", x, w) for w in (self.wq, self.wk, self.wv))
        x = x + torch.einsum("bhnk,hkd->bnd", F.scaled_dot_product_attention(q, k, v), self.wo)
        return x + (x @ self.up).relu() @ self.down


class Adapted(nn.Linear):
    """A layer with a forward of its own, which adds something to the product."""

    def __init__(self, width=24):
        super().__init__(width, width)
        self.a, self.b = nn.Parameter(torch.randn(width, 4)), nn.Parameter(torch.randn(4, width))

    def forward(self, x):
        return F.linear(x, self.weight, self.bias) + (x @ self.a).relu() @ self.b


class Net(nn.Module):
    """A block between a layer and a projection, a parameter of the model itself as in CLIP."""

    def __init__(self, block):
        super().__init__()
        self.first, self.block, self.text_projection = nn.Linear(16, 24), block(), nn.Parameter(torch.randn(24, 10))

    def forward(self, x):
        return self.block(self.first(x)).mean(1) @ self.text_projection


BLOCKS = {
    Attention: {"block.qkv"},
    Packed: {"block.in_proj"},
    Written: {f"block.{name}" for name in ("wq", "wk", "wv", "wo", "up", "down")},
    Adapted: {"block.weight", "block.a", "block.b"},
}


def net(block):
    torch.manual_seed(0)
    return Net(block).eval()


@pytest.mark.parametrize("block", BLOCKS)
def test_compress_does_it_first_and_load_again(block, tmp_path):
    model, x = net(block), torch.randn(64, 6, 16)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    result = taut.compress(model, x, budget=taut.Budget(params=0.6), data=[x], methods="low rank", compare=False)
    steps = {name: step.method for step in reversed(result.plan.steps) for name in step.layers}
    assert {name for name, method in steps.items() if method == "as_layer"} <= BLOCKS[block] | {"text_projection"}
    changed = [name for step in result.plan.steps if step.method == "svd" for name in step.layers]
    assert any(name.startswith(tuple(BLOCKS[block])) for name in changed)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    result.save(tmp_path / "small")
    assert torch.equal(taut.load(tmp_path / "small", base=lambda: net(block))(x), result.model(x))
    if block is Written:
        taut.export(result.model, x, tmp_path / "small.onnx")  # which checks that it computes the same
    copied = copy.deepcopy(result.model).train()
    copied(x).square().mean().backward()
    assert all(p.grad is not None for p in copied.parameters())


@pytest.mark.parametrize("block", BLOCKS)
def test_the_steps_alone_change_nothing(block):
    model, x = net(block), torch.randn(8, 6, 16)
    traced = taut.trace(model, x)
    names = BLOCKS[block] | {"text_projection"}
    steps = [Step((layer.name,), "as_layer") for layer in traced.layers if layer.name in names]
    assert len(steps) == len(names)
    small = taut.apply(model, Plan.of(traced, steps), taut.observe(traced, model))
    assert any(isinstance(module, Product) for module in small.modules())
    torch.testing.assert_close(small(x), model(x))
    assert sum(p.numel() for p in small.parameters()) == sum(p.numel() for p in model.parameters())


def test_layers_that_nothing_else_changed_are_parameters_again():
    model, x = net(Written), torch.randn(8, 6, 16)
    result = taut.compress(model, x, budget=taut.Budget(params=1.0), compare=False)
    assert result.plan.steps == ()
    assert list(result.model.state_dict()) == list(model.state_dict())
    assert torch.equal(result.model(x), model(x))


@pytest.mark.parametrize("keep", ["block.wq", "block", {"block.wq": 0.9}])
def test_what_is_kept_stays_a_parameter(keep):
    model, x = net(Written), torch.randn(8, 6, 16)
    result = taut.compress(model, x, budget=taut.Budget(params=0.95), methods=("svd",), keep=keep, compare=False)
    kept = result.model.state_dict()
    assert torch.equal(
        kept.get("block.wq", kept.get("block.wq.0.weight", torch.empty(0))).flatten().sort().values,
        model.block.wq.flatten().sort().values,
    )


def test_channels_go_through_it():
    class Narrow(nn.Module):
        def __init__(self):
            super().__init__()
            self.up, self.down = nn.Parameter(torch.randn(16, 32)), nn.Parameter(torch.randn(8, 32))

        def forward(self, x):
            return (x @ self.up).relu() @ self.down.T

    torch.manual_seed(0)
    model, x = Narrow().eval(), torch.randn(64, 16)
    result = taut.compress(model, x, budget=taut.Budget(macs=0.5), data=[x], methods=("channels",), compare=False)
    assert result.model.up.shape == (16, 16)
    assert result.model.down.shape == (8, 16)


def test_inspect_says_so():
    seen = taut.inspect(net(Written), torch.randn(2, 6, 16))
    assert seen.share("low rank", "params") == 1
    assert "as_layer first" in str(seen)


def test_parts_are_changed_one_by_one(tmp_path):
    model, x = net(Packed), torch.randn(64, 6, 16)
    traced = taut.trace(model, x)
    exact = Plan.of(traced, [Step(("block.in_proj",), "as_layer")])
    base = taut.apply(model, exact, taut.observe(traced, model))
    inner = taut.trace(base, x)
    step = Plan.of(inner, [Step(("block.in_proj.1",), "svd", {"rank": 5})]).steps[0]
    plan = dataclasses.replace(exact, steps=(*exact.steps, step))
    small = taut.apply(model, plan, taut.observe(traced, model))
    assert [type(part) for part in small.block.in_proj.children()] == [nn.Linear, nn.Sequential, nn.Linear]
    taut.save(small, plan, tmp_path / "small")
    assert torch.equal(taut.load(tmp_path / "small", base=lambda: net(Packed))(x), small(x))


@pytest.mark.parametrize("block", [Written, Packed])
def test_a_plan_is_carried_out_again_and_in_stages(block, tmp_path):
    model, x = net(block), torch.randn(64, 6, 16)
    stages = (taut.Stage(steps=(0, 1), epochs=1), taut.Stage(steps=tuple(range(2, 40)), epochs=1))

    def schedule(plan):
        return tuple(
            dataclasses.replace(stage, steps=tuple(step for step in stage.steps if step < len(plan.steps)))
            for stage in stages
        )

    budget = taut.Budget(params=0.6)
    result = taut.compress(model, x, budget=budget, data=[x], compare=False)
    plan = Plan.from_json(result.plan.to_json())
    again = taut.apply(model, plan, taut.observe(taut.trace(model, x), model, [x]), data=[x])
    assert torch.equal(again(x), result.model(x))
    data = [(x, torch.randint(0, 10, (64,)))]
    tune = taut.Finetune(data, data, loss=F.cross_entropy, schedule=schedule)
    tuned = taut.compress(model, x, budget=budget, data=[x], compare=False, finetune=tune)
    tuned.save(tmp_path / "small")
    assert torch.equal(taut.load(tmp_path / "small", base=lambda: net(block))(x), tuned.model(x))


def test_the_result_runs_under_autocast_where_the_original_does():
    class Casting(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.w = nn.Linear(16, 32), nn.Parameter(torch.randn(32, 32) / 6)
            self.u, self.last = nn.Parameter(torch.randn(32, 32) / 6), nn.Linear(32, 4)

        def forward(self, x):
            x = torch.relu(self.first(x))
            x = torch.tanh(x @ self.w.to(x.dtype))
            return self.last(F.linear(x, self.u.type_as(x)))

    torch.manual_seed(0)
    model, x = Casting().eval(), torch.randn(64, 16)
    result = taut.compress(model, x[:4], budget={"params": 0.6}, data=[x], methods=["svd"], compare=False)
    assert isinstance(result.model.w, Product) or isinstance(result.model.u, Product)
    with torch.autocast("cpu", torch.bfloat16):
        output, wanted = result.model(x), model(x)
    assert output.dtype == wanted.dtype == torch.bfloat16
    torch.testing.assert_close(output.float(), result.model(x), rtol=0.05, atol=0.05)


def test_what_does_not_run_under_autocast_any_more_stays():
    class Checked(nn.Module):
        def __init__(self):
            super().__init__()
            self.w, self.last = nn.Parameter(torch.randn(16, 16)), nn.Linear(16, 4)

        def forward(self, x):
            y = x @ self.w
            if y.dtype == torch.bfloat16:
                y = y + self.w.norm().to(y.dtype)
            return self.last(y)

    torch.manual_seed(0)
    assert taut.trace(Checked().eval(), torch.randn(8, 16))["w"].skip == WRONG


class Regular(nn.Module):
    """With a branch and a method that the example does not show."""

    def __init__(self):
        super().__init__()
        self.w, self.qkv, self.last = nn.Parameter(torch.randn(16, 16)), nn.Linear(16, 24), nn.Linear(8, 4)

    def forward(self, x, scale=False):
        y = x @ (self.w / self.w.norm() if scale else self.w)
        q, k, v = (F.linear(y, part) for part in self.qkv.weight.chunk(3))
        return self.last(q * k + v)

    def regularizer(self):
        return self.w.pow(2).sum() + self.qkv.weight[:8].abs().max()


def test_what_the_example_does_not_show_computes_with_the_weight_s_values(tmp_path):
    torch.manual_seed(0)
    model, x = Regular().eval(), torch.randn(8, 16)
    result = taut.compress(model, x, budget={"params": 0.45}, methods=["svd"], keep="last", compare=False)
    small = result.model
    assert {"w.0", "qkv.weight.0"} <= {name for step in result.plan.steps for name in step.layers}
    result.save(tmp_path / "small")
    for done in (small, taut.load(tmp_path / "small", lambda: Regular().eval())):
        plain = Regular()
        plain.load_state_dict({"w": done.w.dense(), "qkv.weight": done.qkv.weight.dense()}, strict=False)
        plain.qkv.bias, plain.last = done.qkv.bias, done.last
        torch.testing.assert_close(done(x, scale=True), plain(x, scale=True), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(done.regularizer(), plain.regularizer())
        done.regularizer().backward()
        assert all(p.grad is not None for p in done.w.parameters())


class Experts(nn.Module):
    """As Llama 4: each expert gets all rows, times what the router gives for it, in one batch."""

    def __init__(self, count=4, width=24, inner=32):
        super().__init__()
        self.router = nn.Linear(width, count)
        self.gate_up = nn.Parameter(torch.randn(count, width, 2 * inner) / width**0.5)
        self.down = nn.Parameter(torch.randn(count, inner, width) / inner**0.5)

    def forward(self, x):
        rows = x.reshape(-1, x.shape[-1])
        scores = self.router(rows)
        best = scores.topk(2, -1)
        scores = torch.zeros_like(scores).scatter(1, best.indices, best.values.sigmoid())
        given = rows * scores.T[..., None]
        gate, up = torch.bmm(given, self.gate_up).chunk(2, -1)
        return x + torch.bmm(F.silu(gate) * up, self.down).view(len(scores.T), -1, x.shape[-1]).sum(0).view_as(x)


class Numbered(Experts):
    """The same by experts of which one is used by its number, too."""

    def forward(self, x):
        return super().forward(x) + (x @ self.gate_up[0])[..., :24]


def test_experts_in_a_batch_become_one_layer_each(tmp_path):
    model, x = net(Experts), torch.randn(64, 6, 16)
    traced = taut.trace(model, x)
    assert [(traced[f"block.{name}"].stacked, traced[f"block.{name}"].rows) for name in ("gate_up", "down")] == [
        (True, ())
    ] * 2
    result = taut.compress(
        model, x, budget=taut.Budget(macs=0.5), data=[x], keep=["first", "text_projection"], compare=False
    )
    stacks = {name: module for name, module in result.model.named_modules() if isinstance(module, Product)}
    low = [module for stack in stacks.values() for module in stack.children() if isinstance(module, nn.Sequential)]
    assert low
    assert all(type(part) is GroupedLinear and part.groups == 4 for chain in low for part in chain)
    torch.testing.assert_close(result.model(x), model(x), rtol=1, atol=1)
    result.save(tmp_path / "small")
    again = taut.load(tmp_path / "small", base=lambda: net(Experts))
    assert torch.equal(again(x), result.model(x))
    copied = copy.deepcopy(result.model).train()
    copied(x).square().mean().backward()
    assert all(p.grad is not None for p in copied.parameters())


def test_as_one_layer_experts_compute_and_cost_the_same():
    model, x = net(Experts), torch.randn(8, 6, 16)
    traced = taut.trace(model, x)
    steps = [Step((f"block.{name}",), "as_layer") for name in ("gate_up", "down")]
    small = taut.apply(model, Plan.of(traced, steps), taut.observe(traced, model))
    torch.testing.assert_close(small(x), model(x))
    inner = taut.trace(small, x)
    assert [inner[f"block.{name}.0"].kind for name in ("gate_up", "down")] == ["GroupedLinear"] * 2
    assert inner.cost.macs == traced.cost.macs
    assert inner["block.down.0"].macs == traced["block.down"].macs
    assert inner["block.down.0"].skip is None


def test_a_stack_that_is_used_by_number_too_becomes_a_layer_for_each():
    traced = taut.trace(net(Numbered), torch.randn(8, 6, 16))
    assert (traced["block.gate_up"].stacked, traced["block.down"].stacked) == (False, True)


def test_data_on_which_a_stack_is_used_by_number_leave_it_alone():
    class Sometimes(Numbered):
        def forward(self, x):
            return super().forward(x) if len(x) > 8 else Experts.forward(self, x)

    model = net(Sometimes)
    assert taut.trace(model, torch.randn(8, 6, 16))["block.gate_up"].stacked
    other = taut.trace(model, torch.randn(8, 6, 16), [torch.randn(12, 6, 16)])["block.gate_up"]
    assert not other.stacked
    assert "other rows of it" in other.skip
