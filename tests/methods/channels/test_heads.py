"""Whole heads go where code takes their number from attributes: what changes, what it computes, how it is kept."""

import copy
import json
from dataclasses import replace

import pytest
import torch
from torch import nn

import taut
from cases import run, untouched
from methods.channels import heads
from methods.channels.heads import batches, draw, net
from structure.silencing import narrow, silenced
from taut import CallError, Plan
from taut.artifact.checkpoint import load_plan
from taut.core.example import Example
from taut.core.tensors import all_tensors
from taut.errors import ArtifactError
from taut.methods.channels.channels import Channels
from taut.methods.channels.heads import with_heads
from taut.planning.application import apply_plan
from taut.structure.channels.cuts import numbers_of
from taut.structure.channels.groups import coupled
from taut.structure.surgery import renumber
from taut.types.gone import without_gone

CHANGES = {
    heads.Timm: {"num_heads": 1, "attn_dim": 8},
    heads.HeadsFirst: {"num_heads": 1},
    heads.Whisper: {"num_heads": 1},
    heads.Opt: {"num_heads": 1},
    heads.Unnamed: {"n": 1},
    heads.Flattened: {"num_heads": 1, "embed_dim": 6},
    heads.Parts: {"num_heads": 1, "split_size": 6},
    heads.Grouped: {"num_heads": 2, "num_kv_heads": 1},
    heads.Used: {"num_heads": 1},
}
STAYING = [heads.Literal, heads.OfInputs, heads.Scaled, heads.Narrowing]


def of_heads(model, example):
    return [group for group in with_heads(model, example).groups if group.numbers]


def compressed(kind, **settings):
    model = net(kind)
    found = taut.compress(
        model, draw(), budget={"macs": 0.5}, data=batches(), methods=["channels"], compare=False, progress=False
    )
    return model, found


def planned(model, x, data=None, **settings):
    traced = taut.trace(model, x)
    return Plan.of(traced, [taut.whole(traced, "channels", **settings)]), taut.observe(traced, model, data)


def numbers(model):
    names = {*heads.Attention().__dict__, "n", "d", "split_size", "num_kv_heads"}
    return [{k: v for k, v in vars(one).items() if k in names and type(v) is int} for one in model.attn]


@pytest.mark.parametrize("kind", CHANGES)
def test_whole_heads_go_with_the_numbers_that_count_them_and_no_others(kind):
    model, x = net(kind), draw()
    example = Example(model, x)
    with untouched(model):
        found = of_heads(model, example)
    assert len(found) == 2
    for place, group in enumerate(found):
        assert {n.attribute: n.step for n in group.numbers} == CHANGES[kind]
        assert {n.module for n in group.numbers} == {f"attn.{place}"}
        assert all(member.index.shape[1] % model.attn[0].proj.in_features for member in group.of("in"))
    gone = [torch.tensor([1]), torch.tensor([0])]
    small = narrow(model, found, gone)
    renumber(small, numbers_of(found, gone, model))
    torch.testing.assert_close(small(x), silenced(model, found, gone)(x), rtol=1e-5, atol=1e-6)
    before, after = numbers(model)[0], numbers(small)[0]
    assert {key: before[key] - after[key] for key in before if before[key] != after[key]} == CHANGES[kind]


@pytest.mark.parametrize("kind", STAYING)
def test_other_code_stays_as_it_was(kind):
    model = net(kind)
    example = Example(model, draw())
    before, after = coupled(model, example), with_heads(model, example)
    assert [(g.name, g.size, g.numbers) for g in after.groups] == [(g.name, g.size, ()) for g in before.groups]
    assert after.stays == before.stays


def test_numbers_in_the_code_are_a_reason_to_stay():
    model = net(heads.Literal)
    plan, stats = planned(model, draw(), sparsity=0.5, even=True)
    small, done = apply_plan(model, plan, stats, None)
    reasons = {kept.layer: kept.reason for kept in done.kept}
    assert "the narrower network does not run" in reasons["attn.0.v_proj"]
    assert numbers(small) == numbers(model)
    assert done.steps[0].settings["heads"] is None


@pytest.mark.parametrize("zero", ["weight", "both"])
def test_what_gives_nothing_yet_does_not_hide_a_wrong_number(zero):
    """Eight positions of three heads can be read as six of four: what arrives behind them says that this is wrong."""
    model = net(heads.Unnamed)
    for attention in model.attn:
        nn.init.zeros_(attention.proj.weight)
        if zero == "both":
            nn.init.zeros_(attention.proj.bias)
    for group in of_heads(model, Example(model, draw())):
        assert {n.attribute for n in group.numbers} == {"n"}


@pytest.mark.parametrize("kind", [heads.Timm, heads.Whisper, heads.Opt, heads.Grouped])
def test_compress_takes_heads_saves_and_loads_them_bit_by_bit(kind, tmp_path):
    model, found = compressed(kind)
    settings = found.plan.steps[0].settings
    changed = {key: pair for key, pair in settings["heads"].items() if pair[0] != pair[1]}
    assert changed
    assert {key.rpartition(".")[2] for key in changed} == set(CHANGES[kind])
    assert next(f"{key} {old} -> {new}" for key, (old, new) in changed.items()) in str(found.plan)
    assert numbers(model) == numbers(net(kind))
    assert json.loads(json.dumps(settings)) == settings
    taut.save(found.model, found.plan, tmp_path / "small")
    again = taut.load(tmp_path / "small", base=lambda: net(kind))
    assert numbers(again) == numbers(found.model) != numbers(model)
    assert torch.equal(again(draw()), found.model(draw()))
    assert torch.equal(copy.deepcopy(found.model)(draw()), found.model(draw()))


def test_a_base_with_other_heads_does_not_fit(tmp_path):
    _, found = compressed(heads.Opt)
    taut.save(found.model, found.plan, tmp_path / "small")

    def other():
        model = net(heads.Opt)
        for attention in model.attn:
            attention.num_heads, attention.head_dim = 2, 12
        return model

    with pytest.raises(ArtifactError, match=r"'attn\.\d\.num_heads' of the model is 2, and not 4"):
        taut.load(tmp_path / "small", base=other)


def test_a_saved_plan_is_replayed(tmp_path):
    model, found = compressed(heads.Timm)
    taut.save(found.model, found.plan, tmp_path / "small")
    plan = load_plan(tmp_path / "small")
    assert Plan.from_json(plan.to_json()) == plan
    traced = taut.trace(model, draw())
    stats = taut.observe(traced, model, batches())
    with untouched(model):
        again, done = apply_plan(model, plan, stats, batches())
    assert done.steps[0].settings == found.plan.steps[0].settings
    assert numbers(again) == numbers(found.model)
    torch.testing.assert_close(again(draw()), found.model(draw()), rtol=1e-4, atol=1e-5)


def test_counts_of_a_plan_may_be_edited(tmp_path):
    model = net(heads.Timm)
    plan, stats = planned(model, draw(), sparsity=0.3, even=True)
    _, done = apply_plan(model, plan, stats, None)
    step = done.steps[0]
    assert step.settings["heads"]["attn.0.num_heads"] == [3, 2]
    assert step.settings["counts"][1] == 2
    edited = replace(step, settings={**step.settings, "counts": [24, 1, 3, 32]})
    plan = replace(done, steps=(edited,))
    small = taut.apply(model, plan, stats)
    assert [one.num_heads for one in small.attn] == [1, 3]
    taut.save(small, plan, tmp_path / "small")
    again = taut.load(tmp_path / "small", base=lambda: net(heads.Timm))
    assert numbers(again) == numbers(small)
    assert torch.equal(again(draw()), small(draw()))


def test_another_plan_does_not_tell_how_many_heads_there_are(tmp_path):
    model = net(heads.Opt)
    plan, stats = planned(model, draw(), sparsity=0.5, even=True)
    other, _ = planned(model, draw(), sparsity=0.4, even=True)
    small = taut.apply(model, plan, stats)
    with pytest.raises(CallError, match=r"How many heads 'attn\.0' has is told by the plan that made it"):
        taut.save(small, other, tmp_path / "other")
    taut.save(small, plan, tmp_path / "small")
    assert torch.equal(taut.load(tmp_path / "small", base=lambda: net(heads.Opt))(draw()), small(draw()))


def test_other_paths_through_the_code_count():
    """Long inputs take a branch in which the number is used otherwise, and which the example does not take."""

    class Branching(heads.Opt):
        def forward(self, x):
            given = super().forward(x)
            return given if x.shape[1] == 8 else given * self.num_heads

    model = net(Branching)
    long = torch.randn(2, 12, 5, generator=torch.Generator().manual_seed(0))
    example = Example(model, draw())
    assert of_heads(model, example)
    example.paths = (draw(), long)
    assert not of_heads(model, example)


def test_a_plan_from_before_does_what_it_did():
    """Its counts are of the groups as they were, without whole heads."""
    model = net(heads.Opt)
    sizes = [group.size for group in coupled(model, Example(model, draw())).groups]
    plan, stats = planned(model, draw(), counts=[*sizes[:-1], 16])
    small, done = apply_plan(model, plan, stats, None)
    assert small.fc1.out_features == 16
    assert numbers(small) == numbers(model)
    assert done.steps[0].settings["heads"] is None


def test_only_heads_that_are_named_go():
    model = net(heads.Opt)
    plan, stats = planned(model, draw(), sparsity=0.5, even=True, heads={"attn.1.num_heads": [4, 4]})
    small, done = apply_plan(model, plan, stats, None)
    assert [one.num_heads for one in small.attn] == [4, 2]
    assert done.steps[0].settings["heads"] == {"attn.1.num_heads": [4, 2]}


@pytest.mark.parametrize("wrong", [{"a.b": [3]}, {"a.b": [2, 3]}, {"a.b": [2, 0]}, {"a.b": 2}, ["a.b"], {}])
def test_settings_that_mean_nothing_are_call_errors(wrong):
    with pytest.raises(CallError, match="'heads' of channels must be two whole numbers"):
        Channels(macs=0.5, heads=wrong)


def test_twice_and_with_other_steps_behind_it(tmp_path):
    model = net(heads.Timm)
    traced = taut.trace(model, draw())
    step = taut.whole(traced, "channels", sparsity=0.3, even=True)
    plan = Plan.of(traced, [step, step, taut.Step(("head",), "svd", {"rank": 1})])
    small, done = apply_plan(model, plan, taut.observe(traced, model, batches()), batches())
    first, second = (one.settings["heads"] for one in done.steps[:2])
    assert first["attn.0.num_heads"] == [3, 2]
    assert second["attn.0.num_heads"] == [2, 1]
    taut.save(small, done, tmp_path / "small")
    again = taut.load(tmp_path / "small", base=lambda: net(heads.Timm))
    assert torch.equal(again(draw()), small(draw()))


def test_what_is_rolled_back_has_its_heads_again(monkeypatch):
    def departs(_outputs, _most, model, _exact=None):
        return None if model.attn[0].num_heads == 4 else "it is another one"

    model = net(heads.Opt)
    plan, stats = planned(model, draw(), sparsity=0.5, even=True)
    monkeypatch.setattr("taut.planning.execution.departs", departs)
    with pytest.warns(UserWarning, match="rolled back: it is another one"):
        small, done = apply_plan(model, plan, stats, None)
    assert not done.steps
    assert numbers(small) == numbers(model)
    assert torch.equal(small(draw()), model(draw()))


def test_what_went_with_a_block_is_not_renumbered():
    model = net(heads.Opt)
    plan, _ = planned(model, draw(), heads={"attn.0.num_heads": [4, 2], "attn.1.num_heads": [4, 3], "x": [2, 2]})
    left = without_gone(plan.steps[0], ["attn.0"])
    assert isinstance(left, taut.Step)
    assert left.settings["heads"] == {"attn.1.num_heads": [4, 3], "x": [2, 2]}
    plan, _ = planned(model, draw(), heads={"attn.0.num_heads": [4, 2]})
    assert without_gone(plan.steps[0], ["attn.0"]).settings["heads"] is None


def test_training_goes_on_with_fewer_heads(tmp_path):
    model = net(heads.Timm)
    labelled = [(x, torch.randint(4, (len(x),))) for x in batches()]
    plan, stats = planned(model, draw(), labelled, macs=0.5)
    with untouched(model):
        small = taut.finetune(
            model, plan, stats, labelled, labelled[:1], schedule=(taut.Stage((0,), epochs=1),), progress=False
        )
    assert numbers(small) != numbers(model)
    taut.save(small, plan, tmp_path / "small")
    again = taut.load(tmp_path / "small", base=lambda: net(heads.Timm))
    assert torch.equal(again(draw()), small(draw()))


@pytest.mark.parametrize("kind", [heads.Timm, heads.Opt])
def test_exported_with_parity(kind, tmp_path):
    pytest.importorskip("onnxruntime")
    _, found = compressed(kind)
    done = taut.export(found.model, draw(), tmp_path / "model.onnx")
    assert all(parity.holds for parity in done.parity)


def test_inspection_says_that_heads_may_go():
    found = taut.inspect(net(heads.Opt), draw())
    reach = {one.layer.name: one for one in found.layers}
    assert all(reach[f"attn.0.{name}_proj"].outputs == (24, 24) for name in "qkv")
    assert reach["attn.0.proj"].inputs == (24, 24)


def whisper(transformers):
    config = transformers.WhisperConfig(
        vocab_size=60,
        num_mel_bins=8,
        d_model=32,
        encoder_layers=1,
        decoder_layers=2,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=48,
        decoder_ffn_dim=48,
        max_source_positions=16,
        max_target_positions=24,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=1,
    )
    model = transformers.WhisperForConditionalGeneration(config).eval()
    features = torch.randn(4, 8, 32, generator=torch.Generator().manual_seed(0))
    ids = torch.randint(3, 60, (4, 6), generator=torch.Generator().manual_seed(1))
    return model, {"input_features": features, "decoder_input_ids": ids}, {"input_features": features}


def opt(transformers):
    config = transformers.OPTConfig(
        vocab_size=60,
        hidden_size=32,
        word_embed_proj_dim=32,
        ffn_dim=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=32,
        pad_token_id=0,
    )
    words = {"input_ids": torch.randint(3, 60, (4, 6), generator=torch.Generator().manual_seed(0))}
    return transformers.OPTForCausalLM(config).eval(), words, words


@pytest.mark.parametrize("make", [whisper, opt])
def test_transformers_with_numbers_of_heads(make, tmp_path):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    model, x, prompt = make(transformers)
    example = Example(model, x)
    found = of_heads(model, example)
    assert len(found) == {"whisper": 5, "opt": 2}[make.__name__]
    assert {n.attribute for group in found for n in group.numbers} == {"num_heads"}
    gone = [torch.tensor([1, 2]) for _ in found]
    small = narrow(model, found, gone)
    renumber(small, numbers_of(found, gone, model))
    wide = silenced(model, found, gone)
    for one, other in zip(all_tensors(run(small, x)), all_tensors(run(wide, x)), strict=False):
        if one.shape == other.shape:  # a cache is as wide as its heads
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    settings = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    told = [one.generate(**prompt, use_cache=c, **settings) for one in (small, wide) for c in (True, False)]
    assert all(torch.equal(told[0], other) for other in told)

    result = taut.compress(
        model, x, budget={"params": 0.8}, data=[x], methods=["channels"], output="logits", compare=False, progress=False
    )
    changed = {key: pair for key, pair in result.plan.steps[0].settings["heads"].items() if pair[0] != pair[1]}
    assert changed
    assert model.config == result.model.config
    taut.save(result.model, result.plan, tmp_path / "small")
    again = taut.load(tmp_path / "small", base=model)
    made = [one.generate(**prompt, use_cache=c, **settings) for one in (result.model, again) for c in (True, False)]
    assert all(torch.equal(made[0], other) for other in made)


def test_a_search_tries_heads_once(monkeypatch):
    looked = []

    def counted(*args):
        looked.append(args)
        return with_heads(*args)

    monkeypatch.setattr("taut.methods.channels.sight.with_heads", counted)
    _, found = compressed(heads.Opt)
    assert found.plan.steps[0].settings["heads"]
    assert len(looked) == 1
