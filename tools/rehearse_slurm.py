# SPDX-License-Identifier: Apache-2.0
"""Tests a Slurm job on one machine: two simulated nodes, real daemons, the real batch file.

Shows before a job waits in a queue whether recipe, ranks and stopping work. Needs root and Slurm
(Debian, Ubuntu: apt-get install slurm-wlm). The daemons write to a temporary folder and listen on
the loopback interface only; a Slurm that already runs here is not affected.

    python tools/rehearse_slurm.py [--ranks-per-node N] [--sbatch=OPTION] RECIPE [ARGUMENTS]

RECIPE and ARGUMENTS are passed to launch/train.py. The run's folder is temporary too, so that an
earlier run of its name stays as it is, unless ARGUMENTS set output_dir. Ctrl-C cancels the job.
Exit status: the job's.
"""

import argparse
import contextlib
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from megatron_keye.cli.arguments import make_parser
from megatron_keye.cli.status import USER_ERROR

ROOT = Path(__file__).resolve().parent.parent
NODES = ("node1", "node2")
DAEMONS = ("munged", "slurmctld", "slurmd")
GRACE_SECONDS = 120
"""Time for a job that one of the partition `urgent` preempts."""
_SECONDS_TO_START = 30.0
_SECONDS_TO_END = 10.0

_CONFIGURATION = """\
ClusterName=rehearsal
SlurmctldHost=localhost(127.0.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
# Credentials that expire soon let a requeued job start again within seconds.
AuthInfo=socket={folder}/munge.socket,cred_expire=5
CommunicationParameters=NoInAddrAny
SlurmctldPort={ports[0]}
# Random, since the port of the ranks depends on it, and another rehearsal may be running.
FirstJobId={first_job}
ReturnToService=2
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
KillWait=30
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
NodeName=node1 NodeHostname=localhost NodeAddr=127.0.0.1 Port={ports[1]} CPUs={cpus}
NodeName=node2 NodeHostname=localhost NodeAddr=127.0.0.1 Port={ports[2]} CPUs={cpus}
PartitionName=rehearsal Nodes=node1,node2 Default=YES MaxTime=INFINITE GraceTime={grace}
PartitionName=urgent Nodes=node1,node2 MaxTime=INFINITE PriorityTier=2 PreemptMode=OFF
"""


def missing() -> str:
    """Return why this tool cannot run here, or ""."""
    absent = [name for name in DAEMONS if shutil.which(name, path=_path()) is None]
    if absent:
        return f"{', '.join(absent)} not found, expected Slurm: apt-get install slurm-wlm"
    return "" if os.geteuid() == 0 else "expected to run as root, as Slurm's daemons must"


class LocalSlurm:
    """A Slurm cluster of two nodes on this machine, for the duration of a `with` block."""

    def __init__(self) -> None:
        """Choose ports and write the configuration; starts nothing."""
        # Not in TMPDIR, since the path of munge's socket may have at most 107 characters.
        self._folder = Path(tempfile.mkdtemp(prefix="slurm-", dir="/tmp"))
        (self._folder / "state").mkdir()
        for node in NODES:
            (self._folder / f"spool-{node}").mkdir()
        configuration = _CONFIGURATION.format(
            folder=self._folder,
            ports=_free_ports(3),
            cpus=os.cpu_count(),
            first_job=random.randint(1, 20_000),
            grace=GRACE_SECONDS,
        )
        (self._folder / "slurm.conf").write_text(configuration)
        self.environment = os.environ | {
            "PATH": _path(),
            "SLURM_CONF": str(self._folder / "slurm.conf"),
            # The names of the nodes cannot be resolved.
            "MASTER_ADDR": "127.0.0.1",
        }
        self._daemons: list[subprocess.Popen[bytes]] = []

    def __enter__(self) -> Self:
        """Start the daemons and wait until both nodes are idle; TERM then acts as Ctrl-C.

        Raises:
            RuntimeError: When they are not in time; with the ends of their logs.
        """
        # Killed by TERM, this process would leave daemons and jobs behind.
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        try:
            self._start_munge()
            self._start("slurmctld", "-D", "-i")
            for node in NODES:
                self._start("slurmd", "-D", "-N", node)
            self._wait(lambda: self.call("sinfo", "-h", "-t", "idle", "-o", "%D").strip() == "2")
        except BaseException:
            self._stop()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Cancel all jobs, stop the daemons and remove the folder."""
        self._stop()

    def call(self, *command: str) -> str:
        """Run a Slurm command and return its output; RuntimeError if it fails."""
        result = subprocess.run(
            command, env=self.environment, cwd=ROOT, capture_output=True, text=True, check=False
        )
        if result.returncode:
            raise RuntimeError(f"{' '.join(command)}: {result.stderr.strip()}")
        return result.stdout

    def submit(self, *arguments: str, ranks_per_node: int, options: tuple[str, ...] = ()) -> str:
        """Submit launch/slurm.sbatch on both nodes.

        Args:
            arguments: Recipe and settings.
            ranks_per_node: Processes on each of the two nodes.
            options: Options of sbatch.

        Returns:
            The job's number.
        """
        self.environment |= {"RANKS_PER_NODE": str(ranks_per_node), "PYTHON": sys.executable}
        return self.call(
            "sbatch", "--parsable", "--nodes=2", *options, "launch/slurm.sbatch", *arguments
        ).strip()

    def job(self, number: str) -> dict[str, str]:
        """Return the fields that `scontrol show job` prints."""
        fields = re.findall(r"(\S+?)=(\S*)", self.call("scontrol", "show", "job", number))
        return dict(fields)

    def is_over(self, number: str) -> bool:
        """Return whether a job has ended and will not be requeued."""
        running = ("PENDING", "RUNNING", "COMPLETING", "CONFIGURING", "REQUEUED", "SIGNALING")
        return self.job(number)["JobState"] not in running

    def _start_munge(self) -> None:
        key = self._folder / "munge.key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o400)
        files = {"key": "munge.key", "pid": "munged.pid", "log": "munged.log", "seed": "seed"}
        options = [f"--{kind}-file={self._folder / name}" for kind, name in files.items()]
        self._start("munged", "-F", f"--socket={self._folder}/munge.socket", "--force", *options)
        self._wait((self._folder / "munge.socket").exists)

    def _start(self, *command: str) -> None:
        log = (self._folder / f"{command[0]}-{len(self._daemons)}.out").open("wb")
        with log:
            daemon = subprocess.Popen(
                command,
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # the terminal's Ctrl-C is for the job
            )
        self._daemons.append(daemon)

    def _wait(self, is_ready: Callable[[], bool]) -> None:
        deadline = time.monotonic() + _SECONDS_TO_START
        while time.monotonic() < deadline:
            if any(daemon.poll() is not None for daemon in self._daemons):
                break
            with contextlib.suppress(RuntimeError):
                if is_ready():
                    return
            time.sleep(0.1)
        logs = [file for file in self._folder.iterdir() if file.suffix in (".log", ".out")]
        ends = "\n".join(f"{file.name}: {file.read_text()[-1000:]}" for file in logs)
        raise RuntimeError(f"Slurm did not start within {_SECONDS_TO_START:.0f} s\n{ends}")

    def _stop(self) -> None:
        if len(self._daemons) > 1:
            with contextlib.suppress(RuntimeError):
                self.call("scancel", "--signal=KILL", "--full", "--user=root")
                self.call("scancel", "--user=root")
            deadline = time.monotonic() + _SECONDS_TO_END
            with contextlib.suppress(RuntimeError):
                while self.call("squeue", "-h").strip() and time.monotonic() < deadline:
                    time.sleep(0.2)
        for daemon in reversed(self._daemons):
            daemon.terminate()
            try:
                daemon.wait(_SECONDS_TO_END)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()
        shutil.rmtree(self._folder, ignore_errors=True)


def _path() -> str:
    return f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]


def follow(slurm: LocalSlurm, job: str, log: Path) -> int:
    """Print a job's log until the job is over, and return its exit status."""
    shown = 0
    while True:
        is_over = slurm.is_over(job)
        data = log.read_bytes() if log.exists() else b""
        sys.stdout.write(data[shown:].decode(errors="replace"))
        sys.stdout.flush()
        shown = len(data)
        if is_over:
            status, number = map(int, slurm.job(job)["ExitCode"].split(":"))
            return status or (128 + number if number else 0)
        time.sleep(0.5)


def job_arguments(recipe: str, arguments: Sequence[str], folder: Path) -> list[str]:
    """Return the job's arguments, which write to `folder` unless they name another one."""
    return [recipe, "--set", f"output_dir={folder / 'runs'}", *arguments]


def main() -> int:
    """Submit the job, print its log and return its exit status."""
    parser = make_parser("tools/rehearse_slurm.py", __doc__)
    parser.add_argument("--ranks-per-node", type=int, default=2, help="default: 2")
    parser.add_argument("--sbatch", action="append", default=[], help="sbatch option; repeatable")
    parser.add_argument("recipe", metavar="RECIPE", help="recipe for launch/train.py")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="its other arguments")
    options = parser.parse_args()
    reason = missing()
    if reason:
        sys.stderr.write(f"error: {reason}\n")
        return USER_ERROR
    with LocalSlurm() as slurm, tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "job.log"
        job = slurm.submit(
            *job_arguments(options.recipe, options.arguments, Path(folder)),
            ranks_per_node=options.ranks_per_node,
            options=(f"--output={log}", *options.sbatch),
        )
        signal.signal(signal.SIGINT, lambda *_: slurm.call("scancel", job))
        return follow(slurm, job, log)


if __name__ == "__main__":
    sys.exit(main())
