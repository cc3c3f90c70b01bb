"""What the system tells of processes."""

from pathlib import Path


def runs(pid: int) -> bool:
    """Say whether a process is there and does not only wait to be asked how it ended."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False
