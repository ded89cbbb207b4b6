"""
Finds and imports the Triton kernels of the mamba-ssm package, without building or importing that package as a whole.

Its state space scan, one-token state update and gated norm are Python files that Triton compiles on the GPU node itself.
Everything else in the package (compiled extensions, other models, their dependencies) is not needed here, and is where its
installation fails. So `python -m scripts.get_kernels` unpacks those few files of one pinned source distribution, and this
module imports them below a bare package object, so that mamba-ssm's own __init__ never runs.

Where the files are looked for, in this order:
1. the folder that the environment variable NANOCHAT_KERNELS names, if it is set;
2. an installed mamba_ssm package, of OLDEST or later;
3. `vendor/` at the root of a source checkout (git ignores it), or `kernels/` in NANOCHAT_BASE_DIR if nanochat is installed
   as a package. This is one folder: copied with the source tree to another machine, it works there.
"""
import functools
import importlib
import importlib.util
import os
import re
import sys
import types
from pathlib import Path

from nanochat.common import get_base_dir

VERSION = "2.3.2.post1"  # the pinned one, which the tests prove
SHA256 = "104cc47e9101e5401a675fa2b784f2952b9b037f3b1dd83b5ac544394e95d028"  # of its source distribution
OLDEST = (2, 2, 2)
COMMAND = "python -m scripts.get_kernels"

# What we call, and what these import.
CALLED = ("ssd_combined", "selective_state_update", "layernorm_gated")
FILES = (*(f"mamba_ssm/ops/triton/{name}.py" for name in (
    "__init__", *CALLED, "k_activations", "softplus", "ssd_bmm", "ssd_chunk_scan", "ssd_chunk_state",
    "ssd_state_passing")), "mamba_ssm/ops/__init__.py", "mamba_ssm/utils/__init__.py", "mamba_ssm/utils/determinism.py",
    "mamba_ssm/utils/torch.py", "LICENSE", "AUTHORS")


def folder() -> Path:
    """The folder that get_kernels writes to: it holds the pinned version's `mamba_ssm/` and its license."""
    if named := os.environ.get("NANOCHAT_KERNELS"):
        return Path(named).expanduser()
    root = Path(__file__).resolve().parents[2]
    parent = root / "vendor" if (root / "pyproject.toml").is_file() else get_base_dir() / "kernels"
    return parent / f"mamba_ssm-{VERSION}"


def _installed() -> Path | None:
    """The folder of an installed mamba_ssm package, found without importing it."""
    try:
        spec = importlib.util.find_spec("mamba_ssm")
    except ValueError:  # something made by hand is in sys.modules under this name: it has no files
        return None
    if spec is None or not spec.submodule_search_locations:
        return None
    return Path(next(iter(spec.submodule_search_locations)))


def _version(package: Path) -> str:
    """The __version__ in a package's __init__.py, read without running it; 0 if there is none."""
    init = package / "__init__.py"
    found = re.search(r"__version__\s*=\s*[\"']([^\"']+)", init.read_text()) if init.is_file() else None
    return found[1] if found else "0"


def locate() -> tuple[Path, str]:
    """
    (folder of the mamba_ssm package whose Triton files are used, its version).
    Raises ImportError, with the command that helps, where there is none.
    """
    ours, package = folder() / "mamba_ssm", _installed()
    note = ""
    if package is not None and not os.environ.get("NANOCHAT_KERNELS"):
        version = _version(package)
        if tuple(map(int, re.findall(r"\d+", version)[:3])) >= OLDEST:
            return package, version
        note = f"; the installed mamba_ssm {version} is older than {'.'.join(map(str, OLDEST))} and is not used"
    if not (ours / "ops/triton/ssd_combined.py").is_file():
        raise ImportError(f"mamba-ssm's Triton files are not in {ours.parent}{note}: run `{COMMAND}`")
    return ours, VERSION


@functools.cache
def load() -> types.SimpleNamespace:
    """
    The modules of mamba-ssm that are called: attributes ssd_combined, selective_state_update, layernorm_gated.
    Raises ImportError that says what failed to import, and the remedy.
    """
    package, version = locate()
    names = [f"mamba_ssm.ops.triton.{name}" for name in CALLED]
    try:
        with _bare_package("mamba_ssm", package):
            return types.SimpleNamespace(**{name.rsplit(".", 1)[1]: importlib.import_module(name) for name in names})
    except ModuleNotFoundError as e:
        raise ImportError(f"mamba-ssm {version} in {package} needs the Python package {e.name}, which is not here: "
                          "run `pip install triton einops packaging`") from e
    except Exception as e:  # whatever a file of another version runs into
        raise ImportError(f"mamba-ssm {version} in {package} cannot be imported ({type(e).__name__}: {e}): delete that "
                          f"folder or uninstall that package, then run `{COMMAND}`") from e


class _bare_package:
    """
    Inside, `import NAME.x` finds the files in `folder` without running its __init__. Afterwards the table of imported
    modules is as before, so that another user of the package (transformers is one) imports it as if we had not been here.
    What this process has imported already as NAME stays aside meanwhile. causal_conv1d, which mamba-ssm imports if it can
    and we do not need, is hidden, since a broken build of it would fail here.
    """
    def __init__(self, name: str, folder: Path):
        self.name, self.hidden = name, "causal_conv1d"
        self.bare = types.ModuleType(name)
        self.bare.__path__ = [str(folder)]

    def _take(self) -> dict[str, types.ModuleType]:
        mine = [n for n in sys.modules if n.split(".")[0] in (self.name, self.hidden)]
        return {n: sys.modules.pop(n) for n in mine}

    def __enter__(self):
        self.before = self._take()
        sys.modules |= {self.name: self.bare, self.hidden: None}

    def __exit__(self, *_):
        self._take()
        sys.modules.update(self.before)
