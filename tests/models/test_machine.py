"""What is found on a machine is imported and tried: a package that only lies there is not chosen, and the reason is kept."""

import sys
import sysconfig
import types

import pytest

from megatron_ft.models import machine


@pytest.fixture
def package(tmp_path, monkeypatch):
    """Write an importable package of this name and content."""
    monkeypatch.syspath_prepend(str(tmp_path))

    def write(name: str, text: str) -> str:
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text(text)
        monkeypatch.delitem(sys.modules, name, raising=False)
        return name

    return write


def test_packages_are_imported_not_looked_for(package):
    assert machine.try_import(package("whole_package", "x = 1")) is None
    assert machine.try_import("no_such_package_here") == "not installed"
    broken = package("broken_package", "raise OSError('libfoo.so: undefined symbol: _ZN3c10\\nand more')")
    assert machine.try_import(broken) == "installed but cannot be imported (libfoo.so: undefined symbol: _ZN3c10)"
    assert machine.try_import(package("half_package", "import no_such_part_of_it")) == (
        "incomplete: No module named 'no_such_part_of_it'"
    )
    assert machine.try_import("whole_package.optimizers").startswith("incomplete: No module named")


def test_flash_attn_that_imports_has_to_run(monkeypatch):
    """On this machine it would be given CPU tensors, which a stand-in may refuse as a kernel of another GPU does."""
    stub = types.ModuleType("flash_attn")

    def refuses(*_, **__):
        raise RuntimeError("no kernel image is available for execution on the device\nCompile with ...")

    stub.flash_attn_varlen_func = refuses
    monkeypatch.setitem(sys.modules, "flash_attn", stub)
    monkeypatch.setattr(machine.device, "capability", lambda: (9, 0))
    assert machine.try_flash_attn() == (
        "installed but does not run on this GPU (no kernel image is available for execution on the device)"
    )
    stub.flash_attn_varlen_func = lambda query, key, value, *_, **__: query * key * value
    assert machine.try_flash_attn() is None
    monkeypatch.setattr(machine.device, "capability", lambda: (7, 5))
    assert machine.try_flash_attn() == "needs compute capability 8.0, this GPU has 7.5"


def test_compiling_needs_triton_a_compiler_and_headers(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "triton", None)
    assert machine.try_compile().startswith("Triton is ")
    monkeypatch.setitem(sys.modules, "triton", types.ModuleType("triton"))
    monkeypatch.setenv("CC", "no-such-compiler -O2")
    assert "no C compiler" in machine.try_compile()
    monkeypatch.setenv("CC", sys.executable)
    monkeypatch.setattr(sysconfig, "get_paths", lambda: {"include": str(tmp_path)})
    assert "Python.h is missing" in machine.try_compile()
    (tmp_path / "Python.h").touch()
    monkeypatch.setattr("torch.compile", lambda function, **_: lambda x: 1 / 0)
    assert machine.try_compile() == "a first small kernel failed (division by zero)"
    monkeypatch.setattr("torch.compile", lambda function, **_: function)
    assert machine.try_compile() is None


def test_a_machine_without_a_gpu_tries_nothing():
    assert machine.machine() == machine.Machine() and machine.glance() == machine.Machine()
