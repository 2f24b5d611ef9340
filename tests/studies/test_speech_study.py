"""The speaker study's own arithmetic: mel bands, partials, equal error rates, parts that share no voice."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch

HERE = Path(__file__).parents[2] / "experiments" / "resemblyzer"


def script(name):
    spec = importlib.util.spec_from_file_location(f"{name}_of_study", HERE / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


speech, speakers = script("speech"), script("speakers")


def test_a_tone_is_loudest_in_the_band_around_its_pitch():
    tone = np.sin(2 * np.pi * 1000 * np.arange(speech.RATE) / speech.RATE)
    bands = speech.spectrogram(tone)[10:-10].mean(0)
    filters = speech.mel_filters()
    assert filters[int(bands.argmax())].argmax() * speech.RATE / speech.WINDOW == pytest.approx(1000, abs=60)


def test_mel_bands_are_triangles_of_one_area_that_leave_no_gap():
    filters = speech.mel_filters()
    widths = filters.sum(1) * speech.RATE / speech.WINDOW
    assert filters.shape == (40, 201)
    assert widths[20:] == pytest.approx(np.ones(20), rel=0.05)  # wide against the bins of 40 Hz
    assert bool((filters[:, 4:-4].sum(0) > 0).all())


@pytest.mark.parametrize(("frames", "count"), [(50, 1), (160, 1), (196, 1), (197, 2), (274, 3)])
def test_partials_begin_every_77_frames_while_three_quarters_are_speech(frames, count):
    found = speakers.partials(torch.arange(1.0, frames + 1)[:, None].expand(-1, 40))
    assert found.shape == (count, 160, 40)
    assert found[:, 0, 0].tolist() == [1 + 77 * place for place in range(count)]
    assert float(found[-1].max()) == min(frames, 160 + 77 * (count - 1))


def test_equal_error_rates_of_known_scores():
    cosines = np.array([0.9, 0.8, 0.3, 0.7, 0.2, 0.1])
    same = np.array([True, True, True, False, False, False])
    assert speech.equal_error_rate(cosines, same) == pytest.approx(1 / 3)
    assert speech.equal_error_rate(cosines, cosines > 0.5) == 0


def test_no_voice_is_in_two_parts():
    parts = [set(speech.voices(part)) for part in ("measured", "calibration", "validation")]
    assert len(parts[0]) >= 40
    assert sum(map(len, parts)) == len(set.union(*parts)) == len(speech.VARIANTS)


def test_no_voice_is_in_what_trains_and_in_what_is_measured():
    variants = {part: {name.partition("+")[2] for name in speech.voices(part)} for part in ("measured", "validation")}
    training = speech.voices("training")
    assert len(training) == len(set(training)) == len(speech.LANGUAGES) * len(speech.voices("calibration"))
    assert not {name.partition("+")[2] for name in training} & set.union(*variants.values())
