"""The zoo of small nets: each runs forward and backward, and so it does after filter pruning."""

import sys
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import nn

import taut
from cases import untouched
from structure.silencing import halves, narrow, silenced
from taut import Plan
from taut.core.example import Example
from taut.core.modes import quiet
from taut.core.tensors import map_tensors, tensors
from taut.errors import ModelError
from taut.methods.channels.verification import failing
from taut.planning.application import apply_plan
from taut.structure.channels.groups import coupled
from taut.structure.compacting import PER_CHANNEL, compact
from taut.structure.narrowing import narrowed
from taut.structure.patches import groups_of
from taut.structure.support import SUPPORTED, refusal
from taut.structure.surgery import clone

NETS = Path(__file__).parents[2] / "experiments" / "nets"
LARGEST = 150_000

OUTPUTS = {
    "vgg": [(2, 10)],
    "lenet": [(2, 10)],
    "mlp_batchnorm": [(2, 5)],
    "all_conv": [(2, 10)],
    "alexnet": [(2, 10)],
    "maxout": [(2, 10)],
    "no_affine": [(2, 6)],
    "weight_norm": [(2, 10)],
    "frozen": [(2, 5)],
    "blurpool": [(2, 8)],
    "video": [(2, 6)],
    "resnet_basic": [(2, 10)],
    "resnet_option_a": [(2, 10)],
    "resnet_bottleneck": [(2, 10)],
    "resnext": [(2, 10)],
    "se_resnet": [(2, 10)],
    "preact_resnet": [(2, 10)],
    "cbam": [(2, 10)],
    "convnext": [(2, 10)],
    "stochastic_depth": [(2, 10)],
    "mobilenet_v1": [(2, 10)],
    "mobilenet_v2": [(2, 10)],
    "mobilenet_v3": [(2, 10)],
    "shufflenet_v1": [(2, 10)],
    "shufflenet_v2": [(2, 10)],
    "squeezenet": [(2, 10)],
    "ghostnet": [(2, 10)],
    "densenet": [(2, 10)],
    "googlenet": [(2, 10)],
    "csp_detector": [(2, 2, 8, 8, 8)],
    "highway": [(2, 4)],
    "selective_kernel": [(2, 10)],
    "data_branch": [(2, 10)],
    "two_inputs": [(2,), (2, 4)],
    "dict_answering": [(2, 12), (2, 1, 4, 4)],
    "siamese": [(2, 1)],
    "bilinear_pooling": [(2, 10)],
    "cosine_head": [(2, 10)],
    "unet_transposed": [(2, 2, 16, 16)],
    "unet_groupnorm": [(2, 3, 16, 16)],
    "attention_gate": [(2, 1, 16, 16)],
    "fcn_dilated": [(2, 5, 32, 32)],
    "super_resolution": [(2, 3, 32, 32)],
    "gan_generator": [(2, 3, 16, 16)],
    "autoencoder": [(2, 1, 16, 16)],
    "vae": [(2, 64), (2, 8), (2, 8)],
    "fpn": [(2, 6, 16, 16), (2, 6, 8, 8), (2, 6, 4, 4)],
    "style_transfer": [(2, 3, 16, 16)],
    "audio": [(2, 12)],
    "wavenet": [(2, 16, 64)],
    "gated_convs": [(2, 8)],
    "lstm_text": [(2, 4)],
    "crnn": [(2, 16, 11)],
    "conv_lstm": [(2,)],
    "transformer_text": [(2, 4)],
    "vit": [(2, 10)],
    "tied_gpt": [(2, 10, 48)],
    "tied_lstm": [(2, 10, 48)],
    "mlp_mixer": [(2, 10)],
    "spatial_attention": [(2, 1)],
}

UNREACHED = {"data_branch": "dark.", "frozen": "0.", "googlenet": "aux.", "wavenet": "blocks.2.residual."}
"""Parameters that get no gradient: of a branch not taken, frozen, used in training only, of a result not used."""

NOTHING_GOES = {
    "weight_norm": "fixed width in 'addmm'",
    "gated_convs": "'convolution' mixes these channels",
    "tied_lstm": "'decoder' shares a parameter with another layer",
}
"""Nets that filter pruning leaves as they are, and why."""

BY_NUMBERS = {"maxout"}
"""Nets of which something goes only where whole numbers that their modules hold become smaller, too."""

NOTHING_DIES = {"weight_norm", "gan_generator", "gated_convs", "tied_lstm"}
"""Nets that keep all their dead units: no groups, or transposed convolutions alone."""

WRITTEN_INTO_CODE = {
    "lenet": {"conv2"},
    "maxout": {"conv1", "conv2"},
    "selective_kernel": {"stages.0.convs.0.0"},
    "gan_generator": {"fc"},
    "autoencoder": {"1.0"},
    "vit": {"blocks.0.attn.qkv", "blocks.1.attn.qkv"},
    "tied_gpt": {"blocks.0.c_attn", "blocks.1.c_attn"},
}
"""Groups of channels whose number stands in the code: the trial finds them."""

each = pytest.mark.parametrize("name", OUTPUTS)


@pytest.fixture(scope="module")
def zoo():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(NETS))
        import zoo  # noqa: PLC0415 - a script's neighbour, found through the line above

        yield zoo
    for module in [name for name in sys.modules if name.partition(".")[0] == "zoo"]:
        del sys.modules[module]


def backward(zoo, net, example):
    """Gradients of the sum of squares of all outputs."""
    sum(t.square().sum() for t in tensors(zoo.call(net, example))).backward()
    return {name: p.grad for name, p in net.named_parameters()}


def test_every_net_is_declared_here(zoo):
    assert list(zoo.ZOO) == list(zoo.ENDS) == list(OUTPUTS)
    assert len(OUTPUTS) >= 28


@each
def test_forward_and_backward(zoo, name):
    net, example = zoo.ZOO[name]()
    assert not any(module.training for module in net.modules())
    assert sum(p.numel() for p in net.parameters()) <= LARGEST
    outputs = tensors(zoo.call(net, example))
    assert [tuple(t.shape) for t in outputs] == OUTPUTS[name]
    assert all(t.isfinite().all() and t.std() > 0 for t in outputs)
    assert_reached(net, backward(zoo, net, example), name)


def assert_reached(net, gradients, name):
    """All parameters have gradients but those that are told above."""
    start = UNREACHED.get(name)
    missed = [key for key, gradient in gradients.items() if gradient is None]
    assert missed == [key for key, _ in net.named_parameters() if start is not None and key.startswith(start)]


@each
def test_a_sample_alone_gives_what_it_gives_in_a_batch(zoo, name):
    net, example = zoo.ZOO[name]()
    net.double()
    example = map_tensors(lambda t: t.double() if t.is_floating_point() else t, example)
    with torch.no_grad():
        whole = tensors(zoo.call(net, example))
        alone = tensors(zoo.call(net, map_tensors(lambda t: t[:1], example)))
    for one, two in zip(alone, whole, strict=True):
        torch.testing.assert_close(one, two[:1], rtol=1e-10, atol=1e-12)


@each
def test_the_same_net_every_time_with_norms_that_do_something(zoo, name):
    before = torch.get_rng_state()
    (first, x), (second, y) = zoo.ZOO[name](), zoo.ZOO[name]()
    assert torch.equal(before, torch.get_rng_state())
    assert all(torch.equal(a, b) for a, b in zip(tensors(x), tensors(y), strict=True))
    assert all(
        torch.equal(a, b) for a, b in zip(first.state_dict().values(), second.state_dict().values(), strict=True)
    )
    for norm in first.modules():
        if isinstance(norm, nn.modules.batchnorm._BatchNorm):
            assert norm.running_mean.abs().max() > 1e-3
            assert (norm.running_var - 1).abs().max() > 1e-2
            assert norm.weight is None or (norm.weight - 1).abs().max() > 1e-2


@each
def test_all_other_layers_act_through_the_ends_alone(zoo, name):
    """Weights of zero at the ends leave no gradient elsewhere; the end of cosine_head is a parameter of no layer."""
    net, example = zoo.ZOO[name]()
    ends = zoo.ENDS[name]
    assert bool(ends) is (name != "cosine_head")
    with torch.no_grad():
        for end in ends:
            layer = net.get_submodule(end)
            normed = hasattr(layer, "parametrizations")  # a length of zero, the direction stays
            (layer.parametrizations.weight.original0 if normed else layer.weight).zero_()
    mine = {id(p) for end in ends for p in net.get_submodule(end).parameters()}
    gradients = backward(zoo, net, example)
    others = [gradients[key] for key, p in net.named_parameters() if id(p) not in mine and gradients[key] is not None]
    assert others
    assert all(not gradient.any() for gradient in others) is bool(ends)


# Filter pruning.


@pytest.fixture(scope="module")
def wide(zoo):
    """Every net in float64, how it is called, and its coupled channels; each made once, and left as it is."""

    @cache
    def made(name):
        net, value = zoo.ZOO[name]()
        net, value = net.double(), map_tensors(lambda t: t.double() if t.is_floating_point() else t, value)
        example = Example(net, value)
        with quiet():
            return net, example, coupled(net, example).groups

    return made


@each
def test_a_narrower_net_gives_what_the_silenced_one_gives(wide, name):
    """Every group without half of its channels alone, and all at once; but where code holds their number."""
    net, example, groups = wide(name)
    with quiet():
        *alone, together = halves(groups)
        fixed = dict(failing(net, example, groups, together))
        assert {groups[place].name for place in fixed} == WRITTEN_INTO_CODE.get(name, set())
        assert (len(groups) > len(fixed)) is (name not in {*NOTHING_GOES, *BY_NUMBERS})
        for place in fixed:
            assert not same(net, example, groups, alone[place])
            together[place] = together[place][:0]
        for gone in [gone for place, gone in enumerate([*alone, together]) if place not in fixed]:
            assert same(net, example, groups, gone)


def same(net, example, groups, gone):
    """Whether the narrower net runs, and computes what it should; with norms over channels it only has to run."""
    soft = any(
        isinstance(module := net.get_submodule(member.layer), nn.LayerNorm)
        or (isinstance(module, nn.GroupNorm) and module.num_groups < module.num_channels)
        for group, index in zip(groups, gone, strict=True)
        for member in group.of("through")
        if len(index)
    )
    try:
        found = tensors(example.run(narrow(net, groups, gone)))
    except ModelError:
        return False
    wanted = tensors(example.run(silenced(net, groups, gone)))
    shapes = [t.shape for t in wanted] == [t.shape for t in found]
    return shapes and (soft or all(torch.allclose(a, b, 1e-9, 1e-9) for a, b in zip(found, wanted, strict=True)))


@each
def test_dead_units_are_taken_out_exactly(wide, name):
    """A third of every group is not read, and a sixth not fed."""
    original, example, groups = wide(name)
    net = planted(clone(original), groups)
    names = [key for key, layer in net.named_modules() if cuttable(layer)]
    with quiet():
        cuts = compact(net, example, names)
    drawn = map_tensors(lambda t: torch.randn_like(t) if t.is_floating_point() else t, example.value)
    with torch.no_grad():
        wanted = tensors(example.run(net, drawn))
        present = tensors(example.run(narrowed(net, cuts), drawn))
    assert all(torch.allclose(a, b, 1e-8, 1e-8) for a, b in zip(present, wanted, strict=True))
    assert bool(cuts) is (name not in NOTHING_DIES)


def cuttable(layer):
    plain = isinstance(layer, SUPPORTED) and refusal(layer) is None
    return plain or (type(layer) in PER_CHANNEL and layer.weight is not None)


def planted(net, groups):
    random = torch.Generator().manual_seed(0)
    for group in groups:
        order = torch.randperm(group.size, generator=random)
        unread, unfed, _ = order.tensor_split([group.size // 3, group.size // 2])
        for member in group.of("in", "out"):
            layer = net.get_submodule(member.layer)
            if isinstance(layer, SUPPORTED) and groups_of(layer) == 1:
                weight = layer.weight.data.transpose(0, 1) if member.end == "in" else layer.weight.data
                weight[member.index[unread if member.end == "in" else unfed].flatten()] = 0
    return net


@each
@pytest.mark.filterwarnings("ignore:Layer .* is left as it was:UserWarning")
def test_a_third_of_the_channels_goes_or_it_is_said_why_not(zoo, wide, name):
    net, example = zoo.ZOO[name]()
    traced = taut.trace(net, example)
    step = taut.whole(traced, "channels", sparsity=0.3, criterion="l2")
    with untouched(net):
        small, plan = apply_plan(net, Plan((step,)), taut.observe(traced, net))
    told = {kept.layer: kept.reason for kept in plan.kept}
    assert [tuple(t.shape) for t in tensors(zoo.call(small, example))] == OUTPUTS[name]
    assert_reached(small, backward(zoo, small, example), name)
    if name in NOTHING_GOES:
        assert not plan.steps
        assert all(NOTHING_GOES[name] in told[layer] for layer in step.layers)
        assert [tuple(p.shape) for p in small.parameters()] == [tuple(p.shape) for p in net.parameters()]
        return
    assert sum(p.numel() for p in small.parameters()) < sum(p.numel() for p in net.parameters())
    free = {member.layer for group in wide(name)[2] for member in group.of("out")}
    for layer in step.group.layers:
        gives = layer.kind != "Linear" and not layer.kind.startswith("Conv")
        alone = layer.groups > 1 and len(layer.weight) > 1 and layer.weight[1] == 1
        assert gives or alone or layer.name in free | set(told), layer.name
