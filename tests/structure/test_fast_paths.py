"""torch's fused encoder layers: looked at layer by layer, and what is made of them runs as its user runs it."""

import pytest
import torch
from torch import nn

import taut
from taut.core.modes import unfused
from taut.errors import CallError
from taut.types import Plan, Step


class Tagger(nn.Module):
    """An encoder with a padding mask, one output per position."""

    def __init__(self, layers=2, **settings):
        super().__init__()
        self.embed = nn.Embedding(30, 16)
        layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, **settings)
        self.encoder = nn.TransformerEncoder(layer, layers) if layers else layer
        self.out = nn.Linear(16, 5)

    def forward(self, words, padding):
        return self.out(self.encoder(self.embed(words), src_key_padding_mask=padding))


class Pooled(Tagger):
    """Reads what is at padded positions, too."""

    def forward(self, words, padding):
        return self.out(self.encoder(self.embed(words), src_key_padding_mask=padding).mean(1))


def padded():
    words = torch.randint(0, 30, (4, 6))
    lengths = torch.tensor([6, 4, 3, 6])
    return words, torch.arange(6)[None] >= lengths[:, None]


INNER = ["encoder.layers.1.linear1", "encoder.layers.0.linear2"]


def test_the_fast_path_is_put_back_also_on_errors():
    seen = []

    def failing():
        with unfused():
            seen.append(torch.backends.mha.get_fastpath_enabled())
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        failing()
    assert seen == [False]
    assert torch.backends.mha.get_fastpath_enabled()


def test_an_encoder_with_a_mask_is_traced_observed_and_replaced(tmp_path):
    torch.manual_seed(0)
    model, example = Tagger().eval(), padded()
    net = taut.trace(model, example)
    own = sum(net[name].macs for name in INNER)
    assert own == 2 * 6 * 16 * 32  # not hidden in a fused operation
    stats = taut.observe(net, model, [example])
    assert stats.unit == "loss"
    plan = Plan.of(net, [Step((name,), "svd", {"rank": 4}) for name in INNER])
    small = taut.apply(model, plan, stats, [example])
    assert all(isinstance(small.get_submodule(name), nn.Sequential) for name in INNER)
    assert model.encoder.use_nested_tensor
    wanted = small(*example)  # with gradients, which no fused path has
    with torch.no_grad(), torch.autocast("cpu", enabled=False):
        torch.testing.assert_close(small(*example)[~example[1]], wanted[~example[1]])
    small.train()(*example)
    small.eval()
    taut.save(small, plan, tmp_path / "small")
    loaded = taut.load(tmp_path / "small", Tagger)
    with torch.no_grad():
        assert torch.equal(loaded(*example), small(*example))


@pytest.mark.parametrize("settings", [{"layers": 0}, {"norm_first": True}, {"activation": "gelu"}], ids=str)
@pytest.mark.filterwarnings("ignore:enable_nested_tensor")
def test_other_encoders_can_be_replaced_as_well(settings):
    model, example = Tagger(**settings).eval(), padded()
    net = taut.trace(model, example)
    assert {x.skip for x in net.layers if x.name.endswith(("linear1", "linear2"))} == {None}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_in_half_precision_the_fused_path_rounds_otherwise(dtype):
    torch.manual_seed(0)
    net = taut.trace(Tagger().eval().to(dtype), padded())
    assert {x.skip for x in net.layers if x.name.endswith(("linear1", "linear2"))} == {None}
    pooled = taut.trace(Pooled().eval().to(dtype), padded())
    assert "enable_nested_tensor=False" in pooled["encoder.layers.0.linear1"].skip


def test_where_padded_positions_are_read_the_fused_path_stays():
    net = taut.trace(Pooled().eval(), padded())
    assert "enable_nested_tensor=False" in net["encoder.layers.0.linear1"].skip
    model = Pooled().eval()
    model.encoder.use_nested_tensor = False
    assert taut.trace(model, padded())["encoder.layers.0.linear1"].skip is None


def test_narrower_encoders_keep_their_fused_path():
    model, example = Tagger().eval(), padded()
    net = taut.trace(model, example)
    names = tuple(layer.name for layer in net.layers if layer.kind == "Linear" and layer.skip is None)
    plan = Plan.of(net, [Step(names, "channels", {"sparsity": 0.25})])
    small = taut.apply(model, plan, taut.observe(net, model, [example]))
    assert small.encoder.layers[0].linear1.out_features < 32
    assert small.encoder.use_nested_tensor
    with torch.no_grad():
        assert not (small.encoder(small.embed(example[0]), src_key_padding_mask=example[1])[1, 4:]).any()


class Named(nn.Module):
    """An encoder whose padding is marked by an argument of any name, in any way."""

    def __init__(self, kind=nn.TransformerEncoder, norm=None):
        super().__init__()
        self.e = kind(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2, norm=norm)
        self.o = nn.Linear(8, 3)


class ByMask(Named):
    """A name that is recognized."""

    def forward(self, x, attention_mask):
        return self.o(self.e(x, src_key_padding_mask=attention_mask == 0))


class ByPads(Named):
    """A name that is not."""

    def forward(self, x, pads):
        return self.o(self.e(x, src_key_padding_mask=pads))


class OfItsOwn(nn.TransformerEncoder):
    """A user's class."""


def marked(model):
    x, pads = torch.randn(8, 5, 8), torch.zeros(8, 5, dtype=torch.bool)
    pads[::2, 3:] = True
    return {"x": x, **({"pads": pads} if isinstance(model, ByPads) else {"attention_mask": (~pads).long()})}, pads


STEPS = {
    "as_attention": Step(("e.layers.1.self_attn",), "as_attention"),
    "svd": Step(("e.layers.1.linear1",), "svd", {"rank": 4}),
}


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("kind", [ByMask, ByPads])
def test_what_the_fused_path_gives_at_padded_positions_stays(kind, step):
    torch.manual_seed(0)
    model = kind(norm=nn.LayerNorm(8)).eval()
    nn.init.normal_(model.e.norm.bias)  # zeros go through the norm
    example, pads = marked(model)
    net = taut.trace(model, example)
    small = taut.apply(model, Plan.of(net, [STEPS[step]]), taut.observe(net, model, [example]))
    with torch.no_grad():
        before, after = model(**example), small(**example)
    torch.testing.assert_close(after[pads], before[pads])
    assert type(small.e) is taut.nn.FilledEncoder
    if step == "as_attention":
        torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", [ByMask, ByPads])
def test_layers_of_encoders_of_other_classes_stay(kind):
    torch.manual_seed(0)
    model = kind(OfItsOwn).eval()
    example, _ = marked(model)
    net = taut.trace(model, example)
    assert "enable_nested_tensor=False" in net["e.layers.1.linear1"].skip
    assert net["o"].skip is None
    with pytest.raises(CallError, match="enable_nested_tensor=False"):
        taut.apply(model, Plan.of(net, [STEPS["as_attention"]]), taut.observe(net, model, [example]))
