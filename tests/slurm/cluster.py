"""A real Slurm on this machine: slurmctld, munged, and two nodes that are machines to each other.

    this machine ── bridge ──┬── ctl   slurmctld
                             ├── n1    slurmd      each with an address, host name, processes
                             └── n2    slurmd      and shared memory of its own (Linux namespaces)

Files are shared, as on a cluster with a network file system. Needs root and Debian's slurm-wlm, munge, iproute2.
"""

import os
import secrets
import shutil
import subprocess
import time
from contextlib import ExitStack
from pathlib import Path

ROOT = Path(__file__).parents[2]
NODES = {"n1": 1, "n2": 2}
CPUS, GPUS = 8, 6  # of a node, as Slurm is told: two jobs as they are shipped; the GPUs are names only
MORTAL = ["setsid", "setpriv", "--pdeathsig", "KILL"]  # what follows ends with this process, and not by Ctrl-C before it
ENDED = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY"}

CONFIGURATION = """
ClusterName={tag}
SlurmctldHost=ctl({net}.254)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={base}/munge/socket,cred_expire=5
CredType=cred/munge
StateSaveLocation={base}/state
SlurmdSpoolDir={base}/spool/%n
SlurmctldPidFile={base}/run/slurmctld.pid
SlurmdPidFile={base}/run/slurmd-%n.pid
SlurmctldLogFile={base}/log/slurmctld.log
SlurmdLogFile={base}/log/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=batch_sched_delay=0,sched_min_interval=0
SlurmdParameters=config_overrides
MpiDefault=none
SwitchType=switch/none
ReturnToService=2
KillWait=5
SlurmdTimeout=300
GresTypes=gpu
NodeName=n[1-2] NodeAddr={net}.[1-2] CPUs={cpus} RealMemory=12000 Gres=gpu:{gpus} State=UNKNOWN
PartitionName=debug Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


def lacking() -> str | None:
    """What keeps a Slurm from running here."""
    if os.geteuid() != 0:
        return "root, for network namespaces"
    path = os.environ["PATH"] + ":/usr/sbin:/sbin"
    commands = ("slurmctld", "slurmd", "munged", "sbatch", "ip", "unshare")
    absent = [command for command in commands if shutil.which(command, path=path) is None]
    return f"{', '.join(absent)}: make test-slurm installs them on Debian" if absent else None


class Slurm:
    """Started by entering it, and gone, with everything that it ran, after leaving it."""

    def __init__(self, base: Path) -> None:
        self.base, self.tag = base, f"s{secrets.token_hex(2)}"  # interface names have 15 characters
        self.net = f"10.{100 + os.getpid() % 100}.{os.getpid() // 100 % 250}"
        self.environment = os.environ | {"SLURM_CONF": str(base / "slurm.conf"), "PATH": f"{os.environ['PATH']}:/usr/sbin"}
        self.closing = ExitStack()
        self.nodes: dict[str, subprocess.Popen] = {}
        self.killed: set[str] = set()

    def __enter__(self) -> "Slurm":
        with ExitStack() as closing:
            self._start(closing)
            self.closing = closing.pop_all()
        return self

    def __exit__(self, *error) -> None:
        self.closing.close()

    def _run(self, *command: str) -> str:
        return subprocess.run(command, env=self.environment, check=True, capture_output=True, text=True, cwd=ROOT).stdout

    def _start(self, closing: ExitStack) -> None:
        for folder in ("munge", "state", "spool/n1", "spool/n2", "run", "log", "dev"):
            (self.base / folder).mkdir(parents=True)
        self.base.chmod(0o755)
        bridge = f"br{self.tag}"
        self._run("ip", "link", "add", bridge, "type", "bridge")
        closing.callback(self._run, "ip", "link", "del", bridge)
        self._run("ip", "addr", "add", f"{self.net}.253/24", "dev", bridge)
        self._run("ip", "link", "set", bridge, "up")
        hosts = {"ctl": 254} | NODES
        names = "127.0.0.1 localhost\n" + "".join(f"{self.net}.{number} {host}\n" for host, number in hosts.items())
        for host, number in hosts.items():
            self._add_machine(host, f"{self.net}.{number}", bridge, names, closing)
        munge = self.base / "munge"
        munge.chmod(0o755)
        (munge / "key").write_bytes(secrets.token_bytes(1024))
        (munge / "key").chmod(0o600)
        paths = {name: munge / name for name in ("key-file", "socket", "pid-file", "log-file", "seed-file")}
        paths["key-file"] = munge / "key"
        self._stay(closing, "munged", "--foreground", *(f"--{name}={path}" for name, path in paths.items()))
        configuration = CONFIGURATION.format(tag=self.tag, net=self.net, base=self.base, cpus=CPUS, gpus=GPUS)
        (self.base / "slurm.conf").write_text(configuration)
        (self.base / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\nCgroupAutomount=no\nConstrainCores=no\n")
        for number in range(GPUS):
            self._run("mknod", str(self.base / "dev" / f"gpu{number}"), "c", "1", "3")
        (self.base / "gres.conf").write_text(f"Name=gpu File={self.base}/dev/gpu[0-{GPUS - 1}]\n")
        control = "hostname ctl; exec slurmctld -D -c"
        self._stay(closing, "ip", "netns", "exec", f"{self.tag}-ctl", "unshare", "--uts", "bash", "-c", control)
        closing.callback(self.end_nodes)
        self.start_nodes()

    def _add_machine(self, host: str, address: str, bridge: str, names: str, closing: ExitStack) -> None:
        space, outside = f"{self.tag}-{host}", f"v{self.tag}{host}"
        self._run("ip", "netns", "add", space)
        closing.callback(self._run, "ip", "netns", "del", space)
        self._run("ip", "link", "add", outside, "type", "veth", "peer", "name", "eth0", "netns", space)
        self._run("ip", "link", "set", outside, "master", bridge, "up")
        for command in ("link set lo up", f"addr add {address}/24 dev eth0", "link set eth0 up"):
            self._run("ip", "-n", space, *command.split())
        self._run("ip", "-n", space, "route", "add", "default", "via", f"{self.net}.253")
        etc = Path("/etc/netns") / space
        etc.mkdir(parents=True)
        closing.callback(shutil.rmtree, etc)
        (etc / "hosts").write_text(names)
        (etc / "resolv.conf").write_text("")
        (etc / "nsswitch.conf").write_text("passwd: files\ngroup: files\nhosts: files\n")  # no wait for a name server

    def _stay(self, closing: ExitStack, *command: str) -> None:
        with open(self.base / "log" / f"{command[0]}-{command[-1][-3:]}.out", "w") as out:
            process = subprocess.Popen([*MORTAL, *command], env=self.environment, stdout=out, stderr=out)
        closing.callback(end, process)

    def start_nodes(self) -> None:
        """Start the nodes that are not up, and wait until Slurm has both."""
        machine = ["unshare", "--uts", "--mount", "--pid", "--fork", "--kill-child", "bash", "-c"]
        for host in NODES:
            if host in self.nodes:
                continue
            if host in self.killed:  # which Slurm would find out by and by
                self._run("scontrol", "update", f"NodeName={host}", "State=DOWN", "Reason=killed")
            up = "mount -t proc proc /proc; mount -t tmpfs shm /dev/shm"
            life = f"{up}; hostname {host}; slurmd -D -N {host} & wait"  # bash buries what processes leave behind
            command = [*MORTAL, "ip", "netns", "exec", f"{self.tag}-{host}", *machine, life]
            with open(self.base / "log" / f"{host}.out", "a") as out:
                streams = {"stdin": subprocess.DEVNULL, "stdout": out, "stderr": out}
                self.nodes[host] = subprocess.Popen(command, env=self.environment, **streams)
            if host in self.killed:
                self.killed.remove(host)
                self._run("scontrol", "update", f"NodeName={host}", "State=RESUME")
        wait_until(lambda: self._run("sinfo", "-h", "-o", "%T %D").split() == ["idle", "2"], 60, "both nodes are idle")

    def end_nodes(self) -> None:
        for host in list(self.nodes):
            self.kill_node(host)

    def address_of(self, host: str) -> str:
        return f"{self.net}.{NODES[host]}"

    def kill_node(self, host: str) -> None:
        """All that runs on it is gone at once."""
        process = self.nodes.pop(host)
        self.killed.add(host)
        process.kill()
        process.wait()

    def submit(self, script: str, arguments: list[str], *options: str) -> "Job":
        """sbatch as a user types it in the repository."""
        output = self.base / "log" / "job-%j.out"
        number = self._run("sbatch", "--parsable", f"--output={output}", *options, script, *arguments).strip()
        return Job(self, number, self.base / "log" / f"job-{number}.out")


def end(process: subprocess.Popen) -> None:
    process.terminate()
    try:
        process.wait(10)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def wait_until(condition, timeout_s: float, what: str, tell=lambda: "") -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"not within {timeout_s} s: {what}\n{tell()}"
        time.sleep(0.2)


class Job:
    """A submitted one."""

    def __init__(self, slurm: Slurm, number: str, output: Path) -> None:
        self.slurm, self.number, self.output = slurm, number, output

    def show(self) -> dict[str, str]:
        """What Slurm knows of it: JobState, ExitCode, Restarts and others."""
        words = self.slurm._run("scontrol", "show", "job", self.number, "-o").split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def cut_soon(self) -> None:
        """Give it one more minute, or two: Slurm counts whole ones."""
        hours, minutes, _ = map(int, self.show()["RunTime"].split(":"))
        self.update(TimeLimit=str(60 * hours + minutes + 2))

    def update(self, **values: str) -> None:
        self.slurm._run("scontrol", "update", f"JobId={self.number}", *(f"{key}={value}" for key, value in values.items()))

    @property
    def said(self) -> str:
        return self.output.read_text() if self.output.is_file() else ""

    @property
    def has_ended(self) -> bool:
        """Whatever its nodes still have to end."""
        return self.show()["JobState"] in ENDED | {"COMPLETING"}

    def wait(self, timeout_s: float) -> dict[str, str]:
        """`show` once it has ended; nodes included."""
        wait_until(lambda: self.show()["JobState"] in ENDED, timeout_s, f"job {self.number} has ended", lambda: self.said)
        return self.show()
