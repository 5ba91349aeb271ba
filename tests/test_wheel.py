"""The wheel: it holds native kernels for two levels of x86-64 and takes the one that fits; the core needs no extra."""

import json
import platform
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from seqtrain import errors
from seqtrain.kernels.native import build

ROOT = Path(__file__).parents[1]
linux_x86 = pytest.mark.skipif(
    (sys.platform, platform.machine()) != ("linux", "x86_64"), reason="native kernels are built into wheels of Linux"
)
# Modules that the core is installed without.
EXTRAS = sorted(name for packages in errors.EXTRAS.values() for name in packages)


def build_wheel(folder, **environment):
    """The wheel of a copy of this checkout, built as pip would, with the environment changed."""
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder), str(ROOT)]
    subprocess.run(
        ["env", *(f"{name}={value}" for name, value in environment.items()), *command],
        check=True, capture_output=True, timeout=280,
    )  # fmt: skip
    return next(folder.glob("*.whl"))


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """The folder that the wheel, whose name says its platform, was unpacked into."""
    folder = tmp_path_factory.mktemp("wheel")
    wheel = build_wheel(folder)
    assert wheel.name.endswith("-py3-none-linux_x86_64.whl")
    command = [sys.executable, "-m", "pip", "install", "--no-deps", "--no-index", "--target", str(folder / "site")]
    subprocess.run([*command, str(wheel)], check=True, capture_output=True, timeout=120)
    return folder / "site"


def run(site, code, **environment):
    """What a process prints that has the installed package, no compiler and an empty cache."""
    settings = {"PYTHONPATH": site, "CXX": "no-such-compiler", "XDG_CACHE_HOME": site / "cache", **environment}
    command = ["env", *(f"{name}={value}" for name, value in settings.items()), sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=site)
    assert done.returncode == 0, done.stderr
    return done.stdout


OPERATOR = """
import json, logging, sys, torch
logging.basicConfig(level=logging.INFO, stream=sys.stdout)
from seqtrain.kernels import delta_rule
torch.manual_seed(0)
q, k, v = torch.randn(3, 1, 100, 2, 32).unbind()
out, _ = delta_rule(q, torch.nn.functional.normalize(k, dim=-1), v, torch.rand(1, 100, 2), backend="native")
print(json.dumps(out.flatten()[::97].tolist()))
"""


@pytest.mark.all
@linux_x86
@pytest.mark.skipif(not build._levels(), reason="needs a processor with AVX2")
def test_an_installed_package_takes_the_library_that_fits(installed):
    expected = json.loads(run(installed, OPERATOR.replace("native", "chunked")).splitlines()[-1])
    for environment, level in (({}, build._levels()[0]), ({"ATEN_CPU_CAPABILITY": "avx2"}, "x86-64-v3")):
        *said, found = run(installed, OPERATOR, **environment).splitlines()
        assert any(line.endswith(f"native kernels: the wheel's, for {level}") for line in said)
        assert json.loads(found) == pytest.approx(expected, rel=1e-4, abs=1e-5)


@pytest.mark.all
@linux_x86
def test_the_core_works_without_the_extras(installed):
    code = f"""
import sys
sys.modules.update(dict.fromkeys({EXTRAS}))  # as where they are not installed
import torch, seqtrain.kernels, seqtrain.models, seqtrain.mixers
from seqtrain.kernels import linear_attention
print(linear_attention(*torch.randn(3, 1, 5, 1, 4).unbind())[0].shape)
from seqtrain import cli
sys.exit(cli.run("pretrain", []) != 2)
"""
    assert run(installed, code).splitlines()[0] == "torch.Size([1, 5, 1, 4])"


@pytest.mark.all
@linux_x86
def test_without_a_compiler_the_wheel_is_pure(tmp_path):
    wheel = build_wheel(tmp_path, CXX="no-such-compiler")
    assert wheel.name.endswith("-py3-none-any.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert "seqtrain/kernels/native/recurrence.cpp" in names
    assert not [name for name in names if name.endswith(".so")]


def test_a_missing_extra_is_named(capsys):
    def work():
        raise ModuleNotFoundError("No module named 'ray.train'", name="ray.train")

    assert errors.exit_status(work) == 2
    assert capsys.readouterr().err == "error: ray is not installed: pip install 'seqtrain[train]'\n"
    with pytest.raises(ModuleNotFoundError):
        errors.exit_status(lambda: __import__("no_such_module"))
