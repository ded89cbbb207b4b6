"""
The process in which a model's program runs: execution.run_program starts this file, and it imports nothing but the standard
library. Before the program starts, the process gives up, for good:

- time, memory, file size and core dumps: resource limits;
- the network: it moves to an empty network namespace (Linux);
- new processes, signals to others, and sockets: a system-call filter (seccomp; Linux on x86-64 and Arm);
- files outside its own folder and Python's installation: Landlock (Linux 5.13 and later);
- and, where the kernel has none of this, Python's audit hook refuses the same operations. It is the weakest of these: it
  stops what a model would write by itself, not a determined attacker.
"""
import contextlib
import ctypes
import json
import os
import platform
import signal
import struct
import sys

PR_SET_NO_NEW_PRIVS, PR_SET_SECCOMP, SECCOMP_MODE_FILTER = 38, 22, 2
CLONE_NEWUSER, CLONE_NEWNET, CLONE_THREAD = 0x10000000, 0x40000000, 0x00010000
EPERM, ENOSYS = 1, 38
# System calls by number: AUDIT_ARCH, those that are refused, clone (for threads only), clone3 (glibc falls back to clone)
CALLS = {
    "x86_64": (0xC000003E, (41, 42, 43, 44, 46, 49, 50, 53, 57, 58, 59, 62, 101, 129, 165, 200, 234, 322, 424, 425, 434),
               56, 435),
    "aarch64": (0xC00000B7, (40, 117, 129, 130, 131, 138, 198, 199, 200, 201, 202, 203, 206, 211, 221, 281, 424, 425, 434),
                220, 435),
}
LANDLOCK_CREATE, LANDLOCK_ADD, LANDLOCK_RESTRICT = 444, 445, 446
READ = 1 << 0 | 1 << 2 | 1 << 3          # execute, read file, read dir
ALL_OF_ABI_1 = (1 << 13) - 1             # those, and all kinds of writing
AUDITED = ("socket.", "subprocess.", "os.system", "os.exec", "os.fork", "os.posix_spawn", "os.spawn", "os.kill", "os.putenv",
           "os.chmod", "os.chown", "os.symlink", "os.link", "ctypes.", "pty.", "signal.pthread_kill", "webbrowser.",
           "winreg.")


def limit_resources(seconds: float, memory: int, file_bytes: int) -> None:
    with contextlib.suppress(ImportError):
        import resource
        for name, value in (("CPU", int(seconds) + 1), ("AS", memory), ("FSIZE", file_bytes), ("CORE", 0), ("NOFILE", 64),
                            ("MEMLOCK", 0)):
            number = getattr(resource, f"RLIMIT_{name}", None)
            if number is not None:
                with contextlib.suppress(ValueError, OSError):
                    resource.setrlimit(number, (value, value))
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # a file that is too large is an OSError


def leave_network(libc) -> bool:
    return libc.unshare(CLONE_NEWUSER | CLONE_NEWNET) == 0


def filter_system_calls(libc) -> bool:
    """Installs the system-call filter; whether it could."""
    known = CALLS.get(platform.machine())
    if known is None:
        return False
    arch, refused, clone, clone3 = known

    def statement(code, value):
        return struct.pack("HBBI", code, 0, 0, value)

    def jump(code, value, if_true, if_false):
        return struct.pack("HBBI", code, if_true, if_false, value)
    load, equal, bits, ret = 0x20, 0x15, 0x45, 0x06
    allow, fail = 0x7FFF0000, 0x00050000
    program = [statement(load, 4), jump(equal, arch, 1, 0), statement(ret, 0x80000000), statement(load, 0)]
    for number in refused:
        program += [jump(equal, number, 0, 1), statement(ret, fail | EPERM)]
    program += [jump(equal, clone3, 0, 1), statement(ret, fail | ENOSYS),
                jump(equal, clone, 0, 3), statement(load, 16), jump(bits, CLONE_THREAD, 1, 0), statement(ret, fail | EPERM),
                statement(ret, allow)]
    code = b"".join(program)
    buffer = ctypes.create_string_buffer(code)
    header = struct.pack("HxxxxxxP", len(program), ctypes.addressof(buffer))
    return libc.prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, ctypes.create_string_buffer(header), 0, 0) == 0


def readable_folders() -> list[str]:
    """Where Python and the shared libraries of its modules lie."""
    folders = {sys.prefix, sys.base_prefix, sys.exec_prefix, os.path.dirname(os.__file__), "/lib", "/lib64", "/usr/lib",
               "/usr/lib64", "/usr/share/zoneinfo", "/dev/urandom", "/dev/null", *(p for p in sys.path if p)}
    return sorted(os.path.realpath(f) for f in folders if os.path.exists(f))


def confine_files(libc, work: str) -> bool:
    """Lets this process read Python's folders and use its own, and nothing else; whether it could."""
    if sys.platform != "linux" or platform.machine() not in CALLS:
        return False
    rules = ctypes.create_string_buffer(struct.pack("Q", ALL_OF_ABI_1))
    ruleset = libc.syscall(LANDLOCK_CREATE, rules, 8, 0)
    if ruleset < 0:
        return False
    for path, rights in [*((f, READ) for f in readable_folders()), (work, ALL_OF_ABI_1)]:
        fd = os.open(path, os.O_PATH | os.O_CLOEXEC)
        if not os.path.isdir(path):
            rights &= 1 << 0 | 1 << 1 | 1 << 2
        rule = ctypes.create_string_buffer(struct.pack("=Qi", rights, fd))
        if libc.syscall(LANDLOCK_ADD, ruleset, 1, rule, 0):
            return False
        os.close(fd)
    return libc.syscall(LANDLOCK_RESTRICT, ruleset, 0) == 0


def refuse_by_audit(work: str) -> None:
    """Refuses, from Python, what the kernel's guards refuse where there are any."""
    allowed = [*readable_folders(), os.path.realpath(work)]

    def hook(event, arguments):
        if event == "open" and isinstance(arguments[0], (str, bytes)):
            path = os.path.realpath(os.fsdecode(arguments[0]))
            if not any(path == f or path.startswith(f.rstrip(os.sep) + os.sep) for f in allowed):
                raise PermissionError(f"the sandbox does not open {path}")
        elif event.startswith(AUDITED):
            raise PermissionError(f"the sandbox refuses {event}")
    sys.addaudithook(hook)


def run() -> None:
    request = json.loads(sys.stdin.buffer.read())
    program, nonce = request["program"], request["nonce"]
    limit_resources(request["seconds"], request["bytes"], request["file_bytes"])
    if sys.platform == "linux":
        libc = ctypes.CDLL(None, use_errno=True)
        libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
        leave_network(libc)
        confine_files(libc, request["work"])
        filter_system_calls(libc)
    refuse_by_audit(request["work"])
    try:
        exec(compile(program, "<program>", "exec"), {"__name__": "__main__"})
    except BaseException as e:  # exit() too: a program that ends itself did not pass its tests
        print(f"{type(e).__name__}: {e}", flush=True)
        os._exit(1)
    sys.stdout.flush()
    print(nonce, end="", flush=True)
    os._exit(0)


if __name__ == "__main__":
    run()
