"""Two machines in one: two network namespaces, each with its own network card, joined by a switch that can be cut.

The switch is a bridge in a third namespace. A cut takes a port off it: both cards stay up and nobody is told anything,
as where a switch between two machines fails.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ADDRESSES = ("10.77.0.1", "10.77.0.2")


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, text=True)


def why_not() -> str:
    """Why namespaces cannot be made here; empty where they can."""
    if shutil.which("ip") is None:
        return "there is no ip command (iproute2)"
    name = f"genalign-try-{os.getpid()}"
    try:
        _ip("netns", "add", name)
        _ip("-n", name, "link", "add", "switch", "type", "bridge")
    except (OSError, subprocess.CalledProcessError) as error:
        return f"network namespaces may not be made here: {getattr(error, 'stderr', error)}".strip()
    finally:
        subprocess.run(["ip", "netns", "del", name], check=False, capture_output=True)
    return ""


class Machines:
    """The two machines; see ``two_machines``."""

    def __init__(self, prefix: str):
        self.names = [f"{prefix}-{number}" for number in range(2)]
        self.switch = f"{prefix}-switch"

    def build(self) -> None:
        """Make the namespaces and wire them up."""
        for name in (*self.names, self.switch):
            _ip("netns", "add", name)
            _ip("-n", name, "link", "set", "lo", "up")
        _ip("-n", self.switch, "link", "add", "switch", "type", "bridge")
        _ip("-n", self.switch, "link", "set", "switch", "up")
        for number, (name, address) in enumerate(zip(self.names, ADDRESSES, strict=True)):
            _ip(
                "-n", name, "link", "add", "card", "type", "veth", "peer", "name", f"port{number}", "netns", self.switch
            )
            _ip("-n", name, "address", "add", f"{address}/24", "dev", "card")
            _ip("-n", name, "link", "set", "card", "up")
            _ip("-n", self.switch, "link", "set", f"port{number}", "up", "master", "switch")

    def cut(self) -> None:
        """Cut the connection between the two."""
        _ip("-n", self.switch, "link", "set", "port1", "nomaster")

    def mend(self) -> None:
        """Mend it again."""
        _ip("-n", self.switch, "link", "set", "port1", "master", "switch")

    def start(self, number: int, command: list[str], folder: Path, **variables: str) -> subprocess.Popen:
        """Start a command on a machine; what it says goes to ``folder/machine-NUMBER.{out,err}``."""
        words = ["ip", "netns", "exec", self.names[number], *command]
        with (folder / f"machine-{number}.out").open("w") as out, (folder / f"machine-{number}.err").open("w") as err:
            return subprocess.Popen(words, stdout=out, stderr=err, env=os.environ | variables, start_new_session=True)

    def remove(self) -> None:
        """Take the namespaces away."""
        for name in (*self.names, self.switch):
            subprocess.run(["ip", "netns", "del", name], check=False, capture_output=True)


@contextmanager
def two_machines() -> Iterator[Machines]:
    """Two machines for a while."""
    machines = Machines(f"genalign-{os.getpid()}")
    try:
        machines.build()
        yield machines
    finally:
        machines.remove()
