"""
Signals that ask a training run to end: the step under way is finished and saved first.
"""
import os
import signal
import sys
import time

from nanochat.common import drop_terminal

GRACE = 3.0  # seconds in which repeats of a signal count as one
# In the order of what counts where ranks got different ones. Windows has no SIGHUP.
SIGNALS = [getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGHUP") if hasattr(signal, name)]


class Stop:
    """
    Notes SIGINT (Ctrl-C), SIGTERM (a scheduler that wants the machine back) and SIGHUP (a terminal that was closed), the
    last one unless it is ignored (nohup). `signal` is the first of them, None before. A scheduler signals torchrun and its
    processes, and torchrun passes it on: what comes within GRACE seconds is the same wish. A later one ends the program.
    """
    def __enter__(self):
        self.signal = self.since = None
        try:
            self.before = {s: signal.signal(s, self._note) for s in _handled()}
        except ValueError:  # no signals outside the main thread
            self.before = {}
        return self

    def _note(self, number, frame):
        if self.signal is None:
            self.signal, self.since = number, time.monotonic()
            if signal.Signals(number).name == "SIGHUP":
                drop_terminal()
        elif time.monotonic() - self.since > GRACE:
            sys.exit(128 + number)

    def __exit__(self, *_):
        for number, handler in self.before.items():
            signal.signal(number, handler)


def _handled() -> list[int]:
    """Torchrun passes SIGHUP on when it ends because of it, also under nohup: its processes never ignore it."""
    launched = "TORCHELASTIC_RUN_ID" in os.environ
    return [s for s in SIGNALS if s.name != "SIGHUP" or launched or signal.getsignal(s) != signal.SIG_IGN]
