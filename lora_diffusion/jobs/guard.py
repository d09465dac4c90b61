"""A job's driver as a child of the process that a shell or `ray job submit` waits for, which says how it ended.

Ray ends a driver from inside, with 1 and without a word, when the part of Ray dies that the driver is just talking to; now and then one
crashes while it shuts down, its work done. No code of the driver's own can say so.

Light: it forks, so nothing may run in threads yet.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from collections.abc import Callable
from contextlib import suppress

PASSED_ON = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGTSTP)
PR_SET_PDEATHSIG = 1


def guarded(job: str, work: Callable[[], int]) -> int:
    """The exit code of `work`, which runs in a child; 3 and a sentence if that ended without one. Signals, also a terminal's, reach
    the child once, through this process; one that ends it ends this process too, and neither outlives the other. On other
    systems than Linux `work` runs here."""
    if not sys.platform.startswith("linux"):
        return work()
    sys.stdout.flush()
    answer, tell = os.pipe()
    waited = {*PASSED_ON, signal.SIGCHLD}
    before, parent = signal.pthread_sigmask(signal.SIG_BLOCK, waited), os.getpid()
    child = os.fork()
    if not child:
        os.setpgid(0, 0)  # what is sent to the parent's group, as a terminal's ^C, comes through the parent
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:
            os._exit(1)
        os.close(answer)
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        return _told(tell, work)
    os.close(tell)
    code = os.waitstatus_to_exitcode(_until_it_ends(child, waited))
    os.set_blocking(answer, False)  # a process that the driver forked may still hold the other end
    with suppress(BlockingIOError):
        if told := os.read(answer, 1):
            return told[0]
    if code < 0:
        often = ", as a machine does that has no memory left" if code == -signal.SIGKILL else ""
        print(f"{job}: ended by signal {-code}{often}: run the same command again", file=sys.stderr, flush=True)
        if code != -signal.SIGKILL:
            signal.signal(-code, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        os.kill(parent, -code)
    elif code != 3:  # 3: the driver's own watch has said what ended
        print(f"{job}: a part of Ray ended, and the job with it: run the same command again", file=sys.stderr)
    return 3


def _told(tell: int, work: Callable[[], int]) -> int:
    """`work`, whose exit code the parent is told before anything is shut down."""
    code = 1
    try:
        code = work()
        return code
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
        raise
    finally:
        os.write(tell, bytes([code]))


def _until_it_ends(child: int, waited: set[signal.Signals]) -> int:
    while True:
        came = signal.sigwaitinfo(waited)
        if came.si_signo == signal.SIGCHLD:
            ended, status = os.waitpid(child, os.WNOHANG)
            if ended:
                return status
        elif came.si_signo == signal.SIGTSTP:  # ^Z, until `fg` or `bg`
            os.kill(child, signal.SIGSTOP)
            os.kill(os.getpid(), signal.SIGSTOP)
            os.kill(child, signal.SIGCONT)
        else:
            os.kill(child, came.si_signo)
