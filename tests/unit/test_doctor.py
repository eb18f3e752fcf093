"""The doctor's lines: ok, or what to do. Its parts are a run's, which other tests start."""

import shutil
import sys
from collections import namedtuple
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace

import pytest

from grpo import doctor
from grpo.doctor import Doctor, examine, read_pins
from grpo.errors import ConfigError

Usage = namedtuple("Usage", "total used free")


@pytest.fixture
def patient(tmp_path):
    with ExitStack() as closing:
        yield Doctor([], tmp_path, closing)


def test_pins_are_read_with_the_files_that_they_name(tmp_path):
    (tmp_path / "all.txt").write_text("# words\n-r some.txt\nray[default]==2.60.0  # why\nplain\n")
    (tmp_path / "some.txt").write_text("torch==2.13.0\n")
    assert dict(read_pins(tmp_path / "all.txt")) == {"torch": "2.13.0", "ray": "2.60.0"}


def test_this_installation_is_the_tested_one(patient):
    assert "packages of requirements_" in patient.installation()


def test_another_version_and_a_missing_package_are_named(patient, tmp_path, monkeypatch):
    monkeypatch.setattr(doctor, "ROOT", tmp_path)
    for name in ("requirements_cpu.txt", "requirements_ifeval.txt"):
        (tmp_path / name).write_text("pytest==0.1\nno-such-package==1.0\n")
    with pytest.raises(ConfigError, match=r"pytest 0.1 \(\d.* is there\), no-such-package 1.0 \(no is there\): make setup"):
        patient.installation()


@pytest.mark.parametrize(
    ("smi", "remedy"), [(None, "--no-deps -r requirements_cpu.txt"), ("", "-r requirements_ifeval.txt")]
)
def test_the_cpus_lock_file_is_installed_as_it_stands(patient, tmp_path, monkeypatch, smi, remedy):
    monkeypatch.setattr(doctor, "ROOT", tmp_path)
    monkeypatch.setattr(shutil, "which", lambda name: smi if smi is None else f"/usr/bin/{name}")
    (tmp_path / remedy.split()[-1]).write_text("no-such-package==1.0\n")
    with pytest.raises(ConfigError, match=rf": make setup, or pip install {remedy}$"):
        patient.installation()


def test_too_little_room_is_said_with_what_to_do(patient, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(0, 0, 64 << 20))
    with pytest.raises(ConfigError, match=r"0.1 GiB are free here.*hydra.run.dir"):
        patient.disk()
    with pytest.raises(ConfigError, match=r"has 64 MiB free.*--shm-size"):
        patient.shared_memory()


def test_a_gpu_that_pytorch_does_not_see_is_said_with_its_reason(tmp_path, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr(shutil, "which", lambda name: f"/usr/bin/{name}")
    with ExitStack() as closing:
        with pytest.raises(
            ConfigError, match=r"PyTorch is a CPU build: install requirements_ifeval.txt, or type device=cpu"
        ):
            Doctor([], tmp_path, closing).devices()
        monkeypatch.setattr("grpo.devices.cuda_build", lambda: "12.9")
        with pytest.raises(ConfigError, match=r"PyTorch's CUDA 12.9 sees no GPU: a newer driver is needed, or device=cpu"):
            Doctor([], tmp_path, closing).devices()
        assert Doctor(["device=cpu"], tmp_path, closing).devices().startswith("no GPU, ")


def test_a_gpu_without_pythons_headers_is_said_with_the_package_that_has_them(patient, tmp_path, monkeypatch):
    gpu = SimpleNamespace(name="NVIDIA H100", total_memory=80 << 30)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.setattr("torch.cuda.get_device_properties", lambda index: gpu)
    monkeypatch.setattr("sysconfig.get_path", lambda name: str(tmp_path))
    with pytest.raises(ConfigError, match=rf"headers, which are not there: install python3.{sys.version_info.minor}-dev"):
        patient.devices()
    (tmp_path / "Python.h").touch()
    assert patient.devices() == "NVIDIA H100 with 80 GiB, NVIDIA H100 with 80 GiB"


def test_each_check_is_a_line_and_what_needs_a_part_that_is_not_there_is_left_out(monkeypatch, capsys):
    def fails(kind: type) -> doctor.Check:
        def check() -> str:
            raise kind("of two\nlines")

        return check

    checks = [("one", lambda: "well"), ("two", fails(ConfigError)), ("Ray", fails(OSError)), ("engine", fails(ConfigError))]
    monkeypatch.setattr(Doctor, "checks", lambda self: iter(checks))
    assert examine([]) == 2
    assert capsys.readouterr().out.splitlines() == [
        "ok     one: well",
        "FAILED two: of two lines",
        "FAILED Ray: OSError: of two lines",
    ]


def test_the_model_that_is_tried_loads(tmp_path):
    from transformers import AutoModelForCausalLM

    doctor.make_model(str(tmp_path))
    assert AutoModelForCausalLM.from_pretrained(tmp_path).config.hidden_size == 128
    assert Path(tmp_path / "tokenizer_config.json").is_file()
