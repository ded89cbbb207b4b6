"""Where mamba-ssm's Triton files come from and how they are imported: kernels/upstream.py and scripts.get_kernels."""
import hashlib
import io
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from nanochat.kernels import upstream
from scripts import get_kernels

MODULE = "import einops\nhere = __file__\n"


@pytest.fixture
def no_memory():
    upstream.load.cache_clear()
    yield
    upstream.load.cache_clear()


def sdist(path: Path, monkeypatch, leave_out=(), init="raise RuntimeError('the package itself was imported')\n") -> Path:
    """A source distribution with small modules in the place of mamba-ssm's, whose hash becomes the pinned one."""
    files = dict.fromkeys(upstream.FILES, MODULE) | {"mamba_ssm/__init__.py": init, "setup.py": "never run"}
    with tarfile.open(path, "w:gz") as tar:
        for name, text in files.items():
            if name not in leave_out:
                info = tarfile.TarInfo(f"mamba_ssm-{upstream.VERSION}/{name}")
                info.size = len(text)
                tar.addfile(info, io.BytesIO(text.encode()))
    monkeypatch.setattr(upstream, "SHA256", hashlib.sha256(path.read_bytes()).hexdigest())
    return path


@pytest.fixture
def target(tmp_path, monkeypatch, no_memory):
    monkeypatch.setenv("NANOCHAT_KERNELS", str(tmp_path / "kernels"))
    return tmp_path / "kernels"


def refused(capsys, *argv) -> str:
    with pytest.raises(SystemExit) as e:
        get_kernels.main(list(argv))
    err = capsys.readouterr().err
    assert e.value.code == 2 and err.count("\n") == 1, err
    return err


def test_the_files_are_unpacked_once_and_imported_without_the_package(tmp_path, monkeypatch, target, capsys):
    pytest.importorskip("einops")
    file = sdist(tmp_path / "mamba.tar.gz", monkeypatch)
    get_kernels.main(["--from", str(file)])
    assert "unpacked" in capsys.readouterr().out
    found = {str(p.relative_to(target)) for p in target.rglob("*") if p.is_file() and p.suffix != ".pyc"}
    assert found == set(upstream.FILES) - {"__init__.py"}
    assert upstream.load().ssd_combined.here == str(target / "mamba_ssm/ops/triton/ssd_combined.py")
    assert not [name for name in sys.modules if name.split(".")[0] == "mamba_ssm"]
    file.unlink()
    get_kernels.main([])  # what is there is not fetched again
    assert "already" in capsys.readouterr().out and [p.name for p in tmp_path.iterdir()] == ["kernels"]


def test_another_archive_is_refused_before_it_is_opened(tmp_path, monkeypatch, target, capsys):
    file = sdist(tmp_path / "mamba.tar.gz", monkeypatch)
    with open(file, "ab") as f:
        f.write(b"more")
    assert "its SHA-256 is" in refused(capsys, "--from", str(file)) and not target.exists()
    assert "missing.tar.gz" in refused(capsys, "--from", str(tmp_path / "missing.tar.gz"))


def test_what_fails_in_between_leaves_nothing(tmp_path, monkeypatch, target):
    file = sdist(tmp_path / "mamba.tar.gz", monkeypatch, leave_out=["AUTHORS"])
    with pytest.raises(KeyError):
        get_kernels.unpack(file, target)
    assert list(tmp_path.iterdir()) == [file]


@pytest.mark.parametrize("error, words", [
    ("ERROR: No matching distribution found\n", "(ERROR: No matching distribution found): on a machine with network"),
    ("ModuleNotFoundError: No module named 'setuptools'\n", "run `pip install setuptools wheel packaging` first"),
    ("", "it gave no reason")])
def test_a_download_that_fails_says_why(monkeypatch, target, capsys, error, words):
    def pip(command, **_):
        assert "--require-hashes" in command
        return subprocess.CompletedProcess(command, 1, "", error)
    monkeypatch.setattr(subprocess, "run", pip)
    assert words in refused(capsys)


@pytest.mark.parametrize("text, words", [("import no_such_package\n", "needs the Python package no_such_package"),
                                         ("import no.such.package\n", "needs the Python package no"),
                                         ("1 / 0\n", "cannot be imported (ZeroDivisionError: division by zero)")])
def test_files_that_cannot_be_imported_are_named(tmp_path, monkeypatch, target, text, words):
    pytest.importorskip("einops")
    get_kernels.main(["--from", str(sdist(tmp_path / "mamba.tar.gz", monkeypatch))])
    (target / "mamba_ssm/ops/triton/ssd_combined.py").write_text(text)
    upstream.load.cache_clear()
    with pytest.raises(ImportError) as e:
        upstream.load()
    assert words in str(e.value) and str(target) in str(e.value)


def test_an_installed_package_of_another_version(tmp_path, monkeypatch, no_memory):
    """A new one is used before ours; one from before the functions that we call is not, and that is said."""
    monkeypatch.delenv("NANOCHAT_KERNELS", raising=False)
    monkeypatch.setattr(upstream, "folder", lambda: tmp_path / "none")
    package = tmp_path / "site/mamba_ssm"
    package.mkdir(parents=True)
    monkeypatch.syspath_prepend(str(package.parent))
    (package / "__init__.py").write_text("__version__ = '2.4.1'\n")
    assert upstream.locate() == (package, "2.4.1")
    (package / "__init__.py").write_text("__version__ = '2.1.0'\n")
    with pytest.raises(ImportError, match=r"installed mamba_ssm 2\.1\.0 is older than 2\.2\.2"):
        upstream.locate()
