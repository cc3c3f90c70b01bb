"""What the supervisor tells a worker: everything about one sample, in one JSON file."""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ladezeit.checkpoint.resolve import Checkpoint
from ladezeit.config import RunConfig, from_plain, to_plain
from ladezeit.loading.base import Conversion
from ladezeit.results.records import Identity
from ladezeit.system.files import write_atomically

FILE_NAME = "worker.json"

#: The folder beside it that a sample may write to; whoever runs the sample removes it afterwards.
SCRATCH = "scratch"


@dataclass
class WorkerSpec:
    """One sample to measure.

    `folder` is where it leaves what it finds; `environment` goes into the result as it is; `conversion` is the
    checkpoint in the engine's own format, where it has one. `manifest` and `reference` are the files that contents and
    logits are verified by, where the config asks for that.
    """

    config: RunConfig
    checkpoint: Checkpoint
    identity: Identity
    device: str
    folder: Path
    started_at: str = ""
    environment: dict[str, Any] = field(default_factory=dict)
    conversion: Conversion | None = None
    manifest: Path | None = None
    reference: Path | None = None

    @property
    def files(self) -> tuple[Path, ...]:
        """The files that the engine reads, whose state in the page cache is the sample's."""
        return self.checkpoint.shards if self.conversion is None else self.conversion.files

    @property
    def file_bytes(self) -> int:
        """The length of `files` together."""
        return self.checkpoint.file_bytes if self.conversion is None else self.conversion.file_bytes

    def save_spec(self) -> Path:
        """Write ``worker.json`` into the sample's folder and return its path."""
        plain = {
            "config": to_plain(self.config),
            "checkpoint": self.checkpoint.to_json(),
            "identity": asdict(self.identity),
            "device": self.device,
            "folder": str(self.folder),
            "started_at": self.started_at,
            "environment": self.environment,
            "conversion": self.conversion.to_json() if self.conversion else None,
            "manifest": self.manifest and str(self.manifest),
            "reference": self.reference and str(self.reference),
        }
        path = self.folder / FILE_NAME
        write_atomically(path, json.dumps(plain))
        return path

    @classmethod
    def read_spec(cls, path: Path) -> "WorkerSpec":
        """Read what `save` wrote."""
        plain = json.loads(path.read_text(encoding="utf-8"))
        return cls(
            config=from_plain(plain["config"]),
            checkpoint=Checkpoint.from_json(plain["checkpoint"]),
            identity=Identity(**plain["identity"]),
            device=plain["device"],
            folder=Path(plain["folder"]),
            started_at=plain["started_at"],
            environment=plain["environment"],
            conversion=Conversion.from_json(plain["conversion"]) if plain["conversion"] else None,
            manifest=plain["manifest"] and Path(plain["manifest"]),
            reference=plain["reference"] and Path(plain["reference"]),
        )
