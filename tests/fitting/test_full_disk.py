"""fit on a disk that is full: an error that says what to do, and the same command goes on to the same end."""

import errno
import itertools
import sys
import warnings

import pytest
from safetensors.torch import load_file

import rescom_timm
from rescom_timm.engine.errors import ADVICE, FAILURES
from rescom_timm.errors import code_of
from rescom_timm.fitting import plan, training
from rescom_timm.fitting.plan import Training
from tests.faults.refusal import refused
from tests.fitting.made_up import NET, photographs

if not sys.platform.startswith("linux"):
    pytest.skip("these disks are Linux's", allow_module_level=True)

HOW = {"minutes": 100, "backbone": NET, "weights_file": "none", "size": 16, "device": "cpu"}


@pytest.mark.parametrize(("trains", "step"), [(False, 12), pytest.param(True, 7, marks=pytest.mark.slow)])
def test_a_full_disk_loses_nothing(tmp_path, monkeypatch, alone, trains, step):
    """A write is refused, then one of those that follow it, and so on to the end."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(plan, "trainings", lambda *_: [Training("linear", 1)] * trains)
    monkeypatch.setattr(training, "FALL", 100.0)
    photos = photographs(tmp_path / "photos", [8, 6])
    whole = rescom_timm.fit(photos, **HOW, output=tmp_path / "whole")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "run/cache"))
    errors = []
    for at in itertools.count(1, step):
        try:
            with refused(tmp_path / "run", at, errno.ENOSPC) as refusal, warnings.catch_warnings():
                warnings.filterwarnings("ignore", "features are kept in memory")
                run = rescom_timm.fit(photos, **HOW, output=tmp_path / "run")
        except FAILURES as error:
            errors.append(error)
        else:
            if refusal.count < at:
                break
    assert len(errors) > 1 and {code_of(error) for error in errors} <= {"file.failed", "run.export"}
    texts = [str(error).lower() for error in errors]
    assert all(ADVICE[errno.ENOSPC] in text and "same command" in text for text in texts), texts
    one, other = (load_file(each.folder / "fit/chosen.safetensors") for each in (run, whole))
    assert all(one[name].equal(other[name]) for name in other)
    assert (run.folder / "evaluation/test-last.json").is_file()
