"""The signals that stop a run."""

import signal

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP)


def handled_signals() -> list[signal.Signals]:
    """Return the signals that stop a run: not SIGHUP where it is ignored, as nohup has it."""
    return [each for each in SIGNALS if each != signal.SIGHUP or signal.getsignal(each) != signal.SIG_IGN]
