"""What every job needs around its work: errors for people, whole files, the run folder, a progress line. No torch."""

from nautilus.runtime.echo import quiet
from nautilus.runtime.errors import DISK_FULL, UserError, disk_errors, disk_full, installing
from nautilus.runtime.files import atomic_folder, json_lines, read_json, read_text, repair, write_atomic
from nautilus.runtime.hub import HUB_ID, hub_folder
from nautilus.runtime.memory import keep_memory
from nautilus.runtime.progress import Progress, read_metrics
from nautilus.runtime.run import Run, continue_or_create, flat_settings, is_run, last_part, program, refuse_others

__all__ = [
    "DISK_FULL",
    "HUB_ID",
    "Progress",
    "Run",
    "UserError",
    "atomic_folder",
    "continue_or_create",
    "disk_errors",
    "disk_full",
    "flat_settings",
    "hub_folder",
    "installing",
    "is_run",
    "json_lines",
    "last_part",
    "keep_memory",
    "program",
    "quiet",
    "read_json",
    "read_metrics",
    "read_text",
    "refuse_others",
    "repair",
    "write_atomic",
]
