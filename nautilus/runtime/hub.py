"""Repositories on the hub, and what to say where there is none of that name."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from nautilus.runtime.errors import UserError

HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
PATIENCE = 4.0  # seconds that the hub has to answer; the library may wait 3 more before it asks


def hub_folder(name: str, patterns: Sequence[str]) -> Path:
    """The local copy of a repository, of the files that match; where the hub is silent, one that was made before."""
    if Path(name).parent != Path(".") and Path(name).parent.is_dir():
        raise UserError(f"no folder {name!r}, though {str(Path(name).parent)!r} is there; check the name")
    if not HUB_ID.fullmatch(name):
        raise UserError(f"{name!r} is neither a folder nor the id of a hub repository, which is of the form owner/name")
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, HTTPError

    silence = None
    try:
        # A download that cannot reach the hub is tried again and again, for half a minute or without end.
        HfApi().model_info(name, timeout=PATIENCE)
    except (HTTPError, HFValidationError, OSError) as bad:
        silence = bad
    try:
        return Path(snapshot_download(name, allow_patterns=[*patterns], local_files_only=silence is not None))
    except (HTTPError, HFValidationError, OSError) as bad:
        why = silence or bad
        what = "refused it" if isinstance(why, HfHubHTTPError | HFValidationError) else "could not be reached"
        raise UserError(
            f"no folder {name!r} here, and the hub {what} ({type(why).__name__}: {str(why).partition(chr(10))[0]});"
            f" check the name and the network, or give the folder of a copy"
        ) from bad
