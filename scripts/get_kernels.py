"""
Fetches the Triton files of mamba-ssm that the Mamba-2 blocks run on a GPU. Nothing is compiled and nvcc is not needed:
Triton compiles them for the GPU at their first use. Once they are there, running it again does nothing.

    python -m scripts.get_kernels                       downloads them with pip (0.2 MB)
    python -m scripts.get_kernels --from mamba_ssm-2.3.2.post1.tar.gz
                                                        takes a source distribution at hand, for a machine without network

The download is one pinned version, verified by its SHA-256 before anything of it runs. nanochat/kernels/upstream.py says
where the files go, and why they are not installed as a package. At the end it is checked that the kernels can be
imported, and where not, said why.
"""
import argparse
import hashlib
import os
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

from nanochat.common import cli
from nanochat.kernels import upstream


def download(folder: Path) -> Path:
    """Has pip download the pinned source distribution into `folder`. Raises OSError with pip's reason where it cannot."""
    pinned = folder / "pinned.txt"  # pip takes a hash from a file only; it verifies it before it runs setup.py
    pinned.write_text(f"mamba-ssm=={upstream.VERSION} --hash=sha256:{upstream.SHA256}\n")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps",
               "--no-binary", ":all:", "--no-build-isolation", "--require-hashes", "--dest", str(folder), "-r", str(pinned)]
    # pip runs the distribution's setup.py for its metadata, which must not look for a compiler or download wheels.
    done = subprocess.run(command, env={**os.environ, "MAMBA_SKIP_CUDA_BUILD": "TRUE"}, capture_output=True, text=True)
    found = list(folder.glob("*.tar.gz"))
    if done.returncode or len(found) != 1:
        missing = "ModuleNotFoundError" in done.stderr
        raise OSError(f"pip could not download mamba-ssm {upstream.VERSION} ({_reason(done.stderr)}): "
                      + ("run `pip install setuptools wheel packaging` first" if missing else
                         "on a machine with network run `MAMBA_SKIP_CUDA_BUILD=TRUE pip download --no-deps --no-binary "
                         f":all: --no-build-isolation mamba-ssm=={upstream.VERSION}`, copy the file here, and pass it "
                         "with --from"))
    return found[0]


def _reason(text: str) -> str:
    """The line of pip's output that says best what went wrong: its last error, without the ones that only lead to it."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    errors = [line for line in lines if "Error:" in line or line.startswith("ERROR:")]
    return (errors or lines or ["it gave no reason"])[-1]


def unpack(sdist: Path, target: Path) -> None:
    """Verifies the source distribution and puts upstream.FILES of it into the new folder `target`, all or nothing."""
    got = hashlib.sha256(sdist.read_bytes()).hexdigest()
    if got != upstream.SHA256:
        raise ValueError(f"{sdist} is not the source distribution of mamba-ssm {upstream.VERSION}: its SHA-256 is {got}, "
                         f"not {upstream.SHA256}; download it anew with `{upstream.COMMAND}`")
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}.") as made:
        new = Path(made) / "files"
        with tarfile.open(sdist) as tar:
            for name in upstream.FILES:
                path = new / name
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(tar.extractfile(f"mamba_ssm-{upstream.VERSION}/{name}").read())
        try:
            new.rename(target)
        except OSError:
            if not (target / "mamba_ssm").is_dir():  # else another process was faster, with the same files
                raise


@cli
def main(argv=None):
    p = argparse.ArgumentParser(prog="python -m scripts.get_kernels", description=__doc__.split("\n\n")[0],
                                epilog=f"environment: NANOCHAT_KERNELS names another folder than {upstream.folder()}")
    p.add_argument("--from", dest="sdist", type=Path, default=None, metavar="FILE",
                   help=f"the source distribution mamba_ssm-{upstream.VERSION}.tar.gz, instead of a download")
    args = p.parse_args(argv)
    target = upstream.folder()
    if (target / "mamba_ssm").is_dir():
        print(f"the kernels are in {target} already")
    else:
        if args.sdist is not None:
            unpack(args.sdist, target)
        else:
            print(f"downloading mamba-ssm {upstream.VERSION} with pip")
            with tempfile.TemporaryDirectory() as scratch:
                unpack(download(Path(scratch)), target)
        print(f"unpacked {len(upstream.FILES)} files of mamba-ssm {upstream.VERSION} (Apache License 2.0) into {target}")
    upstream.load()
    print(f"the Mamba-2 kernels of mamba-ssm {upstream.locate()[1]} can be imported")


if __name__ == "__main__":
    main()
